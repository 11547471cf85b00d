"""What train.py and util/log.py promise, as long as nothing goes wrong."""

import dataclasses
import json
import math
from collections import Counter
from functools import partial

import pytest
import torch
from PIL import Image

import train
from datasets import Source, collate, open_dataset
from datasets.geometry import AUGMENTATIONS
from dimaskdino import Config, DIMaskDINO
from losses import Criterion, denoising_queries
from small_runs import (
    FOUR,
    SMALL,
    Steps,
    assert_same_gradient,
    batch_of,
    comparable,
    exit_code,
    flags_of,
    gradient_of,
    log_of,
    open_training,
    train_in,
    write_images,
)
from train import Recipe, make_optimizer, micro_batches_of, train_step
from util.log import Log

# ---- Batches ---------------------------------------------------------------------------------------------------------

RECIPE = Recipe(batch_size=4)


def test_an_epoch_shows_every_image_once_and_each_in_another_order():
    first, second = (micro_batches_of(12, RECIPE, epoch, seed=0).flatten().tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12)) and first != second


@pytest.mark.parametrize("world, accumulate", [(2, 1), (1, 4), (2, 2)])
def test_processes_and_micro_batches_share_out_the_batches_of_one(monkeypatch, world, accumulate):
    whole = micro_batches_of(12, RECIPE, 0, seed=0)
    found = []
    for rank in range(world):
        monkeypatch.setattr(train, "rank_and_world", lambda rank=rank: (rank, world))
        found.append(micro_batches_of(12, RECIPE, 0, 0, accumulate))
    for step, batch in enumerate(whole):
        assert sorted(i for mine in found for i in mine[step].flatten()) == sorted(batch.flatten())


def test_a_training_set_smaller_than_a_batch_fills_it_by_repetition():
    (batch,) = micro_batches_of(12, Recipe(batch_size=32), 0, seed=0)
    assert Counter(Counter(batch.flatten().tolist()).values()) == {3: 8, 2: 4}


# ---- Steps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(folder):
    """Training images of the size at which gradients can be compared."""
    return open_training(folder, "--image-size", 128)


def test_micro_batches_give_the_gradient_of_the_whole_batch(images):
    whole = gradient_of(comparable(), batch_of(images, *FOUR))
    parts = gradient_of(comparable(), batch_of(images, *FOUR[:1]), batch_of(images, *FOUR[1:]))
    assert_same_gradient(parts, whole)


def test_recomputed_activations_give_the_same_gradient(images):
    batch = batch_of(images, *FOUR)
    plain, thrifty = comparable(), comparable()
    train.recompute_activations(thrifty.model)
    assert torch.equal(gradient_of(plain, batch), gradient_of(thrifty, batch))


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_the_gradient_of_the_whole_model_is_clipped_and_unscaled(images, amp):
    steps = Steps(amp, image_size=128)(batch_of(images, *FOUR[:2]))
    assert steps.norm > steps.recipe.clip
    assert steps.gradient.norm().item() == pytest.approx(steps.recipe.clip, rel=1e-3)
    assert steps.norm.item() == pytest.approx(Steps(image_size=128)(batch_of(images, *FOUR[:2])).norm.item(), rel=0.2)


def test_a_step_has_the_gradient_of_its_own_batch_alone(images):
    steps, batch = Steps(image_size=128), batch_of(images, FOUR[0])
    start = {name: x.clone() for name, x in steps.model.state_dict().items()}
    first = gradient_of(steps, batch)
    steps.model.load_state_dict(start)
    assert torch.equal(gradient_of(steps, batch), first)


def test_each_group_learns_at_its_rate(folder, tmp_path, monkeypatch, score):
    rates = []

    def recorded(model, criterion, optimizer, *_):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return {"class_0": torch.tensor(1.0)}, torch.tensor(1.0)

    monkeypatch.setattr(train, "train_step", recorded)
    assert train_in(folder, tmp_path, "--set", "backbone_lr=0.5", "--set", "warmup=1") == 0
    full = [1e-3 * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]
    assert [max(r) for r in rates] == pytest.approx([full[0] / 2, full[1], full[2]])
    assert [min(r) for r in rates] == pytest.approx([r / 2 for r in map(max, rates)])


