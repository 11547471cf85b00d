"""What util/distributed.py promises, and that two processes compute what one does."""

import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
import torch.distributed as dist

import evaluate
import train
from small_runs import (
    FOUR,
    SMALL,
    assert_same_gradient,
    exit_code,
    gradient_run,
    gradients_of,
    log_of,
    new_run,
    parts_of,
    write_images,
)
from util import distributed
from util.weights import read_checkpoint

HERE = Path(__file__).parents[1]

# ---- Many processes --------------------------------------------------------------------------------------------------


def two_processes(rank, threads, folder, out):
    """What each of two processes sees, saved for the tests below."""
    torch.set_num_threads(threads)  # as many as in the process that compares: sums come out alike
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost")
    dist.init_process_group("gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=2)
    run = gradient_run(folder, out / "unused")
    run.parallel = torch.nn.parallel.DistributedDataParallel(run.model)
    mine = FOUR[2 * rank : 2 * rank + 2]
    seen = {"shared": gradients_of(run, parts_of(run, mine))}
    seen["in parts"] = gradients_of(run, parts_of(run, mine[:1], mine[1:]))
    part = parts_of(run, FOUR[:2])
    for target in part[0][1] if rank == 1 else ():
        target.update({name: target[name][:0] for name in ("labels", "boxes", "masks")})
    seen["one without objects"] = gradients_of(run, part)
    metrics, results = evaluate.evaluate(run.model, run.val_set, run.device)
    seen.update(metrics=metrics, results=results)
    run.parallel.train()(part[0][0] // (rank + 1))
    seen["own statistics"] = torch.cat([buffer.flatten() for buffer in run.model.buffers()])
    distributed.share_statistics(run.model)
    seen["shared statistics"] = torch.cat([buffer.flatten() for buffer in run.model.buffers()])
    criterion = run.criterion.forward
    if rank == 1:
        run.criterion.forward = lambda *args: {name: loss * math.nan for name, loss in criterion(*args).items()}
    train.update(run, train.gradients(run, part), part)
    seen["end"] = exit_code(train.arrived, run)
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    """(what rank 0 saw, what rank 1 saw)"""
    out = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(two_processes, (torch.get_num_threads(), folder, out), nprocs=2)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("how", ["shared", "in parts"])
def test_two_processes_have_the_gradient_of_one_with_the_whole_batch(folder, tmp_path, pair, how):
    run = gradient_run(folder, tmp_path)
    whole = gradients_of(run, parts_of(run, FOUR))
    assert torch.equal(pair[0][how], pair[1][how])
    assert_same_gradient(pair[0][how], whole)


def test_a_process_without_objects_neither_hangs_nor_skews_the_gradient(folder, tmp_path, pair):
    run = gradient_run(folder, tmp_path)
    parts = parts_of(run, FOUR[:2], FOUR[:2])
    for target in parts[1][1]:
        target.update({name: target[name][:0] for name in ("labels", "boxes", "masks")})
    # Two parts rather than one batch: an image without objects beside others takes part in their denoising groups.
    assert_same_gradient(pair[0]["one without objects"], gradients_of(run, parts))


def test_evaluation_shared_by_two_processes_equals_that_of_one_digit_for_digit(folder, tmp_path, pair):
    run = gradient_run(folder, tmp_path)
    metrics, results = evaluate.evaluate(run.model, run.val_set, run.device)
    assert pair[0]["metrics"] == pair[1]["metrics"] == metrics
    assert pair[0]["results"] == results and pair[1]["results"] is None
    assert len(results) == 5 * 18


def test_all_processes_evaluate_with_the_statistics_that_the_checkpoint_holds(pair):
    assert not torch.equal(pair[0]["own statistics"], pair[1]["own statistics"])
    for seen in pair:
        assert torch.equal(seen["shared statistics"], pair[0]["own statistics"])


def test_a_loss_that_is_not_finite_on_one_process_ends_all_together(pair):
    assert [seen["end"] for seen in pair] == [1, 1]


def test_gpus_are_started_where_a_cluster_has_set_rank_for_a_single_process(monkeypatch):
    started = []
    monkeypatch.setattr(train, "launch", lambda program, arguments, processes: started.append(processes) or 0)
    for world in ("1", ""):
        for name, value in {"RANK": "0", "WORLD_SIZE": world}.items():
            monkeypatch.setenv(name, value)
        assert exit_code(train.main, ["--gpus", "4", "--device", "cpu"]) == 0
    assert started == [4, 4]


@pytest.mark.parametrize(
    ("world", "here", "said"), [("8", "2", "started 2 processes here"), ("2", "", "leave out --gpus"), ("x", "", "'x'")]
)
def test_gpus_are_refused_where_a_launcher_has_started_another_number(monkeypatch, capsys, world, here, said):
    for name, value in {"RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.setenv(name, value)
    assert exit_code(train.main, ["--gpus", "4", "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_a_process_on_a_cpu_keeps_the_memory_that_a_step_frees():
    program = """if True:
        import resource, torch, processes
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


def test_one_process_joins_nobody_whatever_a_cluster_has_set(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "no-such-host.invalid"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.join("cpu") == torch.device("cpu") and not dist.is_initialized()


def start(folder, out, *more):
    """train.py --gpus 2 on a machine whose host name has no address, once its first step is logged."""
    (out / "log.jsonl").unlink(missing_ok=True)
    program = "import socket, train; socket.getfqdn = lambda name='': 'no-such-host.invalid'; train.main()"
    command = [sys.executable, "-c", program, *SMALL, "--data", folder, "--out", out, "--gpus", 2, *more]
    process = subprocess.Popen([*map(str, command)], cwd=HERE, stdout=PIPE, stderr=PIPE, text=True)
    while process.poll() is None and not ((out / "log.jsonl").exists() and log_of(out)):
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_two_processes_train_end_with_the_death_of_one_and_save_on_a_signal(tmp_path):
    folder, out = tmp_path / "data", tmp_path / "run"
    write_images(folder, "train", 2000)  # an epoch of 500 steps, so that all of this happens in it
    write_images(folder, "val", 1)
    job = start(folder, out)
    ranks = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, errors = job.communicate(timeout=100)
    assert job.returncode == 128 + signal.SIGKILL and "process 1 ended" in errors

    job = start(folder, out, "--resume")
    job.terminate()
    output, _ = job.communicate(timeout=100)
    stopped = read_checkpoint(out / "last.pt")["step"]
    assert job.returncode == 143 and f"a signal ended this after step {stopped}" in output
    assert new_run(folder, out, "--resume").step == stopped > 0  # one process may go on where two were
