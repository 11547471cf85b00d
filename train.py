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
from itertools import islice
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
    rank_and_world,
    say,
    stop,
    together,
    workers_for,
)
from util.flags import add_data_flags, add_device_flags, at_least, source_of, user_path
from util.log import Log, describe, replaced
from util.weights import imagenet, load_backbone, load_weights, read_checkpoint

LOG_EVERY = 50  # steps
SAVE_EVERY = 1000  # steps, beside the end of each epoch
LEAST_SCALE = 2.0**-14  # of fp16, which begins with 2 ** 16 and halves with each step that it skips


# ---- The recipe (4.1, appendix B) ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Settings of training. The defaults are the paper's for COCO; what it leaves open follows the released code."""

    epochs: int = 50
    batch_size: int = 16  # over all processes and micro-batches
    lr: float = 1e-4
    backbone_lr: float = 0.1  # times lr; 0 freezes the backbone
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
            if not getattr(self, name) > 0:  # NaN as well
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
    try:
        return name, parsed(value, kind)
    except (ValueError, KeyError):
        named = kind if typing.get_args(kind) else kind.__name__
        raise argparse.ArgumentTypeError(f"{text}: that is no {named}") from None


def parsed(text, kind):
    """A value of a field's type: (300,), None, True, 0.1 or a word."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        texts = [part for part in text.strip("() ").split(",") if part.strip()]
        kinds = parts[:1] * len(texts) if parts[-1] is ... else parts
        return tuple(parsed(*pair) for pair in zip(texts, kinds, strict=True))
    if parts:  # int | None
        return None if text == "None" else parsed(text, parts[0])
    return {"True": True, "False": False}[text] if kind is bool else kind(text)


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
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add_data_flags(add, help="shapes, coco, bdd100k, or a folder as of COCO, Roboflow, CVAT, Label Studio (shapes)")
    held_out = "COCO json of the training images; without --val-json every tenth image is held out"
    add("--train-json", type=user_path, metavar="FILE", help=held_out)
    presets = ["paper", "released", "maskdino", "tiny"]
    add("--preset", choices=presets, help="model and recipe (tiny for shapes, paper for all other data)")
    fields = f"change one of {', '.join(SETTABLE)}"
    add("--set", action="append", type=setting, default=[], metavar="FIELD=VALUE", help=fields)
    add("--epochs", type=at_least(1), help="(paper: 50; tiny: 12)")
    add("--gpus", type=at_least(1), default=1, help="processes to start on this machine (%(default)s)")
    add("--batch-size", type=at_least(1), help="of all processes together (paper: 16, Swin-L 4; tiny: 8)")
    add("--accumulate", type=at_least(1), default=1, help="micro-batches of a batch, to save memory (%(default)s)")
    add("--checkpoint-activations", action="store_true", help="recompute activations, to save memory")
    add("--lr", type=at_least(1e-12, float), help="learning rate (paper: 1e-4; tiny: 2e-3)")
    add("--image-size", type=at_least(1), help="px of training images; test images alike (paper: 1024; tiny: 128)")
    add("--augmentation", choices=[*AUGMENTATIONS], help="(paper: jitter; tiny: flips)")
    add_device_flags(add)
    add("--seed", type=at_least(0), default=0, help="(%(default)s)")
    add("--out", type=user_path, help="the run's folder (runs/DATA)")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--init", type=user_path, metavar="CKPT", help="start from the weights of a checkpoint that fit")
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
    if crowded := sum(len(objects) > queries for objects in train_set.annotations.values()):
        say(f"{crowded:,} training images have more objects than the model has queries, {queries}: see --set selection")
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
        say("\n  ".join([f"weights of {args.init}; left out: {len(left_out)}", *left_out]))
    empty = not args.init or any(name.startswith("backbone.") for name in left_out)
    weights = args.backbone_weights
    if weights is None and empty and config.backbone != "tiny":
        weights = imagenet(config.backbone)
    if weights not in (None, "none"):
        load_backbone(model, weights)
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
    before the schedule as `base_lr`; the backbone has its own, and is frozen where that is 0."""
    if recipe.backbone_lr == 0:
        model.backbone.requires_grad_(False)
        model.backbone.freeze_norm()
    groups = {}
    for prefix, module in model.named_modules():
        lr = recipe.lr * (recipe.backbone_lr if prefix.startswith("backbone") else 1)
        plain = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            decay = 0.0 if plain or name == "relative_position_bias_table" else recipe.weight_decay
            if parameter.requires_grad:
                groups.setdefault((lr, decay), []).append(parameter)
    groups = [{"params": x, "base_lr": lr, "weight_decay": decay} for (lr, decay), x in groups.items()]
    return torch.optim.AdamW(groups, recipe.lr, recipe.betas, fused=True)


