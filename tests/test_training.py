"""What train.py, util/recipe.py and util/log.py promise, as long as nothing goes wrong."""

import dataclasses
import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torchvision
from PIL import Image

import train
from dimaskdino import SWINS, Config, DIMaskDINO
from losses import denoising_queries
from small_models import microsoft_names
from small_runs import (
    FOUR,
    SMALL,
    assert_same_gradient,
    exit_code,
    gradient_run,
    gradients_of,
    log_of,
    new_run,
    parts_of,
    train_in,
    without_chance,
    write_images,
)
from util import log
from util.flags import parse_training
from util.recipe import Recipe, parameter_groups

# ---- The recipe (4.1, appendix B) ------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers_recipe():
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.backbone_lr) == (50, 16, 1e-4, 0.1)
    assert (recipe.weight_decay, recipe.clip, recipe.image_size, recipe.test_size) == (0.05, 0.01, 1024, (800, 1333))
    rates = [recipe.rate(step, 1000) for step in (0, 899, 900, 949, 950, 999)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_bdd100k_takes_68_epochs_of_batches_of_8_and_drops_once_at_epoch_50():
    recipe = Recipe.bdd100k()
    assert (recipe.epochs, recipe.batch_size) == (68, 8)
    rates = [recipe.rate(step, 68 * 875) for step in (0, 50 * 875 - 1, 50 * 875, 68 * 875 - 1)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1])


def test_the_tiny_recipe_warms_up_and_then_falls_to_nothing():
    rates = [Recipe.tiny().rate(step, 4000) for step in range(4000)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:])[::-1]
    assert 0 < rates[0] < 0.02 and 50 < peak < 150 and rates[-1] < 1e-5


def test_denoising_labels_are_as_noisy_as_the_recipe_says(folder, tmp_path, monkeypatch):
    shares = []

    def recorded(targets, num_classes, queries, label_noise):
        shares.append(label_noise)
        return denoising_queries(targets, num_classes, queries, label_noise)

    monkeypatch.setattr(train, "denoising_queries", recorded)
    assert train_in(folder, tmp_path) == 0
    assert set(shares) == {Recipe.tiny().label_noise} and Recipe().label_noise == 0.2


def test_norms_and_embeddings_do_not_decay_and_the_backbone_learns_at_a_tenth():
    model = DIMaskDINO(dataclasses.replace(Config.tiny(), backbone="swin_t"))
    groups = parameter_groups(model, Recipe())
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, decay, rate in [
        ("backbone.stages.0.1.0.attn.qkv.weight", 0.05, 1e-5),
        ("backbone.stages.0.1.0.attn.relative_position_bias_table", 0, 1e-5),
        ("backbone.norms.0.weight", 0, 1e-5),
        ("encoder.lateral.0.weight", 0.05, 1e-4),
        ("encoder.lateral.1.weight", 0, 1e-4),
        ("encoder.level_embed", 0.05, 1e-4),
        ("label_embed.weight", 0, 1e-4),
        ("det_head.classifier.bias", 0.05, 1e-4),
    ]:
        group = of[id(model.get_parameter(name))]
        assert (group["weight_decay"], group["base_lr"]) == pytest.approx((decay, rate)), name


@pytest.mark.parametrize(
    "override, value",
    [
        ("selection=(300,)", (300,)),
        ("bato=False", False),
        ("detection_loss=0.1", 0.1),
        ("detection_loss=2", 2),
        ("guidance=T_s1", "T_s1"),
        ("decoder_layers=9", 9),
        ("guiding_tokens=40", 40),
        ("guiding_tokens=None", None),
    ],
)
def test_set_changes_one_field_of_the_model_or_of_its_training(override, value):
    args = parse_training(["--preset", "released", "--set", override], "")
    name = override.split("=")[0]
    plain = [dataclasses.replace(Config.released(), num_classes=3), Recipe()]
    expected = [dataclasses.replace(x, **{name: value}) if hasattr(x, name) else x for x in plain]
    assert [train.choose_config(args, 3), train.choose_recipe(args)] == expected != plain


@pytest.mark.parametrize(
    "text, kind",
    [
        ("test_size=(800,)", "tuple[int, int]"),
        ("betas=(0.9,0.9,0.9)", "tuple[float, float]"),
        ("selection=(300,1.5)", "tuple[int, ...]"),
        ("selection=300", "tuple[int, ...]"),
        ("guiding_tokens=many", "int | None"),
        ("bato=1", "bool"),
        ("dim=True", "int"),
        ("clip=small", "float"),
    ],
)
def test_a_setting_of_another_type_is_refused_with_the_type_it_needs(text, kind, capsys):
    assert exit_code(parse_training, ["--set", text], "") == 2
    assert f"{text}: that is no {kind}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, preset",
    [("", "tiny"), ("--data coco", "paper"), ("--data shapes-full", "paper"), ("--preset released", "released")],
)
def test_shapes_go_with_the_tiny_model_and_other_data_with_the_papers_unless_told_otherwise(flags, preset):
    assert parse_training(flags.split(), "").preset == preset


