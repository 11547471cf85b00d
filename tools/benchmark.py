"""Time, memory and counts of the whole model and of training steps on this machine: `python -m tools.benchmark`.

Times are medians of repeats in which all rows take turns, after a warm-up. Peak memory is measured: weights, gradients
and the optimiser's state, and beside them what PyTorch allocates on a GPU, or how much the process grows on a CPU. The
other columns are counted with fake tensors, which have shapes and no numbers, as on a GPU: any machine gives the same.

    tensors    the most gigabytes that tensors take at a time: a peak without the workspaces of single operators
    GFLOP      of matrix products, convolutions, attention, and the sums of deformable attention: a multiplication and
               an addition are two. Elementwise operators and grid_sample are not counted
    operators  called, without those that only view or allocate memory: about as many kernels as a GPU has to launch
    waits      of the host for what it reads of the GPU: item, tolist, nonzero, copies
    copies     from the host to the GPU that are not asked for as non_blocking: PyTorch waits for those as well

A training step is train.py's denoising queries, forward, criterion and backward. Its update, clipping and AdamW, has a
row of its own. Images are noise with seven rectangles each, weights are random.
"""

import argparse
import datetime
import functools
import json
import platform
import shlex
import statistics
import sys
import time
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import dimaskdino
from deform_attn_cuda import deform_attn, status
from deform_attn_cuda.benchmark import grid_sample, peak_megabytes
from dimaskdino import RESNETS, SWINS, Config, DIMaskDINO, postprocess
from evaluate import autocast, flop
from losses import Criterion
from train import gradients, recompute_activations, update
from util.distributed import emulates
from util.recipe import Recipe, parameter_groups

aten = torch.ops.aten
PATHS = {"kernel": deform_attn, "grid_sample": grid_sample}
AMP = {"off": "fp32", "bf16": "bf16"}
OBJECTS = 7  # an image
PHOTO = (800, 1216)  # an image of COCO as the paper tests it
MEMORY_SIZE = (1024, 1024)  # the paper's training images


# ---- What is run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A row of the table: something to do with a run, again and again."""

    name: str
    preset: str
    amp: str
    size: tuple[int, int]
    images: int = 1
    path: str = "kernel"  # of deformable attention
    checkpointing: bool = False
    backbone: str | None = None  # None: the preset's

    @property
    def model(self):
        return self.preset, self.backbone

    def prepare(self, run):
        """What is needed before the work and does not belong to it."""
        run.args.amp, run.batch = self.amp, batch(self.size, self.images, run.config.num_classes)
        run.model.train(not self.name.startswith("inference"))
        if self.name.startswith("inference"):
            return
        run.losses = {"loss": torch.zeros((), device=run.device)}

        def make_gradients():
            for parameter in run.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

        if not run.optimizer.state:
            make_gradients()
            update(run, run.losses, [run.batch])
        if self.name == "update":
            make_gradients()
        else:
            run.optimizer.zero_grad()

    def work(self, run):
        with mock.patch.object(dimaskdino, "deform_attn", PATHS[self.path]):
            if self.name.startswith("inference"):
                with torch.no_grad(), autocast(run.device, self.amp):
                    outputs = run.model(run.batch[0].to(run.device))
                if "post" in self.name:
                    postprocess(outputs, [self.size] * self.images, [self.size] * self.images)
            if "step" in self.name:
                run.losses = gradients(run, [run.batch])
            if "update" in self.name:
                update(run, run.losses, [run.batch])

    def state(self, run):
        """The tensors that exist before the work and that it needs."""
        tensors = [*run.model.parameters(), *run.model.buffers()]
        if run.model.training:
            tensors += [p.grad for p in tensors if p.grad is not None]
            tensors += [x for state in run.optimizer.state.values() for x in state.values()]
        return tensors


def new_run(preset, device, checkpointing=False, backbone=None):
    """What the steps of training need of train.Run; weights are random. Norms of ResNets are frozen, as with weights
    from ImageNet."""
    torch.manual_seed(0)
    config, recipe = getattr(Config, preset)(), Recipe.tiny() if preset == "tiny" else Recipe()
    config = replace(config, backbone=backbone or config.backbone)
    with device:
        model = DIMaskDINO(config)
    if config.backbone != "tiny":
        model.backbone.freeze_norm()
    if checkpointing:
        recompute_activations(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), recipe.lr, recipe.betas, fused=True)
    return SimpleNamespace(
        args=SimpleNamespace(amp="off"), config=config, recipe=recipe, device=device, model=model, parallel=model,
        criterion=Criterion(recipe), optimizer=optimizer, scaler=torch.amp.GradScaler(device.type, enabled=False),
        step=0, steps=1000, sent=None,
    )  # fmt: skip


