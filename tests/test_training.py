"""What train.py, recipe.py, log.py and evaluate.py promise. `pytest -v` reads as the list of promises."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import data
import evaluate
import train
from dimaskdino import Config, DIMaskDINO
from losses import denoising_queries
from recipe import AUGMENTATIONS, Recipe, large_scale_jitter, parameter_groups
from weights import read_checkpoint

HERE = Path(__file__).parents[1]
law = settings(deadline=None, max_examples=50)
MODEL = ("dim=32", "heads=2", "ffn=48", "encoder_layers=1", "decoder_layers=2", "selection=(12, 6)", "denoising=8",
         "mask_points=32")  # fmt: skip
SMALL = [
    "--preset", "tiny", "--image-size", "64", "--batch-size", "4", "--lr", "1e-3", "--epochs", "1", "--device", "cpu",
    "--workers", "0", *(word for field in MODEL for word in ("--set", field)),
]  # fmt: skip


# ---- Small data, small runs


def write_images(folder, split, count, classes=("box", "plate", "tile")):
    """Images of 64 x 48 with one to three rectangles each, in COCO layout. Category ids have gaps."""
    rng = np.random.default_rng(len(split))
    ids = [2 + 3 * label for label in range(len(classes))]
    images, annotations = [], []
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for image_id in range(1, count + 1):
        pixels = np.full((48, 64, 3), 90, np.uint8)
        for _ in range(1 + image_id % 3):
            x, y, w, h = (int(rng.integers(low, high)) for low, high in ((0, 40), (0, 24), (12, 24), (12, 24)))
            label = int(rng.integers(len(classes)))
            pixels[y : y + h, x : x + w] = 60 * label + 100
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": ids[label], "bbox": [x, y, w, h],
                "area": w * h, "iscrowd": 0, "segmentation": [corners],
            })  # fmt: skip
        name = f"{image_id}.png"
        Image.fromarray(pixels).save(folder / split / name)
        images.append({"id": image_id, "file_name": name, "width": 64, "height": 48})
    categories = [{"id": i, "name": name} for i, name in zip(ids, classes, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, "train", 12)
    write_images(folder, "val", 5)
    return folder


@pytest.fixture(autouse=True)
def signals():
    """A run sets handlers for signals: put back what pytest had."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(folder, out, *more):
    """The exit code of train.py, in this process; later flags override those of SMALL."""
    return exit_code(train.main, [*SMALL, "--data", str(folder), "--out", str(out), *map(str, more)])


def exit_code(action, *arguments):
    try:
        action(*arguments)
    except SystemExit as end:
        return end.code
    return 0


def new_run(folder, out, *more):
    args = train.parse_arguments([*SMALL, "--data", str(folder), "--out", str(out), *map(str, more)])
    args.amp = args.amp or "off"
    return train.Run(args, torch.device("cpu"))


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folder of a run of two epochs of three steps, trained without any network."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", None)
        assert run(folder, out, "--epochs", 2) == 0
    return out


# ---- The recipe (4.1, appendix B)


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

    def recorded(*arguments, label_noise):
        shares.append(label_noise)
        return denoising_queries(*arguments, label_noise=label_noise)

    monkeypatch.setattr(train, "denoising_queries", recorded)
    assert run(folder, tmp_path) == 0
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


@law
@given(st.sampled_from(sorted(AUGMENTATIONS)), st.integers(0, 2**32), st.integers(1, 3000), st.integers(1, 3000))
def test_every_augmentation_gives_a_square_that_shows_the_image(name, seed, width, height):
    geometry = AUGMENTATIONS[name](96, np.random.default_rng(seed), width, height)
    assert geometry.output == (96, 96)
    for start, length in zip(geometry.offset, geometry.size, strict=True):
        assert length >= 1 and 0 <= start <= max(0, length - 96)
    if name != "jitter":
        assert max(geometry.size) == 96


def test_large_scale_jitter_scales_from_a_tenth_to_double_and_flips_half_the_images():
    drawn = [large_scale_jitter(1024, np.random.default_rng(seed), 640, 480) for seed in range(2000)]
    scales = [max(geometry.size) / 1024 for geometry in drawn]
    assert 0.1 <= min(scales) < 0.12 and 1.98 < max(scales) <= 2.0
    # 2,000 coins fall within five standard deviations, 112, of one half.
    assert abs(sum(geometry.horizontal_flip for geometry in drawn) - 1000) < 112
    assert len({geometry.offset for geometry in drawn if max(geometry.size) > 1500}) > 100


