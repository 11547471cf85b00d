"""What util/distributed.py promises, and that two processes compute what one does."""

import contextlib
import errno
import math
import multiprocessing
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import evaluate
import train
from small_runs import (
    FOUR,
    assert_same_gradient,
    batch_of,
    comparable,
    exit_code,
    flags_of,
    gradient_of,
    log_of,
)
from util import distributed
from util.distributed import LoadingError, batches_of
from util.weights import read_checkpoint

HERE = Path(__file__).parents[1]
ONE_OBJECT = 2  # an image that has one


# ---- Many processes --------------------------------------------------------------------------------------------------


def without_objects(batch):
    for target in batch[1]:
        target.update({name: target[name][:0] for name in ("labels", "boxes", "masks")})
    return batch


def images_of(folder):
    """The training set and the validation set."""
    args = train.parse_training(flags_of(folder, "unused", "--image-size", 128))
    return train.open_data(args, train.choose_recipe(args))


def two_processes(rank, threads, folder, four, out):
    """What each of two processes sees, saved for the tests below."""
    torch.set_num_threads(threads)  # as many as in the process that compares: sums come out alike
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    images, val_set = images_of(folder)
    steps = comparable()
    steps.parallel = DistributedDataParallel(steps.model)
    start = steps.model.state_dict()
    start = {name: x.clone() for name, x in start.items()}
    seen = {}
    mine = FOUR[2 * rank : 2 * rank + 2]
    micro_batches = {
        "shared": [batch_of(images, *mine)],
        "in micro-batches": [batch_of(images, i) for i in mine],
        "one without objects": [batch_of(images, ONE_OBJECT)],
    }
    if rank == 1:
        without_objects(micro_batches["one without objects"][0])
    for how, batches in micro_batches.items():
        steps.model.load_state_dict(start)
        seen[how] = gradient_of(steps, *batches)
    steps.model.load_state_dict(start)
    seen["metrics"], seen["results"] = evaluate.evaluate(steps.model, val_set, torch.device("cpu"))

    # A run of one step an epoch: its criterion gives NaN in process 1 at the second; resumed, it gets a signal there.
    seeds, step, criterion = [], train.train_step, train.Criterion.forward

    def watched(model, *rest):
        seeds.append(torch.initial_seed())
        if (rank, len(seeds)) == (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        done = step(model, *rest)
        seen.setdefault("loss", sum(done[0].values()).item())
        seen.setdefault("own statistics", statistics(model))
        return done

    def poisoned(self, *arguments):
        losses = criterion(self, *arguments)
        return {name: x * math.nan if (rank, len(seeds)) == (1, 2) else x for name, x in losses.items()}

    def evaluated(model, *rest):
        seen["statistics"] = statistics(model)
        return {"AP_box": 5.0, "AP_mask": 5.0}, []

    train.train_step, train.Criterion.forward, train.evaluate = watched, poisoned, evaluated
    train.Log.evaluation = lambda *_: None
    train.join = lambda name: torch.device("cpu")  # has joined
    flags = flags_of(four, out, "--epochs", 2, "--resume")
    seen["ends"] = [exit_code(train.main, flags) for _ in range(2)]
    seen["seeds"] = seeds
    torch.save(seen, out / f"{rank}.seen")
    dist.destroy_process_group()


def statistics(model):
    return torch.cat([buffer.flatten().clone() for buffer in model.buffers()])


@pytest.fixture(scope="module")
def pair(folder, four, tmp_path_factory):
    """(what rank 0 saw, what rank 1 saw)"""
    out = tmp_path_factory.mktemp("pair")
    multiprocessing.set_forkserver_preload(["train"])  # imported once for both
    arguments = torch.get_num_threads(), folder, four, out
    torch.multiprocessing.start_processes(two_processes, arguments, nprocs=2, start_method="forkserver")
    seen = [torch.load(out / f"{rank}.seen", weights_only=True) for rank in (0, 1)]
    left = {"saved step": read_checkpoint(out / "last.pt")["step"], "logged": log_of(out)[0]["loss"]}
    return [of_rank | left for of_rank in seen]


@pytest.fixture(scope="module")
def sets(folder):
    return images_of(folder)


@pytest.mark.parametrize("how", ["shared", "in micro-batches"])
def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(sets, pair, how):
    whole = gradient_of(comparable(), batch_of(sets[0], *FOUR))
    assert torch.equal(pair[0][how], pair[1][how])
    assert_same_gradient(pair[0][how], whole)


def test_a_process_without_objects_neither_hangs_nor_skews_the_gradient(sets, pair):
    # Two micro-batches, as an image without objects beside others takes part in their denoising groups.
    batch, empty = (batch_of(sets[0], ONE_OBJECT) for _ in range(2))
    whole = gradient_of(comparable(), batch, without_objects(empty))
    assert_same_gradient(pair[0]["one without objects"], whole)


def test_evaluation_by_two_processes_equals_that_of_one_to_the_digit(sets, pair):
    metrics, results = evaluate.evaluate(comparable().model, sets[1], torch.device("cpu"))
    assert pair[0]["metrics"] == pair[1]["metrics"] == metrics
    assert pair[0]["results"] == results and pair[1]["results"] is None
    assert len(results) == 5 * 18


def test_all_processes_evaluate_with_the_statistics_of_the_checkpoint(pair):
    assert not torch.equal(pair[0]["own statistics"], pair[1]["own statistics"])
    assert all(torch.equal(seen["statistics"], pair[0]["own statistics"]) for seen in pair)


def test_the_logged_loss_is_the_mean_over_the_processes(pair):
    assert pair[0]["loss"] != pair[1]["loss"]
    assert pair[0]["logged"] == pytest.approx((pair[0]["loss"] + pair[1]["loss"]) / 2, rel=1e-4)


def test_each_process_and_step_draws_noise_of_its_own(pair):
    assert len({*pair[0]["seeds"][:2], *pair[1]["seeds"][:2]}) == 4


def test_a_loss_that_is_not_finite_or_a_signal_in_one_process_ends_all(pair):
    assert [seen["ends"] for seen in pair] == [[1, 143], [1, 143]]
    assert pair[0]["saved step"] == 2


# ---- Starting --------------------------------------------------------------------------------------------------------


def cluster(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("world", ["1", ""])
def test_gpus_are_started_where_a_cluster_has_set_rank_for_one_process(monkeypatch, world):
    started = []
    monkeypatch.setattr(train, "launch", lambda program, arguments, processes: started.append(processes) or 0)
    cluster(monkeypatch, RANK="0", WORLD_SIZE=world)
    assert exit_code(train.main, ["--gpus", "4", "--device", "cpu"]) == 0 and started == [4]


@pytest.mark.parametrize("world, here, said", [("8", "2", "2 processes here"), ("2", "", "--gpus"), ("x", "", "'x'")])
def test_gpus_are_refused_where_a_launcher_started_another_number(monkeypatch, capsys, world, here, said):
    cluster(monkeypatch, RANK="0", WORLD_SIZE=world, LOCAL_WORLD_SIZE=here)
    assert exit_code(train.main, ["--gpus", "4", "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_one_process_joins_nobody_whatever_a_cluster_has_set(monkeypatch):
    cluster(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR="no-such-host.invalid")
    assert distributed.join("cpu") == torch.device("cpu") and not dist.is_initialized()


def test_one_gpu_by_its_number_is_for_one_process_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert distributed.join("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="no GPU number 2.*finds 2"):
        distributed.join("cuda:2")
    cluster(monkeypatch, RANK="0", WORLD_SIZE="2")
    with pytest.raises(ValueError, match="--device cuda gives each its own"):
        distributed.join("cuda:1")


def test_each_process_has_the_gpu_of_its_number_on_its_own_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    cluster(monkeypatch, RANK="3", LOCAL_RANK="1", WORLD_SIZE="4")
    assert distributed.join("cuda") == torch.device("cuda:1")


@pytest.mark.parametrize("rank, order", [(0, ["act", "wait", "wait"]), (1, ["wait", "act", "wait"])])
def test_process_0_makes_files_before_the_others_look_for_them(monkeypatch, rank, order):
    done = []
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (rank, 2))
    monkeypatch.setattr(distributed, "any_rank", lambda _: done.append("wait"))
    distributed.on_every_rank(lambda: done.append("act"))
    assert done == order


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_process_on_a_cpu_keeps_the_memory_that_a_step_frees():
    program = """if True:
        import resource, torch
        from util import distributed
        distributed.join("cpu")
        faults = []
        for step in range(20):  # the first ones ask for what the others use again
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            # Each is larger than any that was freed, else glibc might by chance keep that by itself.
            tensors = [torch.ones(2**21 + 2**12 * step) for _ in range(10)]
            del tensors
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        print(min(faults))
    """
    ended = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 1000  # page faults; 80 MB are 20,480 pages of 4 KB


RANK = """
import os, signal, sys, time
def end(number, frame):
    os.write(1, f"{number}\\n".encode())
    time.sleep(100 if "stays" in sys.argv else 0)
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
print("up", os.environ["RANK"], os.environ["WORLD_SIZE"], signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, flush=True)
if os.environ["RANK"] == "1" and sys.argv[1] == "2":
    sys.exit(2)
time.sleep(100)
"""


def launched(tmp_path, program, *arguments, ignore=None):
    """A launcher of two processes, in a process of its own, and the file that gets what all of them say."""
    said = tmp_path / "said"

    def start():
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
        os.dup2(1, 2)
        if ignore:
            signal.signal(ignore, signal.SIG_IGN)
        os._exit(distributed.launch(str(program), [*arguments], 2))

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    return process, said


def small_ranks(tmp_path, *arguments, ignore=None):
    """A launcher of two processes that do nothing but wait, once they are up."""
    (tmp_path / "rank.py").write_text(RANK)
    process, said = launched(tmp_path, tmp_path / "rank.py", *arguments, ignore=ignore)
    while process.is_alive() and not (said.exists() and said.read_text().count("up") == 2):
        time.sleep(0.02)
    return process, said


def test_a_process_that_fails_ends_the_others_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess.Popen, "wait", lambda process, timeout=None: None)  # no patience
    process, _ = small_ranks(tmp_path, "2")
    process.join(30)
    assert process.exitcode == 2


def test_processes_share_out_the_cores_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (tmp_path / "rank.py").write_text("import os; print('threads', os.environ['OMP_NUM_THREADS'])")
    process, said = launched(tmp_path, tmp_path / "rank.py")
    process.join(30)
    assert said.read_text().split() == ["threads", "4"] * 2


def test_processes_get_the_signals_of_their_launcher(tmp_path):
    process, said = small_ranks(tmp_path, "waits", ignore=signal.SIGHUP)
    os.kill(process.pid, signal.SIGHUP)  # nohup
    os.kill(process.pid, signal.SIGUSR1)
    process.join(30)
    assert process.exitcode == 128 + signal.SIGUSR1
    assert said.read_text().split().count(str(int(signal.SIGUSR1))) == 2 and said.read_text().count("True") == 2


def test_a_second_sigterm_kills_processes_that_wait(tmp_path):
    process, said = small_ranks(tmp_path, "waits", "stays")
    os.kill(process.pid, signal.SIGTERM)
    while str(int(signal.SIGTERM)) not in said.read_text().split():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 137


@pytest.mark.slow
def test_the_death_of_one_process_ends_all_with_a_line(folder, tmp_path, capfd):
    flags = flags_of(folder, tmp_path / "run", "--epochs", 10_000)
    process, said = launched(tmp_path, HERE / "train.py", *flags)
    while not (tmp_path / "run" / "log.jsonl").exists() and process.is_alive():
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    process.join(100)
    assert process.exitcode == 128 + signal.SIGKILL
    assert "process 1 was killed by SIGKILL" in capfd.readouterr().err and "Traceback" not in said.read_text()


# ---- Loading ---------------------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    """Tensors of 100 kB; `trouble` happens where number 3 is asked for."""

    def __init__(self, trouble=None):
        self.trouble = trouble

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 3 and self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3 and isinstance(self.trouble, Exception):
            raise self.trouble
        return torch.full((25_000,), float(index))


def loaded(dataset, workers):
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    return [int(x[0]) for x in batches_of(loader)], loader.num_workers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [ValueError("3.png is cut"), OSError(errno.EIO, "3.png"), MemoryError()])
def test_what_cannot_be_loaded_is_told_in_one_line(workers, error):
    with pytest.raises(LoadingError, match="3.png|memory") as told:
        loaded(Numbers(error), workers)
    assert len(str(told.value).splitlines()) == 1 and "Error:" not in str(told.value)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_ends_the_loading_with_what_helps():
    with pytest.raises(LoadingError, match="a worker.*was killed.*--workers"):
        loaded(Numbers("killed"), 2)


def test_a_program_ends_though_a_worker_is_stuck():
    program = """if True:
        import sys, time
        from torch.utils.data import DataLoader
        from util.distributed import batches_of, join
        class Slow:
            __len__ = lambda self: 8
            __getitem__ = lambda self, index: time.sleep(1000 * bool(index))
        join("cpu")
        batches = batches_of(DataLoader(Slow(), batch_size=None, num_workers=1, collate_fn=repr))
        next(batches)
        sys.exit(3)
    """
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE, timeout=100).returncode == 3


def test_a_batch_that_does_not_fit_into_shared_memory_ends_the_loading(capfd):
    """A limit on the size of files stands for a /dev/shm that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(LoadingError, match="shared memory"):
            loaded(Numbers(), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not put a batch into shared memory" in capfd.readouterr().err


USAGE = namedtuple("usage", "free")


def test_a_damaged_first_image_is_told_where_shared_memory_is_short(monkeypatch):
    monkeypatch.setattr(distributed.shutil, "disk_usage", lambda path: USAGE(0))
    loader = DataLoader(Numbers(ValueError("3.png is cut")), batch_size=None, sampler=[3], num_workers=2)
    with pytest.raises(LoadingError, match="^3.png is cut$"):
        next(batches_of(loader))


@pytest.mark.parametrize(
    "free, processes, workers",
    [(2**40, "", 4), (900_000, "", 2), (900_000, "2", 1), (500_000, "", 1), (64_000, "", 0), (0, "", 0)],
)
def test_as_many_workers_start_as_shared_memory_has_room_for(monkeypatch, capsys, free, processes, workers):
    cluster(monkeypatch, LOCAL_WORLD_SIZE=processes)
    monkeypatch.setattr(distributed.shutil, "disk_usage", lambda path: USAGE(free))
    distributed.say_once.cache_clear()
    assert loaded(Numbers(), 4) == ([*range(8)], workers)
    said = capsys.readouterr().out
    assert said.count("\n") == (workers < 4) and ("room for" in said) == (workers < 4)


def ended(action):
    """The exit code of a forked process that calls action()."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(30)
    return process.exitcode


@pytest.mark.parametrize("second, code", [("SIGINT", -signal.SIGINT), ("SIGHUP", 5), ("SIGUSR1", 5)])
def test_a_second_ctrl_c_ends_at_once_and_a_second_hangup_does_not(second, code):
    def interrupted():
        distributed.Interruption().saved = False
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), getattr(signal, second))
        os._exit(5)

    assert ended(interrupted) == code


def test_nohup_stays_in_force():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    distributed.Interruption()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and callable(signal.getsignal(signal.SIGTERM))


# ---- Folders ---------------------------------------------------------------------------------------------------------


def test_a_program_holds_its_folder_while_it_lives_and_no_longer(tmp_path):
    def hold():
        with distributed.held(tmp_path / "run"):
            (tmp_path / "holds").write_text(str(os.getpid()))
            time.sleep(100)

    other = multiprocessing.get_context("fork").Process(target=hold)
    other.start()
    while not (tmp_path / "holds").exists():
        time.sleep(0.01)
    holder = f"is in use by process {other.pid} on {socket.gethostname()}: wait"
    with pytest.raises(ValueError, match=holder), distributed.held(tmp_path / "run"):
        pass
    other.kill()
    other.join()
    assert (tmp_path / "run" / "lock").exists()  # left behind
    with distributed.held(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / "lock").exists()


def test_a_folder_that_was_made_and_stays_empty_is_removed(tmp_path):
    with distributed.held(tmp_path / "a" / "run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with contextlib.suppress(SystemExit), distributed.held(tmp_path / "b"):
        (tmp_path / "b" / "file").touch()
        sys.exit(1)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["file"]
