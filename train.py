"""Trains a DI-MaskDINO, on a CPU, a GPU or many.

    python train.py                                                  a tiny model on synthetic shapes: minutes on a CPU
    python train.py --data coco --epochs 12 --gpus 4                 the paper's recipe
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --data coco  on several machines

The run's folder gets log.jsonl, curves.png, pictures, predictions.json, and the checkpoints last.pt and best.pt.
--resume continues a stopped run from its last checkpoint. On a CPU the result is the same to the bit as without a stop,
because random numbers depend on the seed, the step and the process alone (those of an augmentation on the seed, the
epoch and the image).
"""

import argparse
import ast
import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import time
import typing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader

from datasets import coco as data
from datasets import collate, open_dataset
from datasets.geometry import AUGMENTATIONS, shortest_side
from dimaskdino import Config, DIMaskDINO, Norm
from evaluate import autocast, evaluate
from losses import Criterion, denoising_queries
from util.compiled import compile_in_place
from util.distributed import (
    Interruption,
    LoadingError,
    amp_for,
    any_rank,
    batches_of,
    held,
    join,
    launch,
    launched_processes,
    on_every_rank,
    print_anything,
    problems_of_all,
    rank_and_world,
    say,
    share_statistics,
    stop,
    warn_of_emulation,
    workers_for,
)
from util.flags import add_data_flags, add_device_flags, at_least, source_of, user_path
from util.log import Log, describe
from util.weights import imagenet, load_weights, read_checkpoint

LOG_EVERY = 50  # steps
SAVE_EVERY = 1000  # steps, beside the end of each epoch
MOST_SKIPPED = 30  # steps in a row that fp16 may skip; its scale is then a billionth of the first
NOT_FINITE = "last.pt is untouched; a lower --lr or --amp off may help"


# ---- The recipe (4.1, appendix B) ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Settings of training. The defaults are the paper's for COCO; what it leaves open follows the released code."""

    epochs: int = 50
    batch_size: int = 16  # over all processes and micro-batches
    lr: float = 1e-4
    backbone_lr: float = 0.1  # times lr
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.05  # but none for norms and embeddings
    clip: float = 0.01  # norm of the gradient of the whole model
    detection_loss: float = 1.0  # factor on the weights of class and box losses; table 3: 0.1
    mask_points: int = 12544  # points at which masks are compared
    denoising: int = 100  # queries that training adds, at most
    label_noise: float = 0.2  # share of the denoising queries with a random label
    warmup: int = 0  # steps
    schedule: str = "steps"  # the rate falls to a tenth at each of `drops`; "cosine": to zero along a cosine
    drops: tuple[float, ...] = (0.9, 0.95)  # as fractions of all steps
    augmentation: str = "jitter"  # "flips", "none": see geometry.AUGMENTATIONS
    image_size: int = 1024  # side of the square training images
    test_size: tuple[int, int] = (800, 1333)  # shortest side of test images, and how far the longest may go

    @classmethod
    def bdd100k(cls) -> "Recipe":
        return cls(epochs=68, batch_size=8, drops=(50 / 68,))

    @classmethod
    def tiny(cls) -> "Recipe":
        """For Config.tiny() on `shapes`, from scratch in few steps."""
        return cls(
            epochs=12,
            batch_size=8,
            lr=2e-3,
            backbone_lr=1.0,
            betas=(0.9, 0.98),
            clip=0.1,
            mask_points=256,
            denoising=16,
            label_noise=0.5,
            warmup=100,
            schedule="cosine",
            augmentation="flips",
            image_size=128,
            test_size=(128, 128),
        )

    def __post_init__(self):
        if self.schedule not in ("steps", "cosine"):
            raise ValueError(f"schedule={self.schedule!r} is not one of steps, cosine")
        for name in ("epochs", "batch_size", "lr", "clip", "mask_points", "image_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not above 0")

    def replace(self, **changes) -> "Recipe":
        """The recipe with some fields changed; the size of test images goes with that of training images."""
        zoom = changes.get("image_size", self.image_size) / self.image_size
        return dataclasses.replace(self, test_size=tuple(round(side * zoom) for side in self.test_size), **changes)

    def rate(self, step: int, steps: int) -> float:
        """Factor of the learning rate in a step, 0 <= step < steps."""
        warmup = min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            return warmup * (1 + math.cos(math.pi * step / steps)) / 2
        return warmup * 0.1 ** sum(step >= round(fraction * steps) for fraction in self.drops)


