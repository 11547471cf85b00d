"""What train.py promises where a run is interrupted, a file is damaged, a disk full or a number not finite."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision

import train
from dimaskdino import Config, Norm
from small_runs import FOUR, Steps, batch_of, flags_of, log_of, open_training, same, train_in, weights, write_images
from util import distributed
from util.weights import read_checkpoint

HERE = Path(train.__file__).parent


@pytest.fixture(autouse=True)
def cheap(score):
    """No test here needs an evaluation."""


def start(args, checkpoint=None):
    """The model that a run begins with."""
    args = train.parse_training(args)
    return train.build_model(args, train.choose_config(args, 3), checkpoint)


# ---- Interruptions ---------------------------------------------------------------------------------------------------


def signal_at(call, number, patch):
    """A real signal to this process while it takes its first, second, ... step."""
    step, calls = train.train_step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return step(*arguments)

    patch.setattr(train, "train_step", interrupted)


@pytest.mark.parametrize("workers, step", [(0, 2), (2, 3)])  # amid the first epoch, and at its end
def test_a_run_interrupted_and_resumed_ends_bit_equal_to_one_that_was_not(folder, trained, tmp_path, workers, step):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(step, signal.SIGTERM, patch)
        assert train_in(folder, tmp_path, "--epochs", 2, "--workers", workers) == 143
    stopped = read_checkpoint(tmp_path / "last.pt")
    assert stopped["step"] == step and not same(stopped["model"], weights(trained))
    assert train_in(folder, tmp_path, "--epochs", 2, "--workers", workers, "--resume") == 0
    assert same(weights(tmp_path), weights(trained))
    losses = [[r["loss"] for r in log_of(out) if "loss" in r and r["step"] == 6] for out in (tmp_path, trained)]
    assert losses[0] == losses[1]


def test_the_seed_alone_decides_what_a_run_learns(four, tmp_path):
    for run, seed in {"first": 0, "second": 0, "other": 1}.items():
        assert train_in(four, tmp_path / run, "--seed", seed) == 0
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert not same(weights(tmp_path / "first"), weights(tmp_path / "other"))


@pytest.mark.parametrize("number", distributed.SIGNALS)
def test_a_signal_finishes_the_step_saves_and_ends_with_128_and_its_number(folder, tmp_path, capsys, number, still):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(1, number, patch)
        assert train_in(folder, tmp_path) == 128 + number
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert "after step 1: --resume goes on" in capsys.readouterr().out


def test_a_signal_during_evaluation_ends_at_once_and_resuming_evaluates(folder, tmp_path, still):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train_in(folder, tmp_path) == 143
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 3 and [*aps(tmp_path)] == []
    assert train_in(folder, tmp_path, "--resume") == 0
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 3 and [*aps(tmp_path)] == [3]


def aps(out):
    """The steps at which a run was evaluated."""
    return [record["step"] for record in log_of(out) if "AP_box" in record]


# ---- Going on --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_all_that_is_needed_in_plain_types(folder, trained):
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    needed = ("model", "optimizer", "scaler", "epoch", "step", "best", "config", "recipe", "classes", "seed", "torch")
    assert set(needed) <= checkpoint.keys()
    assert checkpoint["classes"] == ["box", "plate", "tile"] and checkpoint["category_ids"] == [2, 5, 8]
    assert Config(**checkpoint["config"]).selection == (12, 6)
    assert checkpoint["source"]["data"] == str(folder)


def test_a_run_goes_on_with_another_autocast_and_keeps_fp16s_scale(folder, tmp_path, still):
    for epochs, amp in enumerate(("off", "fp16", "fp16", "bf16"), 1):
        assert train_in(folder, tmp_path, "--epochs", epochs, "--amp", amp, "--batch-size", 12, "--resume") == 0
        checkpoint = read_checkpoint(tmp_path / "last.pt")
        if epochs == 2:
            torch.save({**checkpoint, "scaler": {**checkpoint["scaler"], "scale": 2.0}}, tmp_path / "last.pt")
        if epochs == 3:
            assert checkpoint["scaler"]["scale"] == 2.0
    assert checkpoint["step"] == 4


def test_a_run_goes_on_with_other_images_and_says_so(folder, tmp_path, capsys, still):
    run = tmp_path / "run"
    assert train_in(folder, run) == 0
    assert train_in(folder, run, "--resume") == 0
    assert "goes on with" not in capsys.readouterr().out
    before = log_of(run)
    shutil.copytree(folder, tmp_path / "mended")  # without damaged images: an epoch has one step now, and had three
    path = tmp_path / "mended" / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][:7]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 7]
    path.write_text(json.dumps(content))
    assert train_in(tmp_path / "mended", run, "--resume", "--epochs", 3) == 0
    said = f"12 images of {folder} data: the run goes on with 7 images of {tmp_path / 'mended'} data"
    assert said in capsys.readouterr().out
    checkpoint = read_checkpoint(run / "last.pt")
    assert (checkpoint["epoch"], checkpoint["step"]) == (3, 3) and log_of(run)[: len(before)] == before


def test_no_epoch_is_skipped_where_one_was_stopped_later_than_it_ends_now(folder, four, tmp_path, still):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(2, signal.SIGTERM, patch)
        assert train_in(folder, tmp_path) == 143
    assert train_in(four, tmp_path, "--resume", "--epochs", 3) == 0  # an epoch has one step now, and had three
    assert aps(tmp_path) == [1, 2, 3]


def test_other_classes_are_refused_with_those_that_differ(trained, tmp_path, capsys):
    for split in ("train", "val"):
        write_images(tmp_path, split, 4, classes=("box", "plate", "lid"))
    assert train_in(tmp_path, trained, "--resume") == 2
    message = capsys.readouterr().err
    assert "only" in message and "tile" in message and "lid" in message and "plate" not in message


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--set", "ffn=64"), "ffn was 48, not 64"),
        (("--batch-size", 6), "batch_size was 4, not 6"),
        (("--seed", 3), "seed was 0, not 3"),
    ],
)
def test_a_checkpoint_made_with_other_settings_is_refused(folder, trained, capsys, flags, named):
    assert train_in(folder, trained, "--resume", *flags) == 2
    assert named in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(folder, trained, tmp_path, capsys):
    before = (trained / "last.pt").read_bytes()
    assert train_in(folder, trained) == 2
    assert "--resume" in capsys.readouterr().err and (trained / "last.pt").read_bytes() == before
    (tmp_path / "best.pt").write_bytes(before)
    for flags in ((), ("--resume",)):
        assert train_in(folder, tmp_path, *flags) == 2
    assert (tmp_path / "best.pt").read_bytes() == before


def test_a_start_that_failed_leaves_no_run(folder, tmp_path, still):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", lambda *_: sys.exit("too little memory"))
        assert train_in(folder, tmp_path / "run") == "too little memory"
    assert train_in(folder, tmp_path / "run", "--batch-size", 2) == 0


def test_a_folder_that_another_run_holds_is_left_alone(folder, tmp_path, capsys):
    with multiprocessing.get_context("fork").Pool(1) as other:
        other.apply(hold, (tmp_path,))
        assert train_in(folder, tmp_path) == 2
    assert f"{tmp_path} is in use by process" in capsys.readouterr().err


HELD = contextlib.ExitStack()


def hold(folder):
    HELD.enter_context(distributed.held(folder))


# ---- Files that are written ------------------------------------------------------------------------------------------


def test_what_last_pt_says_of_the_best_is_true_whenever_a_run_is_killed(folder, tmp_path, monkeypatch, score, still):
    score += [10.0, 30.0, 20.0]
    save, bests = train.save, []

    def save_and_look(path, state):
        written = save(path, state)
        for file in ("best.pt", "last.pt"):
            bests.append(read_checkpoint(tmp_path / file)["best"] if (tmp_path / file).exists() else -1.0)
        return written

    monkeypatch.setattr(train, "save", save_and_look)
    assert train_in(folder, tmp_path, "--epochs", 3) == 0
    assert bests[-2:] == [17.5, 17.5] and all(best >= last for best, last in zip(bests[::2], bests[1::2], strict=True))


def test_best_is_never_overwritten_by_a_worse_epoch_also_after_a_resume(folder, tmp_path, score, still):
    score += [10.0, 30.0, 20.0, 25.0]
    assert train_in(folder, tmp_path, "--epochs", 3) == 0
    assert train_in(folder, tmp_path, "--epochs", 4, "--resume") == 0
    best, last = read_checkpoint(tmp_path / "best.pt"), read_checkpoint(tmp_path / "last.pt")
    assert (best["epoch"], best["best"], last["epoch"], last["best"]) == (2, 17.5, 4, 17.5)


def test_a_best_that_could_not_be_written_is_not_taken_for_the_best(folder, tmp_path, score, capsys, still):
    score += [30.0, 10.0]
    (tmp_path / "best.pt.tmp").symlink_to("/dev/full")  # for one write, after which the link is gone
    (tmp_path / "predictions.json").symlink_to("/dev/full")
    assert train_in(folder, tmp_path, "--epochs", 2) == 0
    assert read_checkpoint(tmp_path / "best.pt")["epoch"] == 2
    first, *_ = warnings = capsys.readouterr().err.splitlines()
    assert first.count("was not written") == 1 and "predictions.json was not written: No space left" in first
    assert any("best.pt was not written: No space left" in line for line in warnings)


def test_kill_9_while_saving_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    state = {"model": {f"{i}": torch.full((1000,), float(i)) for i in range(300)}}

    def save_for_ever():
        while True:
            train.save(path, state)

    for pause in (0.02, 0.05, 0.09):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever)
        process.start()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert same(weights(tmp_path), state["model"])


def test_a_write_that_fails_midway_warns_and_leaves_the_old_checkpoint(tmp_path, capsys):
    path = tmp_path / "last.pt"
    assert train.save(path, {"step": 0})
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")  # a device on which every write finds the disk full
    assert not train.save(path, {"step": 7})
    assert read_checkpoint(path)["step"] == 0
    assert "last.pt was not written: No space left on device; an older one stays" in capsys.readouterr().err
    assert train.save(path, {"step": 7})  # there is room again
    assert read_checkpoint(path)["step"] == 7


@pytest.mark.parametrize("signals", [False, True])
def test_a_run_that_cannot_save_says_so_and_does_not_end_well(folder, tmp_path, monkeypatch, capsys, signals, still):
    if signals:
        signal_at(1, signal.SIGTERM, monkeypatch)
    monkeypatch.setattr(torch, "save", full_disk)
    assert train_in(folder, tmp_path) == (143 if signals else 1)
    said = capsys.readouterr()
    assert "could not be" in said.out + said.err and "last.pt was not written: No space left" in said.err
    assert "the best" not in said.out and "goes on" not in said.out and not list(tmp_path.glob("*.pt*"))


def full_disk(state, file):
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- Files that are read ---------------------------------------------------------------------------------------------


def spoil(checkpoint, path, how):
    """A file that is no checkpoint of this run, in one of the ways that occur."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "list":
        torch.save([1, 2], path)
    else:
        torch.save({name: value for name, value in checkpoint.items() if name != how}, path)


