"""Trains a DI-MaskDINO, on a CPU, a GPU or many.

    python train.py --data shapes --preset tiny --out runs/demo      minutes on a CPU
    python train.py --data coco --epochs 12 --gpus 4                 the paper's recipe
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --data coco  joins the processes that torchrun made

The run's folder gets log.jsonl, curves.png, pictures, predictions.json, and the checkpoints last.pt and best.pt.
A run that was stopped, in whatever way, goes on where it was with --resume: on a CPU to the very bit, because each
random number is a function of seed, step and process alone (of seed, epoch and image for what happens to images).
"""

import argparse
import ast
import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from deform_attn_cuda import status
from dimaskdino import Config, DIMaskDINO, load_weights
from evaluate import (
    autocast,
    draw_dataset,
    evaluate,
    join,
    leave_signals_to_the_trainer,
    rank_and_world,
    read_checkpoint,
    spread,
    table,
)
from losses import Criterion, denoising_queries

LOG_EVERY = 50  # steps
SAVE_EVERY = 1000  # steps, beside the end of each epoch
PICTURES = 8  # validation images drawn after each epoch, always the same ones


# ---- Recipe (4.1, appendix B)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The defaults are the paper's for COCO; what it leaves open follows the released code."""

    epochs: int = 50
    batch_size: int = 16  # over all processes and accumulated parts
    lr: float = 1e-4
    backbone_lr: float = 0.1  # times lr
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05  # none on norms and embeddings
    clip: float = 0.01  # norm of the gradient of the whole model
    warmup: int = 0  # steps
    schedule: str = "steps"  # a tenth of the rate from each of `drops` on, or "cosine" down to zero
    drops: tuple[float, ...] = (0.9, 0.95)  # as fractions of all steps
    augmentation: str = "jitter"  # "jitter", "flips" or "none", see AUGMENTATIONS
    image_size: int = 1024  # side of the square training images
    test_size: tuple[int, int] = (800, 1333)  # shortest side of test images, and how far the longest may go

    @classmethod
    def bdd100k(cls):
        return cls(epochs=68, batch_size=8, drops=(50 / 68,))

    @classmethod
    def tiny(cls):
        """For Config.tiny() and `shapes`: everything learns from scratch, in few steps."""
        return cls(
            epochs=8, batch_size=8, lr=2e-3, backbone_lr=1.0, betas=(0.9, 0.98), clip=0.1, warmup=100,
            schedule="cosine", augmentation="flips", image_size=128, test_size=(128, 128),
        )  # fmt: skip

    def scaled_to(self, image_size):
        """The same recipe for larger or smaller images."""
        test_size = tuple(round(side * image_size / self.image_size) for side in self.test_size)
        return dataclasses.replace(self, image_size=image_size, test_size=test_size)


def learning_rate(recipe, step, steps):
    """The rate of a step, 0 <= step < steps, as a factor of recipe.lr."""
    warmup = min(1.0, (step + 1) / (recipe.warmup + 1))
    if recipe.schedule == "cosine":
        return warmup * (1 + math.cos(math.pi * step / steps)) / 2
    return warmup * 0.1 ** sum(step >= round(fraction * steps) for fraction in recipe.drops)


def large_scale_jitter(side, rng, width, height):
    """Flip; resize to 0.1 to 2.0 of a square of `side`; crop that square at a random place, grey beyond the image."""
    scale = rng.uniform(0.1, 2.0) * side / max(width, height)
    size = tuple(max(1, round(length * scale)) for length in (height, width))
    offset = tuple(int(rng.integers(max(length - side, 0) + 1)) for length in size)
    return data.Geometry(size, (side, side), offset, horizontal_flip=bool(rng.random() < 0.5))


def flips_and_transposes(side, rng, width, height):
    """One of the eight positions of a square, at the size that just fits into it."""
    transpose, horizontal, vertical = (bool(coin) for coin in rng.random(3) < 0.5)
    size, output, *_ = fit(side, rng, *((height, width) if transpose else (width, height)))
    return data.Geometry(size, output, (0, 0), transpose, horizontal, vertical)


