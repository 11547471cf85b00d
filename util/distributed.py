"""Several processes: launching and joining them, common decisions, the lock of a folder, signals, workers of a loader.

Everything here also works in a single process that nobody launched, which is rank 0 of 1.
"""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import multiprocessing.queues
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ROOM = 2**31  # bytes of shared memory that suffice a worker for any batch

# ---- Starting and joining --------------------------------------------------------------------------------------------


def rank_and_world() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def launch(program: str, arguments: list[str], processes: int) -> int:
    """Runs `python program arguments` in several processes on this machine; returns the first exit code that is not 0.

    Signals are passed on; a second Ctrl-C or SIGTERM kills the processes. When one fails, the others are ended.
    (torchrun would add a traceback for each wrong flag, end when the terminal closes, even under nohup, kill a process
    that needs more than 30 s to save, and leave the others running when it is killed itself.)
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on any free port
    common = {
        "OMP_NUM_THREADS": str(max(1, os.cpu_count() // processes)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    command = [sys.executable, program, *arguments]
    ranks = []
    received = []
    for rank in map(str, range(processes)):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=end_with_parent))

    def pass_on(number, frame):
        received.append(number)
        again = len(received) > 1 and number in (signal.SIGINT, signal.SIGTERM)
        for rank in ranks:
            rank.send_signal(signal.SIGKILL if again else number)

    catch_signals(pass_on)
    codes = [None]
    while None in codes and not any(codes):
        time.sleep(0.1)
        codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(5)
        rank.kill()
    code = min(filter(None, codes), default=0)
    if code >= 0:
        return code
    print(f"process {codes.index(code)} was killed by {signal.Signals(-code).name}", file=sys.stderr)
    return 128 - code


def end_with_parent() -> None:
    """Asks Linux to send this process SIGTERM when its parent dies."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launched_processes() -> int:
    """The number of processes that a launcher such as torchrun has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


def join(name: str | None) -> torch.device:
    """Joins the other processes, if a launcher such as torchrun started this one; returns this process's device.

    name: "cpu", "cuda", "cuda:1", or None for a GPU where there is one. Raises ValueError if there is no GPU for this
    process.
    """
    atexit.register(end_workers)
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    processes = launched_processes()
    if device.type == "cuda":
        if device.index is not None and processes > 1:
            raise ValueError(f"{device} is one GPU for {processes} processes: --device cuda gives each its own")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            told = f"this machine has no GPU number {index} (from 0 on): torch finds {torch.cuda.device_count()}"
            raise ValueError(f"{told}; ask for fewer with --gpus, or use --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        keep_memory()
    if processes > 1:
        # Tensors on the CPU go by gloo, so that small decisions need no synchronisation with the GPU.
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    return device


def keep_memory() -> None:
    """Makes glibc keep freed memory, which it would give back to the system and ask for again in each step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**28)  # M_TOP_PAD


# ---- Deciding together -----------------------------------------------------------------------------------------------


def any_rank(flag: Any) -> bool:
    """Whether the flag is true in any process."""
    flag = torch.tensor(bool(flag), dtype=torch.uint8)  # on the CPU: no synchronisation
    if dist.is_initialized():
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def together(action: Callable[[], Any], kind: type[Exception] = ValueError) -> Any:
    """Calls action() in all processes; returns its result. An error of a kind, or of the system, in one is raised in
    all."""
    result = None
    problem = ""
    try:
        result = action()
    except (kind, OSError) as error:
        problem = str(error)
    if any_rank(problem):
        problems = [problem]
        if dist.is_initialized():
            problems *= dist.get_world_size()
            dist.all_gather_object(problems, problem)
        raise kind("\n".join(dict.fromkeys(filter(None, problems))))
    return result


def on_every_rank(action: Callable[[], Any]) -> Any:
    """Calls action() first in process 0, which may download or write files, then in the others; returns its result.

    If it raises ValueError or OSError in one process, all of them end with that message and exit code 2.
    """
    first = rank_and_world()[0] == 0
    try:
        early = together(action if first else lambda: None)
        late = together(lambda: None if first else action())
    except ValueError as error:
        stop(error, 2)
    return early if first else late


def stop(message: object, code: int) -> None:
    """Ends all processes with one message on stderr. Every process must call this."""
    if rank_and_world()[0] == 0:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.barrier()
    sys.exit(code)


def say(message: str) -> None:
    """Prints a line in process 0, above the progress bar if there is one."""
    if rank_and_world()[0] == 0:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


say_once = functools.cache(say)