@functools.cache
def batch(size, images, num_classes):
    """Images of noise [B 3 H W] and their targets: rectangles."""
    rng, targets = np.random.default_rng(0), []
    y, x = np.mgrid[: size[0], : size[1]] / np.array(size)[:, None, None]
    for i in range(images):
        centers, sides = rng.uniform(0.3, 0.7, (OBJECTS, 2)), rng.uniform(0.1, 0.5, (OBJECTS, 2))
        x0, y0, x1, y1 = np.concatenate((centers - sides / 2, centers + sides / 2), 1).T[..., None, None]
        target = {
            "labels": rng.integers(num_classes, size=OBJECTS),
            "boxes": np.concatenate((centers, sides), 1, dtype=np.float32),
            "masks": (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1),
        }
        targets.append({name: torch.from_numpy(x) for name, x in target.items()} | {"image_id": i})
    return torch.from_numpy(rng.integers(256, size=(images, 3, *size), dtype=np.uint8)), targets


# ---- What is counted -------------------------------------------------------------------------------------------------


class Counts(TorchDispatchMode):
    """Operators called with fake tensors, their floating point operations, and the memory of tensors."""

    def __init__(self, tensors):
        """tensors: those that exist before"""
        super().__init__()
        self.operators, self.flop, self.memory, self.peak, self.alive = Counter(), 0, 0, 0, set()
        self.note(tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = fakes((args, kwargs)), fakes(result)
        if not given and not made:  # the host's own
            return result
        storages = {id(x.untyped_storage()) for x in given}
        view = not func._schema.is_mutable and all(id(x.untyped_storage()) in storages for x in made)
        if not view and "empty" not in func.name():
            self.operators[func.name().removeprefix("aten::")] += 1
        self.flop += flop(func, args, kwargs or {}, result)
        self.note(made)
        return result

    def note(self, tensors):
        for storage in (x.untyped_storage() for x in tensors):
            if id(storage) not in self.alive:
                self.alive.add(id(storage))
                self.memory += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.memory)

    def forget(self, number, size):
        self.alive.discard(number)
        self.memory -= size


def fakes(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, FakeTensor)]


