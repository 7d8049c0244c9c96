// kdkernels._simt: the GPU kernels on NumPy arrays, in the emulation. Built for the tests only (KDKERNELS_SIMT=1).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../cuda/plan_dict.h"
#include "../cuda/run.h"
#include "faults.h"
#include "simt.h"

namespace py = pybind11;

namespace {

using namespace kd;

DType dtype_of(const std::string& name) {
  const std::map<std::string, DType> names = {
      {"float32", DType::f32}, {"float64", DType::f64}, {"float16", DType::f16}, {"bfloat16", DType::bf16}};
  return names.at(name);
}

// Where the elements of an array begin and end; strides are not negative.
struct Extent {
  char* data = nullptr;
  size_t bytes = 0;
  explicit Extent(const py::array& x) : data(const_cast<char*>(static_cast<const char*>(x.data()))) {
    if (!x.size()) return;
    bytes = x.itemsize();
    for (py::ssize_t i = 0; i < x.ndim(); ++i) bytes += (x.shape(i) - 1) * x.strides(i);
  }
};

using Array = std::optional<py::array>;

// What one call is made of. Arrays of 16-bit types come as their bits, with the type's name beside them.
struct Run {
  gpu::Call call;
  simt::Memory memory;

  Logits logits(const py::array& x, const std::string& dtype) {
    if (x.ndim() != 3) throw py::value_error("logits: must have 3 dimensions (outer, inner, classes)");
    Logits out = {Extent(x).data, dtype_of(dtype), 0, 0, 0};
    const int64_t size = bytes_of(out.dtype);
    if (x.itemsize() != size) throw py::value_error("logits: itemsize is not that of " + dtype);
    out.outer_stride = x.strides(0) / size;
    out.inner_stride = x.strides(1) / size;
    out.class_stride = x.strides(2) / size;
    return out;
  }
  template <class T>
  T* input(const char* name, const Array& x) {
    if (!x) return nullptr;
    const Extent extent(*x);
    if (extent.bytes) memory.input(name, extent.data, extent.bytes);
    return reinterpret_cast<T*>(extent.data);
  }
  void* output(const char* name, const Array& x) {
    if (!x) return nullptr;
    const Extent extent(*x);
    if (extent.bytes) memory.output(name, extent.data, extent.bytes);
    return extent.data;
  }
};

gpu::Device device_of(const py::dict& x) {
  gpu::Device out = {x["multiprocessors"].cast<int>(),
                     x["shared_per_block"].cast<int64_t>(),
                     x["shared_per_multiprocessor"].cast<int64_t>(),
                     x["l2"].cast<int64_t>(),
                     {}};
  const auto clusters = x["clusters"].cast<std::vector<int>>();
  std::copy(clusters.begin(), clusters.end(), out.clusters);
  return out;
}

// A plan that the planner would not make: the regime and the numbers that `forced` names, as far as the call allows.
gpu::Plan forced_plan(const gpu::Shape& x, gpu::Plan plan, const py::dict& forced) {
  const auto number = [&](const char* name, int64_t otherwise) {
    return forced.contains(name) ? forced[name].cast<int64_t>() : otherwise;
  };
  const int64_t vectors = std::max<int64_t>(1, x.classes / x.vector);
  if (forced.contains("regime")) {
    const auto wanted = forced["regime"].cast<std::string>();
    int regime = 0;
    while (wanted != gpu::kRegimes[regime]) ++regime;
    gpu::Plan out = {static_cast<gpu::Regime>(regime), static_cast<int>(number("threads", 32)), number("blocks", 3)};
    switch (out.regime) {
      case gpu::Regime::lanes:
        out.lanes = static_cast<int>(number("lanes", 32));
        out.lane_classes = static_cast<int>(number("lane_classes", gpu::kFewRowsClasses));
        if (x.kept > 2) out.lane_classes = gpu::kFewRowsClasses;
        if (x.alike && !x.strided && x.classes / x.vector * x.vector <= out.lanes * out.lane_classes) plan = out;
        break;
      case gpu::Regime::block:
        while (out.threads * gpu::kept_classes(x.kept, x.vector) < vectors * x.vector) out.threads += 32;
        if (x.alike && !x.strided && out.threads <= gpu::kBlockThreads) plan = out;
        break;
      case gpu::Regime::staged:
        out.stage_slots = static_cast<int>(gpu::ceil_div(vectors, out.threads) + number("more_slots", 0));
        if (x.alike && !x.strided && x.pass != Pass::backward) plan = out;
        break;
      case gpu::Regime::cluster:
        out.parts = static_cast<int>(number("parts", 1));
        out.part_vectors = static_cast<int>(gpu::ceil_div(vectors, out.parts));
        out.stages = static_cast<int>(number("stages", 2));
        out.blocks = out.parts * number("clusters", 2);
        out.alike = x.alike;
        if (!x.strided && x.vector > 2 && x.pass != Pass::backward) plan = out;
        break;
      case gpu::Regime::sweeps:
        out.alike = x.alike;
        if (!x.strided && x.pass != Pass::backward) plan = out;
        break;
      case gpu::Regime::split:
        out.wave = number("wave", x.rows);
        out.part_vectors = static_cast<int>(gpu::ceil_div(vectors, number("parts", 1)));
        out.parts = static_cast<int>(gpu::ceil_div(vectors, out.part_vectors));
        out.blocks = out.wave * out.parts;
        if (!x.strided) plan = out;
        break;
      default:
        plan = out;
    }
  }
  return plan;
}

py::dict run(const std::string& loss, const std::string& pass, const py::array& student,
             const std::string& student_dtype, const Array& teacher, const std::string& teacher_dtype,
             const Array& grad, const Array& target, int64_t ignore_index, const std::vector<double>& params,
             const Array& row_weight, const Array& upstream, const Array& rows, const Array& stats, double scale,
             const Array& normalizer, bool mean, const Array& total, const Array& parts, const py::dict& device,
             const py::dict& forced, const std::string& override, uint64_t seed) {
  Run r;
  gpu::Call& c = r.call;
  Problem& p = c.problem;
  int number = 0;
  while (number < gpu::kLossCount && loss != gpu::kLosses[number].name) ++number;
  if (number == gpu::kLossCount) throw py::value_error("loss: unknown name '" + loss + "'");
  if (static_cast<int>(params.size()) != gpu::kLosses[number].params) throw py::value_error("params: wrong number");
  p.set_loss(number, gpu::kLosses[number], params.data());
  p.pass = pass == "backward" ? Pass::backward : pass == "forward" ? Pass::forward : Pass::forward_grad;
  p.outer = student.shape(0);
  p.inner = student.shape(1);
  p.classes = student.shape(2);
  p.student = r.logits(student, student_dtype);
  r.input<void>("student", student);
  if (teacher) {
    p.teacher = r.logits(*teacher, teacher_dtype);
    r.input<void>("teacher", teacher);
  }
  if (grad) {
    p.grad = r.logits(*grad, student_dtype);
    r.output("grad", grad);
  }
  p.target = r.input<const int64_t>("target", target);
  p.ignore_index = ignore_index;
  p.row_weight = r.input<void>("row_weight", row_weight);
  p.grad_rows = r.input<void>("upstream", upstream);
  p.rows = r.output("rows", rows);
  p.stats = p.pass == Pass::backward ? r.input<void>("stats", stats) : r.output("stats", stats);
  p.parts = r.output("parts", parts);
  p.scale = scale;
  c.normalizer = r.input<void>("normalizer", normalizer);
  c.mean = mean;
  c.total = r.output("total", total);

  const gpu::Shape shape = gpu::shape_of(p);
  const gpu::Plan plan = forced_plan(shape, gpu::plan(shape, device_of(device), gpu::parse_override(override)), forced);
  // NaN, so that what is read before it is written shows.
  std::vector<uint64_t> scratch(gpu::scratch_bytes(c, plan) / 8 + 2, ~uint64_t(0));
  c.scratch = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 15) / 16 * 16);
  r.memory.scratch("scratch", c.scratch, gpu::scratch_bytes(c, plan) + 1);
  std::vector<uint32_t> counter(4, 0);
  c.counter = counter.data();
  r.memory.scratch("counter", c.counter, 4);
  simt::set_options({seed});
  simt::reset_counters();
  const uint64_t before = simt::counters().launches;
  if (gpu::run(c, plan)) throw std::runtime_error(simt::fault());
  py::dict out = gpu::as_dict(plan);
  out["launches"] = simt::counters().launches - before;
  out["copies"] = simt::counters().copies;
  out["bulk_copies"] = simt::counters().bulk_copies;
  out["messages"] = simt::counters().messages;
  return out;
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.doc() = "The GPU kernels, run and checked on the CPU.";
  m.def("run", &run, py::kw_only(), py::arg("loss"), py::arg("pass_"), py::arg("student"), py::arg("student_dtype"),
        py::arg("teacher") = py::none(), py::arg("teacher_dtype") = "", py::arg("grad") = py::none(),
        py::arg("target") = py::none(), py::arg("ignore_index") = -100, py::arg("params") = std::vector<double>(),
        py::arg("row_weight") = py::none(), py::arg("upstream") = py::none(), py::arg("rows") = py::none(),
        py::arg("stats") = py::none(), py::arg("scale") = 1.0, py::arg("normalizer") = py::none(),
        py::arg("mean") = false, py::arg("total") = py::none(), py::arg("parts") = py::none(), py::arg("device"),
        py::arg("forced") = py::dict(), py::arg("override") = "", py::arg("seed") = 0,
        "Runs one call; the plan it took. A fault is a RuntimeError.");
  m.def(
      "scale",
      [](const py::array& grad, const std::string& dtype, const py::array& factor, uint64_t seed) {
        simt::Memory memory;
        const Extent to(grad), by(factor);
        memory.output("grad", to.data, to.bytes);
        memory.input("factor", by.data, by.bytes);
        simt::set_options({seed});
        if (gpu::scale({to.data, dtype_of(dtype), grad.size(), by.data, factor.itemsize() == 8, nullptr}))
          throw std::runtime_error(simt::fault());
      },
      py::arg("grad"), py::arg("dtype"), py::arg("factor"), py::arg("seed") = 0,
      "Multiplies a dense gradient in place.");
  m.def("faults", &simt::fault_names, "The faults that the emulation's own tests plant.");
  m.def("run_fault", &simt::run_fault, py::arg("name"), py::arg("seed"), "What a planted fault reports.");
}
