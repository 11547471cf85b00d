"""One process or many: who am I, joining and launching, deciding together, signals, processes that load data.

Everything here also works in a single process that nobody launched: it is then number 0 of 1.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

# ---- Starting and joining --------------------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """The number of this process, from 0 on, and how many processes there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def launch(program: str, arguments: list[str], processes: int) -> int:
    """Run `python program arguments` in several processes on this machine, as torchrun would. Returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        max_restarts=0,
        run_id="launch",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # any free port
        local_addr="127.0.0.1",  # by default torch looks up the host name, and waits for ever if it has no address
    )
    try:
        elastic_launch(config, sys.executable)(program, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"process {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def join(device: str | None) -> torch.device:
    """Join the other processes, if a launcher such as torchrun started this one, and return this process's device.

    device: "cpu", "cuda", or None for a GPU where there is one. Raises ValueError if there is no GPU for this process.
    """
    atexit.register(end_workers)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"process {local_rank} of this machine has no GPU: torch finds {torch.cuda.device_count()}; "
            "ask for fewer with --gpus, or use --device cpu"
        )
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    else:
        keep_memory()
    if launched_processes() > 1:
        # gloo carries what lives on the CPU, so that small decisions never wait for the GPU.
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def keep_memory() -> None:
    """Let glibc keep what is freed. It would give the memory of each step back to the system and ask for it again."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**30), (M_TOP_PAD, 2**28)):
            libc.mallopt(parameter, size)


def launched_processes() -> int:
    """How many processes a launcher such as torchrun has started; 1 without one, or if it started just this."""
    try:
        return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1
    except ValueError:
        raise ValueError(f"WORLD_SIZE in the environment is {os.environ['WORLD_SIZE']!r}, not a number") from None


# ---- Deciding together -----------------------------------------------------------------------------------------------


def gather(value: Any) -> list:
    """The values of all processes, in all processes."""
    values = [value] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: Any) -> bool:
    """Whether the flag is true in any process."""
    flag = torch.tensor(bool(flag), dtype=torch.uint8)  # on the CPU, so that it waits for no GPU
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def say(message: str) -> None:
    """Print a line for people: once, however many processes there are, and above the progress bar if there is one."""
    if rank_and_world()[0] == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def print_anything() -> None:
    """Let stdout and stderr show names that the terminal has no letters for as \\u0000, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")


def stop(message: object, code: int) -> None:
    """End all processes with one message on stderr. Every process must call this."""
    if rank_and_world()[0] == 0:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.barrier()
    sys.exit(code)


def on_every_rank(action: Callable[[], Any]) -> Any:
    """Call action() in every process and return its result: first in process 0, which may download or write files.

    If it raises ValueError or OSError in one process, all of them end with that message and exit code 2.
    """
    result = None
    for first in (True, False):
        problem = None
        if (rank_and_world()[0] == 0) == first:
            try:
                result = action()
            except (ValueError, OSError) as error:
                problem = str(error)
        if problems := list(filter(None, gather(problem))):
            stop(problems[0], 2)
    return result


def share_statistics(model: nn.Module) -> None:
    """Give every process the batch statistics of process 0, which are those that a checkpoint holds."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


# ---- Signals ---------------------------------------------------------------------------------------------------------


class Interruption:
    """Catches SIGTERM and Ctrl-C, so that a training step that they interrupt is finished and saved.

    number: that of the first signal that came, 0 if none did. saved: set it to True while nothing would be lost, for
    example during evaluation; a signal then ends the program at once.
    """

    def __init__(self):
        self.number, self.saved = 0, False
        signal.signal(signal.SIGTERM, self.catch)
        signal.signal(signal.SIGINT, self.catch)

    def catch(self, number, frame):
        self.number = self.number or number
        if self.saved:
            sys.exit(128 + self.number)


# ---- Processes that load data ----------------------------------------------------------------------------------------


def samples(loader: Iterable) -> Iterator:
    """What the loader yields. If an image cannot be read, the program ends with its name and exit code 2."""
    try:
        yield from loader
    except ValueError as error:
        error.__traceback__ = None  # it keeps the loader alive, whose workers should end now
        # An error from a worker brings that worker's traceback with it; the message is its last line.
        print(str(error).strip().splitlines()[-1].removeprefix("ValueError: "), file=sys.stderr)
        sys.exit(2)


def workers_for(device: torch.device) -> int:
    """How many processes load images unless somebody says otherwise."""
    return 4 if device.type == "cuda" else 0


def amp_for(device: torch.device, backbone: str) -> str:
    """The type of autocast unless somebody says otherwise: bf16 where there are instructions for it, but on a CPU not
    if the backbone is "tiny", whose products are too small to gain from them."""
    return "off" if emulates(device, "bf16") or (device.type, backbone) == ("cpu", "tiny") else "bf16"


def emulates(device: torch.device, amp: str) -> bool:
    """Whether this device has no instructions for the type of autocast: it takes many times as long then. All GPUs have
    them for fp16, and those since Ampere for bf16."""
    if device.type == "cuda":
        return amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    return amp != "off" and not (cpu.get(f"avx512_{amp}") or cpu.get(f"amx_{amp}"))


def warn_of_emulation(device: torch.device, amp: str) -> None:
    """Say so where the type of autocast is emulated."""
    if emulates(device, amp):
        kind, better = ("GPU", "--amp off or fp16") if device.type == "cuda" else ("CPU", "--amp off")
        say(f"warning: this {kind} has no instructions for {amp} and emulates it, very slowly: {better} is faster")


def keep_working(worker: int) -> None:
    """Make a loader's worker ignore Ctrl-C and SIGTERM, which reach it too: the step in progress needs its data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the workers that are left at exit: Python would send SIGTERM, which they ignore, and wait for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()
