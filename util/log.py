"""What people watch while a model trains: lines or a progress bar, log.jsonl, curves.png, pictures, TensorBoard.

Only process 0 writes. If the disk is full, a warning is printed and the run goes on.
"""

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

import deform_attn_cuda
from datasets.coco import evenly_spaced
from util.distributed import rank_and_world, say
from util.pictures import SCORE, draw_dataset

FIGURES = (".png", ".svg", ".pdf")
PICTURES = 8  # validation images drawn after each epoch, always the same ones


# ---- Files and tables ------------------------------------------------------------------------------------------------


def try_output(path: Path, is_folder: bool = True) -> None:
    """Raises OSError, which names the path, unless files can be written into a folder (or into one file), which is made
    for the trial. Nothing is left of that."""
    place = path if is_folder else path.parent
    made = [p for p in (place, *place.parents) if not p.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
        if not is_folder and path.exists():
            path.open("a").close()
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise OSError(f"nothing can be written to {path}: {reason}") from None
    finally:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()


def numbered(path: Path, suffix: str = "") -> Iterator[Path]:
    """The path, and then with _2, _3, ... behind its name, before the suffix."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name.removesuffix(suffix)}_{number}{suffix}")


def unused(path: Path) -> Path:
    """The path of a file, or where that is taken, one with a number."""
    return next(free for free in numbered(path, path.suffix) if not free.exists())


def new_folder(path: Path) -> Path:
    """Makes a folder, where the path is taken one with a number. Nobody else can choose it at the same moment."""
    for folder in numbered(path):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def write_json(path: Path, value: object, indent: int | None = None) -> None:
    """Writes a file that others never see in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(value, indent=indent))
    os.replace(unfinished, path)


PAPER = [name + suffix for name in ("AP_box", "AP_mask") for suffix in ("", "_S", "_M", "_L")]


def table(rows: Iterable[tuple[str, dict]], columns: Sequence[str] = PAPER) -> str:
    """(name, metrics) rows in Markdown, with the columns of the paper's tables."""
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
def tolerant(path):
    """Turns an error of the disk into a warning, so that the run goes on."""
    try:
        yield
    except OSError as error:
        print(f"warning: {path} was not written ({error})", file=sys.stderr)


