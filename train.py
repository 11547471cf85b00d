"""Trains a DI-MaskDINO, on a CPU, a GPU or many.

    python train.py                                                  a tiny model on synthetic shapes: minutes on a CPU
    python train.py --data coco --epochs 12 --gpus 4                 the paper's recipe
    torchrun --nnodes 2 --nproc-per-node 8 ... train.py --data coco  on several machines

The run's folder gets log.jsonl, curves.png, pictures, predictions.json, and the checkpoints last.pt and best.pt.
A run that was stopped, in whatever way, goes on from its last checkpoint with --resume. On a CPU it then ends with the
same bits as if it had never stopped, because random numbers depend on the seed, the step and the process alone (those
that augment an image on the seed, the epoch and the image).
"""

import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader

from datasets import coco as data
from datasets.geometry import AUGMENTATIONS, shortest_side
from dimaskdino import DIMaskDINO, Norm
from evaluate import autocast, evaluate
from losses import Criterion, denoising_queries
from util.distributed import (
    Interruption,
    amp_for,
    any_rank,
    gather,
    join,
    keep_working,
    launch,
    launched_processes,
    on_every_rank,
    print_anything,
    rank_and_world,
    samples,
    say,
    share_statistics,
    stop,
    warn_of_emulation,
    workers_for,
)
from util.flags import choose_config, choose_recipe, files_of, parse_training
from util.log import Log, counted, describe, try_output
from util.recipe import parameter_groups
from util.weights import imagenet, load_weights, read_checkpoint

LOG_EVERY = 50  # steps
MOST_SKIPPED = 30  # steps in a row; fp16's scale then is a billionth of its first
SAVE_EVERY = 1000  # steps, beside the end of each epoch


# ---- Building a run --------------------------------------------------------------------------------------------------


def open_data(args, recipe):
    """The training and the validation set. Raises ValueError with all that is wrong with them."""
    augment = partial(AUGMENTATIONS[recipe.augmentation], recipe.image_size)
    files = files_of(args)
    train_set = data.open_dataset(args.data, args.data_root, "train", augment, True, args.seed, files)
    val_set = data.open_dataset(args.data, args.data_root, "val", shortest_side(*recipe.test_size), False, 0, files)
    for split, dataset in (("training", train_set), ("validation", val_set)):
        if sound := data.require_sound(dataset, f"{split} images of {args.data}", decode=args.check):
            say(sound)
    data.require_same_classes(train_set.classes, val_set.classes, "the training json", "that for validation")
    queries = choose_config(args, len(train_set.classes)).selection[-1]
    crowded = sum(len(objects) > queries for objects in train_set.annotations.values())
    if crowded:
        say(
            f"{crowded:,} training images have more objects than the model has queries ({queries}), so it cannot find "
            "all: the last number of --set selection=(...) changes that"
        )
    return train_set, val_set