@pytest.mark.parametrize("override, value", [
    ("selection=(300,)", (300,)), ("bato=False", False), ("detection_loss=0.1", 0.1), ("detection_loss=2", 2),
    ("guidance=T_s1", "T_s1"), ("decoder_layers=9", 9), ("guiding_tokens=40", 40), ("guiding_tokens=None", None),
])  # fmt: skip
def test_set_changes_one_field_of_the_model_or_of_its_training(override, value):
    args = train.parse_arguments(["--preset", "released", "--set", override])
    name = override.split("=")[0]
    plain = [dataclasses.replace(Config.released(), num_classes=3), Recipe()]
    expected = [dataclasses.replace(x, **{name: value}) if hasattr(x, name) else x for x in plain]
    assert [train.choose_config(args, 3), train.choose_recipe(args)] == expected != plain


# ---- Steps


def test_an_epoch_shows_every_image_once_and_each_epoch_in_another_order(folder, tmp_path):
    run = new_run(folder, tmp_path)
    first = sum(train.batches(run), [])
    run.epoch, run.step = 1, run.steps_per_epoch
    assert sorted(first) == list(range(12)) and first != sum(train.batches(run), [])


def test_each_epoch_augments_the_images_anew(folder, tmp_path):
    run, seen = new_run(folder, tmp_path), []
    for run.epoch in (0, 1):
        run.step = run.epoch * run.steps_per_epoch
        seen.append({t["image_id"]: x for images, targets in train.loader_of(run)
                     for x, t in zip(images, targets, strict=True)})  # fmt: skip
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


@contextlib.contextmanager
def without_chance():
    """Sampled points and noise always the same, so that only the batches' division differs."""

    def points(*size, device=None):
        return torch.linspace(0.1, 0.9, size[-2] * 2).view(-1, 2).expand(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", points)
        patch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 0.4))
        patch.setattr(torch, "randint_like", lambda like, low, high: torch.full_like(like, low))
        yield


def gradients_of(run, parts):
    """The gradients of one step as one vector; batch statistics fixed, because they depend on the division."""
    run.model.train()
    run.model.backbone.eval()
    run.model.zero_grad()
    with without_chance():
        train.gradients(run, parts)
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


def assert_same_gradient(a, b):
    """Up to sums in another order, and what follows where they move the edge of a mask, and so a box, by a pixel."""
    assert (a - b).norm() < 0.02 * b.norm()


def parts_of(run, *parts):
    return [data.collate([run.train_set[i] for i in part]) for part in parts]


# Images 0, 3, 6 and 9 hold two objects each, so that every division makes as many groups of denoising queries.
FOUR = (0, 3, 6, 9)


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(folder, tmp_path):
    run = new_run(folder, tmp_path)
    whole = gradients_of(run, parts_of(run, FOUR))
    parts = gradients_of(run, parts_of(run, FOUR[:1], FOUR[1:]))
    assert_same_gradient(parts, whole)


def test_recomputed_activations_give_the_same_gradient(folder, tmp_path):
    plain, thrifty = new_run(folder, tmp_path), new_run(folder, tmp_path, "--checkpoint-activations")
    assert torch.equal(gradients_of(plain, parts_of(plain, FOUR)), gradients_of(thrifty, parts_of(thrifty, FOUR)))


def test_the_gradient_of_the_whole_model_is_clipped(folder, tmp_path, monkeypatch):
    run = new_run(folder, tmp_path)
    train.gradients(run, parts_of(run, FOUR))
    norms = []
    monkeypatch.setattr(run.optimizer, "step", lambda *_: norms.append(
        torch.cat([p.grad.flatten() for p in run.model.parameters()]).norm().item()))  # fmt: skip
    train.update(run)
    assert norms == pytest.approx([run.recipe.clip], rel=1e-3)