def test_each_epoch_and_each_seed_augments_the_images_in_another_way(four, tmp_path, monkeypatch, score):
    seen = []

    def recorded(model, criterion, optimizer, scaler, micro_batches, *_):
        [(images, _)] = micro_batches
        seen.append({image.numpy().tobytes() for image in images})
        return {"class_0": torch.tensor(1.0)}, torch.tensor(1.0)

    monkeypatch.setattr(train, "train_step", recorded)
    for seed in (0, 1):
        assert train_in(four, tmp_path / str(seed), "--epochs", 2, "--seed", seed) == 0
    first, second, other_seed, _ = seen
    assert first != second and first != other_seed


def test_a_batch_without_objects_trains():
    nothing = {
        "labels": torch.zeros(0, dtype=torch.int64),
        "boxes": torch.zeros(0, 4),
        "masks": torch.zeros(0, 64, 64, dtype=torch.bool),
        "image_id": 1,
    }
    steps = Steps()((torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [nothing, nothing]))
    assert all(map(math.isfinite, steps.losses.values())) and sum(steps.losses.values()) > 0


def test_a_run_denoises_evaluates_and_trains_as_its_settings_say(four, tmp_path, monkeypatch, score, capsys):
    noise, amps, training = set(), [], []
    step, evaluate = train.train_step, train.evaluate

    def recorded(targets, num_classes, queries, label_noise):
        noise.add((queries, label_noise))
        return denoising_queries(targets, num_classes, queries, label_noise)

    def watched(model, *rest):
        training.append(all(module.training for module in model.modules()))
        amps.append(rest[-1])
        return step(model, *rest)

    monkeypatch.setattr(train, "denoising_queries", recorded)
    monkeypatch.setattr(train, "train_step", watched)
    monkeypatch.setattr(train, "amp_for", lambda device, backbone: {"tiny": "bf16"}[backbone])
    monkeypatch.setattr(train, "evaluate", lambda *args: amps.append(args[-1]) or evaluate(*args))
    assert train_in(four, tmp_path, "--epochs", 2) == 0
    assert noise == {(8, Recipe.tiny().label_noise)}
    assert amps == ["bf16"] * 4 and "autocast bf16" in capsys.readouterr().out
    assert training == [True, True]  # also after the evaluation of the first epoch


# ---- What people watch -----------------------------------------------------------------------------------------------


def test_the_first_lines_tell_all_settings_and_the_bar_moves_by_steps(folder, tmp_path, monkeypatch, still, capsys):
    moved = []
    monkeypatch.setattr("tqdm.tqdm.update", lambda bar, steps=1: moved.append(steps))
    assert train_in(folder, tmp_path) == 0
    assert moved == [1, 1, 1]
    lines = iter(capsys.readouterr().out.splitlines())
    for said in ("device: CPU", "deform_attn: ", "12 training and 5 validation images, 3 classes (box, plate, tile)"):
        assert said in next(lines)
    assert "tiny" in next(lines) and "1 x 3 steps of 4 images, lr 1.0e-03" in next(lines)


def test_the_log_has_every_loss_the_rate_the_speed_and_ap(trained):
    steps, metrics = ([r for r in log_of(trained) if name in r] for name in ("loss", "AP_box"))
    assert [(r["epoch"], r["step"]) for r in steps] == [(0.3333, 1), (1, 3), (2, 6)]
    assert [(r["epoch"], r["step"]) for r in metrics] == [(1, 3), (2, 6)]
    for record in steps:
        terms = [v for name, v in record.items() if name.split("_")[0] in ("class", "box", "giou", "mask", "dice")]
        assert sum(terms) == pytest.approx(record["loss"], rel=1e-4)
        assert {"lr", "images_per_second", "waiting_for_data", "dice_2", "class_selection"} <= record.keys()
    assert {f"AP_{what}{area}" for what in ("box", "mask") for area in ("", "_S", "_M", "_L")} <= metrics[0].keys()


def test_the_logged_speed_is_that_of_the_steps_since_the_line_before(folder, tmp_path, monkeypatch, score):
    now = [0.0]  # a clock that a step takes half a second of

    def slow(*_):
        now[0] += 0.5
        return {"class_0": torch.tensor(1.0)}, torch.tensor(1.0)

    monkeypatch.setattr(train, "train_step", slow)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    assert train_in(folder, tmp_path) == 0  # in batches of 4 images, with a line after steps 1 and 3
    assert [r["images_per_second"] for r in log_of(tmp_path) if "loss" in r] == [8, 8]


def test_each_epoch_leaves_curves_predictions_and_pictures(trained):
    assert Image.open(trained / "curves.png").size[0] > 500
    assert len(json.loads((trained / "predictions.json").read_text())) == 5 * 18  # 6 queries of 3 classes
    assert {path.name for path in (trained / "pictures").iterdir()} == {"all.png", *(f"{i}.png" for i in range(1, 6))}