class Run:
    """All that the steps of a run share: settings, data, model, optimiser, and how far it has come.

    epoch: the current one, from 0 on; step: how many are done; best: the highest mean of AP_box and AP_mask so far.
    Raises ValueError or OSError, with what to do, for wrong flags, faulty data and checkpoints that do not fit.
    """

    def __init__(self, args, device):
        checkpoint = last_checkpoint(args)
        self.args, self.device, self.recipe = args, device, choose_recipe(args)
        self.train_set, self.val_set = open_data(args, self.recipe)
        self.config = choose_config(args, len(self.train_set.classes))
        args.amp = args.amp or amp_for(device, self.config.backbone)
        self.epoch, self.step, self.best = 0, 0, -1.0
        self.saved_step, self.skipped = 0, 0  # the step of the checkpoint; steps in a row that fp16 has skipped
        self.steps_per_epoch = max(1, len(self.train_set) // self.recipe.batch_size)
        self.steps = self.recipe.epochs * self.steps_per_epoch
        if checkpoint:
            self.require_same_settings(checkpoint)
        torch.manual_seed(args.seed)
        self.model = DIMaskDINO(self.config)
        self.load(checkpoint)
        self.model.to(device).train()
        if args.checkpoint_activations:
            recompute_activations(self.model)
        self.parallel, self.sent = self.model, None  # the model, or DDP around it; the last step's numbers
        self.criterion = Criterion(self.recipe)
        groups = parameter_groups(self.model, self.recipe)
        self.optimizer = torch.optim.AdamW(groups, self.recipe.lr, self.recipe.betas, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        if checkpoint:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:  # empty without fp16
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.epoch, self.saved_step, self.best = (checkpoint[name] for name in ("epoch", "step", "best"))
            self.step = self.saved_step
            if (images := checkpoint["training_images"]) != len(self.train_set):
                self.count_steps_anew(images)

    def count_steps_anew(self, images):
        """Where the number of training images has changed: as many epochs and steps of this one are done as before."""
        before = max(1, images // self.recipe.batch_size)
        done = self.saved_step - self.epoch * before
        self.step = self.epoch * self.steps_per_epoch + min(done, self.steps_per_epoch)
        say(
            f"there were {images:,} training images and are {len(self.train_set):,} now: the run goes on with those, "
            f"from step {self.step:,} in epoch {self.epoch + 1} on"
        )

    def settings(self):
        """What must be as in the checkpoint for a run to go on from it."""
        recipe = dataclasses.asdict(self.recipe)
        run = {"classes": self.train_set.classes, "training_images": len(self.train_set), "seed": self.args.seed}
        return {"config": dataclasses.asdict(self.config), "recipe": recipe, **run}

    def require_same_settings(self, checkpoint):
        """Raises ValueError if the checkpoint was made with other settings; numbers of epochs and images may differ."""

        def flat(settings):
            every = {**settings, **settings["config"], **settings["recipe"]}
            return {
                name: value
                for name, value in every.items()
                if name not in ("config", "recipe", "epochs", "training_images")
            }

        path, now = self.args.out / "last.pt", self.settings()
        needed = (*now, "model", "optimizer", "scaler", "epoch", "step", "best")
        if missing := [name for name in needed if name not in checkpoint]:
            raise ValueError(f"{path} is no checkpoint of a run: it has no {', '.join(missing)}; --init takes weights")
        data.require_same_classes(checkpoint["classes"], now["classes"], str(path), self.args.data)
        now_on = dict.fromkeys([self.args.data, *files_of(self.args).values()])
        was_on = dict.fromkeys([checkpoint["data"], *checkpoint["files"].values()]) if "files" in checkpoint else now_on
        if [*map(os.path.realpath, was_on)] != [*map(os.path.realpath, now_on)]:
            say(f"{path} was trained on {' '.join(was_on)}: the run goes on with {' '.join(now_on)}")
        then, now = flat({name: checkpoint[name] for name in now}), flat(now)
        changed = [f"{name} was {then.get(name)!r}, not {now[name]!r}" for name in now if then.get(name) != now[name]]
        if changed:
            way_out = "Go on with those, or start a new run from its weights with --init and another --out"
            raise ValueError(f"{path} was made with other settings: {'; '.join(changed)}. {way_out}")

    def load(self, checkpoint):
        """Fill the model with the weights to start from."""
        args, left_out = self.args, []
        if checkpoint:
            load_weights(self.model, checkpoint)
            return
        if args.init:
            left_out = load_weights(self.model, args.init, partial=True)
            say("\n  ".join([f"weights of {args.init}" + ", without" * bool(left_out), *left_out]))
        unfilled = {odd.partition(":")[0] for odd in left_out}
        lacking = any(f"backbone.{name}" in unfilled for name in self.model.backbone.state_dict())
        wanted = self.config.backbone != "tiny" and (lacking or not args.init)
        if args.backbone_weights != "none" and (args.backbone_weights or wanted):
            load_weights(self.model, args.backbone_weights or imagenet(self.config.backbone))
            if args.init:
                say(f"the backbone's weights are those of {args.backbone_weights or 'ImageNet-1k'}")


def last_checkpoint(args):
    """The checkpoint to go on from, or None for a new run. Raises ValueError if that would write over another run."""
    last, best, log = (args.out / name for name in ("last.pt", "best.pt", "log.jsonl"))
    if not args.resume and (last.exists() or best.exists() or log.exists()):
        raise ValueError(f"{args.out} holds a run: add --resume to go on with it, or choose another --out")
    if not last.exists() and best.exists():
        raise ValueError(f"{args.out} has no last.pt to go on from: start from {best} with --init and another --out")
    return read_checkpoint(last) if last.exists() else None


def recompute_activations(model):
    """Keep of the backbone's stages and of the layers of encoder and decoder only what goes in. A backbone whose norms
    are not frozen is left as it is, as they would count each batch twice."""
    frozen = all(norm.frozen for norm in model.backbone.modules() if isinstance(norm, Norm))
    stages = model.backbone.stages if frozen else ()
    for layer in (*stages, *model.encoder.layers, model.residual, *model.decoder):
        layer.forward = partial(recompute, layer.forward, use_reentrant=False)


# ---- Steps -----------------------------------------------------------------------------------------------------------


def batches(run):
    """Places in the training set for the rest of the epoch, a list for each part of a batch that this process takes.

    All processes and parts together make the batches of a single process. A training set that is smaller than a batch
    is repeated until it fills one.
    """
    rank, world = rank_and_world()
    order = np.random.default_rng((run.args.seed, run.epoch)).permutation(len(run.train_set))
    share = run.recipe.batch_size // (run.args.accumulate * world)
    order = np.resize(order, (run.steps_per_epoch, run.args.accumulate, world, share))
    return order[run.step - run.epoch * run.steps_per_epoch :, :, rank].reshape(-1, share).tolist()


def loader_of(run):
    """Loads the parts of batches, (images [B 3 H W] uint8, targets), for the rest of the epoch."""
    run.train_set.epoch = run.epoch
    return DataLoader(
        run.train_set,
        batch_sampler=batches(run),
        collate_fn=data.collate,
        num_workers=run.args.workers,
        worker_init_fn=keep_working,
        pin_memory=run.device.type == "cuda",
    )


def objects_per_process(parts):
    """What every process divides its losses by: the number of objects in the whole batch over that of processes.

    Then any number of processes and parts gives the gradient that one process gets from the whole batch.
    """
    objects = torch.tensor(float(sum(len(target["labels"]) for _, targets in parts for target in targets)))
    world = rank_and_world()[1]
    if world > 1:
        dist.all_reduce(objects)
    return max(objects.item(), 1.0) / world


def gradients(run, parts):
    """Noise, forward, criterion and backward for each part of a batch: gradients add up in the parameters.

    parts: a list of (images [B 3 H W] uint8, targets) of this process. Returns its share of each loss {name: scalar},
    on the device: it waits for the device once for each part, to match predictions with objects.
    """
    num_objects, totals = objects_per_process(parts), 0
    for number, (images, targets) in enumerate(parts, 1):
        noised = denoising_queries(targets, run.config.num_classes, run.recipe.denoising, run.recipe.label_noise)
        images, targets, noised = to_device(run.device, images, targets, noised)
        with contextlib.nullcontext() if number == len(parts) else not_yet_averaged(run):
            with autocast(run.device, run.args.amp):
                outputs = run.parallel(images, noised)
            with finite_or_stop(run, run.step, [targets]):
                losses = run.criterion(outputs, targets, num_objects, noised)
            values = torch.stack([*losses.values()])
            run.scaler.scale(values.sum()).backward()
        totals = totals + values.detach()
    return dict(zip(losses, totals, strict=True))


def update(run, losses, parts):
    """The optimiser's step, with the gradient of the whole model clipped to a norm.

    A gradient that is not finite changes no weight. Nobody waits to find out: the numbers of the step are sent to the
    CPU, where `arrived` looks at them.
    """
    rate = run.recipe.rate(run.step, run.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * rate
    run.scaler.unscale_(run.optimizer)
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
    if not run.scaler.is_enabled():  # fp16's scaler looks for itself, skips such a step and lowers its scale
        run.optimizer.found_inf = (~norm.isfinite()).float()  # as the scaler would say it
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    numbers = torch.stack([*losses.values(), norm]).to("cpu", non_blocking=True)
    there = torch.cuda.Event() if run.device.type == "cuda" else None
    if there:
        there.record()
    run.sent = Sent(run.step, parts, [*losses], numbers, there)
    run.step += 1


class Sent(NamedTuple):
    """What the CPU is to know of a step: the names of its losses; their values and the gradient's norm."""

    step: int
    parts: list
    names: list
    numbers: Tensor
    there: torch.cuda.Event | None  # when the numbers have arrived


def arrived(run):
    """The losses {name: float} of the step that `update` did last, or of none. Where a number is not finite, all
    processes end."""
    if run.sent is None:
        return {}
    (step, parts, names, numbers, there), run.sent = run.sent, None
    if there:
        there.synchronize()
    *values, norm = numbers.tolist()
    losses = dict(zip(names, values, strict=True))
    checked = losses if run.scaler.is_enabled() else {**losses, "the gradient's norm": norm}
    with finite_or_stop(run, step, [targets for _, targets in parts]):
        if not all(map(math.isfinite, checked.values())):
            raise FloatingPointError(", ".join(f"{name} {value:.4g}" for name, value in checked.items()))
    stop_if_always_skipped(run, step, norm)
    return losses


def stop_if_always_skipped(run, step, norm):
    """With fp16, ends all processes where the gradient has not been finite for many steps in a row: the scaler skips
    each, and would do so for ever."""
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    if run.skipped == MOST_SKIPPED:
        steps = f"the {MOST_SKIPPED} steps up to step {step + 1} (epoch {step // run.steps_per_epoch + 1})"
        stop(f"fp16 trains nothing: the gradient was not finite in any of {steps}. --amp bf16 or off may help", 1)


def to_device(device, images, targets, noised):
    targets = [{k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in t.items()} for t in targets]
    return images.to(device, non_blocking=True), targets, noised.to(device)


def not_yet_averaged(run):
    """DistributedDataParallel averages gradients over the processes with the last part; until then it waits."""
    return run.parallel.no_sync() if run.parallel is not run.model else contextlib.nullcontext()


@contextlib.contextmanager
def finite_or_stop(run, step, parts):
    """If a FloatingPointError is raised inside, in any process, all of them end here, with no weight made of it.

    step: the one, from 0 on, and parts: the targets, that the message names."""
    trouble = ""
    try:
        yield
    except FloatingPointError as error:
        trouble = str(error)
    if any_rank(trouble):
        images = [target["image_id"] for targets in parts for target in targets]
        reports = gather(trouble and f"process {rank_and_world()[0]}, images {images}: {trouble}")
        rate = run.recipe.lr * run.recipe.rate(step, run.steps)
        head = f"the loss is not finite in step {step + 1} (epoch {step // run.steps_per_epoch + 1}, lr {rate:.1e})"
        tail = f"{run.args.out / 'last.pt'} is untouched. A lower --lr or --amp off may help"
        stop("\n".join([head, *filter(None, reports), tail]), 1)


def train_epoch(run, interruption, log):
    """Train for the rest of the epoch, or until the end of the step in which a signal comes."""
    rank, world = rank_and_world()
    loaded, last = log.follow(run, samples(loader_of(run))), (run.epoch + 1) * run.steps_per_epoch
    totals, steps, waited, since = Counter(), 0, 0.0, time.perf_counter()
    while run.step < last and not any_rank(interruption.number):
        begin = time.perf_counter()
        parts = [next(loaded) for _ in range(run.args.accumulate)]
        waited += time.perf_counter() - begin
        torch.manual_seed(np.random.SeedSequence((run.args.seed, run.step, rank)).generate_state(1).item())
        losses = gradients(run, parts)
        totals.update(arrived(run))  # of the step before, which is over as a rule: matching waits for the device
        update(run, losses, parts)
        steps += 1
        if run.step % LOG_EVERY == 0 or run.step in (1, last):
            totals.update(arrived(run))
            means = torch.tensor(list(totals.values())) / (steps * world)
            if world > 1:
                dist.all_reduce(means)
            seconds = time.perf_counter() - since
            log.training(run, dict(zip(totals, means.tolist(), strict=True)), seconds / steps, waited / seconds)
            totals, steps, waited, since = Counter(), 0, 0.0, time.perf_counter()
        if run.step % SAVE_EVERY == 0:
            save(run, "last.pt")
    arrived(run)


def save(run, name):
    """Write a checkpoint, in process 0. It replaces the one before it only once it is whole; where the disk is full,
    that one stays, a warning is printed, and False returned."""
    if rank_and_world()[0] != 0:
        return True
    state = {part: getattr(run, part).state_dict() for part in ("model", "optimizer", "scaler")}
    progress = {"epoch": run.epoch, "step": run.step, "best": run.best}
    origin = {"data": run.args.data, "files": files_of(run.args), "category_ids": run.train_set.category_ids}
    origin["torch"] = str(torch.__version__)
    path, unfinished = run.args.out / name, run.args.out / f"{name}.tmp"
    try:
        with open(unfinished, "wb") as file:
            torch.save({**state, **progress, **run.settings(), **origin}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save reports some of the system's errors as RuntimeError
        unfinished.unlink(missing_ok=True)
        print(f"warning: {path} was not written, the one before it stays ({error})", file=sys.stderr)
        return False
    return True


# ---- The story -------------------------------------------------------------------------------------------------------


def check_data(args):
    """For --check: read every image, and measure how fast training images load."""
    recipe = choose_recipe(args)
    train_set, val_set = open_data(args, recipe)
    sample = torch.utils.data.Subset(train_set, data.evenly_spaced(64, len(train_set)))
    begin = time.perf_counter()
    count = sum(1 for _ in DataLoader(sample, batch_size=None, num_workers=args.workers))
    rate = count / (time.perf_counter() - begin)
    say(f"{args.data} is sound: {len(train_set):,} training and {len(val_set):,} validation images")
    say(f"training images of {recipe.image_size} px load at {rate:.1f} a second with {args.workers} workers")


def train(args):
    try:
        device = join(args.device)
    except ValueError as error:
        stop(error, 2)
    on_gpu = device.type == "cuda"
    args.workers = workers_for(device) if args.workers is None else args.workers
    if args.check:
        return on_every_rank(lambda: rank_and_world()[0] or check_data(args))
    on_every_rank(lambda: rank_and_world()[0] or try_output(args.out))
    run = on_every_rank(partial(Run, args, device))
    on_every_rank(partial(args.out.mkdir, parents=True, exist_ok=True))
    describe(run)
    warn_of_emulation(device, args.amp)
    if dist.is_initialized():
        run.parallel = nn.parallel.DistributedDataParallel(run.model, device_ids=[device] if on_gpu else None)
    log, interruption = Log(run), Interruption()

    while run.epoch < run.recipe.epochs:
        run.model.train()
        train_epoch(run, interruption, log)
        save(run, "last.pt")
        if any_rank(interruption.number):
            say(f"a signal ended this after step {run.step}: --resume goes on")
            sys.exit(128 + (interruption.number or signal.SIGTERM))

        interruption.saved = True
        share_statistics(run.model)
        metrics, results = evaluate(run.model, run.val_set, device, args.workers, args.amp)
        log.evaluation(run, metrics, results)
        interruption.saved = False
        score = ((metrics["AP_box"] or 0) + (metrics["AP_mask"] or 0)) / 2
        before, run.best, run.epoch = run.best, max(score, run.best), run.epoch + 1
        if score > before and not save(run, "best.pt"):  # first: what last.pt says of it has to be true
            run.best = before
        save(run, "last.pt")
    epochs = counted(run.epoch, "epoch")
    say(f"trained for {epochs}; {args.out / 'best.pt'} is the best, {run.best:.1f}, the mean of both AP")


def must_launch(gpus):
    """Whether --gpus has to start processes. Where a launcher has started another number, that is said, and the end."""
    try:
        processes = launched_processes()
    except ValueError as error:
        stop(error, 2)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
    if processes > 1 and here != gpus:
        stop(f"a launcher has started {here} processes here (RANK, WORLD_SIZE), not {gpus}: leave out --gpus", 2)
    return processes == 1


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    print_anything()
    args = parse_training(arguments, __doc__.split("\n")[0])
    if args.gpus > 1 and not args.check and must_launch(args.gpus):  # to read all files, one process is enough
        if args.device != "cpu" and args.gpus > torch.cuda.device_count():
            stop(f"this machine has {torch.cuda.device_count()} GPUs, not {args.gpus}; --device cpu goes without", 2)
        sys.exit(launch(__file__, arguments, args.gpus))
    try:
        train(args)
    except torch.OutOfMemoryError as error:
        sys.exit(f"{error}\n--accumulate 2, --checkpoint-activations or a smaller --image-size take less memory")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
