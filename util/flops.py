"""Counts floating point operations: those of matrix products, convolutions, attention, and the sums of deformable
attention. A multiplication and an addition are two. Elementwise operators are none, and so is deformable attention that
is not compiled."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def flop(func, args, kwargs, result) -> int:
    """Floating point operations of one call of an operator."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if func.namespace == "deform_attn":  # a sample reads four corners; the gradient needs two products with each
        value, samples = (next(x for x in tensors if x.ndim == n) for n in (4, 6))  # [B N h c], [B Q h L P 2]
        return 4 * value.shape[-1] * (samples.numel() // 2) * (4 if "backward" in func.name() else 2)
    if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(x.shape for x in tensors[:3]))
    if func.overloadpacket is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(x.shape for x in tensors[:4]))
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


class Flop(TorchDispatchMode):
    """Adds up in `total` what is called under it. Inference mode would hide what operators consist of."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.total += flop(func, args, kwargs or {}, result)
        return result


def flop_of(model: nn.Module, images: Tensor) -> int:
    """Floating point operations of the model for images [B 3 H W], with the masks of all queries at the last layer."""
    with torch.inference_mode(False), torch.no_grad(), Flop() as counted:
        model(images)["masks"]
    return counted.total
