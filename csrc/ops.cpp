// The operators on a CPU: they run on torch's threads.
#include "binding.h"

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/pool.h"

// There from torch 2.11 on. Under older ones no memory is kept.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* out, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace {

using namespace kd::binding;

const kd::Kernels& current_kernels() {
  const char* name = std::getenv("KDKERNELS_CPU_ISA");
  if (!name || !*name) return *kd::best_kernels();
  const kd::Kernels* found = kd::kernels(name);
  STD_TORCH_CHECK(found, "KDKERNELS_CPU_ISA=", name, " is not available here; allowed: ", kd::supported_names());
  return *found;
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

struct Described {
  TensorDevice place;
  kd::Problem problem;
  int64_t counted;               // rows that are not ignored
  const double* params_of_rows;  // (rows, so many), or null: all rows have the same
};

Described describe_call(const kd::Kernels& build, const std::string& loss, const Tensor& student,
                        const std::optional<Tensor>& teacher, const std::optional<Tensor>& target,
                        const std::optional<Tensor>& row_weight, const Tensor& params, int64_t ignore_index,
                        int64_t classes) {
  STD_TORCH_CHECK(student.is_cpu(), "student: must be on the CPU");
  const TensorDevice place = TensorDevice::of(student);
  const kd::Problem p = kd::binding::describe_call(build.losses, build.loss_count, place, loss, student, teacher,
                                                   target, row_weight, params, ignore_index, classes, true);
  const auto* numbers = params.dim() == 2 ? static_cast<const double*>(params.data_ptr()) : nullptr;
  return {place, p, target ? check_targets(p) : p.rows_total(), numbers};
}

// Where the rows of each thread begin, and where the last one's end: as much for each to do, in whole units. Of a row
// that is skipped only the zeros of its gradient are written; padding makes them stand together.
std::vector<int64_t> shares(const Described& call, int unit) {
  const kd::Problem& p = call.problem;
  constexpr int64_t kRead = 8, kSkipped = 1, kWorthAThread = 32768 * kRead;  // classes: about 20 microseconds
  const int64_t rows = p.rows_total();
  const bool alike = !p.row_weight && call.counted == rows;
  int64_t all = kRead * rows;
  if (!alike) {
    all = 0;
    for (int64_t row = 0; row < rows; ++row) all += p.skips(row) ? kSkipped : kRead;
  }
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (rows + unit - 1) / unit),
                tasks = std::max<int64_t>(1, std::min(threads, all / (kWorthAThread / p.classes + 1)));
  std::vector<int64_t> begins{0};
  int64_t done = 0, row = 0;
  for (int64_t task = 1; task < tasks; ++task) {
    if (alike)
      row = rows * task / tasks;
    else
      for (; done * tasks < all * task; ++row) done += p.skips(row) ? kSkipped : kRead;
    begins.push_back(std::min(rows, (row + unit - 1) / unit * unit));
  }
  begins.push_back(rows);
  return begins;
}

void run(const kd::Kernels& build, const Described& call) {
  const kd::Problem& p = call.problem;
  if (p.rows_total() == 0) return;
  const kd::Plan plan = kd::plan(build, p);
  const std::vector<int64_t> begins = shares(call, call.params_of_rows ? 1 : plan.unit);
  std::atomic<bool> ok{true};
  torch::stable::parallel_for(0, begins.size() - 1, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = begins[first], end = begins[last];
    if (!call.params_of_rows) {
      if (!build.run(p, plan, begin, end)) ok = false;
      return;
    }
    // Kernels take the numbers of a call: rows with the same ones are one.
    const kd::LossFacts& facts = build.losses[p.loss];
    const auto of_row = [&](int64_t row) { return call.params_of_rows + row * facts.params; };
    const size_t bytes = facts.params * sizeof(double);
    kd::Problem part = p;
    for (int64_t row = begin, stop; row < end; row = stop) {
      for (stop = row + 1; stop < end && memcmp(of_row(row), of_row(stop), bytes) == 0;) ++stop;
      part.set_loss(p.loss, facts, of_row(row));
      if (!build.run(part, kd::plan(build, part), row, stop)) ok = false;
    }
  });
  STD_TORCH_CHECK(ok, "out of memory: no scratch for ", p.classes, " classes");
}

size_t pool_limit() {
  const char* given = torch_from_blob ? std::getenv("KDKERNELS_POOL") : "0";
  if (!given || !*given) return kd::kPoolLimit;
  char* end;
  errno = 0;
  const unsigned long long mebibytes = std::strtoull(given, &end, 10);
  STD_TORCH_CHECK(*given >= '0' && *given <= '9' && !*end && !errno && mebibytes <= SIZE_MAX >> 20,
                  "KDKERNELS_POOL=", given, " is no number of MiB; allowed: 0, for none, or more");
  return static_cast<size_t>(mebibytes) << 20;
}