@pytest.mark.parametrize("how", ["truncated", "list", "optimizer", "model"])
def test_a_file_that_is_no_checkpoint_is_named_and_stays(folder, trained, tmp_path, capsys, how):
    path = tmp_path / "last.pt"
    path.write_bytes((trained / "last.pt").read_bytes())
    spoil(read_checkpoint(path), path, how)
    broken = path.read_bytes()
    assert train_in(folder, tmp_path, "--resume") == 2
    assert "last.pt" in capsys.readouterr().err and path.read_bytes() == broken


def test_init_takes_every_tensor_that_fits_and_names_the_others(folder, trained, capsys):
    model = start(flags_of(folder, "out", "--init", trained / "best.pt", "--set", "ffn=64")).state_dict()
    given = weights(trained, "best.pt")
    odd = {name for name, x in model.items() if x.shape != given[name].shape}
    message = capsys.readouterr().out
    assert odd and all(name in message for name in odd)
    assert same({k: v for k, v in model.items() if k not in odd}, {k: v for k, v in given.items() if k not in odd})


def test_a_backbone_that_init_leaves_empty_gets_its_own_weights(folder, trained, tmp_path, monkeypatch):
    net = torchvision.models.resnet18()
    monkeypatch.setattr(train, "imagenet", lambda backbone: {"resnet18": net.state_dict()}[backbone])
    resnet = [*flags_of(folder, "out"), "--set", "backbone=resnet18"]
    fresh = start(resnet)
    assert torch.equal(fresh.backbone.stages[2][0].conv1.weight, net.layer2[0].conv1.weight)
    init = ["--init", str(trained / "last.pt")]
    model = start([*resnet, *init])
    assert torch.equal(model.backbone.stages[2][0].conv1.weight, net.layer2[0].conv1.weight)
    assert torch.equal(model.label_embed.weight, weights(trained)["label_embed.weight"])
    torch.nn.init.constant_(net.layer2[0].conv1.weight, 0.25)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    model = start([*resnet, *init, "--backbone-weights", str(tmp_path / "net.pt")])
    assert (model.backbone.stages[2][0].conv1.weight == 0.25).all()
    monkeypatch.setattr(train, "imagenet", None)  # not asked where --init fills the backbone, or nobody wants weights
    start([*flags_of(folder, "out"), *init])
    start([*resnet, *init, "--backbone-weights", "none"])


