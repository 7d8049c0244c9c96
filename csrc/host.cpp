// kdkernels._host: what the package and the tests ask the build on the host, with NumPy arrays and no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/cpu.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> out;
  std::istringstream names(kd::supported_names());
  for (std::string name; std::getline(names, name, ',');) out.push_back(name);
  return out;
}

const kd::Kernels& build_of(const std::string& isa) {
  const kd::Kernels* found = kd::kernels(isa.c_str());
  if (!found)
    throw py::value_error("isa: '" + isa + "' is not available here; allowed: " + std::string(kd::supported_names()));
  return *found;
}

template <class T>
py::array_t<T> map(py::array_t<T, py::array::c_style> x, void (*function)(const T*, T*, int64_t)) {
  std::vector<T> in((x.size() + 15) / 16 * 16, T(0)), out(in.size());
  std::copy(x.data(), x.data() + x.size(), in.begin());
  function(in.data(), out.data(), static_cast<int64_t>(in.size()));
  py::array_t<T> y(x.size());
  std::copy(out.begin(), out.begin() + x.size(), y.mutable_data());
  return y;
}

py::dict losses() {
  py::dict out;
  const kd::Kernels& build = *kd::best_kernels();
  for (int i = 0; i < build.loss_count; ++i) {
    const kd::LossFacts& loss = build.losses[i];
    py::dict facts;
    facts["outputs"] = loss.outputs;
    facts["teacher"] = loss.teacher;
    facts["two_temperatures"] = loss.two_temperatures;
    out[loss.name] = facts;
  }
  return out;
}

// The regime for contiguous logits, or for logits with the class dimension in the middle.
std::string plan(const std::string& isa, int64_t rows, int64_t classes, bool class_strided) {
  kd::Problem p;
  p.outer = 1;
  p.inner = rows;
  p.classes = classes;
  p.student.data = &p;
  p.student.class_stride = class_strided ? rows : 1;
  const char* const names[] = {"lanes_are_classes", "batches", "lanes_are_rows"};
  return names[static_cast<int>(kd::plan(build_of(isa), p).regime)];
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the CPU build, and its lane functions for tests.";
  m.def("isas", &isas, "Instruction sets built in and supported by this processor, best last.");
  m.def("losses", &losses, "The C++ list of losses: name -> {outputs, teacher, two_temperatures}.");
  m.def("plan", &plan, py::arg("isa"), py::arg("rows"), py::arg("classes"), py::arg("class_strided") = false,
        "The regime the planner picks.");
  m.def("stats_width", [] { return kd::kStatsWidth; });
  m.def("exp2_f32", [](const std::string& isa, py::array_t<float, py::array::c_style> x) {
    return map<float>(x, build_of(isa).exp2_f32);
  });
  m.def("exp2_f64", [](const std::string& isa, py::array_t<double, py::array::c_style> x) {
    return map<double>(x, build_of(isa).exp2_f64);
  });
  m.def("log_f64", [](const std::string& isa, py::array_t<double, py::array::c_style> x) {
    return map<double>(x, build_of(isa).log_f64);
  });
  m.def("log1p_f64", [](const std::string& isa, py::array_t<double, py::array::c_style> x) {
    return map<double>(x, build_of(isa).log1p_f64);
  });
}