def test_a_batch_without_objects_trains(folder, tmp_path):
    run = new_run(folder, tmp_path)
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4),
               "masks": torch.zeros(0, 64, 64, dtype=torch.bool), "image_id": 1}  # fmt: skip
    losses = train.gradients(run, [(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [nothing, nothing])])
    train.update(run)
    assert all(map(math.isfinite, losses.values())) and sum(losses.values()) > 0


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_training_runs_in_half_precision_with_a_loss_near_that_of_fp32(folder, tmp_path, amp):
    losses = []
    for choice in ("off", amp):
        run = new_run(folder, tmp_path, "--amp", choice)
        with without_chance():
            losses.append(sum(train.gradients(run, parts_of(run, FOUR)).values()))
        train.update(run)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # bf16 keeps 8 bits, and may match other queries


# ---- Checkpoints


def weights(out, name="last.pt"):
    return read_checkpoint(out / name)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def signal_at(step, number, patch):
    """A real signal to this process while it takes the given step."""
    update = train.update

    def interrupted(run):
        if run.step == step - 1:
            os.kill(os.getpid(), number)
        update(run)

    patch.setattr(train, "update", interrupted)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [2, 3])  # amid the first epoch and at its end
def test_a_run_that_is_interrupted_and_resumed_ends_bit_equal_to_one_that_was_not(
    folder, trained, tmp_path, workers, step
):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(step, signal.SIGTERM, patch)
        assert run(folder, tmp_path, "--epochs", 2, "--workers", workers) == 143
    stopped = read_checkpoint(tmp_path / "last.pt")
    assert stopped["step"] == step and not same(stopped["model"], weights(trained))
    assert run(folder, tmp_path, "--epochs", 2, "--workers", workers, "--resume") == 0
    assert same(weights(tmp_path), weights(trained))
    ours, theirs = ([record for record in log_of(out) if "AP_box" in record] for out in (tmp_path, trained))
    assert ours == theirs


def test_two_runs_with_one_seed_are_bit_equal_and_another_seed_differs(folder, trained, tmp_path):
    assert run(folder, tmp_path / "same", "--epochs", 2) == 0
    assert run(folder, tmp_path / "other", "--epochs", 2, "--seed", 1) == 0
    assert same(weights(tmp_path / "same"), weights(trained))
    assert not same(weights(tmp_path / "other"), weights(trained))