def test_of_a_whole_model_backbone_weights_are_those_of_its_backbone(folder, trained):
    flags = ["--seed", "1", "--backbone-weights", str(trained / "best.pt")]
    model = start(flags_of(folder, "out", *flags))
    fresh = start(flags_of(folder, "out", "--seed", "1"))
    given = weights(trained, "best.pt")
    assert all(norm.frozen for norm in model.backbone.modules() if isinstance(norm, Norm))
    for name, x in model.state_dict().items():
        assert torch.equal(x, given[name] if name.startswith("backbone.") else fresh.state_dict()[name])


# ---- Numbers that are not finite -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_with_step_term_rate_and_images(folder, tmp_path, monkeypatch, capsys):
    losses = [1.0, 1.0, 1.0, 1.0, math.nan, 1.0]
    terms = ({"class_0": torch.tensor(1.0), "dice_1": torch.tensor(x)} for x in losses)
    monkeypatch.setattr(train, "train_step", lambda *_: (next(terms), torch.tensor(1.0)))
    assert train_in(folder, tmp_path, "--epochs", 2) == 1
    message = capsys.readouterr().err
    assert "step 5 (epoch 2, lr " in message and "dice_1 nan" in message and "class_0" not in message
    images = json.loads(message[message.index("images [") + len("images ") : message.index("]") + 1])
    order = train.micro_batches_of(12, train.Recipe(batch_size=4), epoch=1, seed=0)[1]
    assert images == [i + 1 for i in order.flatten()]  # image ids begin with 1
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_predictions_that_are_not_finite_end_before_they_are_matched(folder, tmp_path, monkeypatch, capsys):
    build = train.build_model

    def broken(*args):
        model = build(*args)
        model.det_head.classifier.weight.data.fill_(math.inf)
        return model

    monkeypatch.setattr(train, "build_model", broken)
    assert train_in(folder, tmp_path) == 1
    message = capsys.readouterr().err
    assert "step 1 (epoch 1" in message and "not finite: predicted logits" in message


