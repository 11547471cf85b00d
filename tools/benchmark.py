"""Time, memory, operators and synchronisations of the model and of a training step: `python -m tools.benchmark`.

    seconds    the median of repeats, after two warm-ups
    peak GB    allocated by PyTorch on a GPU; on a CPU held by the process, with Python and its libraries
    operators  without those that only view memory: about as many kernels as a GPU has to launch
    waits      synchronisations: how often the host reads what was computed from the model's weights

Inference is that of one image of COCO's size, up to the factors of its masks; a training step is `train_step` of
train.py. Images are noise with seven rectangles each, weights are random. Operators and waits are counted on any
device, so a CPU shows where a GPU would make the host wait. bf16 is left out where there are no instructions for it.
With --compile, the seconds of compilation and a row without operators and waits follow each row.

To compare two versions, run both in turn, as a machine's speed wanders:

    for i in 1 2 3; do for d in OLD NEW; do (cd $d && python -m tools.benchmark --repeats 1); done; done
"""

import argparse
import ctypes
import datetime
import math
import platform
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deform_attn_cuda import status
from dimaskdino import Config, DIMaskDINO
from evaluate import autocast
from losses import Criterion
from train import Recipe, make_optimizer, recompute_activations, train_step
from util.compiled import compile_in_place
from util.distributed import emulates
from util.flags import at_least

aten = torch.ops.aten
PHOTO = (800, 1216)  # an image of COCO as the paper tests it
OBJECTS = 7  # in each image
# Operators that are waits: item, bool and their like; a mask as an index, of which the host has to know the number of
# True; and copies to the host, which on a CPU are no operators.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}
INDEXING = {aten.index, aten.index_put, aten.index_put_}


def made_up_batch(images: int, size: tuple[int, int], num_classes: int) -> tuple[Tensor, list[dict]]:
    """Images of noise [B 3 H W] uint8, and targets as those of a data set: rectangles."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(size[0])[:, None] / size[0]
    x = torch.arange(size[1]) / size[1]
    targets = []
    for image_id in range(images):
        boxes = torch.tensor([0.3, 0.3, 0.1, 0.1]) + 0.4 * torch.rand(OBJECTS, 4, generator=generator)
        cx, cy, w, h = boxes.T[..., None, None]
        masks = (abs(x - cx) < w / 2) & (abs(y - cy) < h / 2)
        labels = torch.randint(num_classes, (OBJECTS,), generator=generator)
        targets.append({"labels": labels, "boxes": boxes, "masks": masks, "image_id": image_id})
    return torch.randint(256, (images, 3, *size), dtype=torch.uint8, generator=generator), targets


def new_model(preset: str, device: torch.device, recompute: bool = False) -> DIMaskDINO:
    """A model with random weights. The norms of a ResNet are frozen, as when it starts from weights of ImageNet."""
    torch.manual_seed(0)
    model = DIMaskDINO(getattr(Config, preset)()).to(device)
    if model.config.backbone != "tiny":
        model.backbone.freeze_norm()
    if recompute:
        recompute_activations(model)
    return model


def inference(model, device, amp, size=PHOTO):
    """A function that runs the model on one image."""
    images, _ = made_up_batch(1, size, model.config.num_classes)
    model.eval()

    @torch.no_grad()
    def work():
        with autocast(device, amp):
            model(images.to(device))

    return work


def training_step(model, recipe, device, amp, size, images=1):
    """A function that does a step of training."""
    criterion = Criterion(recipe)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    batch = made_up_batch(images, size, model.config.num_classes)
    model.train()
    return lambda: train_step(model, criterion, optimizer, scaler, [batch], recipe, amp)


class Operators(TorchDispatchMode):
    """Counts operators, and the waits that they are. What is computed from `tensors` lies on the device."""

    def __init__(self, tensors):
        super().__init__()
        self.operators = Counter()
        self.waits = Counter()
        self.on_device = WeakSet(x.untyped_storage() for x in tensors)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if not func.is_view:
            self.operators[str(name)] += 1
        if self.has(args):
            self.on_device.update(x.untyped_storage() for x in tree_leaves(result) if isinstance(x, Tensor))
            by_mask = name in INDEXING and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
            if name in READS or by_mask:
                self.waits[str(name)] += 1
        return result

    def has(self, args):
        return any(isinstance(x, Tensor) and x.untyped_storage() in self.on_device for x in tree_leaves(args))


class Copies(TorchFunctionMode):
    """Adds to the waits of Operators the copies to the host, which on a CPU are no operators."""

    def __init__(self, counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = func in (Tensor.cpu, Tensor.tolist) or (func is Tensor.to and args[1:] == ("cpu",))
        if to_host and self.counted.has(args) and not kwargs.get("non_blocking"):
            self.counted.waits[func.__name__] += 1
        return func(*args, **kwargs)


def count(model, work):
    """The operators and the waits of a call, two Counters by name."""
    with Operators([*model.parameters(), *model.buffers()]) as counted, Copies(counted):
        work()
    return counted.operators, counted.waits


def peak_gigabytes(work, device):
    """The most memory that is taken during a call; NaN where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 1e9
    process = Path("/proc/self")
    if not process.exists():
        work()
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    (process / "clear_refs").write_text("5")  # the peak starts anew
    work()
    return int(re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())[1]) / 1e6