# ---- A step ----------------------------------------------------------------------------------------------------------


def train_step(model, criterion, optimizer, scaler, micro_batches, recipe, amp="off"):
    """A step of the optimiser, with gradient accumulation over micro-batches.

    model: a DIMaskDINO, or DistributedDataParallel around one. micro_batches: a list of (images [B 3 H W] uint8,
    targets). Returns this process's share of each loss {name: scalar} and the norm of the gradient, both on the device.
    Each micro-batch has one synchronisation, in Hungarian matching. A gradient that is not finite changes no weight.
    Raises FloatingPointError, in all processes, where a prediction is not finite.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    device = next(bare.parameters()).device

    # Losses are divided by the objects of the whole batch over the number of processes. So any number of processes and
    # micro-batches gives the gradient of the whole batch in one process.
    objects = torch.tensor(float(sum(len(target["labels"]) for _, targets in micro_batches for target in targets)))
    world = rank_and_world()[1]
    if world > 1:
        dist.all_reduce(objects)
    num_objects = max(objects.item(), 1.0) / world

    totals = 0
    for number, (images, targets) in enumerate(micro_batches, 1):
        noise = denoising_queries(targets, bare.config.num_classes, recipe.denoising, recipe.label_noise)
        noise = noise.to(device)
        images = images.to(device, non_blocking=True)
        targets = [
            {name: x if name == "image_id" else x.to(device, non_blocking=True) for name, x in target.items()}
            for target in targets
        ]
        # Gradients accumulate in the parameters; the last backward averages them over the processes.
        averaged = number == len(micro_batches) or model is bare
        with contextlib.nullcontext() if averaged else model.no_sync():
            with autocast(device, amp):
                outputs = model(images, noise)
            # An error in one process ends all, before the others wait for its gradient.
            losses = together(partial(criterion, outputs, targets, num_objects, noise), FloatingPointError)
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


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def last_checkpoint(args):
    """The checkpoint to go on from, or None for a new run. Raises ValueError if that would write over another one."""
    last = args.out / "last.pt"
    if args.resume and last.exists():
        return read_checkpoint(last)
    for path in (last, args.out / "best.pt"):
        if path.exists():
            raise ValueError(f"{path} is of another run: --resume goes on from last.pt, else choose another --out")


def require_same_settings(path, then, now):
    """Raises ValueError unless a checkpoint was made with these settings; epochs, images and their paths may differ."""
    needed = (*now, "model", "optimizer", "scaler", "epoch", "step", "best")
    if missing := [name for name in needed if name not in then]:
        raise ValueError(f"{path} is no checkpoint of a run: it has no {', '.join(missing)}; --init takes weights")
    data.require_same_classes(then["classes"], now["classes"], str(path), "the data")
    before = {**then["config"], **then["recipe"], "seed": then["seed"]}
    after = {**now["config"], **now["recipe"], "seed": now["seed"], "epochs": before.get("epochs")}
    changed = [f"{name} was {before.get(name)!r}, not {x!r}" for name, x in after.items() if before.get(name) != x]
    if changed:
        way_out = "Go on with those, or start a new run from its weights with --init and another --out"
        raise ValueError(f"{path} was made with other settings: {'; '.join(changed)}. {way_out}")
    if images_of(then) != images_of(now):
        say(f"{path} was trained on {images_of(then)}: the run goes on with {images_of(now)}")


def images_of(settings):
    """The training images of a checkpoint, in words."""
    return f"{settings['training_images']:,} images of {' '.join(filter(None, settings['source'].values()))}"


def save(path, state):
    """Writes a checkpoint in process 0; returns in all processes whether it is written. It replaces the previous one
    only once it is complete: where the disk is full, that one stays, and a warning is printed."""
    written = False
    if rank_and_world()[0] == 0:
        try:
            with replaced(path) as file:
                torch.save(state, file)
            written = True
        except OSError as error:
            print(f"warning: {error}; an older one stays as it is", file=sys.stderr)
    return any_rank(written)


# ---- A run -----------------------------------------------------------------------------------------------------------


def set_up(args):
    """The checkpoint to go on from, the settings, the data and the model: all that a user's fault can stop."""
    checkpoint = last_checkpoint(args)
    recipe = choose_recipe(args)
    train_set, val_set = open_data(args, recipe)
    config = choose_config(args, len(train_set.classes))
    settings = {  # what a checkpoint stores beside weights, states and progress
        "config": dataclasses.asdict(config),
        "recipe": dataclasses.asdict(recipe),
        "seed": args.seed,
        "classes": train_set.classes,
        "category_ids": train_set.category_ids,
        "training_images": len(train_set),
        "source": dataclasses.asdict(source_of(args)),
        "torch": str(torch.__version__),
    }
    if checkpoint:
        require_same_settings(args.out / "last.pt", checkpoint, settings)
    model = build_model(args, config, checkpoint)
    if args.compile:
        compile_in_place(model)
    return checkpoint, recipe, train_set, val_set, settings, model


