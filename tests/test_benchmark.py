"""What tools/benchmark.py counts and measures, and what that may come to."""

import dataclasses

import pytest
import torch

from tools import benchmark
from train import Recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def paper():
    return benchmark.new_model("paper", CPU)


def test_a_training_step_takes_at_most_3400_operators_and_2_waits(paper, monkeypatch):
    """One image of 256x320, seven objects. AdamW's first step makes its state: SGD has none, and as many operators."""
    recipe = dataclasses.replace(Recipe(), mask_points=1024)  # of 12,544, which only take longer
    monkeypatch.setattr(benchmark, "make_optimizer", lambda model, _: torch.optim.SGD(model.parameters(), fused=True))
    operators, waits = benchmark.count(paper, benchmark.training_step(paper, recipe, CPU, "off", (256, 320)))
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


def test_the_table_has_a_row_for_each_type_that_the_machine_computes_in(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PHOTO", (64, 96))
    flags = ["--preset", "tiny", "--image-size", "64", "--batch-size", "1", "--repeats", "1", "--device", "cpu"]
    for emulated, types in ((False, ["fp32", "fp32", "bf16", "bf16"]), (True, ["fp32", "fp32"])):
        monkeypatch.setattr(benchmark, "emulates", lambda _, amp, emulated=emulated: emulated and amp == "bf16")
        benchmark.main(flags)
        printed = capsys.readouterr().out
        rows = [line.split() for line in printed.splitlines() if line.startswith(("inference", "training step"))]
        assert [row[-5] for row in rows] == types and all(float(row[-4]) > 0 for row in rows)
        assert ("left out" in printed) == emulated and torch.__version__ in printed