@pytest.mark.parametrize("flag", ["data", "data-root", "val-json", "out", "init", "backbone-weights"])
def test_a_tilde_is_the_home_folder_also_behind_an_equals_sign(flag, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(getattr(parse_training([f"--{flag}=~/x"], ""), flag.replace("-", "_"))) == "/home/me/x"


# ---- Steps -----------------------------------------------------------------------------------------------------------


def test_an_epoch_shows_every_image_once_and_each_epoch_in_another_order(folder, tmp_path):
    run = new_run(folder, tmp_path)
    first = sum(train.batches(run), [])
    run.epoch, run.step = 1, run.steps_per_epoch
    assert sorted(first) == list(range(12)) and first != sum(train.batches(run), [])


def test_each_epoch_augments_the_images_anew(folder, tmp_path):
    run, seen = new_run(folder, tmp_path), []
    for run.epoch in (0, 1):
        run.step = run.epoch * run.steps_per_epoch
        seen.append(
            {t["image_id"]: x for images, targets in train.loader_of(run) for x, t in zip(images, targets, strict=True)}
        )
    assert seen[0].keys() == seen[1].keys() == set(range(1, 13))
    assert any(not torch.equal(seen[0][i], seen[1][i]) for i in seen[0])


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 4), (2, 2)])
def test_processes_and_parts_share_out_the_batches_of_one_process(folder, tmp_path, monkeypatch, world, accumulate):
    whole = train.batches(new_run(folder, tmp_path))
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(train, "rank_and_world", lambda rank=rank: (rank, world))
        ranks.append(train.batches(new_run(folder, tmp_path, "--accumulate", accumulate)))
    for step, batch in enumerate(whole):
        parts = [part for mine in ranks for part in mine[step * accumulate : (step + 1) * accumulate]]
        assert sorted(sum(parts, [])) == sorted(batch)


def test_a_training_set_smaller_than_a_batch_fills_it_by_repetition(folder, tmp_path):
    run = new_run(folder, tmp_path, "--batch-size", 32)
    assert run.steps == 1 and Counter(Counter(train.batches(run)[0]).values()) == {3: 8, 2: 4}


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(folder, tmp_path):
    run = gradient_run(folder, tmp_path)
    whole = gradients_of(run, parts_of(run, FOUR))
    parts = gradients_of(run, parts_of(run, FOUR[:1], FOUR[1:]))
    assert_same_gradient(parts, whole)


def test_recomputed_activations_give_the_same_gradient(folder, tmp_path):
    plain, thrifty = gradient_run(folder, tmp_path), gradient_run(folder, tmp_path, "--checkpoint-activations")
    assert torch.equal(gradients_of(plain, parts_of(plain, FOUR)), gradients_of(thrifty, parts_of(thrifty, FOUR)))


def test_the_gradient_of_the_whole_model_is_clipped(folder, tmp_path, monkeypatch):
    run = new_run(folder, tmp_path)
    losses, norms = train.gradients(run, parts_of(run, FOUR)), []
    monkeypatch.setattr(
        run.optimizer,
        "step",
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()),
    )
    train.update(run, losses, [])
    assert norms == pytest.approx([run.recipe.clip], rel=1e-3)


def test_a_batch_without_objects_trains(folder, tmp_path):
    run = new_run(folder, tmp_path)
    nothing = {
        "labels": torch.zeros(0, dtype=torch.int64),
        "boxes": torch.zeros(0, 4),
        "masks": torch.zeros(0, 64, 64, dtype=torch.bool),
        "image_id": 1,
    }
    losses = train.gradients(run, [(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [nothing, nothing])])
    train.update(run, losses, [])
    assert all(map(math.isfinite, losses.values())) and sum(losses.values()) > 0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_training_runs_in_half_precision_with_a_loss_near_that_of_fp32(folder, tmp_path, amp):
    losses = []
    for choice in ("off", amp):
        run = new_run(folder, tmp_path, "--amp", choice)
        with without_chance():
            terms = train.gradients(run, parts_of(run, FOUR))
        train.update(run, terms, [])
        losses.append(sum(train.arrived(run).values()))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # bf16 keeps 8 bits, and may match other queries


def test_swin_l_from_microsofts_file_trains_and_is_evaluated(tmp_path):
    """195 M parameters: a file of 0.8 GB, and 4.8 GB of memory."""
    width, depths, heads, window, _ = SWINS["swin_l"]
    with torch.device("meta"):
        net = torchvision.models.SwinTransformer([4, 4], width, depths, heads, [window, window])
    state = {name: torch.full_like(x, 0.01, device="cpu") for name, x in net.state_dict().items()}
    torch.save({"model": microsoft_names(state)}, tmp_path / "swin_large.pth")
    write_images(tmp_path / "data", "train", 4)
    write_images(tmp_path / "data", "val", 1)
    flags = ["--set", "backbone=swin_l", "--backbone-weights", tmp_path / "swin_large.pth", "--amp", "off"]
    run = new_run(tmp_path / "data", tmp_path / "run", *flags)
    (tmp_path / "swin_large.pth").unlink()
    last = run.model.backbone.stages[3][1][-1].mlp[0].weight
    assert last.shape == (6144, 1536) and (last == 0.01).all()
    losses = train.gradients(run, parts_of(run, [0, 1]))
    train.update(run, losses, [])
    assert (last != 0.01).any() and all(map(math.isfinite, train.arrived(run).values()))
    metrics, results = train.evaluate(run.model, run.val_set, run.device)
    assert metrics["AP_box"] is not None and len(results) == 18