@pytest.mark.parametrize("amp, scale", [("off", 1), ("fp16", 64)])  # half of what it was
def test_a_gradient_that_is_not_finite_changes_no_weight(folder, amp, scale):
    steps, images = Steps(amp), open_training(folder)
    before = {name: x.clone() for name, x in steps.model.named_parameters()}
    handle = steps.model.det_head.classifier.weight.register_hook(lambda grad: grad * math.inf)
    steps(batch_of(images, *FOUR[:2]))
    assert not steps.norm.isfinite() and same(before, dict(steps.model.named_parameters()))
    assert steps.scaler.get_scale() == scale
    handle.remove()
    steps(batch_of(images, *FOUR[:2]))
    assert not same(before, dict(steps.model.named_parameters()))


def test_fp16_that_never_steps_ends_with_a_message(folder, tmp_path, monkeypatch, capsys):
    def overflow(model, criterion, optimizer, scaler, *_):
        scaler.scale(torch.ones(1))
        scaler.update(scaler.get_scale() / 2)  # what a step that it skips does
        return {"class_0": torch.tensor(1.0)}, torch.tensor(math.inf)

    monkeypatch.setattr(train, "train_step", overflow)
    assert train_in(folder, tmp_path, "--amp", "fp16", "--epochs", 20) == 1
    assert "fp16 trains nothing: the gradient is not finite" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 27  # the scale has halved 30 times at the end of an epoch