class Imagined(TorchFunctionMode):
    """Fake tensors are those of a GPU, others the host's: what the host reads of a GPU is zeros, and is counted.

    So matching pairs each object with the query of its own number: of the same size as any other match.
    """

    def __init__(self, fake):
        super().__init__()
        self.fake, self.waits, self.copies = fake, Counter(), 0
        self.patches = [mock.patch.object(torch, name, partial(self.create, getattr(torch, name))) for name in CREATE]
        # Its own one reads number by number.
        self.patches.append(mock.patch.object(FakeTensor, "tolist", Tensor.tolist))

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)

    def create(self, func, *args, device=None, **kwargs):
        """A tensor of the host's numbers."""
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
            self.copies += device is not None
            return result if device is None else self.fake.from_tensor(result)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        with unset_fake_temporarily():
            if fakes(args):
                self.copies += name == "new_tensor"
                if func in READS or (name == "to" and "cpu" in args):
                    self.waits[name] += not kwargs.get("non_blocking")
                    return func(torch.zeros(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs)
            elif any(isinstance(x, Tensor) for x in tree_leaves((args, kwargs))):  # the host's own
                result = func(*args, **kwargs)
                if name != "to" or not any(isinstance(x, torch.device) for x in (*args, *kwargs.values())):
                    return result
                self.copies += not kwargs.get("non_blocking")
                return self.fake.from_tensor(result)
        return func(*args, **kwargs)


CREATE = ("tensor", "from_numpy")
READS = {Tensor.cpu, Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.nonzero}


def as_on_gpu(norm):
    """A function for a norm that works in fp32 under autocast; on a CPU they keep the type they get."""

    def call(*args, **kwargs):
        if torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return norm(*args, **kwargs)

    return call


def count(case):
    """What a case takes by counting: {column: value}. Nothing is computed, and no memory is used."""
    status("cpu")  # looks for the kernel: with real numbers
    fake, foreach = FakeTensorMode(allow_non_fake_inputs=True), torch.utils._foreach_utils._foreach_supported_types
    with (
        mock.patch.object(torch.utils._foreach_utils, "_foreach_supported_types", [*foreach, FakeTensor]),
        mock.patch.multiple(nnf, layer_norm=as_on_gpu(nnf.layer_norm), group_norm=as_on_gpu(nnf.group_norm)),
        mock.patch.object(torch.nn.init, "trunc_normal_"),  # looks at numbers
        fake,
    ):
        run = new_run(case.preset, torch.device("cpu"), case.checkpointing, case.backbone)
        with Imagined(fake):
            case.prepare(run)
        with Counts(case.state(run)) as counts, Imagined(fake) as imagined:
            case.work(run)
    return {
        "GFLOP": counts.flop / 1e9,
        "operators": counts.operators.total(),
        "waits": imagined.waits.total(),
        "copies": imagined.copies,
        "tensors_GB": counts.peak / 1e9,
        "operators_by_name": dict(counts.operators.most_common()),
        "waits_by_name": dict(imagined.waits),
    }


# ---- What is measured ------------------------------------------------------------------------------------------------


def seconds(call, device):
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measured_peak(case, run):
    """Gigabytes: the state from before, and the most that the work needs beyond it."""
    case.prepare(run)
    before = sum(x.nbytes for x in case.state(run))
    return (before / 1e6 + peak_megabytes(partial(case.work, run), run.device.type)) / 1e3


def measure(cases, runs, repeats):
    """Peaks, which warm up, and median times: all cases take turns in each repeat."""
    peaks = [measured_peak(case, runs[case.model]) for case in cases]
    times = [[] for _ in cases]
    for _ in range(repeats):
        for case, so_far in zip(cases, times, strict=True):
            run = runs[case.model]
            case.prepare(run)
            so_far.append(seconds(partial(case.work, run), run.device))
    return [{"seconds": statistics.median(t), "peak_GB": peak} for t, peak in zip(times, peaks, strict=True)]


def captured_and_compiled(case, run, repeats):
    """Lines on CUDA graphs and torch.compile of an inference: how long they take, or why they do not run."""
    case.prepare(run)
    image = run.batch[0].to(run.device)

    @torch.no_grad()
    def infer(model):
        with autocast(run.device, case.amp):
            return model(image)

    def graph():
        infer(run.model)  # the first call sets up what must not be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            infer(run.model)
        return graph.replay

    ways = {
        "eager": lambda: partial(infer, run.model),
        "CUDA graph": graph,
        "torch.compile": lambda: partial(infer, torch.compile(run.model)),
    }
    for name, make in ways.items():
        title = f"{case.name} {AMP[case.amp]}, {name}:"
        try:
            call = make()
            call()
            times = [seconds(call, run.device) for _ in range(repeats)]
            yield f"{title} {statistics.median(times):.4f} s"
        except Exception as error:  # whatever they make of this model: the table is whole without them
            yield f"{title} {type(error).__name__}: {str(error).splitlines()[0]}"


# ---- The tables ------------------------------------------------------------------------------------------------------


def cases_of(args):
    """The rows of the table. None is in bf16 where that is emulated, as one convolution can take a minute then."""
    cases, training = [], (args.image_size, args.image_size)
    for amp in ("off",) if emulates(torch.device(args.device), "bf16") else ("off", "bf16"):
        cases.append(Case("inference", args.preset, amp, PHOTO))
        cases.append(Case("inference, post-processed", args.preset, amp, PHOTO))
        cases.append(Case("training step", args.preset, amp, training, args.batch_size))
    cases.append(Case("update", args.preset, "off", training, args.batch_size))
    cases = [replace(case, backbone=args.backbone) for case in cases]
    cases.append(Case("training step", "tiny", "off", (128, 128), 8))
    cases.append(Case("update", "tiny", "off", (128, 128), 8))
    if args.against:
        cases = [replace(case, path=path) for case in cases for path in PATHS if case.name != "update"]
    return cases


HEADER = (
    f"{'':26}{'preset':9}{'images':15}{'type':5}{'attention':12}{'seconds':>8}{'peak GB':>8}{'tensors':>8}{'GFLOP':>8}"
    f"{'operators':>10}{'waits':>6}{'copies':>7}"
)


def text(row):
    size, amp = "x".join(map(str, (row["images"], *row["size"]))), AMP[row["amp"]]
    return (
        f"{row['name']:26}{row['preset']:9}{size:15}{amp:5}{row['path']:12}{row['seconds']:8.3f}{row['peak_GB']:8.2f}"
        f"{row['tensors_GB']:8.2f}{row['GFLOP']:8.1f}{row['operators']:10,}{row['waits']:6}{row['copies']:7}"
    )


def memory_table(args, device):
    """The peak of training steps with images of 1024 px in bf16: measured on a GPU, and estimated."""
    for checkpointing in (False, True):
        for images in (1, 2, 4):
            case = Case("step and update", args.preset, "bf16", MEMORY_SIZE, images)
            case = replace(case, checkpointing=checkpointing, backbone=args.backbone)
            row = {"images": images, "checkpoint_activations": checkpointing, "estimated_GB": count(case)["tensors_GB"]}
            if device.type == "cuda":
                row["measured_GB"] = measured_peak(case, new_run(args.preset, device, checkpointing, args.backbone))
            yield row


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def parse_arguments(arguments):
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is not at least 1")
        return int(text)

    def side(text):
        if positive(text) % 32:
            raise argparse.ArgumentTypeError(f"{text} is not a multiple of 32")
        return int(text)

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, presets = parser.add_argument, ["paper", "released", "maskdino", "tiny"]
    add("--preset", choices=presets, default="paper", help="(%(default)s)")
    add("--backbone", choices=[*RESNETS, *SWINS], help="(the preset's)")
    add("--image-size", type=side, default=512, help="side of training images in px (%(default)s)")
    add("--batch-size", type=positive, default=2, help="training images (%(default)s)")
    add("--repeats", type=positive, default=3, help="the median of so many is printed (%(default)s)")
    add(
        "--against",
        choices=["grid_sample"],
        help="also with deformable attention as DETR's repositories do it, in turn",
    )
    add(
        "--memory",
        action="store_true",
        help="instead: the peak of a training step with 1, 2, 4 images of 1024 px in bf16",
    )
    add("--operators", action="store_true", help="list the operators, too")
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(%(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures, with all operators by name, to a file")
    return parser.parse_args(arguments)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_arguments(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("torch finds no GPU here: --device cpu", file=sys.stderr)
        sys.exit(2)
    head = {
        "machine": machine(device),
        "software": f"PyTorch {torch.__version__}, {status(device)}",
        "date": f"{datetime.date.today()}",
        "command": shlex.join(["python", "-m", "tools.benchmark", *arguments]),
    }
    print(*head.values(), sep="\n")
    if args.memory:
        rows = []
        size = "x".join(map(str, MEMORY_SIZE))
        print(f"\nThe peak in GB of a training step of {args.preset} and its update, images of {size}, bf16")
        print(f"{'images':8}{'activations':13}{'estimate':>9}{'measured':>9}")
        for row in memory_table(args, device):
            kept, measured = "recomputed" if row["checkpoint_activations"] else "kept", row.get("measured_GB")
            measured = f"{measured:9.2f}" if measured else f"{'-':>9}"
            print(f"{row['images']:<8}{kept:13}{row['estimated_GB']:9.2f}{measured}", flush=True)
            rows.append(row)
    else:
        print(f"\n{HEADER}")
        cases = cases_of(args)
        counted = [count(case) for case in cases]
        runs = {model: new_run(model[0], device, backbone=model[1]) for model in {case.model for case in cases}}
        measured = measure(cases, runs, args.repeats)
        rows = [asdict(case) | m | c for case, m, c in zip(cases, measured, counted, strict=True)]
        for row in rows:
            print(text(row))
            if args.operators:
                print("   ", ", ".join(f"{number} {name}" for name, number in row["operators_by_name"].items()))
        if device.type == "cuda":
            plain = [case for case in cases if case.name == "inference" and case.path == "kernel"]
            remarks = [x for c in plain for x in captured_and_compiled(c, runs[c.model], args.repeats)]
        else:
            remarks = ["CUDA graphs and torch.compile: no GPU, skipped"]
        if emulates(device, "bf16"):
            remarks.append(f"bf16: no instructions for it on this {device.type}, skipped")
        print("", *remarks, sep="\n")
        head["remarks"] = remarks
    if args.json:
        args.json.write_text(json.dumps(head | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
