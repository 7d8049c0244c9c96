// The binding: the only C++ that sees torch. Checks what memory safety needs (Python has checked what users can get
// wrong), allocates, describes the call to the kernels and runs them on torch's threads. No maths.
//
// The schemas live in kdkernels/ops.py; this file brings their implementations for the CPU, on LibTorch's stable ABI
// (torch >= 2.10), so that one binary serves many torch releases.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/problem.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Params = std::vector<double>;

const kd::Kernels& current_kernels() {
  const char* name = std::getenv("KDKERNELS_CPU_ISA");
  if (!name || !*name) return *kd::best_kernels();
  const kd::Kernels* found = kd::kernels(name);
  STD_TORCH_CHECK(found, "KDKERNELS_CPU_ISA=", name, " is not available here; allowed: ", kd::supported_names());
  return *found;
}

kd::DType dtype_of(const Tensor& x, const char* name) {
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

kd::Logits describe(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": must be on the CPU");
  STD_TORCH_CHECK(x.dim() == 3, name, ": must have 3 dimensions (outer, inner, classes), got ", x.dim());
  return {x.data_ptr(), dtype_of(x, name), x.stride(0), x.stride(1), x.stride(2)};
}

// A tensor with one element per row (and output), of the compute type or int64.
void check_rows(const Tensor& x, const char* name, const kd::Problem& p, ScalarType dtype, int outputs = 1) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype && x.numel() == outputs * p.rows_total(),
                  name, ": must be a contiguous CPU tensor of ", outputs * p.rows_total(),
                  " elements of the right dtype");
}

ScalarType compute_type(const kd::Problem& p) { return p.in_double() ? ScalarType::Double : ScalarType::Float; }

// Everything about a call but its outputs. Keeps nothing alive: the tensors outlive the call.
kd::Problem problem(const kd::Kernels& build, const std::string& loss, const Tensor& student,
                    const std::optional<Tensor>& teacher, const std::optional<Tensor>& target,
                    const std::optional<Tensor>& row_weight, const Params& params, int64_t ignore_index) {
  kd::Problem p;
  while (p.loss < build.loss_count && loss != build.losses[p.loss].name) ++p.loss;
  STD_TORCH_CHECK(p.loss < build.loss_count, "loss: unknown name '", loss, "'");
  const kd::LossFacts& facts = build.losses[p.loss];
  STD_TORCH_CHECK(params.size() <= kd::kMaxParams, "params: at most ", kd::kMaxParams, ", got ", params.size());
  std::copy(params.begin(), params.end(), p.params);

  p.student = describe(student, "student");
  p.outer = student.size(0);
  p.inner = student.size(1);
  p.classes = student.size(2);
  STD_TORCH_CHECK(p.classes > 0, "student: needs at least one class");
  STD_TORCH_CHECK(teacher.has_value() == facts.teacher, "teacher: '", loss, facts.teacher ? "' needs" : "' takes no",
                  " teacher");
  if (teacher) {
    p.teacher = describe(*teacher, "teacher");
    for (int i = 0; i < 3; ++i)
      STD_TORCH_CHECK(teacher->size(i) == student.size(i), "teacher: must have the student's shape");
  }
  p.ignore_index = ignore_index;
  if (target) {
    check_rows(*target, "target", p, ScalarType::Long);
    p.target = static_cast<const int64_t*>(target->data_ptr());
    for (int64_t row = 0; row < p.rows_total(); ++row) {
      const int64_t y = p.target[row];
      STD_TORCH_CHECK(y == ignore_index || (y >= 0 && y < p.classes), "target: class ", y, " in row ", row,
                      " is out of range; allowed: 0 to ", p.classes - 1, " or ignore_index ", ignore_index);
    }
  } else {
    STD_TORCH_CHECK(loss == "kd", "target: '", loss, "' needs one");
  }
  if (row_weight) {
    check_rows(*row_weight, "row_weight", p, compute_type(p));
    p.row_weight = row_weight->data_ptr();
  }
  return p;
}

void run(const kd::Kernels& build, const kd::Problem& p) {
  const kd::Plan plan = kd::plan(build, p);
  const int64_t rows = p.rows_total(), units = (rows + plan.unit - 1) / plan.unit;
  if (rows == 0) return;
  constexpr int64_t kWorthAThread = 32768;  // classes: about 20 microseconds
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / (p.classes * plan.unit));
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    if (!build.run(p, plan, begin * plan.unit, std::min(rows, end * plan.unit))) ok = false;
  });
  STD_TORCH_CHECK(ok, "out of memory: no scratch for ", p.classes, " classes");
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

