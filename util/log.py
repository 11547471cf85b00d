"""Output of a run: lines or a progress bar, log.jsonl, curves.png, pictures, TensorBoard; and files and tables for all.

Only process 0 writes. If the disk is full, a warning is printed and the run goes on.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

import deform_attn_cuda
from datasets.coco import evenly_spaced
from datasets.images import shortened
from util.distributed import rank_and_world, say, unwritable, warn_of_emulation
from util.pictures import SCORE, draw_dataset

PICTURES = 8  # validation images drawn after each epoch, always the same ones


# ---- Files and tables ------------------------------------------------------------------------------------------------


def try_output(path: Path, is_folder: bool = True) -> None:
    """Raises OSError, which names the path, unless a file, or files in a folder, can be written."""
    folder = path if is_folder else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if not is_folder and path.exists():
            path.open("a").close()
    except OSError as error:
        raise unwritable(path, error) from None


def unused(path: Path) -> Path:
    """The path of a file or, where it is taken, the first free one with _2, _3, ... behind its stem."""
    free = path
    for number in itertools.count(2):
        if not free.exists():
            return free
        free = path.with_stem(f"{path.stem}_{number}")


def new_folder(path: Path) -> Path:
    """Makes a folder or, where it is taken, one with _2, _3, ...; safe against others who do so at the same time."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of another only once it is complete. Raises OSError, which names it."""
    special = path.exists() and not path.is_file()  # /dev/stdout or a pipe: written to, never replaced
    unfinished = path if special else path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            if not special:
                os.fsync(file.fileno())
        if not special:
            os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save reports some of the system's errors as RuntimeError
        if not special:
            with contextlib.suppress(OSError):
                unfinished.unlink()
        raise OSError(f"{path} was not written: {getattr(error, 'strerror', None) or error}") from None


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Writes a file so that it is never seen in part. Raises OSError, which names it."""
    with replaced(path) as file:
        file.write(json.dumps(value, indent=indent).encode())


PAPER = [name + suffix for name in ("AP_box", "AP_mask") for suffix in ("", "_S", "_M", "_L")]


def table(rows: Iterable[tuple[str, dict]], columns: Sequence[str] = PAPER) -> str:
    """Markdown table of (name, metrics) rows, with the columns of the paper's tables."""
    rows = list(rows)
    heads = [c if c in ("AP_box", "AP_mask") else c[-1] for c in columns]
    width = max(12, *(len(name) for name, _ in rows))
    lines = [f"| {'':<{width}} |" + "".join(f" {h:>7} |" for h in heads), "|---|" + "---|" * len(heads)]
    for name, metrics in rows:
        cells = ["-" if metrics[c] is None else f"{metrics[c]:.1f}" for c in columns]
        lines.append(f"| {name:<{width}} |" + "".join(f" {cell:>7} |" for cell in cells))
    return "\n".join(lines)


# ---- A run -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tolerant(what):
    """Turns an OSError into a warning, so that the run goes on."""
    try:
        yield
    except OSError as error:
        print(f"warning: {what}: {error}", file=sys.stderr)


