"""What train.py promises where a run is interrupted, a file is damaged or a number is not finite."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torchvision

import train
from dimaskdino import Config
from small_runs import (
    FOUR,
    exit_code,
    log_of,
    new_run,
    parts_of,
    same,
    train_in,
    weights,
    write_images,
)
from util.weights import read_checkpoint

# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def signal_at(step, number, patch):
    """A real signal to this process while it takes the given step."""
    update = train.update

    def interrupted(run, *rest):
        if run.step == step - 1:
            os.kill(os.getpid(), number)
        update(run, *rest)

    patch.setattr(train, "update", interrupted)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [2, 3])  # amid the first epoch and at its end
def test_a_run_that_is_interrupted_and_resumed_ends_bit_equal_to_one_that_was_not(
    folder, trained, tmp_path, workers, step
):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(step, signal.SIGTERM, patch)
        assert train_in(folder, tmp_path, "--epochs", 2, "--workers", workers) == 143
    stopped = read_checkpoint(tmp_path / "last.pt")
    assert stopped["step"] == step and not same(stopped["model"], weights(trained))
    assert train_in(folder, tmp_path, "--epochs", 2, "--workers", workers, "--resume") == 0
    assert same(weights(tmp_path), weights(trained))
    ours, theirs = ([record for record in log_of(out) if "AP_box" in record] for out in (tmp_path, trained))
    assert ours == theirs


def test_two_runs_with_one_seed_are_bit_equal_and_another_seed_differs(folder, trained, tmp_path):
    assert train_in(folder, tmp_path / "same", "--epochs", 2) == 0
    assert train_in(folder, tmp_path / "other", "--epochs", 2, "--seed", 1) == 0
    assert same(weights(tmp_path / "same"), weights(trained))
    assert not same(weights(tmp_path / "other"), weights(trained))


def test_ctrl_c_finishes_the_step_saves_and_ends_with_130(folder, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(1, signal.SIGINT, patch)
        assert train_in(folder, tmp_path) == 130
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert "--resume" in capsys.readouterr().out


def test_a_signal_during_evaluation_ends_at_once_and_resuming_evaluates(folder, trained, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train_in(folder, tmp_path, "--epochs", 2) == 143
    assert not any("AP_box" in record for record in log_of(tmp_path))
    assert train_in(folder, tmp_path, "--epochs", 2, "--resume") == 0
    assert same(weights(tmp_path), weights(trained)) and sum("AP_box" in record for record in log_of(tmp_path)) == 2


def test_a_checkpoint_holds_all_that_is_needed_in_plain_types(trained):
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    needed = ("model", "optimizer", "scaler", "epoch", "step", "best", "config", "recipe", "classes", "seed")
    assert set(needed) <= checkpoint.keys()
    assert checkpoint["classes"] == ["box", "plate", "tile"]
    assert Config(**checkpoint["config"]).selection == (12, 6)


def test_fp16s_scale_survives_a_resume(folder, tmp_path):
    assert train_in(folder, tmp_path, "--amp", "fp16") == 0
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    checkpoint["scaler"]["scale"] = 123.0
    torch.save(checkpoint, tmp_path / "last.pt")
    assert new_run(folder, tmp_path, "--amp", "fp16", "--resume").scaler.get_scale() == 123.0


@pytest.mark.parametrize("order", [("off", "fp16", "bf16"), ("fp16", "off", "fp16"), ("bf16", "fp16", "off")])
def test_a_run_goes_on_with_another_autocast(folder, tmp_path, order):
    for epochs, amp in enumerate(order, 1):
        assert train_in(folder, tmp_path, "--epochs", epochs, "--amp", amp, "--resume") == 0
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 9


def test_a_run_goes_on_where_a_damaged_image_was_taken_out_and_says_so(tmp_path, capsys):
    write_images(tmp_path, "train", 12)
    write_images(tmp_path, "val", 1)
    assert train_in(tmp_path, tmp_path / "run") == 0
    path = tmp_path / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["images"] = content["images"][:7]  # an epoch has one step now, and had three
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] <= 7]
    path.write_text(json.dumps(content))
    before = log_of(tmp_path / "run")
    assert train_in(tmp_path, tmp_path / "run", "--resume", "--epochs", 3) == 0
    assert "there were 12 training images and are 7 now" in capsys.readouterr().out
    checkpoint = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (checkpoint["epoch"], checkpoint["step"]) == (3, 3) and log_of(tmp_path / "run")[: len(before)] == before


def test_other_classes_are_refused_with_those_that_differ(folder, trained, tmp_path, capsys):
    for split in ("train", "val"):
        write_images(tmp_path, split, 4, classes=("box", "plate", "lid"))
    assert train_in(tmp_path, trained, "--resume") == 2
    message = capsys.readouterr().err
    assert "only" in message and "tile" in message and "lid" in message and "plate" not in message


def test_a_run_that_goes_on_with_other_data_says_so(folder, trained, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(trained, tmp_path / "run")
    assert train_in(tmp_path / "copy", tmp_path / "run", "--resume") == 0
    assert f"trained on {folder}: the run goes on with {tmp_path / 'copy'}" in capsys.readouterr().out
    assert train_in(folder, tmp_path / "run", "--resume") == 0
    assert "goes on with" not in capsys.readouterr().out


def score_epochs(patch, *scores):
    """Every epoch gets its AP_box from a list."""
    scores = iter(scores)
    nothing = {name + area: None for name in ("AP_box", "AP_mask") for area in ("", "_50", "_S", "_M", "_L")}
    patch.setattr(train, "evaluate", lambda *_: ({**nothing, "AP_box": next(scores), "AP_mask": 5.0}, []))


def test_what_the_last_checkpoint_says_of_the_best_is_true_wherever_a_run_is_killed(folder, tmp_path, monkeypatch):
    score_epochs(monkeypatch, 10.0, 30.0, 20.0)
    save, bests = train.save, []

    def save_and_look(run, name):
        written = save(run, name)
        for file in ("best.pt", "last.pt"):
            bests.append(read_checkpoint(tmp_path / file)["best"] if (tmp_path / file).exists() else -1.0)
        return written

    monkeypatch.setattr(train, "save", save_and_look)
    assert train_in(folder, tmp_path, "--epochs", 3) == 0
    assert bests[-2:] == [17.5, 17.5] and all(best >= last for best, last in zip(bests[::2], bests[1::2], strict=True))


def test_a_best_that_could_not_be_written_is_not_taken_for_the_best(folder, tmp_path, monkeypatch):
    score_epochs(monkeypatch, 30.0, 10.0)
    (tmp_path / "best.pt.tmp").symlink_to("/dev/full")  # for one write, after which the link is gone
    assert train_in(folder, tmp_path, "--epochs", 2) == 0
    assert read_checkpoint(tmp_path / "best.pt")["epoch"] == 2


def test_best_is_never_overwritten_by_a_worse_epoch_also_after_a_resume(folder, tmp_path, monkeypatch):
    score_epochs(monkeypatch, 10.0, 30.0, 20.0, 25.0)
    assert train_in(folder, tmp_path, "--epochs", 3) == 0
    assert train_in(folder, tmp_path, "--epochs", 4, "--resume") == 0
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
    assert train_in(folder, tmp_path, "--epochs", 2) == 0
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
def test_a_file_that_is_no_checkpoint_is_named_and_refused_and_never_runs_code(
    folder, trained, tmp_path, monkeypatch, capsys, how
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    path.write_bytes((trained / "last.pt").read_bytes())
    spoil(read_checkpoint(path), path, how)
    broken = path.read_bytes()
    assert train_in(folder, tmp_path, "--resume") == 2
    assert "last.pt" in capsys.readouterr().err
    assert path.read_bytes() == broken and not Path("exploded").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--set", "ffn=64"), "ffn was 48, not 64"),
        (("--batch-size", 6), "batch_size was 4, not 6"),
        (("--seed", 3), "seed was 0, not 3"),
    ],
)
def test_a_checkpoint_made_with_other_settings_is_refused_with_their_names(folder, trained, capsys, flags, named):
    assert train_in(folder, trained, "--resume", *flags) == 2
    assert named in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_not_overwritten(folder, trained, capsys):
    before = (trained / "last.pt").read_bytes()
    assert train_in(folder, trained) == 2
    assert "--resume" in capsys.readouterr().err and (trained / "last.pt").read_bytes() == before


def test_a_folder_with_nothing_but_a_best_checkpoint_is_not_overwritten(folder, trained, tmp_path, capsys):
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
    for flags in ((), ("--resume",)):
        assert train_in(folder, tmp_path, *flags) == 2
    assert (tmp_path / "best.pt").read_bytes() == (trained / "best.pt").read_bytes()


def test_any_seed_of_64_bits_trains(folder, tmp_path):
    assert train_in(folder, tmp_path, "--seed", 2**64 - 1) == 0


def test_init_takes_every_tensor_that_fits_and_names_the_others(trained, tmp_path, capsys):
    write_images(tmp_path / "data", "train", 4, classes=("box", "lid"))
    write_images(tmp_path / "data", "val", 2, classes=("box", "lid"))
    started = new_run(tmp_path / "data", tmp_path / "out", "--init", trained / "best.pt")
    given = weights(trained, "best.pt")
    odd = {name for name, x in started.model.state_dict().items() if x.shape != given[name].shape}
    assert odd == {"det_head.classifier.weight", "det_head.classifier.bias", "label_embed.weight"}
    message = capsys.readouterr().out
    assert all(name in message for name in odd)
    assert same(
        {k: v for k, v in started.model.state_dict().items() if k not in odd},
        {k: v for k, v in given.items() if k not in odd},
    )


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


def test_init_that_leaves_the_backbone_empty_leaves_it_to_its_own_weights(folder, trained, tmp_path, monkeypatch):
    net = torchvision.models.resnet18()
    monkeypatch.setattr(train, "imagenet", lambda backbone: {"resnet18": net.state_dict()}[backbone])
    flags = ["--init", trained / "last.pt", "--set", "backbone=resnet18"]
    started = new_run(folder, tmp_path / "out", *flags).model
    assert torch.equal(started.backbone.stages[2][0].conv1.weight, net.layer2[0].conv1.weight)
    assert torch.equal(started.label_embed.weight, weights(trained)["label_embed.weight"])
    torch.nn.init.constant_(net.layer2[0].conv1.weight, 0.25)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    started = new_run(folder, tmp_path / "out", *flags, "--backbone-weights", tmp_path / "net.pt").model
    assert (started.backbone.stages[2][0].conv1.weight == 0.25).all()
    monkeypatch.setattr(train, "imagenet", None)  # not asked where --init fills the backbone, or nobody wants weights
    new_run(folder, tmp_path / "out", *flags[:2])
    new_run(folder, tmp_path / "out", *flags, "--backbone-weights", "none")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 cut"])
def test_a_damaged_download_is_named_with_what_to_do(folder, tmp_path, monkeypatch, capsys, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert train_in(folder, tmp_path / "out", *RESNET18) == 2
    message = capsys.readouterr().err
    assert str(file) in message and "delete it" in message and "Traceback" not in message


@pytest.mark.parametrize("backbone, named", [("resnet18", "https://download"), ("swin_l", "Swin-Transformer")])
def test_weights_that_cannot_be_had_are_named_with_the_way_out(folder, tmp_path, monkeypatch, capsys, backbone, named):
    monkeypatch.setenv("https_proxy", "http://localhost:9")  # where nobody answers
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert train_in(folder, tmp_path / "out", *RESNET18[:2], "--set", f"backbone={backbone}") == 2
    message = capsys.readouterr().err
    assert named in message and "--backbone-weights" in message


# ---- Faults ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_the_step_each_term_the_rate_and_the_images(
    folder, tmp_path, monkeypatch, capsys
):
    criterion = train.Criterion.forward
    calls = []

    def poisoned(self, *args):
        calls.append(1)
        return {
            name: loss * math.nan if len(calls) == 4 and name == "dice_1" else loss
            for name, loss in criterion(self, *args).items()
        }

    monkeypatch.setattr(train.Criterion, "forward", poisoned)
    assert train_in(folder, tmp_path, "--epochs", 2) == 1
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
    train.update(run, {}, [])
    assert exit_code(train.arrived, run) == 1
    assert same(before, run.model.state_dict()) and "gradient" in capsys.readouterr().err


def test_fp16_that_never_steps_ends_with_a_message(folder, tmp_path, capsys):
    run = new_run(folder, tmp_path, "--amp", "fp16")
    before = {name: x.clone() for name, x in run.model.state_dict().items()}
    for _ in range(train.MOST_SKIPPED):
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, math.inf)
        run.scaler.scale(torch.zeros(1))
        train.update(run, {}, [])
        if code := exit_code(train.arrived, run):
            break
    message = capsys.readouterr().err
    assert code == 1 and run.step == train.MOST_SKIPPED and "fp16 trains nothing" in message
    assert same(before, run.model.state_dict())


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(tmp_path, capfd, split, workers):
    write_images(tmp_path / "data", "train", 4)
    write_images(tmp_path / "data", "val", 2)
    (tmp_path / "data" / split / "2.png").write_bytes(b"no image")
    assert train_in(tmp_path / "data", tmp_path / "out", "--workers", workers) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith(f"{tmp_path}/data/{split}/2.png")


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
        (("--batch-size", -8), "-8 is not at least 1"),
        (("--lr", "-1"), "-1 is not at least"),
        (("--lr", "nan"), "nan is not at least"),
        (("--val-json", "x.json"), "add --train-json"),
        (("--train-json", "x.json"), "there is no x.json"),
        (("--gpus", 2, "--device", "cuda"), "GPU"),
    ],
)
def test_a_wrong_flag_gets_a_message_and_exit_code_2(folder, tmp_path, capsys, flags, named):
    assert train_in(folder, tmp_path / "out", *flags) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message


def test_faults_in_the_data_stop_a_run_before_its_first_step(tmp_path, capsys):
    write_images(tmp_path, "train", 3)
    write_images(tmp_path, "val", 1)
    path = tmp_path / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][1]["category_id"] = 91
    path.write_text(json.dumps(content))
    assert train_in(tmp_path, tmp_path / "out") == 2
    assert "91" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_check_decodes_every_image_and_trains_nothing(tmp_path, capsys):
    write_images(tmp_path, "train", 3)
    write_images(tmp_path, "val", 2)
    assert train_in(tmp_path, tmp_path / "out", "--check") == 0
    assert "3 training and 2 validation images" in capsys.readouterr().out and not (tmp_path / "out").exists()
    (tmp_path / "val" / "2.png").write_bytes(b"no image")
    assert train_in(tmp_path, tmp_path / "out", "--check") == 2
    assert "2.png" in capsys.readouterr().err