class Log:
    """A progress bar on a terminal and lines elsewhere; log.jsonl; TensorBoard where it is installed; after each epoch
    curves.png, pictures and predictions.json."""

    def __init__(self, run):
        self.out, self.active, self.tensorboard = run.args.out, rank_and_world()[0] == 0, None
        terminal = self.active and sys.stderr.isatty()
        self.bar = tqdm(total=run.steps, initial=run.step, unit="step", disable=not terminal, dynamic_ncols=True)
        if self.active:
            # A run that was killed may have logged steps that it did not save: they will be logged again.
            kept = [record for record in self.records() if record["step"] <= run.saved_step]
            with tolerant(self.out / "log.jsonl"):
                (self.out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(self.out)

    def records(self):
        """The lines of log.jsonl, without one that was cut short."""
        records, path = [], self.out / "log.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def write(self, run, values):
        values = {k: v if v is None else float(f"{v:.6g}") for k, v in values.items()}
        record = {"epoch": round(run.step / run.steps_per_epoch, 4), "step": run.step, **values}
        with tolerant(self.out / "log.jsonl"), open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items() if self.tensorboard else ():
            if value is not None:
                self.tensorboard.add_scalar(name, value, run.step)

    def follow(self, run, parts):
        """Yields the parts of batches; the progress bar moves with the steps in which they are used."""
        for part in parts:
            self.bar.update(run.step - self.bar.n)
            yield part

    def training(self, run, losses, seconds, waiting):
        """After some steps. losses: the mean of each; seconds: for a step; waiting: the share of them spent on waiting
        for data."""
        if not self.active:
            return
        speed = {"images_per_second": run.recipe.batch_size / seconds, "waiting_for_data": waiting}
        if run.device.type == "cuda":
            speed["memory_gb"] = torch.cuda.max_memory_allocated(run.device) / 1e9
        loss, rate = sum(losses.values()), run.recipe.lr * run.recipe.rate(run.step - 1, run.steps)
        self.write(run, {"loss": loss, **losses, "lr": rate, **speed})
        text = f"loss {loss:.2f}, lr {rate:.1e}, {speed['images_per_second']:.1f} images/s, {waiting:.0%} waiting"
        text += f", {speed['memory_gb']:.1f} GB" if "memory_gb" in speed else ""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(run.step - self.bar.n)
        if self.bar.disable:
            minutes = round(seconds * (run.steps - run.step) / 60)
            place = f"epoch {run.epoch + 1}/{run.recipe.epochs}, step {run.step}/{run.steps}"
            say(f"{place}: {text}, {minutes // 60}:{minutes % 60:02} h to go")

    def evaluation(self, run, metrics, results):
        """After an epoch. metrics: those of `average_precision`; results: COCO results."""
        if not self.active:
            return
        self.write(run, metrics)
        say(table([(f"epoch {run.epoch + 1}", metrics)]))
        with tolerant(self.out):
            (self.out / "predictions.json").write_text(json.dumps(results))
            places = evenly_spaced(PICTURES, len(run.val_set))
            score = draw_dataset(run.val_set, results, places, self.out / "pictures")
            if score < SCORE:
                say(f"nothing on the pictures reaches a score of {SCORE}: they show what reaches {score:.2g}")
            self.draw_curves()

    def draw_curves(self):
        from matplotlib.figure import Figure

        records = self.records()
        figure = Figure((11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        training = merged([record for record in records if "loss" in record])
        for kind in ("loss", "class", "box", "giou", "mask", "dice"):  # the sum of class_0, class_1, ...
            values = [sum(v for name, v in record.items() if name.split("_")[0] == kind) for record in training]
            left.plot([record["epoch"] for record in training], values, label=kind)
        left.set(xlabel="epoch", title="losses", yscale="log")
        for name in ("AP_box", "AP_mask"):
            points = [(record["epoch"], record[name]) for record in records if record.get(name) is not None]
            right.plot(*zip(*points, strict=True) if points else ([], []), "o-", label=name)
        right.set(xlabel="epoch", title="AP on the validation images", ylim=(0, None))
        for axes in (left, right):
            axes.legend()
            axes.grid(alpha=0.3)
        figure.savefig(self.out / "curves.png", dpi=110)


def merged(records):
    """Records of training, each the mean since the one before, with those of few steps joined to the one before: the
    mean of two steps at the end of an epoch would be a spike among means of fifty."""
    steps = [
        record["step"] - before for record, before in zip(records, [0] + [r["step"] for r in records], strict=False)
    ]
    usual, whole = sorted(steps)[len(steps) // 2] if steps else 0, []
    for record, count in zip(records, steps, strict=True):
        if len(whole) > 1 and 0 < count < usual / 2:
            before, weight = whole.pop()
            shared = record.keys() & before.keys() - {"epoch", "step"}
            mean = {name: (before[name] * weight + record[name] * count) / (weight + count) for name in shared}
            record, count = {**record, **mean}, weight + count
        whole.append((record, count))
    return [record for record, _ in whole]


def counted(number, thing):
    return f"{number:,} {thing}{'s' * (number != 1)}"


def describe(run):
    """The first lines of a run."""
    device, world = run.device, rank_and_world()[1]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    recipe, classes, config = run.recipe, run.train_set.classes, run.config
    kernel = deform_attn_cuda.status(device.type)
    deform_attn_cuda.SAID.add(kernel)
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    say(
        f"device: {name}{f' x {world}' if world > 1 else ''}, autocast {run.args.amp}\n"
        f"{kernel}\n"
        f"data: {run.args.data}, {len(run.train_set):,} training and {len(run.val_set):,} validation images, "
        f"{len(classes)} classes ({', '.join(classes[:8])}{', ...' * (len(classes) > 8)})\n"
        f"model: {run.args.preset}{f', {config.backbone}' * (config.backbone != run.args.preset)}, "
        f"{parameters:.1f} M parameters\n"
        f"training: {counted(recipe.epochs, 'epoch')} of {counted(run.steps_per_epoch, 'step')} of "
        f"{counted(recipe.batch_size, 'image')}, lr {recipe.lr:.1e}, into {run.args.out}"
        + f"; going on after step {run.step:,}"
        * bool(run.step)
    )
