// The check that all kernels of the operators share.
#pragma once
#include <ATen/core/Tensor.h>

namespace deform_attn {

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Raises ValueError unless no kernel can read or write outside of the tensors of this call. grad_output may be
// undefined.
void check(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& reference,
           const at::Tensor& offsets, const at::Tensor& logits, const at::Tensor& grad_output = {});

}  // namespace deform_attn