def fit(side, rng, width, height):
    """The whole image at the size that just fits into the square, grey beyond it."""
    size = tuple(max(1, round(length * side / max(width, height))) for length in (height, width))
    return data.Geometry(size, (side, side))


AUGMENTATIONS = {"jitter": large_scale_jitter, "flips": flips_and_transposes, "none": fit}


def parameter_groups(model, recipe):
    """Weight decay for all but norms, embeddings and Swin's position biases; a rate of its own for the backbone."""
    groups = {}
    norms = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.Embedding)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decay = not isinstance(module, norms) and name != "relative_position_bias_table"
                groups.setdefault((prefix.startswith("backbone"), decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": recipe.lr * (recipe.backbone_lr if backbone else 1),
            "weight_decay": recipe.weight_decay if decay else 0.0,
        }
        for (backbone, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


# ---- Processes and signals


def launch(processes, arguments):
    """This same command in as many processes, through torchrun's own launcher; returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="train", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)(__file__, *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        print(f"process {failure.global_rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def on_every_rank(action):
    """The result of action() on every rank, on rank 0 first, which may have to make or download files. What goes wrong
    through the user's doing on one rank ends all of them alike, so that none waits for the others."""
    rank, world = rank_and_world()
    result = None
    for turn in range(min(world, 2)):
        problem = None
        if (rank == 0) == (turn == 0):
            try:
                result = action()
            except (ValueError, OSError) as error:
                problem = str(error)
        problems = [problem]
        if world > 1:
            problems = [None] * world
            dist.all_gather_object(problems, problem)
        if any(problems):
            raise UserError(next(filter(None, problems)))
    return result


class UserError(Exception):
    """A message for the user, who can mend its cause; exit code 2."""


def any_rank(flag):
    """Whether the flag is true on any rank. A CPU tensor, so that it passes through gloo and waits for no GPU."""
    if not dist.is_initialized():
        return bool(flag)
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


class Interruption:
    """SIGTERM and SIGINT. In training they wait for the end of the step, whose state is then saved; while everything is
    saved already, in evaluation, they end the program at once."""

    def __init__(self):
        self.number, self.saved = 0, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        self.number = self.number or number
        if self.saved:
            sys.exit(128 + self.number)


# ---- Building a run


@dataclass
class Run:
    """What the steps of a run share."""

    args: argparse.Namespace
    config: Config
    recipe: Recipe
    train_set: data.CocoDataset
    val_set: data.CocoDataset
    device: torch.device
    model: nn.Module = None
    parallel: nn.Module = None  # the model, or DDP around it
    criterion: nn.Module = None
    optimizer: torch.optim.Optimizer = None
    scaler: torch.amp.GradScaler = None
    epoch: int = 0  # the epoch in work, from 0
    step: int = 0  # optimiser steps so far
    best: float = -1.0  # highest mean of AP_box and AP_mask

    @property
    def steps_per_epoch(self):
        return max(1, len(self.train_set) // self.recipe.batch_size)

    @property
    def steps(self):
        return self.recipe.epochs * self.steps_per_epoch


def choose_recipe(args):
    recipe = Recipe.tiny() if args.preset == "tiny" else Recipe.bdd100k() if args.data == "bdd100k" else Recipe()
    given = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "augmentation")}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in given.items() if value is not None})
    return recipe.scaled_to(args.image_size) if args.image_size else recipe