# ---- Flags -----------------------------------------------------------------------------------------------------------

# What --set may change: every field of Config and Recipe that has no flag of its own.
FLAGS = ("epochs", "batch_size", "lr", "augmentation", "image_size")
SETTABLE = typing.get_type_hints(Config) | typing.get_type_hints(Recipe)
SETTABLE = {name: kind for name, kind in SETTABLE.items() if name not in ("num_classes", *FLAGS)}


def setting(text):
    """Parses FIELD=VALUE of --set into (field, value)."""
    name, _, value = text.partition("=")
    if name not in SETTABLE:
        raise argparse.ArgumentTypeError(f"{name}: the fields are {', '.join(SETTABLE)}")
    kind = SETTABLE[name]
    if kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if not fits(value, kind):
        raise argparse.ArgumentTypeError(f"{text}: that is no {kind if typing.get_args(kind) else kind.__name__}")
    return name, value


def fits(value, kind):
    """Whether a value is of a field's type. A whole number is a float as well; True is no number."""
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        parts = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if typing.get_args(kind):  # int | None
        return any(fits(value, part) for part in typing.get_args(kind))
    return isinstance(value, (float, int) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def with_settings(settings, args):
    """The Config or Recipe with the values of --set for its fields."""
    return dataclasses.replace(settings, **{name: value for name, value in args.set if hasattr(settings, name)})


def choose_recipe(args):
    if args.preset == "tiny":
        recipe = Recipe.tiny()
    elif args.data == "bdd100k":
        recipe = Recipe.bdd100k()
    else:
        recipe = Recipe()
    given = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    recipe = with_settings(recipe.replace(**given), args)
    shares = rank_and_world()[1] * args.accumulate
    if recipe.batch_size % shares:
        raise ValueError(f"--batch-size {recipe.batch_size} must be a multiple of processes x --accumulate, {shares}")
    if recipe.image_size % data.STRIDE:
        raise ValueError(f"--image-size {recipe.image_size} must be a multiple of {data.STRIDE}")
    return recipe


def choose_config(args, num_classes):
    return with_settings(dataclasses.replace(getattr(Config, args.preset)(), num_classes=num_classes), args)


def parse_training(arguments, description=""):
    """Parses the flags of train.py; some defaults depend on the data."""
    positive = at_least(1)
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    named = "shapes, coco, bdd100k, or a folder as COCO, Roboflow, CVAT or Label Studio lay it out (shapes)"
    add_data_flags(add, help=named)
    outright = "COCO json of the training images, in place of --data; without --val-json every tenth image is held out"
    add("--train-json", type=user_path, metavar="FILE", help=outright)
    presets = ["paper", "released", "maskdino", "tiny"]
    add("--preset", choices=presets, help="model and recipe (tiny for shapes, paper for all other data)")
    fields = f"change a field of the model or of its training: {', '.join(SETTABLE)}"
    add("--set", action="append", type=setting, default=[], metavar="FIELD=VALUE", help=fields)
    add("--epochs", type=positive, help="(paper: 50; tiny: 12)")
    add("--gpus", type=positive, default=1, help="processes to start on this machine (%(default)s)")
    add("--batch-size", type=positive, help="of all processes together (paper: 16, Swin-L 4; tiny: 8)")
    accumulate = "gradient accumulation: micro-batches that make up each batch, to save memory (%(default)s)"
    add("--accumulate", type=positive, default=1, help=accumulate)
    add("--checkpoint-activations", action="store_true", help="recompute activations, to save memory")
    add("--lr", type=at_least(1e-12, float), help="learning rate (paper: 1e-4; tiny: 2e-3)")
    size = "side of training images in px; test images change alike (paper: 1024; tiny: 128)"
    add("--image-size", type=positive, help=size)
    add("--augmentation", choices=[*AUGMENTATIONS], help="(paper: jitter; tiny: flips)")
    add_device_flags(add)
    add("--seed", type=at_least(0), default=0, help="(%(default)s)")
    add("--out", type=user_path, help="the run's folder (runs/DATA)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    init = "start from those weights of a checkpoint, ours or the authors', that fit"
    add("--init", type=user_path, metavar="CKPT", help=init)
    backbone = "also in place of --init's (torchvision's, of ImageNet-1k, unless --init fills it); none: from scratch"
    add("--backbone-weights", type=os.path.expanduser, metavar="PATH", help=backbone)
    add("--check", action="store_true", help="only check the data: decode every image")
    args = parser.parse_args(arguments)
    args.data = args.data or str(args.train_json or args.val_json or "shapes")
    args.preset = args.preset or ("tiny" if args.data == "shapes" else "paper")
    args.out = args.out or Path("runs") / (Path(args.data).stem if args.train_json else Path(args.data).resolve().name)
    return args


# ---- Data ------------------------------------------------------------------------------------------------------------


def open_data(args, recipe):
    """The training and the validation set. Raises ValueError with all that is wrong with them."""
    source = source_of(args)
    augment = partial(AUGMENTATIONS[recipe.augmentation], recipe.image_size)
    train_set = open_dataset(source, "train", augment, training=True, seed=args.seed)
    val_set = open_dataset(source, "val", shortest_side(*recipe.test_size), training=False)
    for split, dataset in (("training", train_set), ("validation", val_set)):
        if sound := data.require_sound(dataset, f"{split} images of {args.data}", decode=args.check):
            say(sound)
    data.require_same_classes(train_set.classes, val_set.classes, "the training json", "that for validation")
    if seen := data.seen_in_training(train_set, val_set):
        say(seen)
    queries = choose_config(args, len(train_set.classes)).selection[-1]
    crowded = sum(len(objects) > queries for objects in train_set.annotations.values())
    if crowded:
        say(
            f"{crowded:,} training images have more objects than the model has queries ({queries}), so it cannot find "
            "all: the last number of --set selection=(...) changes that"
        )
    return train_set, val_set


def steps_of_an_epoch(images, recipe):
    return max(1, images // recipe.batch_size)


def micro_batches_of(images, recipe, epoch, seed, accumulate=1):
    """Indices into a training set for the micro-batches of each step of an epoch [steps, accumulate, images].

    Those of all processes together make the batches of a single process. A training set that is smaller than a batch
    is repeated until it fills one.
    """
    rank, world = rank_and_world()
    order = np.random.default_rng((seed, epoch)).permutation(images)
    share = recipe.batch_size // (accumulate * world)
    return np.resize(order, (steps_of_an_epoch(images, recipe), accumulate, world, share))[:, :, rank]


# ---- Model and optimiser ---------------------------------------------------------------------------------------------


def build_model(args, config, checkpoint=None):
    """The model, with the weights to start from: a checkpoint's, --init's, a backbone's, or random ones."""
    torch.manual_seed(args.seed)
    model = DIMaskDINO(config)
    if checkpoint:
        load_weights(model, checkpoint)
        return model
    left_out = []
    if args.init:
        left_out = load_weights(model, args.init, partial=True)
        say("\n  ".join([f"weights of {args.init}{', without' if left_out else ''}", *left_out]))
    unfilled = {odd.partition(":")[0] for odd in left_out}
    lacking = any(f"backbone.{name}" in unfilled for name in model.backbone.state_dict())
    wanted = config.backbone != "tiny" and (lacking or not args.init)
    if args.backbone_weights != "none" and (args.backbone_weights or wanted):
        load_weights(model, args.backbone_weights or imagenet(config.backbone))
        if args.init:
            say(f"the backbone's weights are those of {args.backbone_weights or 'ImageNet-1k'}")
    return model


def recompute_activations(model):
    """Activation checkpointing of the backbone's stages and the layers of encoder and decoder, which the backward pass
    computes again. A backbone whose norms are not frozen is left out, as they would count each batch twice."""
    frozen = all(norm.frozen for norm in model.backbone.modules() if isinstance(norm, Norm))
    stages = model.backbone.stages if frozen else ()
    for layer in (*stages, *model.encoder.layers, model.residual, *model.decoder):
        layer.forward = partial(recompute, layer.forward, use_reentrant=False)


def make_optimizer(model, recipe):
    """AdamW, with no weight decay on norms, embeddings and Swin's position biases. Each group keeps its learning rate
    before the schedule as `base_lr`; the backbone has its own."""
    groups = {}
    for prefix, module in model.named_modules():
        plain = not isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                kind = prefix.startswith("backbone"), plain and name != "relative_position_bias_table"
                groups.setdefault(kind, []).append(parameter)
    groups = [
        {
            "params": parameters,
            "base_lr": recipe.lr * (recipe.backbone_lr if backbone else 1),
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), parameters in groups.items()
    ]
    return torch.optim.AdamW(groups, recipe.lr, recipe.betas, fused=True)


# ---- A step ----------------------------------------------------------------------------------------------------------


def objects_per_process(micro_batches):
    """The divisor of the losses, the same in every process: objects of the whole batch over the number of processes.

    With it, any number of processes and micro-batches gives the gradient of the whole batch in one process.
    """
    objects = torch.tensor(float(sum(len(target["labels"]) for _, targets in micro_batches for target in targets)))
    world = rank_and_world()[1]
    if world > 1:
        dist.all_reduce(objects)
    return max(objects.item(), 1.0) / world


def to_device(device, images, targets, noise):
    targets = [{k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
    return images.to(device, non_blocking=True), targets, noise.to(device)


def train_step(model, criterion, optimizer, scaler, micro_batches, recipe, amp="off"):
    """A step of the optimiser, with gradient accumulation over micro-batches.

    micro_batches: a list of (images [B 3 H W] uint8, targets).
    model: a DIMaskDINO, or DistributedDataParallel around one. Returns this process's share of each loss {name: scalar}
    and the norm of the gradient, both on the device. Each micro-batch has one synchronisation, in Hungarian matching. A
    gradient that is not finite changes no weight. Raises FloatingPointError, in all processes, where a prediction is
    not finite.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    device = next(bare.parameters()).device
    num_objects = objects_per_process(micro_batches)
    totals = 0
    for number, (images, targets) in enumerate(micro_batches, 1):
        noise = denoising_queries(targets, bare.config.num_classes, recipe.denoising, recipe.label_noise)
        images, targets, noise = to_device(device, images, targets, noise)
        # Gradients accumulate in the parameters; the last backward averages them over the processes.
        averaged = number == len(micro_batches) or model is bare
        with contextlib.nullcontext() if averaged else model.no_sync():
            with autocast(device, amp):
                outputs = model(images, noise)
            problem = ""
            try:
                losses = criterion(outputs, targets, num_objects, noise)
            except FloatingPointError as error:
                problem = str(error)
            if problems := problems_of_all(problem):  # before others wait for this process's gradient
                raise FloatingPointError("\n".join(problems))
            values = torch.stack([*losses.values()])
            scaler.scale(values.sum()).backward()
        totals = totals + values.detach()

    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(bare.parameters(), recipe.clip)
    if not scaler.is_enabled():  # an enabled scaler checks the gradient itself
        optimizer.found_inf = (~norm.isfinite()).float()  # 1 makes AdamW skip the step, without a synchronisation
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return dict(zip(losses, totals)), norm


class Totals:
    """Sums of losses over steps, kept on the device: only `read` synchronises."""

    def __init__(self, device, fp16):
        self.fp16 = fp16  # whose scaler skips steps with a gradient that is not finite
        self.skipped = torch.zeros((), device=device)  # so many of them in a row
        self.clear()

    def clear(self):
        self.steps = 0
        self.finite = 0  # steps before the first with a number that is not finite
        self.sums = 0

    def add(self, losses, norm):
        self.names = [*losses] if self.fp16 else [*losses, "the gradient's norm"]
        self.sums = self.sums + torch.stack([*losses.values(), norm])[: len(self.names)]
        self.finite = self.finite + self.sums.isfinite().all()  # a sum that is not finite stays so
        self.skipped = torch.where(norm.isfinite(), 0, self.skipped + 1)
        self.steps += 1

    def read(self):
        """Means over these steps {name: float}, the number of steps before the first that was not finite, and that of
        steps in a row that fp16 has skipped. A synchronisation."""
        means = (self.sums / self.steps).tolist()
        return dict(zip(self.names, means)), int(self.finite), int(self.skipped)


def mean_of_all(means):
    """The mean over the processes of numbers by name."""
    values = torch.tensor([*means.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
    return dict(zip(means, (values / rank_and_world()[1]).tolist()))


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def last_checkpoint(args):
    """The checkpoint to go on from, or None for a new run. Raises ValueError if that would write over another run."""
    last = args.out / "last.pt"
    best = args.out / "best.pt"
    if not args.resume and (last.exists() or best.exists()):
        raise ValueError(f"{args.out} holds a run: add --resume to go on with it, or choose another --out")
    if not last.exists() and best.exists():
        raise ValueError(f"{args.out} has no last.pt to go on from: start from {best} with --init and another --out")
    return read_checkpoint(last) if last.exists() else None


def resumed_step(checkpoint, recipe, images):
    """The number of steps that a resumed run has done. Where the number of training images has changed, it keeps its
    epoch and its steps within that epoch."""
    step = checkpoint["step"]
    if checkpoint["training_images"] != images:
        before = steps_of_an_epoch(checkpoint["training_images"], recipe)
        now = steps_of_an_epoch(images, recipe)
        step = checkpoint["epoch"] * now + min(step - checkpoint["epoch"] * before, now)
        say(
            f"there were {checkpoint['training_images']:,} training images and are {images:,} now: the run goes on "
            f"with those, from step {step:,} in epoch {checkpoint['epoch'] + 1} on"
        )
    return step


def settings_of(args, config, recipe, train_set):
    """What a checkpoint stores of its run beside weights, states and progress."""
    return {
        "config": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "seed": args.seed,
        "classes": train_set.classes,
        "category_ids": train_set.category_ids,
        "training_images": len(train_set),
        "source": dataclasses.asdict(source_of(args)),
        "torch": str(torch.__version__),
    }


def require_same_settings(path, then, now):
    """Raises ValueError unless a checkpoint was made with these settings; epochs and images may differ."""
    needed = (*now, "model", "optimizer", "scaler", "epoch", "step", "best")
    if missing := [name for name in needed if name not in then]:
        raise ValueError(f"{path} is no checkpoint of a run: it has no {', '.join(missing)}; --init takes weights")
    data.require_same_classes(then["classes"], now["classes"], str(path), "the data")
    before = {**then["config"], **then["recipe"], "seed": then["seed"]}
    after = {**now["config"], **now["recipe"], "seed": now["seed"]}
    changed = [name for name in after if name != "epochs" and before.get(name) != after[name]]
    if changed:
        told = "; ".join(f"{name} was {before.get(name)!r}, not {after[name]!r}" for name in changed)
        way_out = "Go on with those, or start a new run from its weights with --init and another --out"
        raise ValueError(f"{path} was made with other settings: {told}. {way_out}")
    used = paths_of(then["source"])
    given = paths_of(now["source"])
    if [os.path.realpath(x) for x in used] != [os.path.realpath(x) for x in given]:
        say(f"{path} was trained on {' '.join(used)}: the run goes on with {' '.join(given)}")


def paths_of(source):
    """The different paths and names in a checkpoint's source."""
    return list(dict.fromkeys(filter(None, source.values())))


def save(path, state):
    """Writes a checkpoint in process 0; returns in all processes whether it is written. It replaces the previous one
    only once it is complete: where the disk is full, that one stays, and a warning is printed."""
    written = False
    if rank_and_world()[0] == 0:
        unfinished = path.with_name(f"{path.name}.tmp")
        try:
            with open(unfinished, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            written = True
        except (OSError, RuntimeError) as error:  # torch.save reports some of the system's errors as RuntimeError
            unfinished.unlink(missing_ok=True)
            kept = ", the one before it stays" if path.exists() else ""
            print(f"warning: {path} was not written{kept} ({error}): is the disk full?", file=sys.stderr)
    return any_rank(written)


# ---- A run -----------------------------------------------------------------------------------------------------------


def train(args, device):
    interruption = Interruption()
    rank, world = rank_and_world()

    # data
    checkpoint = on_every_rank(partial(last_checkpoint, args))
    recipe = on_every_rank(partial(choose_recipe, args))
    train_set, val_set = on_every_rank(partial(open_data, args, recipe))
    workers = workers_for(device) if args.workers is None else args.workers
    steps_per_epoch = steps_of_an_epoch(len(train_set), recipe)
    steps = recipe.epochs * steps_per_epoch

    # model and optimiser
    config = on_every_rank(partial(choose_config, args, len(train_set.classes)))
    settings = settings_of(args, config, recipe, train_set)
    if checkpoint:
        on_every_rank(partial(require_same_settings, args.out / "last.pt", checkpoint, settings))
    model = on_every_rank(partial(build_model, args, config, checkpoint)).to(device)
    if args.checkpoint_activations:
        recompute_activations(model)
    if args.compile:
        on_every_rank(partial(compile_in_place, model))
    amp = args.amp or amp_for(device, config.backbone)
    criterion = Criterion(recipe)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    parallel = model
    if world > 1:
        parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # progress
    epoch = 0  # the current one
    step = 0  # steps done
    logged = 0  # steps whose lines in the log stay
    best = -1.0  # the highest mean of AP_box and AP_mask
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty without fp16
            scaler.load_state_dict(checkpoint["scaler"])
        epoch = checkpoint["epoch"]
        step = resumed_step(checkpoint, recipe, len(train_set))
        logged = checkpoint["step"]
        best = checkpoint["best"]
    saved = True
    saved_step = step  # that of last.pt

    def save_as(name):
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        return save(args.out / name, {**parts, "epoch": epoch, "step": step, "best": best, **settings})

    def where(step):
        return f"step {step + 1} (epoch {step // steps_per_epoch + 1}, lr {recipe.lr * recipe.rate(step, steps):.1e})"

    describe(args, device, amp, model, train_set, val_set)
    say(
        f"training: {recipe.epochs} x {steps_per_epoch} steps of {recipe.batch_size} images, lr {recipe.lr:.1e}, "
        f"into {args.out}{f'; going on after step {step:,}' if step else ''}"
    )
    warn_of_emulation(device, amp)
    log = Log(args.out, steps, steps_per_epoch, step, logged)
    totals = Totals(device, fp16=amp == "fp16")

    while epoch < recipe.epochs:
        model.train()
        train_set.epoch = epoch
        interruption.saved = False
        begin = step
        end = (epoch + 1) * steps_per_epoch
        indices = micro_batches_of(len(train_set), recipe, epoch, args.seed, args.accumulate)[step - end :]
        loaded = batches_of(
            DataLoader(
                train_set,
                batch_sampler=indices.reshape(-1, indices.shape[-1]).tolist(),
                collate_fn=collate,
                num_workers=workers,
                pin_memory=device.type == "cuda",
            )
        )
        stopping = False
        problems = []
        waited = 0.0
        since = time.perf_counter()
        while step < end and not stopping:
            # the next batch
            asked = time.perf_counter()
            problem = ""
            try:
                micro_batches = [next(loaded) for _ in range(args.accumulate)]
            except LoadingError as error:
                problem = str(error)
            waited += time.perf_counter() - asked
            if problems := problems_of_all(problem):
                break

            # forward, criterion, backward, clip, step, with random numbers of this step and process
            torch.manual_seed(np.random.SeedSequence((args.seed, step, rank)).generate_state(1).item())
            rate = recipe.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
            try:
                losses, norm = train_step(parallel, criterion, optimizer, scaler, micro_batches, recipe, amp)
            except FloatingPointError as error:
                stop(f"{where(step)}: {error}\n{NOT_FINITE}", 1)
            totals.add(losses, norm)
            step += 1
            log.bar.update()
            stopping = any_rank(interruption.number)

            if step % LOG_EVERY == 0 or step in (1, end) or stopping:
                means, finite, skipped = totals.read()
                problem = ""
                if finite < totals.steps:
                    bad = step - totals.steps + finite
                    images = [train_set.image_ids[i] for i in indices[bad - begin].flat]
                    odd = [f"{name} {value}" for name, value in means.items() if not math.isfinite(value)]
                    problem = f"{where(bad)}: the loss is not finite, process {rank}, images {images}: {', '.join(odd)}"
                if problems := problems_of_all(problem):
                    stop("\n".join([*problems, NOT_FINITE]), 1)
                if skipped >= MOST_SKIPPED:
                    told = f"the gradient was not finite in any of the {skipped} steps up to {where(step - 1)}"
                    stop(f"fp16 trains nothing: {told}. --amp bf16 or off may help", 1)
                seconds = time.perf_counter() - since
                lr = recipe.lr * rate
                means = mean_of_all({name: means[name] for name in losses})
                log.training(step, means, lr, recipe.batch_size, seconds / totals.steps, waited / seconds)
                totals.clear()
                waited = 0.0
                since = time.perf_counter()
            if step % SAVE_EVERY == 0 and save_as("last.pt"):
                saved_step = step

        loaded.close()  # ends its workers
        saved = step == saved_step or save_as("last.pt")
        if problems:
            stop(problems[0], 2)
        if any_rank(interruption.number):
            after = f"a signal ended this after step {step}"
            say(f"{after}: --resume goes on" if saved else f"{after}, which could not be saved")
            sys.exit(128 + (interruption.number or signal.SIGTERM))

        interruption.saved = True
        share_statistics(model)
        metrics, results = evaluate(model, val_set, device, workers, amp)
        log.evaluation(step, metrics, results, val_set)
        interruption.saved = False
        epoch += 1
        score = ((metrics["AP_box"] or 0) + (metrics["AP_mask"] or 0)) / 2
        before = best
        best = max(score, best)
        if score > before and not save_as("best.pt"):  # before last.pt, which stores the score of best.pt
            best = before
        saved = save_as("last.pt")
        saved_step = step

    trained = f"trained for {recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}"
    if not saved:
        stop(f"{trained}, but {args.out / 'last.pt'} could not be written", 1)
    if best >= 0:
        say(f"{trained}; {args.out / 'best.pt'} is the best, {best:.1f}, the mean of both AP")


def check_data(args):
    """--check: decodes every image."""
    if rank_and_world()[0] == 0:
        train_set, val_set = open_data(args, choose_recipe(args))
        say(f"{args.data} is sound: {len(train_set):,} training and {len(val_set):,} validation images")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    print_anything()
    args = parse_training(arguments, __doc__.split("\n")[0])
    try:
        processes = launched_processes()
        if args.gpus > 1 and not args.check:  # one process is enough for --check
            if args.device != "cpu" and args.gpus > torch.cuda.device_count():
                told = f"this machine has {torch.cuda.device_count()} GPUs, not {args.gpus}"
                raise ValueError(f"{told}; --device cpu goes without")
            if processes == 1:
                sys.exit(launch(__file__, arguments, args.gpus))
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
            if here != args.gpus:
                told = f"a launcher has started {here} processes here (RANK, WORLD_SIZE), not {args.gpus}"
                raise ValueError(f"{told}: leave out --gpus")
        device = join(args.device)
    except ValueError as error:
        stop(error, 2)
    if args.check:
        return on_every_rank(partial(check_data, args))
    try:
        with contextlib.ExitStack() as stack:
            on_every_rank(lambda: stack.enter_context(held(args.out)))
            train(args, device)
    except LoadingError as error:  # of a validation image, in this process alone
        print(error, file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{error}\n--accumulate 2, --checkpoint-activations or a smaller --image-size take less memory")
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search("gloo|NCCL|peer", str(error)):
            raise
        sys.exit("another process of this run has died: --resume goes on from the last checkpoint")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
