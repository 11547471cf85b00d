// The check that all kernels of the operators share.
#pragma once
#include <ATen/core/Tensor.h>

namespace deform_attn {

// Raises ValueError unless no kernel can read or write outside of the tensors of this call. grad_output may be undefined.
void check(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations, const at::Tensor& weights,
           const at::Tensor& grad_output = {});

}  // namespace deform_attn
