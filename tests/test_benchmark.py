"""What tools/benchmark.py counts, which no machine changes: a promise of the model and of the training step."""

import json
from dataclasses import replace

import pytest
import torch

from small_runs import exit_code
from tools import benchmark
from tools.benchmark import Case, count, new_run

STEP = Case("training step", "paper", "off", (256, 320))


@pytest.fixture(scope="module")
def step():
    return count(STEP)


def test_a_training_step_calls_at_most_2900_operators(step):
    assert 1000 < step["operators"] <= 2900


def test_a_training_step_waits_for_a_gpu_once_and_its_update_never(step):
    assert step["waits_by_name"] == {"cpu": 1}
    update = count(Case("update", "paper", "off", (256, 320)))
    assert update["waits"] == 0 and 10 < update["operators"] < 40
    assert update["operators_by_name"]["_fused_adamw_"] <= 4  # one for each group of parameters


def test_inference_of_the_released_model_costs_742_gflop_and_waits_never():
    counted = count(Case("inference", "released", "off", (800, 1216)))
    assert 700 < counted["GFLOP"] <= 742  # 2.3 are attention's, which FlopCounterMode does not know on a CPU
    assert counted["waits"] == 0


def test_bf16_and_recomputed_activations_take_less_memory(step):
    half, recomputed = (count(replace(STEP, amp="bf16", checkpointing=again)) for again in (False, True))
    assert step["tensors_GB"] > half["tensors_GB"] > recomputed["tensors_GB"]
    assert recomputed["GFLOP"] > half["GFLOP"] == step["GFLOP"]


def test_tensors_of_a_training_step_are_counted_as_they_are_allocated():
    """As many bytes as a real step holds at its end: the gradients that it leaves, and the weights."""
    case, run = Case("training step", "tiny", "off", (64, 64)), new_run("tiny", torch.device("cpu"))
    case.prepare(run)
    before = sum(x.nbytes for x in case.state(run))
    case.work(run)
    left = sum(x.nbytes for x in case.state(run))
    assert before < left < 1e9 * count(case)["tensors_GB"]


def test_a_host_that_reads_the_gpu_or_sends_to_it_is_seen():
    class Reads(Case):
        def work(self, run):
            x = torch.zeros(3, device=run.device)
            x.tolist(), x.sum().item(), x.cpu(), x.nonzero(), bool(x[0] > 0)
            x.to("cpu", non_blocking=True)
            torch.tensor([1.0], device=run.device) + torch.zeros(1).to(run.device, non_blocking=True)

    counted = count(Reads("nothing", "tiny", "off", (64, 64)))
    reads = {"tolist": 1, "item": 1, "cpu": 1, "nonzero": 1, "__bool__": 1, "to": 0}
    assert (counted["waits_by_name"], counted["copies"]) == (reads, 1)


def test_the_released_model_works_under_the_autocast_of_a_gpu():
    count(Case("inference, post-processed", "released", "bf16", (256, 320)))


def test_the_table_has_every_row_and_the_json_its_operators(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "PHOTO", (64, 96))
    monkeypatch.setattr(benchmark, "emulates", lambda *_: False)
    flags = "--preset tiny --image-size 64 --batch-size 1 --repeats 1 --device cpu"
    benchmark.main([*flags.split(), "--json", str(tmp_path / "figures.json")])
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())
    assert flags in printed and torch.__version__ in printed
    assert all(remark in printed for remark in figures["remarks"]) and "no GPU, skipped" in figures["remarks"][0]
    lines = [line.split() for line in printed.splitlines() if " tiny " in line][1:]  # after the command
    assert len(figures["rows"]) == len(lines) == 9
    for amp in ("fp32", "bf16"):
        for name in ("inference", "inference,", "training"):
            assert any(line[0] == name and amp in line for line in lines)
    for row in figures["rows"]:
        assert row["operators"] == sum(row["operators_by_name"].values()) > 0
        assert row["seconds"] > 0


def test_bf16_is_left_out_where_the_cpu_emulates_it_and_the_json_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert {case.amp for case in benchmark.cases_of(benchmark.parse_arguments(["--device", "cpu"]))} == {"off"}
    assert {case.amp for case in benchmark.cases_of(benchmark.parse_arguments(["--device", "cuda"]))} == {"off", "bf16"}
    monkeypatch.setattr(benchmark, "cases_of", lambda args: [])
    benchmark.main(["--device", "cpu", "--json", str(tmp_path / "figures.json")])
    assert "bf16: no instructions" in json.loads((tmp_path / "figures.json").read_text())["remarks"][-1]


def test_against_grid_sample_every_row_has_a_partner_that_calls_no_kernel():
    cases = benchmark.cases_of(benchmark.parse_arguments(["--against", "grid_sample"]))
    assert cases[1::2] == [replace(case, path="grid_sample") for case in cases[::2]]
    operators = count(Case("inference", "tiny", "off", (64, 64), path="grid_sample"))["operators_by_name"]
    assert operators["grid_sampler_2d"] and not any("deform_attn" in name for name in operators)


def test_memory_is_told_for_1_2_and_4_images_with_and_without_recomputation(monkeypatch, capsys):
    estimate = {(n, again): n + 10 * again for n in (1, 2, 4) for again in (False, True)}
    monkeypatch.setattr(benchmark, "count", lambda case: {"tensors_GB": estimate[case.images, case.checkpointing]})
    benchmark.main(["--memory", "--device", "cpu"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " kept " in line or " recomputed " in line]
    table = {(int(images), way == "recomputed"): float(peak) for images, way, peak, _ in rows}
    assert table == estimate


@pytest.mark.parametrize("flags", ["--repeats 0", "--image-size 100", "--preset large", "--against torch", "--batch x"])
def test_wrong_flags_are_refused(flags, capsys):
    assert exit_code(benchmark.main, flags.split()) == 2
    assert "error: argument" in capsys.readouterr().err