def choose_config(args, num_classes):
    """The preset with the --set overrides. Raises ValueError for unknown fields and values of another type."""
    config = dataclasses.replace(getattr(Config, args.preset)(), num_classes=num_classes)
    changes = {}
    for override in args.set:
        name, _, text = override.partition("=")
        if name == "num_classes" or not hasattr(config, name):
            fields = ", ".join(f.name for f in dataclasses.fields(Config) if f.name != "num_classes")
            raise ValueError(f"--set {override}: the fields are {fields}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        old = getattr(config, name)
        if not isinstance(value, float | int if isinstance(old, float) else int | None if old is None else type(old)):
            raise ValueError(f"--set {override}: {name} is {old!r} by default, so {value!r} will not do")
        changes[name] = value
    return dataclasses.replace(config, **changes)


def open_run(args, device):
    """The data, checked, and the settings."""
    recipe = choose_recipe(args)
    _, world = rank_and_world()
    if recipe.batch_size % (world * args.accumulate):
        raise ValueError(f"--batch-size {recipe.batch_size} cannot be shared out over {world} processes "
                         f"with --accumulate {args.accumulate}: it must be a multiple of {world * args.accumulate}")
    augment = partial(AUGMENTATIONS[recipe.augmentation], recipe.image_size)
    train_set = data.open_dataset(args.data, args.data_root, "train", augment, training=True, seed=args.seed)
    val_set = data.open_dataset(args.data, args.data_root, "val", data.shortest_side(*recipe.test_size), training=False)
    if train_set.classes != val_set.classes:
        raise ValueError(f"training and validation images of {args.data} have different classes: "
                         f"{', '.join(train_set.classes)} and {', '.join(val_set.classes)}")
    for name, dataset in (("training", train_set), ("validation", val_set)):
        report = data.check(dataset, decode=args.check)
        if report.fatal:
            raise ValueError(f"the {name} images of {args.data} have faults:\n{report}")
        if not len(dataset):
            raise ValueError(f"there are no {name} images in {args.data} with anything to learn from")
        if report.warnings and rank_and_world()[0] == 0:
            print(f"{name} images of {args.data}:\n{report}", file=sys.stderr)
    return Run(args, choose_config(args, len(train_set.classes)), recipe, train_set, val_set, device)


def build(run):
    """Model, losses and optimiser; then what an earlier run left in --out or what --init gives."""
    args, last = run.args, run.args.out / "last.pt"
    if last.exists() and not args.resume:
        raise ValueError(f"{args.out} holds a run already: add --resume to go on with it, or choose another --out")
    checkpoint = read_checkpoint(last) if last.exists() else None
    if args.resume and not checkpoint:
        say(f"no checkpoint in {args.out} yet: starting from the beginning")
    torch.manual_seed(args.seed)
    run.model = DIMaskDINO(run.config)
    if checkpoint:
        check_same_run(run, checkpoint, last)
        load_weights(run.model, checkpoint)
    elif args.init:
        left_out = load_weights(run.model, args.init, partial=True)
        say("\n  ".join([f"weights from {args.init}, but not", *left_out]) if left_out else f"weights from {args.init}")
    elif run.config.backbone != "tiny" and args.backbone_weights != "none":
        load_weights(run.model, args.backbone_weights or imagenet(run.config.backbone))
    run.model.to(run.device).train()
    if args.checkpoint_activations:
        for layer in (*run.model.encoder.layers, run.model.residual, *run.model.decoder):
            layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
    run.criterion = Criterion(run.config)
    run.optimizer = torch.optim.AdamW(parameter_groups(run.model, run.recipe), run.recipe.lr, run.recipe.betas)
    run.scaler = torch.amp.GradScaler(run.device.type, enabled=args.amp == "fp16")
    if checkpoint:
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.scaler.load_state_dict(checkpoint["scaler"])
        run.epoch, run.step, run.best = checkpoint["epoch"], checkpoint["step"], checkpoint["best"]
        say(f"going on with {last}: epoch {run.epoch + 1}, step {run.step}")
    run.parallel = run.model
    if dist.is_initialized():
        devices = [run.device] if run.device.type == "cuda" else None
        run.parallel = nn.parallel.DistributedDataParallel(run.model, device_ids=devices)


def check_same_run(run, checkpoint, path):
    """Raises ValueError where a checkpoint cannot be continued with these settings. More epochs are welcome."""
    then = {**checkpoint["config"], **checkpoint["recipe"], **checkpoint["run"]}
    now = {**dataclasses.asdict(run.config), **dataclasses.asdict(run.recipe), **identity(run)}
    changed = [f"{name} {then.get(name)!r} -> {now[name]!r}" for name in now if then.get(name) != now[name]]
    changed = [change for change in changed if not change.startswith("epochs ")]
    if checkpoint["classes"] != run.train_set.classes:
        changed.append(f"classes {checkpoint['classes']} -> {run.train_set.classes}")
    if changed:
        raise ValueError(f"{path} was made with other settings ({'; '.join(changed)}): use those, or start a new run "
                         "with --init and another --out")


def identity(run):
    """What must be the same for the random streams and the order of the images to go on."""
    return {"seed": run.args.seed, "images": len(run.train_set)}


def imagenet(backbone):
    """Torchvision's weights of a backbone trained on ImageNet-1k, downloaded once."""
    from torchvision.models import get_model_weights

    weights = get_model_weights(backbone).IMAGENET1K_V1 if backbone != "swin_l" else None
    if weights is None:
        raise ValueError("there is no Swin-L in torchvision: give Microsoft's file swin_large_patch4_window12_384_22k.pth "
                         "(https://github.com/microsoft/Swin-Transformer) with --backbone-weights")
    try:
        return torch.hub.load_state_dict_from_url(weights.url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:
        raise ValueError(f"{weights.url} cannot be downloaded ({error}): fetch it elsewhere and name the file with "
                         "--backbone-weights, or start from scratch with --backbone-weights none") from None


# ---- Steps


def batches(run):
    """Places in the training set for the rest of the epoch: a list for each part of a step that this process does.

    Processes and accumulated parts together make the same batches as one process does. A set with fewer images than
    a batch is repeated to fill it.
    """
    rank, world = rank_and_world()
    order = np.random.default_rng((run.args.seed, run.epoch)).permutation(len(run.train_set))
    order = np.resize(order, (run.steps_per_epoch, run.args.accumulate, world, run.recipe.batch_size // world
                              // run.args.accumulate))
    done = run.step - run.epoch * run.steps_per_epoch
    return order[done:, :, rank].reshape(-1, order.shape[-1]).tolist()


def gradients(run, parts):
    """Adds up the gradients of one step over its parts [(images, targets)]; returns the loss terms of this process.

    Every process divides by the same count of objects, that of the whole batch over all, so that processes and parts
    give the gradients of one process with the whole batch. Raises FloatingPointError on all processes together.
    """
    rank, world = rank_and_world()
    objects = torch.tensor(float(sum(len(target["labels"]) for _, targets in parts for target in targets)))
    if world > 1:
        dist.all_reduce(objects)
    num_objects = max(objects.item(), 1.0) / world
    totals = {}
    for place, (images, targets) in enumerate(parts):
        targets = [{k: v.to(run.device) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
        alone = world > 1 and place < len(parts) - 1
        with run.parallel.no_sync() if alone else contextlib.nullcontext():
            with autocast(run.device, run.args.amp):
                outputs = run.parallel(images.to(run.device), denoising_queries(targets, run.config.num_classes, run.config.denoising))
            try:
                terms, trouble = run.criterion(outputs, targets, num_objects), ""
            except FloatingPointError as error:
                terms, trouble = {}, str(error)
            values = {name: value.item() for name, value in terms.items()}
            if any_rank(trouble or not all(map(math.isfinite, values.values()))):
                stop_not_finite(run, trouble or values, [target["image_id"] for target in targets])
            run.scaler.scale(sum(terms.values())).backward()
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def update(run):
    """The optimiser's step, at the rate of the schedule."""
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * learning_rate(run.recipe, run.step, run.steps)
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
    if not run.scaler.is_enabled() and not norm.isfinite():  # fp16's scaler leaves such a step out and scales less
        stop_not_finite(run, {"norm of the gradient": norm.item()}, [])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.step += 1


def stop_not_finite(run, trouble, image_ids):
    """Ends all processes together, before the step has changed a weight. trouble: a message, or loss terms."""
    rank, world = rank_and_world()
    if isinstance(trouble, dict):
        trouble = ", ".join(f"{name} {value:.4g}" for name, value in trouble.items())
    reports = [f"process {rank}, images {image_ids}: {trouble}"]
    if world > 1:
        reports = [None] * world
        dist.all_gather_object(reports, f"process {rank}, images {image_ids}: {trouble}")
    rate = run.recipe.lr * learning_rate(run.recipe, run.step, run.steps)
    raise FloatingPointError("\n".join([
        f"the loss is not finite at step {run.step} (epoch {run.epoch + 1}, lr {rate:.2e})", *reports,
        f"{run.args.out / 'last.pt'} is as it was last saved. A lower --lr or --amp off may help.",
    ]))


def train_epoch(run, interruption, log):
    """The rest of the epoch in work, or as far as a signal lets it go."""
    args, world = run.args, rank_and_world()[1]
    run.train_set.epoch = run.epoch
    loader = iter(DataLoader(
        run.train_set, batch_sampler=batches(run), collate_fn=data.collate, num_workers=args.workers,
        pin_memory=run.device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer, generator=torch.Generator(),
    ))  # fmt: skip
    totals, counted, waited, since = {}, 0, 0.0, time.perf_counter()
    last = (run.epoch + 1) * run.steps_per_epoch
    while run.step < last and not any_rank(interruption.number):
        begin = time.perf_counter()
        parts = [next(loader) for _ in range(args.accumulate)]
        waited += time.perf_counter() - begin
        torch.manual_seed(np.random.SeedSequence((args.seed, run.step, rank_and_world()[0])).generate_state(1).item())
        for name, value in gradients(run, parts).items():
            totals[name] = totals.get(name, 0.0) + value
        update(run)
        counted += 1
        if run.step % LOG_EVERY == 0 or run.step == last:
            terms = torch.tensor(list(totals.values())) / (counted * world)
            if world > 1:
                dist.all_reduce(terms)
            seconds = time.perf_counter() - since
            log.training(run, dict(zip(totals, terms.tolist(), strict=True)), seconds / counted, waited / seconds)
            totals, counted, waited, since = {}, 0, 0.0, time.perf_counter()
        if run.step % SAVE_EVERY == 0:
            save(run, "last.pt")


# ---- Checkpoints


def save(run, name):
    """Write a checkpoint beside the old one and put it in its place, so that there is a whole one at every moment.
    A full disk costs a warning and leaves the old one."""
    if rank_and_world()[0] != 0:
        return
    checkpoint = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
        "best": run.best,
        "config": dataclasses.asdict(run.config),
        "recipe": dataclasses.asdict(run.recipe),
        "classes": run.train_set.classes,
        "data": run.args.data,
        "run": identity(run),
        "torch": str(torch.__version__),
    }
    path = run.args.out / name
    unfinished = path.with_suffix(".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save turns some of the system's errors into its own
        unfinished.unlink(missing_ok=True)
        print(f"warning: {path} was not written, the one before stays ({error})", file=sys.stderr)


# ---- What people watch


def say(message):
    """For people, once, however many processes there are; above the progress bar if there is one."""
    if rank_and_world()[0] == 0:
        tqdm.write(str(message), file=sys.stdout)
        sys.stdout.flush()


class Log:
    """A progress bar on a terminal and lines elsewhere; log.jsonl; TensorBoard where it is installed; curves.png and
    pictures after each epoch. Writes on rank 0 alone, and a full disk does not stop it."""

    def __init__(self, run):
        self.out, self.writes, self.tensorboard = run.args.out, rank_and_world()[0] == 0, None
        terminal = self.writes and sys.stderr.isatty()
        self.bar = tqdm(total=run.steps, initial=run.step, unit="step", disable=not terminal, dynamic_ncols=True)
        if not self.writes:
            return
        path = self.out / "log.jsonl"
        with self.tolerant(path):  # a run that was killed may have logged steps that it never saved
            old = read_log(path)
            path.write_text("".join(json.dumps(r) + "\n" for r in old if r["step"] <= run.step))
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.out)

    @contextlib.contextmanager
    def tolerant(self, path):
        try:
            yield
        except OSError as error:
            print(f"warning: {path} was not written ({error})", file=sys.stderr)

    def write(self, run, record):
        if not self.writes:
            return
        record = {"epoch": round(run.step / run.steps_per_epoch, 4), "step": run.step, **record}
        path = self.out / "log.jsonl"
        with self.tolerant(path), open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.tensorboard:
            for name, value in record.items():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, run.step)

    def training(self, run, terms, seconds, waiting):
        """After some steps: terms, the mean of each loss; seconds a step; waiting, the share of it spent on data."""
        record = {
            "loss": sum(terms.values()),
            **terms,
            "lr": run.recipe.lr * learning_rate(run.recipe, run.step - 1, run.steps),
            "images_per_second": run.recipe.batch_size / seconds,
            "waiting_for_data": waiting,
        }
        if run.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated(run.device) / 1e9
        self.write(run, record)
        text = f"loss {record['loss']:.2f}, lr {record['lr']:.1e}, {record['images_per_second']:.1f} images/s"
        text += f", {record['memory_gb']:.1f} GB" if "memory_gb" in record else ""
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(run.step - self.bar.n)
        if self.bar.disable:
            remaining = time.strftime("%H:%M:%S", time.gmtime(seconds * (run.steps - run.step) % 86400))
            days = f"{seconds * (run.steps - run.step) // 86400:.0f} d " * (seconds * (run.steps - run.step) >= 86400)
            say(f"epoch {run.epoch + 1}/{run.recipe.epochs}, step {run.step}/{run.steps}: {text}, "
                f"{days}{remaining} to go")

    def evaluation(self, run, metrics, results):
        """After an epoch: the metrics, and from rank 0's results predictions.json and pictures."""
        self.write(run, metrics)
        say(table([(f"epoch {run.epoch + 1}", metrics)]))
        if self.writes:
            with self.tolerant(self.out):
                (self.out / "predictions.json").write_text(json.dumps(results))
                draw_dataset(run.val_set, results, spread(PICTURES, len(run.val_set)), self.out / "pictures")
                draw_curves(self.out)


def read_log(path):
    """The records of log.jsonl, without a last line that was cut short."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def draw_curves(out):
    """curves.png: the loss with its kinds, and AP, over epochs."""
    from matplotlib.figure import Figure

    records = read_log(out / "log.jsonl")
    training = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "AP_box" in r]
    figure = Figure((11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in training]
    left.plot(epochs, [r["loss"] for r in training], "k", label="all")
    for kind in ("class", "box", "giou", "mask", "dice"):
        values = [sum(v for name, v in r.items() if name.startswith(kind + "_")) for r in training]
        left.plot(epochs, values, label=kind)
    left.set(xlabel="epoch", title="losses", yscale="log")
    for name in ("AP_box", "AP_mask"):
        right.plot([r["epoch"] for r in evaluations], [r[name] for r in evaluations], "o-", label=name)
    right.set(xlabel="epoch", title="AP on the validation images")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(out / "curves.png", dpi=110)


# ---- The story


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, shapes-full, coco, bdd100k or a folder in COCO layout (%(default)s)")
    add("--data-root", default="data", help="where the data sets lie (%(default)s)")
    add("--preset", choices=["paper", "released", "maskdino", "tiny"], default="paper", help="model and recipe (%(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the model's Config")
    add("--epochs", type=positive, help="default: the recipe's (paper: 50)")
    add("--gpus", type=positive, default=1, metavar="N", help="processes to start on this machine (%(default)s)")
    add("--batch-size", type=positive, help="of all processes together (paper: 16)")
    add("--accumulate", type=positive, default=1, metavar="N", help="do each batch in N parts, to save memory (%(default)s)")
    add("--checkpoint-activations", action="store_true", help="save memory by computing activations twice")
    add("--lr", type=float, help="learning rate (paper: 1e-4)")
    add("--image-size", type=positive, help="side of the training images; test images change alike (paper: 1024)")
    add("--augmentation", choices=list(AUGMENTATIONS), help="paper: jitter")
    add("--amp", choices=["bf16", "fp16", "off"], help="autocast (bf16 on a GPU, off on a CPU)")
    add("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    add("--workers", type=int, default=2, help="processes that load images, for each training process (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--out", type=Path, help="folder of the run (runs/DATA)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--init", metavar="CKPT", help="start from all tensors that fit, of one of our checkpoints or the authors'")
    add("--backbone-weights", metavar="PATH", help="default: torchvision's, of ImageNet-1k; none: start from scratch")
    add("--check", action="store_true", help="only check the data, decoding every image")
    args = parser.parse_args(arguments)
    args.out = args.out or Path("runs") / Path(args.data).name
    return args


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def introduce(run):
    """The first lines of a run."""
    world = rank_and_world()[1]
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    recipe, classes = run.recipe, run.train_set.classes
    names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    say(f"device       {device}{f' x {world}' if world > 1 else ''}, autocast {run.args.amp}\n"
        f"deform_attn  {status()}\n"
        f"data         {run.args.data}: {len(run.train_set):,} training and {len(run.val_set):,} validation images, "
        f"{len(classes)} classes ({names})\n"
        f"model        {run.args.preset}: {run.config.backbone}, {parameters:.1f} M parameters\n"
        f"training     {recipe.epochs} epochs of {run.steps_per_epoch:,} steps of {recipe.batch_size} images, "
        f"lr {recipe.lr:.1e} ({recipe.schedule}), into {run.args.out}")


def train(args):
    device = join(args.device)
    args.amp = args.amp or ("bf16" if device.type == "cuda" else "off")
    run = on_every_rank(lambda: open_run(args, device))
    if args.check:
        return say(f"{args.data}: {len(run.train_set):,} training and {len(run.val_set):,} validation images are sound")
    args.out.mkdir(parents=True, exist_ok=True)
    on_every_rank(lambda: build(run))
    introduce(run)
    log, interruption = Log(run), Interruption()

    while run.epoch < run.recipe.epochs:
        interruption.saved = False
        run.model.train()
        train_epoch(run, interruption, log)
        save(run, "last.pt")
        if any_rank(interruption.number):
            say(f"stopped by a signal after step {run.step}: --resume goes on")
            sys.exit(128 + (interruption.number or signal.SIGTERM))

        interruption.saved = True
        metrics, results = evaluate(run.model, run.val_set, device, args.workers)
        log.evaluation(run, metrics, results)
        run.epoch += 1
        score = ((metrics["AP_box"] or 0) + (metrics["AP_mask"] or 0)) / 2
        better, run.best = score > run.best, max(score, run.best)
        save(run, "last.pt")
        if better:
            save(run, "best.pt")
    say(f"trained for {run.epoch} epochs; the best mean of AP_box and AP_mask was {run.best:.1f} ({args.out / 'best.pt'})")


def main():
    args = parse_arguments(sys.argv[1:])
    try:
        if args.gpus > 1 and "RANK" not in os.environ:
            sys.exit(launch(args.gpus, sys.argv[1:]))
        train(args)
        if dist.is_initialized():
            dist.destroy_process_group()
    except UserError as error:
        say_error(error, 2)
    except FloatingPointError as error:
        say_error(error, 1)


def say_error(error, code):
    if rank_and_world()[0] == 0:
        print(error, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.barrier()
    sys.exit(code)


if __name__ == "__main__":
    main()