Tensor empty_gradient(const Tensor& student, kd::Problem& p) {
  Tensor grad = torch::stable::empty_like(student);
  p.grad = describe(grad, "grad");
  kd::advise_huge_pages(grad.data_ptr(), grad.numel() * grad.element_size());
  return grad;
}

std::tuple<Tensor, Tensor> forward(std::string loss, Tensor student, std::optional<Tensor> teacher,
                                   std::optional<Tensor> target, std::optional<Tensor> row_weight, Params params,
                                   int64_t ignore_index) {
  const kd::Kernels& build = current_kernels();
  kd::Problem p = problem(build, loss, student, teacher, target, row_weight, params, ignore_index);
  const int outputs = build.losses[p.loss].outputs;
  Tensor rows = outputs == 1 ? empty(student, {p.outer, p.inner}, compute_type(p))
                             : empty(student, {outputs, p.outer, p.inner}, compute_type(p));
  Tensor stats = empty(student, {p.rows_total(), kd::kStatsWidth}, ScalarType::Double);
  p.pass = kd::Pass::forward;
  p.rows = rows.data_ptr();
  p.stats = static_cast<double*>(stats.data_ptr());
  run(build, p);
  return {rows, stats};
}

Tensor backward(std::string loss, Tensor grad_rows, Tensor student, std::optional<Tensor> teacher,
                std::optional<Tensor> target, std::optional<Tensor> row_weight, Tensor stats, Params params,
                int64_t ignore_index) {
  const kd::Kernels& build = current_kernels();
  kd::Problem p = problem(build, loss, student, teacher, target, row_weight, params, ignore_index);
  check_rows(stats, "stats", p, ScalarType::Double, kd::kStatsWidth);
  grad_rows = torch::stable::contiguous(grad_rows);
  check_rows(grad_rows, "grad_rows", p, compute_type(p), build.losses[p.loss].outputs);
  Tensor grad = empty_gradient(student, p);
  p.pass = kd::Pass::backward;
  p.grad_rows = grad_rows.data_ptr();
  p.stats = static_cast<double*>(stats.data_ptr());
  run(build, p);
  return grad;
}

std::tuple<Tensor, Tensor> reduced(std::string loss, Tensor student, std::optional<Tensor> teacher,
                                   std::optional<Tensor> target, std::optional<Tensor> row_weight, Tensor scale,
                                   Params params, int64_t ignore_index, bool with_grad) {
  const kd::Kernels& build = current_kernels();
  kd::Problem p = problem(build, loss, student, teacher, target, row_weight, params, ignore_index);
  STD_TORCH_CHECK(build.losses[p.loss].outputs == 1, "loss: '", loss, "' has several outputs, none to reduce");
  STD_TORCH_CHECK(scale.is_cpu() && scale.numel() == 1 && scale.scalar_type() == compute_type(p),
                  "scale: must be one CPU number of the loss's dtype");
  p.scale = p.in_double() ? *static_cast<double*>(scale.data_ptr()) : *static_cast<float*>(scale.data_ptr());
  Tensor grad = with_grad ? empty_gradient(student, p) : empty(student, {0}, student.scalar_type());
  p.pass = kd::Pass::forward_grad;
  std::vector<double> scaled_rows(p.rows_total());
  p.scaled_rows = scaled_rows.data();
  run(build, p);

  double sum = 0;  // in index order: the same bits for any number of threads
  for (double x : scaled_rows) sum += x;
  Tensor total = empty(student, {}, compute_type(p));
  if (p.in_double())
    *static_cast<double*>(total.data_ptr()) = sum;
  else
    *static_cast<float*>(total.data_ptr()) = static_cast<float>(sum);
  return {total, grad};
}

// A factor of 1, the ordinary case of loss.backward(), touches nothing.
void scale_(Tensor grad, Tensor factor) {
  STD_TORCH_CHECK(factor.is_cpu() && factor.numel() == 1, "factor: must be one CPU number");
  const void* value = factor.data_ptr();
  const bool is_double = factor.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || factor.scalar_type() == ScalarType::Float, "factor: must be float32 or float64");
  if ((is_double ? *static_cast<const double*>(value) : *static_cast<const float*>(value)) == 1) return;
  std::array<StableIValue, 2> stack{torch::stable::detail::from(grad), torch::stable::detail::from(factor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the dispatcher hands its result over
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("reduced", TORCH_BOX(&reduced));
  m.impl("scale_", TORCH_BOX(&scale_));
}

// Importing the module registers the operators; it holds nothing else.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