def print_anything() -> None:
    """Makes stdout and stderr escape letters that the terminal lacks (\\u0000), rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")


# ---- Folders ---------------------------------------------------------------------------------------------------------


def unwritable(path: Path, error: OSError) -> OSError:
    """The error that names a path that nothing can be written to, and why."""
    reason = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
    return OSError(f"nothing can be written to {path}: {reason}")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes a folder and locks it, in process 0: a second program gets a ValueError that names the first.

    The lock ends with its process, however that ends; workers do not inherit it. A folder that stays empty is removed.
    """
    if rank_and_world()[0] != 0:
        yield
        return
    new = not folder.exists()
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise unwritable(folder, error) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = path.read_text().strip() or "another process"
            raise ValueError(f"{folder} is in use by {holder}: wait for its end, or choose another --out") from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                if new:
                    folder.rmdir()


# ---- Signals ---------------------------------------------------------------------------------------------------------


def catch_signals(handler: Callable) -> None:
    """Sets the handler of SIGNALS, but for those that are ignored on purpose, as SIGHUP under nohup."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class Interruption:
    """Catches SIGTERM, Ctrl-C, SIGHUP and SIGUSR1, so that a training step in progress is finished and saved.

    number: of the first signal, or 0. saved: while it is False, the first signal is only noted in `number`. Otherwise
    it ends the program at once, as a second SIGTERM or Ctrl-C always does. Closing a terminal sends SIGHUP repeatedly.
    """

    def __init__(self):
        self.number = 0
        self.saved = True
        catch_signals(self.catch)

    def catch(self, number, frame):
        self.number = number
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)
        for again in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(again, signal.SIG_IGN)
        if self.saved:
            sys.exit(128 + number)


# ---- Processes that load data ----------------------------------------------------------------------------------------


class LoadingError(ValueError):
    """An image cannot be read, or a process that loads images has died. The message is one line."""


def batches_of(loader: DataLoader) -> Iterator:
    """Yields the batches of a loader, with as many workers as shared memory has room for. Raises LoadingError."""
    try:
        loader.num_workers = workers_that_fit(loader)
        loader.worker_init_fn = prepare_worker
        batches = iter(loader)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises wherever the program is just then
        try:
            yield from batches
        finally:
            if loader.num_workers:
                batches._shutdown_workers()  # done by the garbage collector, it may not reach them, and waits long
    except (ValueError, OSError, MemoryError) as error:
        # An error in a worker arrives with its traceback as the message, whose last line is the worker's message.
        message = re.sub(r"^\w+Error:? ?", "", str(error).strip().rpartition("\n")[2])
        raise LoadingError(message or "there is too little memory to load an image") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise LoadingError(
            "a worker, a process that loads images, has failed or was killed, as the system does where memory or "
            "shared memory (/dev/shm) is short: fewer --workers need less, 0 none"
        ) from None


def workers_that_fit(loader: DataLoader) -> int:
    """As many of a loader's workers as shared memory has room for."""
    asked = loader.num_workers
    if not asked or not os.path.isdir("/dev/shm"):
        return asked
    free = shutil.disk_usage("/dev/shm").free // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if free > asked * ROOM:
        return asked
    loader.num_workers = 0
    size = len(pickle.dumps(next(iter(loader), None)))
    fit = min(asked, free // (4 * size))  # a worker prepares two batches, which may have more objects
    if fit < asked:
        used = f"{fit} of {asked} --workers, so {fit or 'none'} will load images"
        say_once(f"shared memory (/dev/shm) has room for {used}; docker run --shm-size=8g makes more")
    return fit


def prepare_worker(worker: int) -> None:
    """Makes a worker ignore signals, as the step in progress needs its data, and exit where it cannot hand over a
    batch, for which the program would wait for ever."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)


def end_worker(error: Exception, batch: Any) -> None:
    print(f"a worker could not put a batch into shared memory (/dev/shm): {error}", file=sys.stderr, flush=True)
    os._exit(1)


def end_workers() -> None:
    """Kills workers that are left at exit: Python would send SIGTERM, which they ignore, and wait for ever."""
    for worker in multiprocessing.active_children():
        worker.kill()


# ---- Devices ---------------------------------------------------------------------------------------------------------


def workers_for(device: torch.device) -> int:
    """The default of --workers."""
    return 4 if device.type == "cuda" else 0


def amp_for(device: torch.device, backbone: str) -> str:
    """The default of --amp: bf16 where the device has instructions for it, but not for the tiny backbone on a CPU,
    whose products are too small to gain from it."""
    return "off" if emulates(device, "bf16") or (device.type, backbone) == ("cpu", "tiny") else "bf16"


def emulates(device: torch.device, amp: str) -> bool:
    """Whether the device lacks instructions for the type of autocast, which then takes many times as long. All GPUs
    have them for fp16, those since Ampere for bf16."""
    if device.type == "cuda":
        return amp == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    return amp != "off" and not (cpu.get(f"avx512_{amp}") or cpu.get(f"amx_{amp}"))


def warn_of_emulation(device: torch.device, amp: str) -> None:
    """Warns where the type of autocast is emulated."""
    if emulates(device, amp):
        better = "--amp off or fp16" if device.type == "cuda" else "--amp off"
        say(f"warning: this device has no instructions for {amp} and emulates it, very slowly: {better} is faster")