def require_finite(values, names, first, where):
    """Raises FloatingPointError for the first of some steps with a number that is not finite. values: those of each
    step from `first` on, in the order of their names; where(step) tells of a step."""
    for step, of_step in enumerate(values, first):
        if odd := [f"{name} {x}" for name, x in zip(names, of_step) if not math.isfinite(x)]:
            raise FloatingPointError(f"{where(step)}: the loss is not finite, {', '.join(odd)}")


def train(args, device):
    interruption = Interruption()
    rank, world = rank_and_world()
    checkpoint, recipe, train_set, val_set, settings, model = on_every_rank(partial(set_up, args))
    workers = workers_for(device) if args.workers is None else args.workers
    steps_per_epoch = steps_of_an_epoch(len(train_set), recipe)
    steps = recipe.epochs * steps_per_epoch

    # model and optimiser
    model.to(device)
    if args.checkpoint_activations:
        recompute_activations(model)
    amp = args.amp or amp_for(device, model.config.backbone)
    criterion = Criterion(recipe)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    parallel = model
    if world > 1:
        parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # progress
    epoch = 0  # the current one
    step = 0  # steps done
    best = -1.0  # the highest mean of AP_box and AP_mask
    saved = True
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # empty without fp16
            scaler.load_state_dict(checkpoint["scaler"])
        epoch = checkpoint["epoch"]
        best = checkpoint["best"]
        # With another number of images the epoch stays, and so do the steps within it.
        within = checkpoint["step"] - epoch * steps_of_an_epoch(checkpoint["training_images"], recipe)
        step = epoch * steps_per_epoch + min(within, steps_per_epoch)

    def save_as(name):
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        return save(args.out / name, {**parts, "epoch": epoch, "step": step, "best": best, **settings})

    def where(step):
        return f"step {step + 1} (epoch {step // steps_per_epoch + 1}, lr {recipe.lr * recipe.rate(step, steps):.1e})"

    def with_images(step):
        images = [train_set.image_ids[i] for i in indices[step % steps_per_epoch].flat]
        return f"{where(step)}, process {rank}, images {images}"

    describe(args, device, amp, model, train_set, val_set)
    say(
        f"training: {recipe.epochs} x {steps_per_epoch} steps of {recipe.batch_size} images, lr {recipe.lr:.1e}, "
        f"into {args.out}; {step:,} steps are done"
    )
    log = Log(args.out, steps, steps_per_epoch, step, checkpoint["step"] if checkpoint else 0)

    while epoch < recipe.epochs:
        model.train()
        train_set.epoch = epoch
        interruption.saved = False
        begin = epoch * steps_per_epoch
        end = begin + steps_per_epoch
        indices = micro_batches_of(len(train_set), recipe, epoch, args.seed, args.accumulate)
        batches = batches_of(
            DataLoader(
                train_set,
                batch_sampler=indices[step - begin :].reshape(-1, indices.shape[-1]).tolist(),
                collate_fn=collate,
                num_workers=workers,
                pin_memory=device.type == "cuda",
            )
        )
        stopping = False
        history = []  # losses and the gradient's norm of the steps that are not logged yet, on the device
        waited = 0.0
        since = time.perf_counter()
        while step < end and not stopping:
            # the next batch
            asked = time.perf_counter()
            try:
                micro_batches = together(partial(list, islice(batches, args.accumulate)), LoadingError)
            except LoadingError as error:
                save_as("last.pt")
                stop(error, 2)
            waited += time.perf_counter() - asked

            # forward, criterion, backward, clip, step, with random numbers of this step and process
            torch.manual_seed(np.random.SeedSequence((args.seed, step, rank)).generate_state(1).item())
            rate = recipe.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * rate
            try:
                losses, norm = train_step(parallel, criterion, optimizer, scaler, micro_batches, recipe, amp)
            except FloatingPointError as error:
                raise FloatingPointError(f"{where(step)}: {error}") from None
            history.append(torch.stack([*losses.values(), norm]))
            step += 1
            log.bar.update()
            stopping = any_rank(interruption.number)

            if step % LOG_EVERY == 0 or step in (1, end) or stopping:
                values = torch.stack(history).cpu()  # waits for the device
                names = [*losses, "the gradient's norm"]
                if amp == "fp16":  # whose scaler skips steps with a gradient that is not finite
                    names.pop()
                first = step - len(history)
                together(partial(require_finite, values.tolist(), names, first, with_images), FloatingPointError)
                if scaler.get_scale() <= LEAST_SCALE:
                    never = f"the gradient is not finite, however small its scale, at {where(step - 1)}"
                    stop(f"fp16 trains nothing: {never}. --amp bf16 or off may help", 1)
                means = values.mean(0)
                if world > 1:
                    dist.all_reduce(means)
                means = dict(zip(losses, (means / world).tolist()))
                seconds = time.perf_counter() - since
                log.training(step, means, recipe.lr * rate, recipe.batch_size, seconds / len(history), waited / seconds)
                history = []
                waited = 0.0
                since = time.perf_counter()
            if step % SAVE_EVERY == 0 or step == end or stopping:
                saved = save_as("last.pt")

        batches.close()  # ends its workers
        if any_rank(interruption.number):
            after = f"a signal ended this after step {step}"
            say(f"{after}: --resume goes on" if saved else f"{after}, which could not be saved")
            sys.exit(128 + (interruption.number or signal.SIGTERM))

        interruption.saved = True
        for buffer in model.buffers() if world > 1 else ():  # batch statistics: those of the checkpoint
            dist.broadcast(buffer, 0)
        metrics, results = evaluate(model, val_set, device, workers, amp)
        log.evaluation(step, metrics, results, val_set)
        interruption.saved = False
        epoch += 1
        score = ((metrics["AP_box"] or 0) + (metrics["AP_mask"] or 0)) / 2
        before = best
        best = max(score, before)
        if score > before and not save_as("best.pt"):  # before last.pt, which stores the score of best.pt
            best = before
        saved = save_as("last.pt")

    if not saved:
        stop(f"trained, but {args.out / 'last.pt'} could not be written", 1)
    say(f"trained for {epoch} epochs; the best mean of both AP was {best:.1f}, that of {args.out / 'best.pt'}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    print_anything()
    args = parse_training(arguments, __doc__.split("\n")[0])
    try:
        processes = launched_processes()
        if args.gpus > 1 and not args.check:  # one process is enough for --check
            devices = torch.cuda.device_count()
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
            if args.device != "cpu" and args.gpus > devices:
                raise ValueError(f"this machine has {devices} GPUs, not {args.gpus}; --device cpu goes without")
            if processes == 1:
                sys.exit(launch(__file__, arguments, args.gpus))
            if here != args.gpus:
                raise ValueError(f"a launcher has started {here} processes here (RANK, WORLD_SIZE): leave out --gpus")
        device = join(args.device)
    except ValueError as error:
        stop(error, 2)
    if args.check:
        train_set, val_set = on_every_rank(lambda: open_data(args, choose_recipe(args)))
        return say(f"{args.data} is sound: {len(train_set):,} training and {len(val_set):,} validation images")
    try:
        with contextlib.ExitStack() as stack:
            on_every_rank(lambda: stack.enter_context(held(args.out)))
            train(args, device)
    except FloatingPointError as error:
        stop(f"{error}\nlast.pt is untouched; a lower --lr or --amp off may help", 1)
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