class Log:
    """A progress bar on a terminal and lines elsewhere; log.jsonl; TensorBoard where it is installed; after each epoch
    curves.png, pictures and predictions.json."""

    def __init__(self, out, steps, steps_per_epoch, step=0, saved_step=0):
        """step: the number of `steps` that are done. saved_step: lines of later steps are dropped, as a killed run may
        have logged steps that it did not save, and does them again."""
        self.out = out
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.active = rank_and_world()[0] == 0
        self.tensorboard = None
        terminal = self.active and sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=not terminal, dynamic_ncols=True)
        self.records = []  # the lines of log.jsonl
        path = out / "log.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # a line that was cut short
                self.records.append(json.loads(line))
        self.records = [record for record in self.records if record["step"] <= saved_step]
        if self.active:
            with tolerant("log.jsonl"), replaced(path) as file:
                file.write("".join(json.dumps(record) + "\n" for record in self.records).encode())
            with contextlib.suppress(Exception):  # a TensorBoard that is not installed, too old, or broken
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(out)

    def write(self, step, values):
        values = {k: v if v is None else float(f"{v:.6g}") for k, v in values.items()}
        self.records.append({"epoch": round(step / self.steps_per_epoch, 4), "step": step, **values})
        with tolerant("log.jsonl"), open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(self.records[-1]) + "\n")
        with tolerant("TensorBoard"):
            for name, value in values.items() if self.tensorboard else ():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, step)

    def training(self, step, losses, lr, batch_size, seconds, waiting):
        """Logs some steps. losses: means over them; seconds: of a step; waiting: the share of it spent on loading."""
        if not self.active:
            return
        loss = sum(losses.values())
        speed = {"images_per_second": batch_size / seconds, "waiting_for_data": waiting}
        text = f"loss {loss:.2f}, lr {lr:.1e}, {speed['images_per_second']:.1f} images/s, {waiting:.0%} waiting"
        if torch.cuda.is_initialized():
            speed["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            text += f", {speed['memory_gb']:.1f} GB"
        self.write(step, {"loss": loss, **losses, "lr": lr, **speed})
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable:
            epoch = math.ceil(step / self.steps_per_epoch)
            to_go = timedelta(seconds=round(seconds * (self.steps - step)))
            say(f"epoch {epoch}, step {step}/{self.steps}: {text}, {to_go} to go")

    def evaluation(self, step, metrics, results, dataset):
        """Logs an epoch. metrics: those of `average_precision`; results: COCO results of the dataset."""
        if not self.active:
            return
        self.write(step, metrics)
        say(table([(f"epoch {step // self.steps_per_epoch}", metrics)]))
        with tolerant("predictions, pictures, curves"):
            write_json(self.out / "predictions.json", results)
            indices = evenly_spaced(PICTURES, len(dataset))
            score = draw_dataset(dataset, results, indices, self.out / "pictures")
            if score < SCORE:
                say(f"nothing on the pictures reaches a score of {SCORE}: they show what reaches {score:.2g}")
            self.draw_curves()

    def draw_curves(self):
        from matplotlib.figure import Figure

        figure = Figure((11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        training = [record for record in self.records if "loss" in record]
        for kind in ("loss", "class", "box", "giou", "mask", "dice"):  # the sum of class_0, class_1, ...
            values = [sum(v for name, v in record.items() if name.split("_")[0] == kind) for record in training]
            left.plot([record["epoch"] for record in training], values, label=kind)
        left.set(xlabel="epoch", title="losses", yscale="log")
        evaluated = [record for record in self.records if "AP_box" in record]
        for name in ("AP_box", "AP_mask"):
            values = [math.nan if record[name] is None else record[name] for record in evaluated]
            right.plot([record["epoch"] for record in evaluated], values, "o-", label=name)
        right.set(xlabel="epoch", title="AP on the validation images", ylim=(0, None))
        for axes in (left, right):
            axes.legend()
            axes.grid(alpha=0.3)
        figure.savefig(self.out / "curves.png", dpi=110)


def describe(args, device, amp, model, train_set, val_set):
    """Prints the device, the path of deformable attention, the data and the model."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kernel = deform_attn_cuda.status(device.type)
    deform_attn_cuda.SAID.add(kernel)
    images = f"{len(train_set):,} training and {len(val_set):,} validation images"
    classes = f"{len(train_set.classes)} classes ({shortened(train_set.classes)})"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"device: {name} x {rank_and_world()[1]}, autocast {amp}")
    warn_of_emulation(device, amp)
    say(kernel)
    say(f"data: {args.data}, {images}, {classes}")
    say(f"model: {args.preset}, backbone {model.config.backbone}, {parameters:.1f} M parameters")
