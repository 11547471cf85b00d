"""What tools/benchmark.py counts and measures, and what that may come to."""

import dataclasses

import pytest
import torch

from deform_attn_cuda import status
from tools import benchmark
from train import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paper():
    return benchmark.new_model("paper", CPU)


@pytest.mark.skipif("fallback" in str(status(CPU)), reason="the fallback takes more operators: make build")
def test_a_training_step_takes_at_most_3400_operators_and_2_waits(paper, monkeypatch):
    """One image, seven objects, of any size. SGD has no state to make at its first step, and as many operators."""
    recipe = dataclasses.replace(Recipe(), mask_points=128)  # of 12,544, which only take longer
    monkeypatch.setattr(benchmark, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), fused=True))
    operators, waits = benchmark.count(paper, benchmark.training_step(paper, recipe, CPU, "off", (128, 160)))
    assert 1000 < operators.total() <= 3400, operators
    assert 0 < waits.total() <= 2, waits


def test_inference_never_waits(paper):
    operators, waits = benchmark.count(paper, benchmark.inference(paper, CPU, "off", (64, 96)))
    assert operators.total() <= 1000 and not waits


def test_each_way_to_read_what_a_model_computed_is_a_wait():
    def work():
        x, host = model(torch.ones(2, 3)), torch.ones(3)
        x.cpu(), x.to("cpu"), x.tolist(), x.sum().item(), x.nonzero(), x[x > 0], bool(x[0, 0] > 0), x[0, :2].view(2)
        host.cpu(), host.tolist(), host.sum().item(), host.nonzero(), x.to(torch.float64), x[:, torch.tensor([0])]

    model = torch.nn.Linear(3, 4)
    operators, waits = benchmark.count(model, work)
    assert sorted(waits.elements()) == sorted(
        ["cpu", "to", "tolist", *["aten._local_scalar_dense"] * 2, "aten.nonzero", "aten.index"]
    )
    assert operators["aten.addmm"] == 1 and "aten.view" not in operators  # views are no work


def test_the_peak_is_the_most_that_was_held_in_between():
    nothing = benchmark.peak_gigabytes(lambda: None, CPU)
    assert benchmark.peak_gigabytes(lambda: torch.ones(10**8).sum(), CPU) - nothing == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("emulated", [False, True])
def test_the_table_has_a_row_for_each_type_that_the_machine_computes_in(emulated, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PHOTO", (64, 96))
    monkeypatch.setattr(benchmark, "emulates", lambda device, amp: emulated and amp == "bf16")
    if not emulated:
        monkeypatch.setattr(benchmark, "measured", lambda *_: "1.0 1.0 1 1")
    monkeypatch.setattr(benchmark, "compile_in_place", lambda model: None)
    flags = ["--preset", "tiny", "--image-size", "64", "--batch-size", "1", "--repeats", "1", "--device", "cpu"]
    benchmark.main([*flags, "--compile"] if emulated else flags)
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(("inference", "training step"))]
    assert [row[-5] for row in rows] == (["fp32"] * 2 if emulated else ["fp32"] * 2 + ["bf16"] * 2)
    assert all(float(figure.replace(",", "")) > 0 for row in rows for figure in row[-4:-1])
    compiled = [line.split() for line in printed.splitlines() if line.startswith("  compiled")]
    assert [row[2] for row in compiled] == (["fp32"] * 2 if emulated else [])
    assert ("left out" in printed) == emulated and torch.__version__ in printed