def test_resuming_drops_lines_never_saved_and_one_cut_short(tmp_path):
    log = Log(tmp_path, steps=6, steps_per_epoch=3)
    for step in (1, 3, 5):
        log.write(step, {"loss": 1.0})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 2, "st')
    Log(tmp_path, 6, 3, step=3, saved_step=3).write(4, {"loss": 0.5})
    assert [record["step"] for record in log_of(tmp_path)] == [1, 3, 4]


@pytest.mark.parametrize("error", ["ImportError", "TypeError('Descriptors cannot be created directly.')"])
def test_a_tensorboard_that_does_not_import_is_as_if_not_there(tmp_path, monkeypatch, error):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "__init__.py").write_text(f"raise {error}")
    for name in [n for n in __import__("sys").modules if n.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(__import__("sys").modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    Log(tmp_path, 6, 3).write(1, {"loss": 1.0})
    assert len(log_of(tmp_path)) == 1


def test_tensorboard_gets_every_number_where_it_is_installed(tmp_path, monkeypatch):
    log, seen = Log(tmp_path, 6, 3), []
    log.tensorboard = type("Writer", (), {"add_scalar": lambda self, *values: seen.append(values)})()
    log.write(2, {"loss": 1.0, "AP_box": None})
    assert seen == [("loss", 1.0, 2)]


def test_images_without_objects_are_evaluated_and_not_trained_on(tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path, split, 3)
        path = tmp_path / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] > 1]
        path.write_text(json.dumps(content))
    args = train.parse_training(flags_of(tmp_path, "unused"))
    assert [len(dataset) for dataset in train.open_data(args, train.choose_recipe(args))] == [2, 3]


def test_images_with_more_objects_than_queries_are_counted(folder, tmp_path, capsys):
    assert train_in(folder, tmp_path, "--check", "--set", "selection=(12,2)") == 0
    said = "4 training images have more objects than the model has queries, 2: see --set selection"
    assert said in capsys.readouterr().out


def test_check_decodes_every_image_in_one_process_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "launch", None)
    write_images(tmp_path, "train", 3)
    write_images(tmp_path, "val", 2)
    flags = tmp_path, tmp_path / "out", "--check", "--gpus", 4
    assert train_in(*flags) == 0
    assert "3 training and 2 validation images" in capsys.readouterr().out and not (tmp_path / "out").exists()
    (tmp_path / "val" / "2.png").write_bytes(b"no image")
    assert train_in(*flags) == 2
    assert "2.png" in capsys.readouterr().err


def test_a_single_json_trains_and_holds_images_out(folder, tmp_path, still, capsys):
    files = "--train-json", folder / "annotations" / "instances_train.json", "--image-folder", folder / "train"
    assert exit_code(train.main, [*SMALL, *map(str, files), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "every tenth image is held out" in said and "10 training and 2 validation images" in said


# ---- What is learnt --------------------------------------------------------------------------------------------------


def divergence_from_uniform(model, images):
    """Mean Kullback-Leibler divergence of Eq. 8's attention weights from uniform ones."""
    inputs = []
    hook = model.bato.attention.mha.register_forward_pre_hook(lambda _, args: inputs.append(args))
    with torch.no_grad():
        model.eval()(images)
        hook.remove()
        weights = model.bato.attention.mha(*inputs[0], average_attn_weights=False)[1]  # [B h N G]
    return (weights * (weights * weights.shape[-1]).log()).sum(-1).mean().item()


def test_eq8_attends_to_some_guiding_tokens_more_after_thirty_steps(tmp_path):
    # With an MLP of its own as N_mask the attention stayed uniform (0.8 of the start after 30 steps).
    resized = partial(AUGMENTATIONS["none"], 64)
    shapes = open_dataset(Source("shapes", str(tmp_path)), "val", resized, training=True)
    images, targets = collate([shapes[i] for i in range(4)])
    torch.manual_seed(0)
    sizes = {"dim": 32, "heads": 2, "ffn": 48, "selection": (20, 10), "decoder_layers": 2}
    model = DIMaskDINO(dataclasses.replace(Config.tiny(), **sizes))
    recipe = dataclasses.replace(Recipe.tiny(), mask_points=64, denoising=8)
    criterion, optimizer = Criterion(recipe), make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = divergence_from_uniform(model, images)
    for _ in range(30):
        train_step(model.train(), criterion, optimizer, scaler, [(images, targets)], recipe, "off")
    assert divergence_from_uniform(model, images) > 5 * before