// As torch.empty_like, of memory that is kept for the next call where there is any.
Tensor kept_like(const Tensor& x, const TensorDevice& place) {
  const size_t bytes = x.numel() * x.element_size(), limit = pool_limit();
  const auto strides = strides_like(x);
  kd::PoolBlock* const block = strides ? kd::pool_lend(bytes, limit) : nullptr;
  if (!block) {
    Tensor fresh = fresh_like(x, place);
    kd::advise_huge_pages(fresh.data_ptr(), bytes);
    return fresh;
  }
  const auto give_back = [](void*, void* lent) { kd::pool_give_back(static_cast<kd::PoolBlock*>(lent)); };
  AtenTensorHandle handle;
  const AOTITorchError error =
      torch_from_blob(block->data, x.dim(), x.sizes().data(), strides->data(), 0, shim_dtype(x.scalar_type()),
                      place.type, place.index, &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, block);
  if (error) kd::pool_give_back(block);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

Tensor empty_gradient(const Tensor& student, Described& call) {
  return as_gradient(kept_like(student, call.place), student, call.problem, call.place);
}

std::tuple<Tensor, Tensor, Tensor> forward(std::string loss, Tensor student, std::optional<Tensor> teacher,
                                           std::optional<Tensor> target, std::optional<Tensor> row_weight,
                                           Tensor params, int64_t ignore_index, bool with_parts, int64_t classes) {
  const kd::Kernels& build = current_kernels();
  Described call = describe_call(build, loss, student, teacher, target, row_weight, params, ignore_index, classes);
  kd::Problem& p = call.problem;
  const int outputs = build.losses[p.loss].outputs;
  Tensor rows = fresh_rows(student, outputs, p, call.place);
  Tensor stats = fresh({p.rows_total(), kd::kStatsWidth}, ScalarType::Double, call.place);
  Tensor parts = fresh_parts(build.losses[p.loss], student, p, call.place, with_parts);
  p.pass = kd::Pass::forward;
  p.rows = rows.data_ptr();
  p.stats = stats.data_ptr();
  run(build, call);
  return {rows, stats, parts};
}

Tensor backward(std::string loss, Tensor grad_rows, Tensor student, std::optional<Tensor> teacher,
                std::optional<Tensor> target, std::optional<Tensor> row_weight, Tensor stats, Tensor params,
                int64_t ignore_index, int64_t classes) {
  const kd::Kernels& build = current_kernels();
  Described call = describe_call(build, loss, student, teacher, target, row_weight, params, ignore_index, classes);
  kd::Problem& p = call.problem;
  check_rows(stats, "stats", p, call.place, ScalarType::Double, kd::kStatsWidth);
  grad_rows = torch::stable::contiguous(grad_rows);
  check_rows(grad_rows, "grad_rows", p, call.place, compute_type(p), build.losses[p.loss].outputs);
  Tensor grad = empty_gradient(student, call);
  p.pass = kd::Pass::backward;
  p.grad_rows = grad_rows.data_ptr();
  p.stats = stats.data_ptr();
  run(build, call);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> reduced(std::string loss, Tensor student, std::optional<Tensor> teacher,
                                           std::optional<Tensor> target, std::optional<Tensor> row_weight,
                                           std::optional<Tensor> normalizer, bool mean, Tensor params,
                                           int64_t ignore_index, bool with_grad, bool with_parts, int64_t classes) {
  const kd::Kernels& build = current_kernels();
  Described call = describe_call(build, loss, student, teacher, target, row_weight, params, ignore_index, classes);
  kd::Problem& p = call.problem;
  STD_TORCH_CHECK(build.losses[p.loss].outputs == 1, "loss: '", loss, "' has several outputs, none to reduce");
  if (normalizer) p.scale /= number(*normalizer, "normalizer");
  if (mean) p.scale /= static_cast<double>(std::max<int64_t>(call.counted, 1));
  Tensor grad = with_grad ? empty_gradient(student, call) : fresh({0}, student.scalar_type(), call.place);
  Tensor parts = fresh_parts(build.losses[p.loss], student, p, call.place, with_parts);
  p.pass = kd::Pass::forward_grad;
  std::vector<double> scaled_rows(p.rows_total());
  p.scaled_rows = scaled_rows.data();
  run(build, call);

  double sum = 0;  // in index order: the same bits for any number of threads
  for (double x : scaled_rows) sum += x;
  Tensor total = fresh({}, compute_type(p), call.place);
  if (p.in_double())
    *static_cast<double*>(total.data_ptr()) = sum;
  else
    *static_cast<float*>(total.data_ptr()) = static_cast<float>(sum);
  return {total, grad, parts};
}

// A factor of 1, the ordinary case of loss.backward(), touches nothing.
void scale_(Tensor grad, Tensor factor) {
  if (number(factor, "factor") == 1) return;
  multiply_(grad, factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("reduced", TORCH_BOX(&reduced));
  m.impl("scale_", TORCH_BOX(&scale_));
}

// Bytes that may be kept, that are, and that gradients hold.
static PyObject* memory(PyObject*, PyObject*) {
  try {
    const kd::PoolState state = kd::pool_state();
    const unsigned long long limit = pool_limit(), kept = state.kept, lent = state.lent;
    return Py_BuildValue("KKK", limit, kept, lent);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

static PyObject* release_memory(PyObject*, PyObject*) {
  kd::pool_release();
  Py_RETURN_NONE;
}

static PyMethodDef kMethods[] = {
    {"memory", memory, METH_NOARGS, nullptr}, {"release_memory", release_memory, METH_NOARGS, nullptr}, {}};
KD_MODULE(_C, kMethods)