def measured(model, work, device, repeats):
    """The figures of a row: median seconds, peak GB, operators, waits."""
    peak = peak_gigabytes(work, device)
    operators, waits = count(model, work)
    return f"{median_seconds(work, device, repeats):9.3f}{peak:9.2f}{operators.total():11,}{waits.total():7}"


def median_seconds(work, device, repeats):
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        getattr(torch, device.type).synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=["paper", "released", "maskdino", "tiny"], default="paper", help="(%(default)s)")
    add("--image-size", type=at_least(32), default=512, help="side of training images in px (%(default)s)")
    add("--batch-size", type=at_least(1), default=2, help="training images (%(default)s)")
    add("--checkpoint-activations", action="store_true", help="recompute activations, as train.py does with this flag")
    add("--compile", action="store_true", help="each also compiled, as train.py does with this flag")
    add("--repeats", type=at_least(1), default=3, help="the median of so many is printed (%(default)s)")
    add("--device", choices=["cpu", "cuda"], default=default, help="(%(default)s)")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --device cpu")
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(f"{name}, PyTorch {torch.__version__}, {status(device)}, {datetime.date.today()}")
    print(shlex.join(["python", "-m", "tools.benchmark", *arguments]))
    print(f"\n{args.preset:15}{'images':12}{'type':5}{'seconds':>9}{'peak GB':>9}{'operators':>11}{'waits':>7}")
    recipe = Recipe.tiny() if args.preset == "tiny" else Recipe()
    square = args.image_size, args.image_size
    for amp in ("off", "bf16"):
        if emulates(device, amp):
            print(f"bf16: no instructions for it on this {device.type}, left out")
            continue
        for name, images, size in (("inference", 1, PHOTO), ("training step", args.batch_size, square)):
            model = new_model(args.preset, device, args.checkpoint_activations)
            if name == "inference":
                work = inference(model, device, amp, size)
            else:
                work = training_step(model, recipe, device, amp, size, images)
            shape = f"{images}x{size[0]}x{size[1]}"
            what = f"{shape:12}{'fp32' if amp == 'off' else amp:5}"
            print(f"{name:15}{what}{measured(model, work, device, args.repeats)}", flush=True)
            if args.compile:  # PyTorch's operators are gone
                compile_in_place(model)
                work()
                peak = peak_gigabytes(work, device)
                print(f"  compiled     {what}{median_seconds(work, device, args.repeats):9.3f}{peak:9.2f}", flush=True)


if __name__ == "__main__":
    main()
