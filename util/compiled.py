"""torch.compile of a model, for train.py, evaluate.py and the benchmark."""

import os
import shutil
import time

import torch
from torch import nn
from torch._dynamo import config, maybe_mark_dynamic
from torch._dynamo.callback import callback_handler
from torch.fx.experimental import _config as shapes
from torch.utils._sympy.reference import TensorReferenceAnalysis

from util.distributed import say


def compile_in_place(model: nn.Module, **options) -> None:
    """Has a DIMaskDINO compiled when it is first called: one graph for training with any number of denoising queries,
    and one for inference with images of any size. Prints how long that takes. State dicts stay as they are.

    options: of torch.compile. Raises ValueError where there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise ValueError(f"--compile needs a C++ compiler, and {compiler} is not found: install g++, or leave it out")
    shapes.use_duck_shape = False  # that the first image is square says nothing of the next
    config.optimize_ddp = False  # it would divide the graph
    if not hasattr(TensorReferenceAnalysis, "python_mod"):  # missing in PyTorch 2.14, where padding to 32 needs it
        TensorReferenceAnalysis.python_mod = TensorReferenceAnalysis.mod
    compiled = torch.compile(model.forward, **options)

    def forward(images, denoising=None, trace=False):
        if denoising is None:
            maybe_mark_dynamic(images, (0, 2, 3))
        else:  # images of one size, but as many queries as the objects ask for
            maybe_mark_dynamic(denoising.labels, 1)
            maybe_mark_dynamic(denoising.boxes_logit, 1)
            denoising = denoising._replace(groups=torch.tensor(denoising.groups), pairs=[])  # 1 would be a constant
        return compiled(images, denoising, trace)

    model.forward = forward
    begun = 0.0

    def begin(_):
        nonlocal begun
        begun = time.perf_counter()

    def end(_):
        what = "training" if model.training else "inference"
        say(f"compiled the model for {what} in {time.perf_counter() - begun:.0f} s")

    callback_handler.clear()
    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
