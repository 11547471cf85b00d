"""--compile. PyTorch runs the graphs itself here (backend="eager"): that needs no minutes.

On a CPU, PyTorch chooses between two ways to convolve a single image, by its number of pixels. Those that the tiny
backbone needs for the choices to stay the same are between 20,480 and 40,960.
"""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

import evaluate
import train
from losses import Criterion
from small_models import TRAINING, build, close, objects, pictures
from small_runs import exit_code, flags_of
from util.compiled import compile_in_place

LEAST = {"decoder_layers": 2, "interaction_layers": 1}


@pytest.fixture
def compiled():
    """A function that compiles a model in place and returns what counts its graphs."""

    def compile_model(model):
        counter = CompileCounter()
        compile_in_place(model, backend=counter, fullgraph=True)
        return counter

    torch.compiler.reset()
    yield compile_model
    torch.compiler.reset()


@torch.inference_mode()
def test_inference_is_one_graph_for_images_of_all_sizes(compiled, capsys):
    model = build(levels=3, **LEAST)  # more levels, more minutes
    sizes = [(160, 160), (160, 224), (200, 150)]
    expected = [model(pictures(1, 3, *size)) for size in sizes]
    names = [*model.state_dict()]
    counter = compiled(model)
    for size, prediction in zip(sizes, expected):
        close(model(pictures(1, 3, *size))["logits"], prediction["logits"])
    assert counter.frame_count == 1 and [*model.state_dict()] == names
    assert capsys.readouterr().out.startswith("compiled the model for inference in ")


def steps(model, parallel, amp):
    """The losses of two steps, of two micro-batches each."""
    optimizer = train.make_optimizer(model, TRAINING)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for counts in ((1, 2), (9, 3)):  # 8 denoising queries, and 9 in one group
        torch.manual_seed(0)
        batches = [(pictures(2, 3, 64, 64, seed=n), objects(n, 1)) for n in counts]
        losses.append(train.train_step(parallel, Criterion(TRAINING), optimizer, scaler, batches, TRAINING, amp)[0])
    return losses


def test_training_is_one_graph_with_all_that_train_py_adds(compiled):
    """DistributedDataParallel, gradient accumulation, autocast, recomputed activations, any number of objects."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        losses = []
        for compiles in (False, True):
            model = build(**LEAST).train()
            model.backbone.freeze_norm()
            train.recompute_activations(model)
            counter = compiled(model) if compiles else None
            losses.append(steps(model, DistributedDataParallel(model), "bf16"))
    finally:
        dist.destroy_process_group()
    assert counter.frame_count == 1
    for before, after in zip(*losses):
        close(after, before)


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_without_a_compiler_one_line_names_the_way_out(program, folder, tmp_path, monkeypatch, request, capsys):
    monkeypatch.setenv("CXX", "no-compiler")
    if program == "train":
        assert exit_code(train.main, flags_of(folder, tmp_path, "--compile")) == 2
    else:
        checkpoint = request.getfixturevalue("trained") / "best.pt"
        assert exit_code(evaluate.main, ["--ckpt", str(checkpoint), "--device", "cpu", "--compile"]) == 2
    error = "--compile needs a C++ compiler, and no-compiler is not found: install g++, or leave it out\n"
    assert capsys.readouterr().err.endswith(error)