def test_ctrl_c_finishes_the_step_saves_and_ends_with_130(folder, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(1, signal.SIGINT, patch)
        assert run(folder, tmp_path) == 130
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert "--resume" in capsys.readouterr().out


def test_a_signal_during_evaluation_ends_at_once_and_resuming_evaluates(folder, trained, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert run(folder, tmp_path, "--epochs", 2) == 143
    assert not any("AP_box" in record for record in log_of(tmp_path))
    assert run(folder, tmp_path, "--epochs", 2, "--resume") == 0
    assert same(weights(tmp_path), weights(trained)) and sum("AP_box" in record for record in log_of(tmp_path)) == 2


def test_a_checkpoint_holds_all_that_is_needed_in_plain_types(trained):
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    needed = ("model", "optimizer", "scaler", "epoch", "step", "best", "config", "recipe", "classes", "seed")
    assert set(needed) <= checkpoint.keys()
    assert checkpoint["classes"] == ["box", "plate", "tile"]
    assert Config(**checkpoint["config"]).selection == (12, 6)


def test_fp16s_scale_survives_a_resume(folder, tmp_path):
    assert run(folder, tmp_path, "--amp", "fp16") == 0
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    checkpoint["scaler"]["scale"] = 123.0
    torch.save(checkpoint, tmp_path / "last.pt")
    assert new_run(folder, tmp_path, "--amp", "fp16", "--resume").scaler.get_scale() == 123.0


def test_best_is_never_overwritten_by_a_worse_epoch_also_after_a_resume(folder, tmp_path, monkeypatch):
    scores = iter([10.0, 30.0, 20.0, 25.0])
    nothing = {name + area: None for name in ("AP_box", "AP_mask") for area in ("", "_50", "_S", "_M", "_L")}
    monkeypatch.setattr(train, "evaluate", lambda *_: ({**nothing, "AP_box": next(scores), "AP_mask": 5.0}, []))
    assert run(folder, tmp_path, "--epochs", 3) == 0
    assert run(folder, tmp_path, "--epochs", 4, "--resume") == 0
    best, last = read_checkpoint(tmp_path / "best.pt"), read_checkpoint(tmp_path / "last.pt")
    assert (best["epoch"], best["best"], last["epoch"], last["best"]) == (2, 17.5, 4, 17.5)


def test_kill_9_while_saving_leaves_a_whole_checkpoint(folder, tmp_path):
    run = new_run(folder, tmp_path)

    def save_for_ever():
        while True:
            run.step += 1
            train.save(run, "last.pt")

    for pause in (0.02, 0.05, 0.09):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever)
        process.start()
        while not (tmp_path / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert same(weights(tmp_path), run.model.state_dict())


def test_a_write_that_fails_midway_warns_and_leaves_the_old_checkpoint(folder, trained, tmp_path, monkeypatch, capsys):
    run = new_run(folder, tmp_path)
    train.save(run, "last.pt")
    run.step = 7
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")  # a device on which every write finds the disk full
    train.save(run, "last.pt")
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 0
    assert "last.pt was not written" in capsys.readouterr().err
    train.save(run, "last.pt")  # there is room again
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 7


def test_a_full_disk_does_not_stop_a_run(folder, tmp_path, capsys):
    for name in ("predictions.json", "best.pt.tmp"):
        (tmp_path / name).symlink_to("/dev/full")
    assert run(folder, tmp_path, "--epochs", 2) == 0
    warnings = capsys.readouterr().err
    assert "best.pt" in warnings and "No space left" in warnings
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 6


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def spoil(checkpoint, path, how):
    """A file that is no checkpoint of this run, in one of the ways that occur."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        path.write_text("<html>404</html>")
    elif how == "code":
        torch.save({**checkpoint, "extra": Bomb()}, path)
    elif how == "list":
        torch.save([1, 2], path)
    else:
        torch.save({name: value for name, value in checkpoint.items() if name != how}, path)


@pytest.mark.parametrize("how", ["truncated", "empty", "foreign", "code", "list", "optimizer", "model"])
def test_a_file_that_is_no_checkpoint_is_named_and_refused_and_never_runs_code(folder, trained, tmp_path, monkeypatch,
                                                                              capsys, how):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes((trained / "last.pt").read_bytes())
    spoil(read_checkpoint(path), path, how)
    broken = path.read_bytes()
    assert run(folder, tmp_path, "--resume") == 2
    assert "last.pt" in capsys.readouterr().err
    assert path.read_bytes() == broken and not Path("exploded").exists()


@pytest.mark.parametrize("flags, named", [
    (("--set", "ffn=64"), "ffn was 48, not 64"),
    (("--batch-size", 6), "batch_size was 4, not 6"),
    (("--seed", 3), "seed was 0, not 3"),
])  # fmt: skip
def test_a_checkpoint_made_with_other_settings_is_refused_with_their_names(folder, trained, capsys, flags, named):
    assert run(folder, trained, "--resume", *flags) == 2
    assert named in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(folder, trained, capsys):
    before = (trained / "last.pt").read_bytes()
    assert run(folder, trained) == 2
    assert "--resume" in capsys.readouterr().err and (trained / "last.pt").read_bytes() == before


def test_init_takes_every_tensor_that_fits_and_names_the_others(trained, tmp_path, capsys):
    write_images(tmp_path / "data", "train", 4, classes=("box", "lid"))
    write_images(tmp_path / "data", "val", 2, classes=("box", "lid"))
    started = new_run(tmp_path / "data", tmp_path / "out", "--init", trained / "best.pt")
    given = weights(trained, "best.pt")
    odd = {name for name, x in started.model.state_dict().items() if x.shape != given[name].shape}
    assert odd == {"det_head.classifier.weight", "det_head.classifier.bias", "label_embed.weight"}
    message = capsys.readouterr().out
    assert all(name in message for name in odd)
    assert same({k: v for k, v in started.model.state_dict().items() if k not in odd},
                {k: v for k, v in given.items() if k not in odd})  # fmt: skip


RESNET18 = ("--preset", "released", "--set", "backbone=resnet18")


def test_pretrained_weights_downloaded_once_need_no_network_and_freeze_their_norms(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    net = torchvision.models.resnet18()
    torch.nn.init.constant_(net.layer2[0].conv1.weight, 0.25)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    started = new_run(folder, tmp_path / "out", *RESNET18)
    assert (started.model.backbone.stages[2][0].conv1.weight == 0.25).all()
    norms = [module for module in started.model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training or norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize("backbone, named", [("resnet18", "https://download"), ("swin_l", "Swin-Transformer")])
def test_weights_that_cannot_be_had_are_named_with_the_way_out(folder, tmp_path, monkeypatch, capsys, backbone, named):
    monkeypatch.setenv("https_proxy", "http://localhost:9")  # where nobody answers
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert run(folder, tmp_path / "out", *RESNET18[:2], "--set", f"backbone={backbone}") == 2
    message = capsys.readouterr().err
    assert named in message and "--backbone-weights" in message


# ---- Faults


def test_a_loss_that_is_not_finite_stops_with_the_step_each_term_the_rate_and_the_images(folder, tmp_path, monkeypatch,
                                                                                       capsys):  # fmt: skip
    criterion = train.Criterion.forward
    calls = []

    def poisoned(self, *args):
        calls.append(1)
        return {name: loss * math.nan if len(calls) == 4 and name == "dice_1" else loss
                for name, loss in criterion(self, *args).items()}  # fmt: skip

    monkeypatch.setattr(train.Criterion, "forward", poisoned)
    assert run(folder, tmp_path, "--epochs", 2) == 1
    message = capsys.readouterr().err
    assert "step 4 (epoch 2, lr " in message and "dice_1 nan" in message and "class_selection " in message
    images = json.loads(message[message.index("images [") + len("images ") : message.index("]") + 1])
    assert len(images) == 4 and set(images) <= set(range(1, 13))
    saved = read_checkpoint(tmp_path / "last.pt")
    assert saved["step"] == 3 and all(x.isfinite().all() for x in saved["model"].values())


def test_predictions_that_are_not_finite_stop_before_they_are_matched(folder, tmp_path, capsys):
    run = new_run(folder, tmp_path)
    run.model.det_head.classifier.weight.data.fill_(math.inf)
    assert exit_code(train.gradients, run, parts_of(run, FOUR)) == 1
    assert "not finite" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_changes_no_weight(folder, tmp_path, capsys):
    run = new_run(folder, tmp_path)
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    assert exit_code(train.update, run) == 1
    assert same(before, run.model.state_dict()) and "gradient" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(tmp_path, capfd, split, workers):
    write_images(tmp_path / "data", "train", 4)
    write_images(tmp_path / "data", "val", 2)
    (tmp_path / "data" / split / "2.png").write_bytes(b"no image")
    assert run(tmp_path / "data", tmp_path / "out", "--workers", workers) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith(f"{tmp_path}/data/{split}/2.png")


@pytest.mark.parametrize("flags, named", [
    (("--set", "dims=32"), "fields are"),
    (("--set", "dim=wide"), "dim=wide"),
    (("--set", "guidance=T_x"), "T_x"),
    (("--batch-size", 5, "--accumulate", 2), "multiple of"),
    (("--image-size", 100), "multiple of 32"),
    (("--init", "nowhere.pt"), "nowhere.pt"),
    (("--data", "nowhere"), "expected annotations"),
    (("--epochs", 0), "at least 1"),
    (("--gpus", 2, "--device", "cuda"), "GPU"),
])  # fmt: skip
def test_a_wrong_flag_gets_a_message_and_exit_code_2(folder, tmp_path, capsys, flags, named):
    assert run(folder, tmp_path / "out", *flags) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message


def test_faults_in_the_data_stop_a_run_before_its_first_step(tmp_path, capsys):
    write_images(tmp_path, "train", 3)
    write_images(tmp_path, "val", 1)
    path = tmp_path / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["category_id"] = 91
    path.write_text(json.dumps(content))
    assert run(tmp_path, tmp_path / "out") == 2
    assert "91" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_check_decodes_every_image_and_trains_nothing(tmp_path, capsys):
    write_images(tmp_path, "train", 3)
    write_images(tmp_path, "val", 2)
    assert run(tmp_path, tmp_path / "out", "--check") == 0
    assert "3 training and 2 validation images" in capsys.readouterr().out and not (tmp_path / "out").exists()
    (tmp_path / "val" / "2.png").write_bytes(b"no image")
    assert run(tmp_path, tmp_path / "out", "--check") == 2
    assert "2.png" in capsys.readouterr().err


# ---- What people watch


def test_the_first_lines_tell_device_kernel_data_model_and_recipe(folder, tmp_path, capsys):
    assert run(folder, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    said = ("device: CPU", "deform_attn: ", "12 training and 5 validation images, 3 classes (box, plate, tile)",
            "model: tiny", "1 epochs of 3 steps of 4 images, lr 1.0e-03")  # fmt: skip
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
    assert run(folder, tmp_path) == 0
    before = log_of(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 1.9, "step": 5, "loss": 1}\n{"epoch": 2, "st')
    assert run(folder, tmp_path, "--resume") == 0
    assert log_of(tmp_path) == before


# ---- Evaluation


def predictions(truth, shift=0, score=0.9):
    """Every object of a COCO dict as a result, its mask moved right by some pixels and its box by twice as many."""
    index, results = evaluate.coco(json.loads(json.dumps(truth))), []
    for annotation in truth["annotations"]:
        mask = np.roll(index.annToMask(annotation), shift, 1)
        code = rle.encode(np.asfortranarray(mask))
        x, y, w, h = annotation["bbox"]
        results.append({
            "image_id": annotation["image_id"], "category_id": annotation["category_id"], "score": score,
            "bbox": [x + 2 * shift, y, w, h], "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        })  # fmt: skip
    return results


def truth_of(folder):
    return data.open_dataset(str(folder), ".", "val", data.identity, training=False).json


def test_perfect_predictions_give_100_and_none_gives_0(folder):
    perfect = evaluate.average_precision(truth_of(folder), predictions(truth_of(folder)))
    nothing = evaluate.average_precision(truth_of(folder), [])
    present = {name for name, value in perfect.items() if value is not None}
    assert {"AP_box", "AP_mask", "AP_box_S"} <= present
    for name in perfect:
        assert perfect[name] == (pytest.approx(100) if name in present else None)
        assert nothing[name] == (0 if name in present else None)


def test_a_hand_made_set_gets_the_numbers_of_pycocotools_on_the_hand_written_json(tmp_path):
    def square(number, image, category, side, **more):
        box = [10, 10, side, side]
        corners = [10, 10, 10 + side, 10, 10 + side, 10 + side, 10, 10 + side]
        return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": side * side * 0.8,
                "iscrowd": 0, "segmentation": [corners], **more}  # fmt: skip

    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 160, "height": 160} for i in (7, 3, 5)],
        "categories": [{"id": 4, "name": "a"}, {"id": 9, "name": "b"}],
        "annotations": [square(1, 7, 4, 20), square(2, 7, 9, 60), square(3, 3, 4, 120), square(4, 5, 9, 60, iscrowd=1)],
    }
    truth["annotations"][3]["segmentation"] = rle.frPyObjects(truth["annotations"][3]["segmentation"], 160, 160)[0]
    truth["annotations"][3]["segmentation"]["counts"] = truth["annotations"][3]["segmentation"]["counts"].decode()
    found = predictions(truth, shift=3, score=0.8) + [{**r, "category_id": 4, "score": 0.7} for r in predictions(truth)]
    found.append({**found[0], "bbox": [0, 0, 150, 150], "score": 0.95})  # a small mask in a large box
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    expected = {}
    for name, kind in (("AP_box", "bbox"), ("AP_mask", "segm")):
        ground = COCO(str(tmp_path / "truth.json"))
        kept = json.loads(json.dumps(found))
        for result in kept if kind == "segm" else ():
            del result["bbox"]
        evaluation = COCOeval(ground, ground.loadRes(kept), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for place, area in ((0, ""), (1, "_50"), (3, "_S"), (4, "_M"), (5, "_L")):
            value = evaluation.stats[place]
            expected[name + area] = None if value < 0 else 100 * value
    assert evaluate.average_precision(truth, found) == expected
    assert 0 < expected["AP_box"] < 100 and expected["AP_box"] != expected["AP_mask"]


def test_results_carry_pixels_of_the_original_image_and_category_ids():
    masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    masks[0, 5:9, 11:13] = True
    detections = {"boxes": torch.tensor([[11.0, 5.0, 13.0, 9.0]]), "labels": torch.tensor([1]),
                  "scores": torch.tensor([0.5]), "masks": masks}  # fmt: skip
    (result,) = evaluate.coco_results(detections, 42, [3, 17])
    assert (result["image_id"], result["category_id"], result["bbox"], result["score"]) == (42, 17, [11, 5, 2, 4], 0.5)
    assert np.array_equal(rle.decode(result["segmentation"]), masks[0].numpy())


def test_the_table_has_the_papers_columns_and_a_dash_where_there_is_no_object():
    metrics = {name + area: 12.345 for name in ("AP_box", "AP_mask") for area in ("", "_50", "_S", "_M", "_L")}
    head, _, row = evaluate.table([("tiny", {**metrics, "AP_mask_L": None})]).splitlines()
    assert head.replace("|", "").split() == ["AP_box", "S", "M", "L", "AP_mask", "S", "M", "L"]
    assert row.replace("|", "").split() == ["tiny", *["12.3"] * 7, "-"]


def test_evaluate_prints_the_ap_that_training_logged_and_every_layers(folder, trained, tmp_path, capsys):
    flags = ["--ckpt", trained / "last.pt", "--data", folder, "--device", "cpu", "--out", tmp_path, "--layers",
             "--speed", "--draw", 2, "--json", tmp_path / "metrics.json"]  # fmt: skip
    assert exit_code(evaluate.main, [*map(str, flags)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| layer")]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(rows) == len(metrics["layers"]) == 1 + read_checkpoint(trained / "last.pt")["config"]["decoder_layers"]
    logged = [record for record in log_of(trained) if "AP_box" in record][-1]
    for name in ("AP_box", "AP_mask", "AP_box_S"):
        assert metrics[name] == metrics["layers"][-1][name] == pytest.approx(logged[name], rel=1e-5)
    assert metrics["FPS_without_postprocessing"] >= metrics["FPS"] > 0
    assert len(list((tmp_path / "pictures").iterdir())) == 2 and (tmp_path / "predictions.json").exists()


def test_evaluate_refuses_data_of_other_classes_and_names_both(trained, tmp_path, capsys):
    write_images(tmp_path, "val", 1, classes=("box", "lid"))
    assert exit_code(evaluate.main, ["--ckpt", str(trained / "last.pt"), "--data", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "box, plate, tile" in message and "box, lid" in message


def test_own_images_get_pictures_and_only_what_reaches_the_score(folder, trained, tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (90, 70), "red").save(photo)
    flags = ["--ckpt", trained / "last.pt", "--device", "cpu", "--out", tmp_path / "found", "--images", photo]
    kept = []
    for score in ("0", "0.02", "1"):
        assert exit_code(evaluate.main, [*map(str, flags), "--score", score]) == 0
        kept.append(json.loads((tmp_path / "found" / "predictions.json").read_text()))
    assert len(kept[0]) == 18 and kept[2] == []
    assert kept[1] == [result for result in kept[0] if result["score"] >= 0.02]
    assert kept[0][0]["segmentation"]["size"] == [70, 90] and kept[0][0]["category"] in ("box", "plate", "tile")
    assert (tmp_path / "found" / "photo_found.png").exists()


@pytest.mark.parametrize("size", [(1, 1), (200, 4), (3, 150), (33, 31)])
def test_images_of_any_size_and_shape_give_boxes_inside_them_and_masks_of_their_size(trained, tmp_path, size):
    Image.new("RGB", size, "blue").save(tmp_path / "image.png")
    flags = ["--ckpt", trained / "last.pt", "--device", "cpu", "--out", tmp_path, "--score", "0"]
    assert exit_code(evaluate.main, [*map(str, flags), "--images", str(tmp_path / "image.png")]) == 0
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert results
    for x, y, w, h in (result["bbox"] for result in results):
        assert x >= 0 and y >= 0 and x + w <= size[0] + 1e-3 and y + h <= size[1] + 1e-3  # sums of float32
    assert {tuple(result["segmentation"]["size"]) for result in results} == {size[::-1]}


def test_a_picture_shows_what_reaches_the_score_and_nothing_else(folder):
    dataset = data.open_dataset(str(folder), ".", "val", data.identity, training=False)
    image = data.read_record(dataset.folder, dataset.images[1])
    names = dict(zip(dataset.category_ids, dataset.classes, strict=True))
    found = [r for r in predictions(dataset.json) if r["image_id"] == 1]
    found[0]["bbox"] = [-30, -5, 400, 0]  # boxes are not clipped to the image
    plain, shown = evaluate.draw(image, found, names, score=0.95), evaluate.draw(image, found, names, score=0.5)
    assert plain.shape == shown.shape == (3, 480, 640)
    assert np.array_equal(plain.permute(1, 2, 0)[5::10, 5::10], np.asarray(image)) and not torch.equal(plain, shown)


# ---- Many processes


def two_processes(rank, threads, folder, out):
    """What each of two processes sees, saved for the tests below."""
    torch.set_num_threads(threads)  # as many as in the process that compares: sums come out alike
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    run = new_run(folder, out / "unused")
    run.parallel = torch.nn.parallel.DistributedDataParallel(run.model)
    mine = FOUR[2 * rank : 2 * rank + 2]
    seen = {"shared": gradients_of(run, parts_of(run, mine))}
    seen["in parts"] = gradients_of(run, parts_of(run, mine[:1], mine[1:]))
    part = parts_of(run, FOUR[:2])
    for target in part[0][1] if rank == 1 else ():
        target.update({name: target[name][:0] for name in ("labels", "boxes", "masks")})
    seen["one without objects"] = gradients_of(run, part)
    metrics, results = evaluate.evaluate(run.model, run.val_set, run.device)
    seen.update(metrics=metrics, results=results)
    run.parallel.train()(part[0][0] // (rank + 1))
    seen["own statistics"] = torch.cat([buffer.flatten() for buffer in run.model.buffers()])
    train.share_statistics(run.model)
    seen["shared statistics"] = torch.cat([buffer.flatten() for buffer in run.model.buffers()])
    criterion = run.criterion.forward
    if rank == 1:
        run.criterion.forward = lambda *args: {name: loss * math.nan for name, loss in criterion(*args).items()}
    seen["end"] = exit_code(train.gradients, run, part)
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    """(what rank 0 saw, what rank 1 saw)"""
    out = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(two_processes, (torch.get_num_threads(), folder, out), nprocs=2)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("how", ["shared", "in parts"])
def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(folder, tmp_path, pair, how):
    run = new_run(folder, tmp_path)
    whole = gradients_of(run, parts_of(run, FOUR))
    assert torch.equal(pair[0][how], pair[1][how])
    assert_same_gradient(pair[0][how], whole)


def test_a_process_without_objects_neither_hangs_nor_skews_the_gradient(folder, tmp_path, pair):
    run = new_run(folder, tmp_path)
    parts = parts_of(run, FOUR[:2], FOUR[:2])
    for target in parts[1][1]:
        target.update({name: target[name][:0] for name in ("labels", "boxes", "masks")})
    # Two parts rather than one batch: an image without objects beside others takes part in their denoising groups.
    assert_same_gradient(pair[0]["one without objects"], gradients_of(run, parts))


def test_evaluation_shared_by_two_processes_equals_that_of_one_digit_for_digit(folder, tmp_path, pair):
    run = new_run(folder, tmp_path)
    metrics, results = evaluate.evaluate(run.model, run.val_set, run.device)
    assert pair[0]["metrics"] == pair[1]["metrics"] == metrics
    assert pair[0]["results"] == results and pair[1]["results"] is None
    assert len(results) == 5 * 18


def test_all_processes_evaluate_with_the_statistics_that_the_checkpoint_holds(pair):
    assert not torch.equal(pair[0]["own statistics"], pair[1]["own statistics"])
    for seen in pair:
        assert torch.equal(seen["shared statistics"], pair[0]["own statistics"])


def test_a_loss_that_is_not_finite_on_one_process_ends_all_together(pair):
    assert [seen["end"] for seen in pair] == [1, 1]


def start(folder, out, *more):
    """train.py --gpus 2 as a user starts it, once its first step is logged."""
    (out / "log.jsonl").unlink(missing_ok=True)
    command = [sys.executable, HERE / "train.py", *SMALL, "--data", folder, "--out", out, "--gpus", 2, *more]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ((out / "log.jsonl").exists() and log_of(out)):
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_two_processes_train_end_with_the_death_of_one_and_save_on_a_signal(tmp_path):
    folder, out = tmp_path / "data", tmp_path / "run"
    write_images(folder, "train", 2000)  # an epoch of 500 steps, so that all of this happens in it
    write_images(folder, "val", 1)
    job = start(folder, out)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, errors = job.communicate(timeout=100)
    assert job.returncode == 128 + signal.SIGKILL and "process 1 ended" in errors

    job = start(folder, out, "--resume")
    job.terminate()
    output, _ = job.communicate(timeout=100)
    stopped = read_checkpoint(out / "last.pt")["step"]
    assert job.returncode == 143 and f"a signal ended this after step {stopped}" in output
    assert new_run(folder, out, "--resume").step == stopped > 0  # one process may go on where two were
