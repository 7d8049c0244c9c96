// The operators on a CUDA device: they launch on torch's current stream and wait for nothing.
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>

#include "binding.h"
#include "cuda/call.h"

namespace {

using namespace kd::binding;
using kd::gpu::Call;

void check(int error) { STD_TORCH_CHECK(error == 0, "CUDA error: ", kd::gpu::error_text(error)); }

void* stream_of(int32_t index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return stream;
}

struct Described {
  TensorDevice place;
  torch::stable::accelerator::DeviceGuard guard;
  Call call;
  const kd::LossFacts& facts;
};

Described describe_call(const std::string& loss, const Tensor& student, const std::optional<Tensor>& teacher,
                        const std::optional<Tensor>& target, const std::optional<Tensor>& row_weight,
                        const Tensor& params, int64_t ignore_index, int64_t classes) {
  STD_TORCH_CHECK(student.is_cuda(), "student: must be on a CUDA device");
  const TensorDevice place = TensorDevice::of(student);
  Call call;
  call.problem = kd::binding::describe_call(kd::gpu::kLosses, kd::gpu::kLossCount, place, loss, student, teacher,
                                            target, row_weight, params, ignore_index, classes);
  const kd::Problem& p = call.problem;
  STD_TORCH_CHECK(p.classes < (int64_t(1) << 31) - 64, "student: at most 2^31 - 65 classes, got ", p.classes);
  for (const Tensor* x : {&student, teacher ? &*teacher : nullptr})
    STD_TORCH_CHECK(!x || reinterpret_cast<uintptr_t>(x->data_ptr()) % x->element_size() == 0,
                    x == &student ? "student" : "teacher", ": the data must be aligned to its elements");
  call.stream = stream_of(place.index);
  return {place, torch::stable::accelerator::DeviceGuard(place.index), call, kd::gpu::kLosses[p.loss]};
}

// Looked at in every call, so that measuring one plan after another takes no new process.
kd::gpu::Override override_of_environment() {
  const char* text = std::getenv(kd::gpu::kOverrideVariable);
  return text ? kd::gpu::parse_override(text) : kd::gpu::Override{};
}

void run(Described& d) {
  if (d.call.problem.rows_total() == 0) return;
  kd::gpu::Needs needs;
  check(kd::gpu::prepare(d.call, needs, override_of_environment()));
  // Handed back to torch's allocator when this returns, which keeps it from any other stream until the kernels are
  // done.
  std::optional<Tensor> scratch;
  if (needs.bytes > 0) scratch = fresh({needs.bytes}, ScalarType::Byte, d.place);
  check(kd::gpu::run(d.call, needs, scratch ? scratch->data_ptr() : nullptr));
}

std::tuple<Tensor, Tensor, Tensor> forward(std::string loss, Tensor student, std::optional<Tensor> teacher,
                                           std::optional<Tensor> target, std::optional<Tensor> row_weight,
                                           Tensor params, int64_t ignore_index, bool with_parts, int64_t classes) {
  Described d = describe_call(loss, student, teacher, target, row_weight, params, ignore_index, classes);
  kd::Problem& p = d.call.problem;
  Tensor rows = fresh_rows(student, d.facts.outputs, p, d.place);
  Tensor stats = fresh({p.rows_total(), kd::kStatsWidth}, compute_type(p), d.place);
  Tensor parts = fresh_parts(d.facts, student, p, d.place, with_parts);
  p.pass = kd::Pass::forward;
  p.rows = rows.data_ptr();
  p.stats = stats.data_ptr();
  run(d);
  return {rows, stats, parts};
}

Tensor backward(std::string loss, Tensor grad_rows, Tensor student, std::optional<Tensor> teacher,
                std::optional<Tensor> target, std::optional<Tensor> row_weight, Tensor stats, Tensor params,
                int64_t ignore_index, int64_t classes) {
  Described d = describe_call(loss, student, teacher, target, row_weight, params, ignore_index, classes);
  kd::Problem& p = d.call.problem;
  check_rows(stats, "stats", p, d.place, compute_type(p), kd::kStatsWidth);
  grad_rows = torch::stable::contiguous(grad_rows);
  check_rows(grad_rows, "grad_rows", p, d.place, compute_type(p), d.facts.outputs);
  Tensor grad = as_gradient(fresh_like(student, d.place), student, d.call.problem, d.place);
  p.pass = kd::Pass::backward;
  p.grad_rows = grad_rows.data_ptr();
  p.stats = stats.data_ptr();
  run(d);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> reduced(std::string loss, Tensor student, std::optional<Tensor> teacher,
                                           std::optional<Tensor> target, std::optional<Tensor> row_weight,
                                           std::optional<Tensor> normalizer, bool mean, Tensor params,
                                           int64_t ignore_index, bool with_grad, bool with_parts, int64_t classes) {
  Described d = describe_call(loss, student, teacher, target, row_weight, params, ignore_index, classes);
  kd::Problem& p = d.call.problem;
  STD_TORCH_CHECK(d.facts.outputs == 1, "loss: '", loss, "' has several outputs, none to reduce");
  if (normalizer && normalizer->is_cpu()) {
    p.scale /= number(*normalizer, "normalizer");
  } else if (normalizer) {
    STD_TORCH_CHECK(
        d.place.holds(*normalizer) && normalizer->numel() == 1 && normalizer->scalar_type() == compute_type(p),
        "normalizer: must be one number, on the CPU or in the dtype of the loss on the device of the student");
    d.call.normalizer = normalizer->data_ptr();
  }
  if (mean && !target) p.scale /= static_cast<double>(std::max<int64_t>(p.rows_total(), 1));
  d.call.mean = mean && target;
  Tensor grad = with_grad ? as_gradient(fresh_like(student, d.place), student, d.call.problem, d.place)
                          : fresh({0}, student.scalar_type(), d.place);
  Tensor total = fresh({}, compute_type(p), d.place);
  if (p.rows_total() == 0) torch::stable::zero_(total);
  Tensor parts = fresh_parts(d.facts, student, p, d.place, with_parts);
  p.pass = kd::Pass::forward_grad;
  d.call.total = total.data_ptr();
  run(d);
  return {total, grad, parts};
}

bool is_dense(const Tensor& x) {
  int64_t last = 0;
  for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
  return last + 1 == x.numel();
}

void scale_(Tensor grad, Tensor factor) {
  STD_TORCH_CHECK(grad.is_cuda(), "grad: must be on a CUDA device");
  const TensorDevice place = TensorDevice::of(grad);
  STD_TORCH_CHECK(place.holds(factor) && factor.numel() == 1, "factor: must be one number on the device of grad");
  const ScalarType dtype = factor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "factor: must be float32 or float64");
  if (grad.numel() == 0) return;
  const bool fits = dtype == ScalarType::Double || grad.scalar_type() != ScalarType::Double;
  if (!fits || !is_dense(grad)) return multiply_(grad, factor);  // no gradient of ours is like that
  const torch::stable::accelerator::DeviceGuard guard(place.index);
  check(kd::gpu::scale({grad.data_ptr(), dtype_of(grad, "grad"), grad.numel(), factor.data_ptr(),
                        dtype == ScalarType::Double, stream_of(place.index)}));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("reduced", TORCH_BOX(&reduced));
  m.impl("scale_", TORCH_BOX(&scale_));
}

KD_MODULE(_cuda, nullptr)
