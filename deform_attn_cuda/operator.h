// What the operators on all devices share.
#pragma once
#include <ATen/core/Tensor.h>

#include "problem.h"

namespace deform_attn {

using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The shapes of a call. Raises ValueError if its arguments do not fit one another: then a kernel would read or write
// outside of them. grad_output may be undefined.
Problem problem_of(const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& reference,
                   const at::Tensor& offsets, const at::Tensor& logits, const at::Tensor& grad_output = {});

template <typename T>
T* pointer(const at::Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }  // null where empty

}  // namespace deform_attn