# ---- Faults of users -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, workers", [("train", 0), ("train", 2), ("val", 0)])
def test_an_image_that_cannot_be_read_is_named_and_steps_are_kept(tmp_path, monkeypatch, capfd, split, workers):
    monkeypatch.undo()  # with a real evaluation
    write_images(tmp_path / "data", "train", 4)
    write_images(tmp_path / "data", "val", 2)
    order = train.micro_batches_of(4, train.Recipe(batch_size=1), epoch=0, seed=0).flatten()
    image = order[2] + 1 if split == "train" else 2
    (tmp_path / "data" / split / f"{image}.png").write_bytes(b"no image")
    assert train_in(tmp_path / "data", tmp_path / "out", "--batch-size", 1, "--workers", workers) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith(f"{tmp_path}/data/{split}/{image}.png")
    assert read_checkpoint(tmp_path / "out" / "last.pt")["step"] == (2 if split == "train" else 4)


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--set", "dims=32"), "fields are"),
        (("--set", "dim=wide"), "dim=wide"),
        (("--set", "guidance=T_x"), "T_x"),
        (("--batch-size", 5, "--accumulate", 2), "multiple of"),
        (("--image-size", 100), "multiple of 32"),
        (("--init", "nowhere.pt"), "nowhere.pt"),
        (("--backbone-weights", "nowhere.pt"), "nowhere.pt"),
        (("--set", "heads=0"), "heads=0 is less than 1"),
        (("--set", "mask_points=0"), "mask_points=0 is not above 0"),
        (("--data", "bdd100k", "--image-folder", "x"), "leave out --image-folder"),
        (("--data", "nowhere"), "expected annotations"),
        (("--epochs", 0), "at least 1"),
        (("--seed", -1), "-1 is not at least 0"),
        (("--seed", 2**64), "too large"),
        (("--workers", -1), "-1 is not at least 0"),
        (("--lr", "nan"), "nan is not at least"),
        (("--val-json", "x.json"), "add --train-json"),
        (("--train-json", "x.json"), "there is no x.json"),
        (("--gpus", 2, "--device", "cuda"), "GPU"),
        (("--device", "cuda:7"), "GPU"),
    ],
)
def test_a_wrong_flag_gets_a_message_and_exit_code_2(folder, tmp_path, capsys, flags, named):
    assert train_in(folder, tmp_path / "out", *flags) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train_in(folder, tmp_path / "file") == 2
    assert f"nothing can be written to {tmp_path / 'file'}: a file is in the way" in capsys.readouterr().err


def test_any_seed_of_64_bits_trains(folder, tmp_path, still):
    assert train_in(folder, tmp_path, "--seed", 2**64 - 1) == 0
