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

using torch::headeronly::IntHeaderOnlyArrayRef;
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

// (outer, inner, classes), where the first one or both may be absent: they are then 1.
kd::Logits describe(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, ": must be on the CPU");
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, name, ": must have 1 to 3 dimensions (rows..., classes), got ", dims);
  return {x.data_ptr(), dtype_of(x, name), dims > 2 ? x.stride(0) : 0, dims > 1 ? x.stride(dims - 2) : 0,
          x.stride(dims - 1)};
}

// A tensor with one element per row (and output), of the compute type or int64.
void check_rows(const Tensor& x, const char* name, const kd::Problem& p, ScalarType dtype, int outputs = 1) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == dtype && x.numel() == outputs * p.rows_total(),
                  name, ": must be a contiguous CPU tensor of ", outputs * p.rows_total(),
                  " elements of the right dtype");
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// Checks the range of the targets and returns how many rows are not ignored.
int64_t check_targets(const kd::Problem& p) {
  const int64_t rows = p.rows_total();
  int64_t counted = 0, allowed = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = p.target[row];
    const bool ignored = y == p.ignore_index, in_range = y >= 0 && y < p.classes;
    counted += !ignored;
    allowed += ignored || in_range;
  }
  if (allowed == rows) return counted;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = p.target[row];
    STD_TORCH_CHECK(y == p.ignore_index || (y >= 0 && y < p.classes), "target: class ", y, " in row ", row,
                    " is out of range; allowed: 0 to ", p.classes - 1, " or ignore_index ", p.ignore_index);
  }
  return counted;
}

ScalarType compute_type(const kd::Problem& p) { return p.in_double() ? ScalarType::Double : ScalarType::Float; }

struct Call {
  kd::Problem problem;
  int64_t counted;  // rows that are not ignored
};

// Everything about a call but its outputs. Keeps nothing alive: the tensors outlive the call.
Call describe_call(const kd::Kernels& build, const std::string& loss, const Tensor& student,
                   const std::optional<Tensor>& teacher, const std::optional<Tensor>& target,
                   const std::optional<Tensor>& row_weight, const Params& params, int64_t ignore_index) {
  Call call;
  kd::Problem& p = call.problem;
  while (p.loss < build.loss_count && loss != build.losses[p.loss].name) ++p.loss;
  STD_TORCH_CHECK(p.loss < build.loss_count, "loss: unknown name '", loss, "'");
  const kd::LossFacts& facts = build.losses[p.loss];
  STD_TORCH_CHECK(params.size() <= kd::kMaxParams, "params: at most ", kd::kMaxParams, ", got ", params.size());
  std::copy(params.begin(), params.end(), p.params);

  p.student = describe(student, "student");
  const int64_t dims = student.dim();
  p.outer = dims > 2 ? student.size(0) : 1;
  p.inner = dims > 1 ? student.size(dims - 2) : 1;
  p.classes = student.size(dims - 1);
  STD_TORCH_CHECK(p.classes > 0, "student: needs at least one class");
  STD_TORCH_CHECK(teacher.has_value() == facts.teacher, "teacher: '", loss, facts.teacher ? "' needs" : "' takes no",
                  " teacher");
  if (teacher) {
    p.teacher = describe(*teacher, "teacher");
    STD_TORCH_CHECK(same_shape(*teacher, student), "teacher: must have the student's shape");
  }
  p.ignore_index = ignore_index;
  if (target) {
    check_rows(*target, "target", p, ScalarType::Long);
    p.target = static_cast<const int64_t*>(target->data_ptr());
    call.counted = check_targets(p);
  } else {
    STD_TORCH_CHECK(loss == "kd", "target: '", loss, "' needs one");
    call.counted = p.rows_total();
  }
  if (row_weight) {
    check_rows(*row_weight, "row_weight", p, compute_type(p));
    p.row_weight = row_weight->data_ptr();
  }
  return call;
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

// Allocates by LibTorch's C interface: a call of aten::empty would go through the dispatcher once more, which costs
// more than the kernels on a small input.
Tensor fresh_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor fresh(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  return fresh_strided(sizes, strides, dtype);
}

// As torch.empty_like, which keeps the strides of whatever is dense.
Tensor fresh_like(const Tensor& x) {
  return x.is_contiguous() ? fresh_strided(x.sizes(), x.strides(), x.scalar_type()) : torch::stable::empty_like(x);
}

double number(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.numel() == 1, name, ": must be one CPU number");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name, ": must be float32 or float64");
  return dtype == ScalarType::Double ? *static_cast<const double*>(x.data_ptr())
                                     : *static_cast<const float*>(x.data_ptr());
}

Tensor empty_gradient(const Tensor& student, kd::Problem& p) {
  Tensor grad = fresh_like(student);
  p.grad = describe(grad, "grad");
  kd::advise_huge_pages(grad.data_ptr(), grad.numel() * grad.element_size());
  return grad;
}

std::tuple<Tensor, Tensor> forward(std::string loss, Tensor student, std::optional<Tensor> teacher,
                                   std::optional<Tensor> target, std::optional<Tensor> row_weight, Params params,
                                   int64_t ignore_index) {
  const kd::Kernels& build = current_kernels();
  kd::Problem p = describe_call(build, loss, student, teacher, target, row_weight, params, ignore_index).problem;
  const int outputs = build.losses[p.loss].outputs;
  const auto sizes = student.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  if (outputs > 1) shape.insert(shape.begin(), outputs);
  Tensor rows = fresh(shape, compute_type(p));
  Tensor stats = fresh({p.rows_total(), kd::kStatsWidth}, ScalarType::Double);
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
  kd::Problem p = describe_call(build, loss, student, teacher, target, row_weight, params, ignore_index).problem;
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
                                   std::optional<Tensor> target, std::optional<Tensor> row_weight, double scale,
                                   std::optional<Tensor> normalizer, bool mean, Params params, int64_t ignore_index,
                                   bool with_grad) {
  const kd::Kernels& build = current_kernels();
  Call call = describe_call(build, loss, student, teacher, target, row_weight, params, ignore_index);
  kd::Problem& p = call.problem;
  STD_TORCH_CHECK(build.losses[p.loss].outputs == 1, "loss: '", loss, "' has several outputs, none to reduce");
  p.scale = scale;
  if (normalizer) p.scale /= number(*normalizer, "normalizer");
  if (mean) p.scale /= static_cast<double>(std::max<int64_t>(call.counted, 1));
  Tensor grad = with_grad ? empty_gradient(student, p) : fresh({0}, student.scalar_type());
  p.pass = kd::Pass::forward_grad;
  std::vector<double> scaled_rows(p.rows_total());
  p.scaled_rows = scaled_rows.data();
  run(build, p);

  double sum = 0;  // in index order: the same bits for any number of threads
  for (double x : scaled_rows) sum += x;
  Tensor total = fresh({}, compute_type(p));
  if (p.in_double())
    *static_cast<double*>(total.data_ptr()) = sum;
  else
    *static_cast<float*>(total.data_ptr()) = static_cast<float>(sum);
  return {total, grad};
}

// A factor of 1, the ordinary case of loss.backward(), touches nothing.
void scale_(Tensor grad, Tensor factor) {
  if (number(factor, "factor") == 1) return;
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
