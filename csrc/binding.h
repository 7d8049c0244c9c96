// What the bindings share: they are the only C++ that sees torch. They check what memory safety needs (Python has
// checked what users can get wrong), allocate, describe the call to the kernels and run them. No maths.
//
// The schemas live in kdkernels/ops.py; the bindings bring implementations for a device, on LibTorch's stable ABI
// (torch >= 2.10), so that one binary serves many torch releases.
#pragma once

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "problem.h"

namespace kd {
namespace binding {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where all tensors of a call must be.
struct TensorDevice {
  int32_t type, index;
  static TensorDevice of(const Tensor& x) {
    return {x.is_cpu() ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda(), x.get_device_index()};
  }
  bool holds(const Tensor& x) const {
    return type == aoti_torch_device_type_cpu() ? x.is_cpu() : x.is_cuda() && x.get_device_index() == index;
  }
};

inline kd::DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kd::DType::f32;
    case ScalarType::Double:
      return kd::DType::f64;
    case ScalarType::Half:
      return kd::DType::f16;
    case ScalarType::BFloat16:
      return kd::DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, ": dtype must be float16, bfloat16, float32 or float64");
  }
}

// (outer, inner, classes), where the first one or both may be absent: they are then 1.
inline Logits describe(const Tensor& x, const char* name, const TensorDevice& place) {
  STD_TORCH_CHECK(place.holds(x), name, ": must be on the device of the operator and of the student");
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, name, ": must have 1 to 3 dimensions (rows..., classes), got ", dims);
  return {x.data_ptr(), dtype_of(x, name), dims > 2 ? x.stride(0) : 0, dims > 1 ? x.stride(dims - 2) : 0,
          x.stride(dims - 1)};
}

// A tensor with one element per row (and output), of the compute type or int64.
inline void check_rows(const Tensor& x, const char* name, const Problem& p, const TensorDevice& place, ScalarType dtype,
                       int outputs = 1) {
  STD_TORCH_CHECK(
      place.holds(x) && x.is_contiguous() && x.scalar_type() == dtype && x.numel() == outputs * p.rows_total(), name,
      ": must be a contiguous tensor of ", outputs * p.rows_total(),
      " elements of the right dtype, on the device of the student");
}

inline ScalarType compute_type(const Problem& p) { return p.in_double() ? ScalarType::Double : ScalarType::Float; }

// A number that is read on the host.
inline double number(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.numel() == 1, name, ": must be one CPU number");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name, ": must be float32 or float64");
  return dtype == ScalarType::Double ? *static_cast<const double*>(x.data_ptr())
                                     : *static_cast<const float*>(x.data_ptr());
}

// Everything about a call but its outputs. Keeps nothing alive: the tensors outlive the call. of_rows: whether params
// may be those of each row, (rows, so many): the call then has the first one's.
inline Problem describe_call(const LossFacts* losses, int loss_count, const TensorDevice& place,
                             const std::string& loss, const Tensor& student, const std::optional<Tensor>& teacher,
                             const std::optional<Tensor>& target, const std::optional<Tensor>& row_weight,
                             const Tensor& params, int64_t ignore_index, int64_t classes, bool of_rows = false) {
  Problem p;
  int number = 0;
  while (number < loss_count && loss != losses[number].name) ++number;
  STD_TORCH_CHECK(number < loss_count, "loss: unknown name '", loss, "'");
  const LossFacts& facts = losses[number];
  p.student = describe(student, "student", place);
  const int64_t dims = student.dim();
  p.outer = dims > 2 ? student.size(0) : 1;
  p.inner = dims > 1 ? student.size(dims - 2) : 1;
  const int64_t all = student.size(dims - 1);
  p.classes = classes == 0 ? all : classes;
  STD_TORCH_CHECK(all > 0, "student: needs at least one class");
  STD_TORCH_CHECK(classes >= 0 && p.classes <= all, "classes: got ", classes, ", the student has ", all);
  STD_TORCH_CHECK(teacher.has_value() == facts.teacher, "teacher: '", loss, facts.teacher ? "' needs" : "' takes no",
                  " teacher");
  if (teacher) {
    p.teacher = describe(*teacher, "teacher", place);
    const auto x = teacher->sizes(), y = student.sizes();
    const int64_t own = teacher->size(teacher->dim() - 1);
    STD_TORCH_CHECK(x.size() == y.size() && std::equal(x.begin(), x.end() - 1, y.begin()) &&
                        (classes == 0 ? own == all : own >= classes),
                    "teacher: must have the student's shape, or, with `classes`, at least so many of them");
  }
  STD_TORCH_CHECK(params.is_cpu() && params.scalar_type() == ScalarType::Double && params.is_contiguous() &&
                      (params.dim() == 1 || (of_rows && params.dim() == 2)),
                  "params: must be a contiguous float64 tensor of one dimension", of_rows ? ", or of two," : "",
                  " on the CPU");
  const int64_t given = params.size(params.dim() - 1);
  STD_TORCH_CHECK(given == facts.params, "params: '", loss, "' has ", facts.params, ", got ", given);
  STD_TORCH_CHECK(params.dim() == 1 || params.size(0) == p.rows_total(), "params: got those of ", params.size(0),
                  " rows, the student has ", p.rows_total());
  if (params.numel() > 0) p.set_loss(number, facts, static_cast<const double*>(params.data_ptr()));
  p.ignore_index = ignore_index;
  if (target) {
    check_rows(*target, "target", p, place, ScalarType::Long);
    p.target = static_cast<const int64_t*>(target->data_ptr());
  } else {
    STD_TORCH_CHECK(!facts.target, "target: '", loss, "' needs one");
  }
  if (row_weight) {
    check_rows(*row_weight, "row_weight", p, place, compute_type(p));
    p.row_weight = row_weight->data_ptr();
  }
  return p;
}

inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Allocates by LibTorch's C interface: a call of aten::empty would go through the dispatcher once more, which costs
// more than the kernels on a small input.
inline Tensor fresh_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype,
                            const TensorDevice& place) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  shim_dtype(dtype), place.type, place.index < 0 ? 0 : place.index,
                                                  &handle));
  return Tensor(handle);
}

inline Tensor fresh(const std::vector<int64_t>& sizes, ScalarType dtype, const TensorDevice& place) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return fresh_strided(sizes, strides, dtype, place);
}

// The strides of torch.empty_like(x), which are x's own wherever it has no gaps; nothing where torch has to be asked:
// of ambiguous ones.
inline std::optional<std::vector<int64_t>> strides_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  if (x.is_contiguous()) return std::vector<int64_t>(strides.begin(), strides.end());
  std::vector<size_t> order(sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  std::vector<int64_t> dense(sizes.size());
  int64_t stride = 1;
  for (size_t i = 0; i < order.size(); ++i) {
    if (sizes[order[i]] < 2 || strides[order[i]] <= (i ? strides[order[i - 1]] : 0)) return std::nullopt;
    dense[order[i]] = stride;
    stride *= sizes[order[i]];
  }
  return dense;
}

// As torch.empty_like.
inline Tensor fresh_like(const Tensor& x, const TensorDevice& place) {
  const auto strides = strides_like(x);
  return strides ? fresh_strided(x.sizes(), {strides->data(), strides->size()}, x.scalar_type(), place)
                 : torch::stable::empty_like(x);
}

// Made the gradient of the student in p, 0 where classes do not count.
inline Tensor as_gradient(Tensor grad, const Tensor& student, Problem& p, const TensorDevice& place) {
  p.grad = describe(grad, "grad", place);
  const int64_t dim = student.dim() - 1, rest = student.size(dim) - p.classes;
  if (rest > 0) {
    Tensor unread = torch::stable::narrow(grad, dim, p.classes, rest);
    torch::stable::zero_(unread);
  }
  return grad;
}

// (outputs, *rows), or the shape of the rows for one output.
inline Tensor fresh_rows(const Tensor& student, int outputs, const Problem& p, const TensorDevice& place) {
  const auto sizes = student.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  if (outputs > 1) shape.insert(shape.begin(), outputs);
  return fresh(shape, compute_type(p), place);
}

// Distillation and cross-entropy of each row by themselves, (2, *rows); nothing unless asked for.
inline Tensor fresh_parts(const LossFacts& facts, const Tensor& student, Problem& p, const TensorDevice& place,
                          bool with_parts) {
  if (!with_parts) return fresh({0}, compute_type(p), place);
  STD_TORCH_CHECK(facts.parts, "with_parts: '", facts.name, "' has no weights, and so no parts");
  Tensor parts = fresh_rows(student, 2, p, place);
  p.parts = parts.data_ptr();
  return parts;
}

inline void multiply_(const Tensor& x, const Tensor& factor) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(x), torch::stable::detail::from(factor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the dispatcher hands its result over
}

}  // namespace binding
}  // namespace kd

// Importing a binding registers its operators. methods: what its module has beside them, or null.
#define KD_MODULE(name, methods)                                                                 \
  extern "C" __attribute__((visibility("default"))) PyObject* PyInit_##name() {                  \
    static PyModuleDef module = {                                                                \
        PyModuleDef_HEAD_INIT, #name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&module);                                                             \
  }