def test_training_and_its_validation_use_the_autocast_that_pays(folder, tmp_path, monkeypatch, capsys):
    used, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "amp_for", lambda device, backbone: {"tiny": "bf16"}[backbone])
    monkeypatch.setattr(train, "evaluate", lambda *args: used.append(args[-1]) or evaluate(*args))
    assert train_in(folder, tmp_path) == 0
    assert used == ["bf16"] and "autocast bf16" in capsys.readouterr().out


# ---- What people watch -----------------------------------------------------------------------------------------------


def test_the_first_lines_tell_device_kernel_data_model_and_recipe(folder, tmp_path, capsys):
    assert train_in(folder, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    said = (
        "device: CPU",
        "deform_attn: ",
        "12 training and 5 validation images, 3 classes (box, plate, tile)",
        "model: tiny",
        "1 epoch of 3 steps of 4 images, lr 1.0e-03",
    )
    assert all(part in line for part, line in zip(said, lines, strict=False)) and len(lines) > len(said)


def test_the_log_has_every_loss_the_rate_the_speed_and_after_each_epoch_ap(trained):
    steps, metrics = ([r for r in log_of(trained) if name in r] for name in ("loss", "AP_box"))
    assert [(r["epoch"], r["step"]) for r in steps] == [(0.3333, 1), (1, 3), (2, 6)]
    assert [(r["epoch"], r["step"]) for r in metrics] == [(1, 3), (2, 6)]
    for record in steps:
        terms = [v for name, v in record.items() if name.split("_")[0] in ("class", "box", "giou", "mask", "dice")]
        assert sum(terms) == pytest.approx(record["loss"], rel=1e-4)
        assert {"lr", "images_per_second", "waiting_for_data", "dice_2", "class_selection"} <= record.keys()
    assert {f"AP_{what}{area}" for what in ("box", "mask") for area in ("", "_S", "_M", "_L")} <= metrics[0].keys()


def test_each_epoch_leaves_curves_predictions_and_pictures_of_the_same_images(trained):
    assert Image.open(trained / "curves.png").size[0] > 500
    assert len(json.loads((trained / "predictions.json").read_text())) == 5 * 18  # 6 queries of 3 classes
    assert {path.name for path in (trained / "pictures").iterdir()} == {f"{i}.png" for i in range(1, 6)}


def test_resuming_drops_logged_steps_that_were_never_saved_and_a_line_cut_short(folder, tmp_path):
    assert train_in(folder, tmp_path) == 0
    before = log_of(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 1.9, "step": 5, "loss": 1}\n{"epoch": 2, "st')
    assert train_in(folder, tmp_path, "--resume") == 0
    assert log_of(tmp_path) == before


def test_a_mean_of_few_steps_at_the_end_of_an_epoch_is_joined_to_the_one_before():
    records = [
        {"step": step, "loss": loss} for step, loss in ((1, 9.0), (50, 5.0), (100, 4.0), (102, 30.0), (150, 3.0))
    ]
    curve = [(record["step"], record["loss"]) for record in log.merged(records)]
    assert curve == [(1, 9), (50, 5), (102, pytest.approx((50 * 4 + 2 * 30) / 52)), (150, 3)]


def test_the_progress_bar_moves_with_every_step_from_the_first(folder, tmp_path):
    run, seen = new_run(folder, tmp_path), []
    watched = log.Log(run)
    watched.bar = SimpleNamespace(n=0, update=lambda steps: seen.append(steps))
    for _ in watched.follow(run, range(4)):
        watched.bar.n = run.step
        run.step += 1
    assert seen == [0, 1, 1, 1]


def test_images_with_more_objects_than_queries_are_counted_with_the_setting(folder, tmp_path, capsys):
    assert train_in(folder, tmp_path, "--check", "--set", "selection=(12,2)") == 0
    said = capsys.readouterr().out
    assert "4 training images have more objects than the model has queries (2)" in said and "selection" in said


def test_to_check_the_data_takes_one_process(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "launch", None)
    assert train_in(folder, tmp_path, "--check", "--gpus", "4") == 0
    assert "is sound" in capsys.readouterr().out


def test_a_folder_with_a_single_json_trains_and_holds_images_out(folder, tmp_path, capsys):
    files = "--train-json", folder / "annotations" / "instances_train.json", "--image-folder", folder / "train"
    assert exit_code(train.main, [*SMALL, *map(str, files), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "every tenth image is held out" in said and "10 training and 2 validation images" in said
