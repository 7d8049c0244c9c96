// kdkernels._host: what the package and the tests ask the build on the host, with NumPy arrays and no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <sstream>
#include <string>
#include <typeinfo>
#include <vector>

#include "cpu/cpu.h"
#include "cuda/plan_dict.h"
#include "losses/list.h"

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
    facts["params"] = loss.params;
    facts["teacher"] = loss.teacher;
    facts["target"] = loss.target;
    facts["parts"] = loss.parts;
    out[loss.name] = facts;
  }
  return out;
}

kd::Problem call_of(const std::string& loss, const std::vector<double>& params) {
  int number = 0;
  while (number < kd::Losses::size && loss != kd::Losses::facts[number].name) ++number;
  if (number == kd::Losses::size) throw py::value_error("loss: unknown name '" + loss + "'");
  const kd::LossFacts& facts = kd::Losses::facts[number];
  if (static_cast<int>(params.size()) != facts.params) throw py::value_error("params: wrong number");
  kd::Problem p;
  p.set_loss(number, facts, params.data());
  return p;
}

// What a call of a loss sums, by a name that only serves comparison: calls of one name share their kernels.
std::string sums(const std::string& loss, const std::vector<double>& params) {
  return kd::Losses::chosen(call_of(loss, params),
                            [](auto tag) { return typeid(typename decltype(tag)::type::Sums).name(); });
}

// The contract of `Sums` (stats.h) on one row, once relative to the pivots `to` and once relative to `from` and moved:
// pairs that must agree. numbers: random ones, for coefficients and for what opens a second round.
template <class Sums>
py::dict algebra_of(const kd::Problem& p, const std::vector<double>& s, const std::vector<double>& t,
                    const std::vector<double>& from, const std::vector<double>& to,
                    const std::vector<double>& numbers) {
  const kd::Chosen<double> chosen(p);
  const auto& scales = chosen.template scales<Sums>();
  const kd::Pivots<double> a = {from[0], from[1]}, b = {to[0], to[1]};
  typename Sums::template Stats<double> there = {}, here = {};
  // Coefficients are rebased where there is no second round; where there is one, what opens it.
  typename Sums::template Coef<double> coef = {}, rebased;
  for (int k = 0; k < Sums::coefs; ++k) coef.c[k] = numbers[k];
  rebased = coef;
  if constexpr (Sums::refined == 0) Sums::template rebase<double>(scales, rebased, b, a);
  std::vector<double> gradient, gradient_moved;
  std::vector<std::vector<double>> refined, refined_moved;
  for (size_t i = 0; i < s.size(); ++i) {
    const auto x = Sums::template exps<double>(scales, s[i] - a.s, t[i] - a.t);
    const auto y = Sums::template exps<double>(scales, s[i] - b.s, t[i] - b.t);
    Sums::template add<double>(there, x);
    Sums::template add<double>(here, y);
    if constexpr (Sums::refined == 0) {
      gradient.push_back(Sums::template gradient<double>(y.e, coef.c));
      gradient_moved.push_back(Sums::template gradient<double>(x.e, rebased.c));
    }
    if constexpr (Sums::refined > 0) {
      const auto refine = [&](const double* kept, bool move, std::vector<std::vector<double>>& out) {
        kd::Opening<Sums, double> opening;
        double e[Sums::kept], more[Sums::refined] = {};
        for (int k = 0; k < Sums::openings; ++k) opening.c[k] = std::fabs(numbers[k]);
        for (int k = 0; k < Sums::kept; ++k) e[k] = kept[k];
        if (move) Sums::template rebase<double>(scales, opening, b, a);
        Sums::template refine<double>(scales, e, opening, more);
        out.emplace_back(e, e + Sums::kept);
        out.back().insert(out.back().end(), more, more + Sums::refined);
      };
      refine(y.e, false, refined);
      refine(x.e, true, refined_moved);
    }
  }
  const auto moved = Sums::template moved_to<double>(scales, there, a, b);
  py::dict out;
  out["stats"] = py::make_tuple(std::vector<double>(here.v, here.v + Sums::count),
                                std::vector<double>(moved.v, moved.v + Sums::count));
  if (!Sums::refined) out["gradient"] = py::make_tuple(gradient, gradient_moved);
  if (Sums::refined) out["refined"] = py::make_tuple(refined, refined_moved);
  return out;
}

py::dict algebra(const std::string& loss, const std::vector<double>& params, const std::vector<double>& s,
                 const std::vector<double>& t, const std::vector<double>& from, const std::vector<double>& to,
                 const std::vector<double>& numbers) {
  if (s.size() != t.size() || from.size() != 2 || to.size() != 2 || numbers.size() < 16)
    throw py::value_error("two rows of one length, two pivots each, 16 numbers");
  const kd::Problem p = call_of(loss, params);
  return kd::Losses::chosen(
      p, [&](auto tag) { return algebra_of<typename decltype(tag)::type::Sums>(p, s, t, from, to, numbers); });
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

namespace gpu = kd::gpu;

const gpu::Device& gpu_device(const std::string& name) {
  std::string names;
  for (const gpu::KnownDevice& known : gpu::kDevices) {
    if (name == known.name) return known.device;
    names += (names.empty() ? "" : ", ") + std::string(known.name);
  }
  throw py::value_error("device: '" + name + "' is not known here; allowed: " + names);
}

py::dict gpu_plan(const std::string& device, int64_t rows, int64_t classes, int itemsize, bool teacher, int kept,
                  bool alike, bool strided, bool wide, bool backward, bool writes, const std::string& override) {
  constexpr int64_t kMostClasses = (int64_t(1) << 31) - 65;  // as the binding has it
  if (rows < 1 || rows > int64_t(1) << 48) throw py::value_error("rows: must be from 1 to 2^48");
  if (classes < 1 || classes > kMostClasses) throw py::value_error("classes: must be from 1 to 2^31 - 65");
  gpu::Shape x = {rows,
                  classes,
                  wide ? 32 / itemsize : 16 / itemsize,
                  teacher ? 2 * itemsize : itemsize,
                  kept,
                  alike,
                  strided,
                  wide,
                  writes,
                  backward ? kd::Pass::backward : kd::Pass::forward_grad};
  if (wide) x.vector = itemsize == 8 ? 2 : 8;
  const gpu::Plan plan = gpu::plan(x, gpu_device(device), gpu::parse_override(override));
  py::dict out = gpu::as_dict(plan);
  out["vector"] = x.vector;
  return out;
}

// The rules, and what they make of 4096 rows of a student and a teacher on a device.
std::string gpu_table(const std::string& device) {
  std::ostringstream out;
  out << "rules, the first that applies:\n";
  for (const gpu::Rule& rule : gpu::kTable)
    out << "  " << gpu::kRegimes[static_cast<int>(rule.regime)] << ": " << rule.when << "\n";
  out << device << ", 4096 rows, one temperature:\n  classes  16 bit  32 bit\n";
  for (int64_t classes : {10, 100, 200, 1000, 4096, 8192, 16384, 32000, 50257, 65536, 128256, 151936, 262144}) {
    out << "  " << classes;
    for (int itemsize : {2, 4}) {
      const gpu::Shape x = {4096, classes, 16 / itemsize, 2 * itemsize, 2,
                            true, false,   false,         true,         kd::Pass::forward_grad};
      const gpu::Plan plan = gpu::plan(x, gpu_device(device));
      out << "  " << gpu::kRegimes[static_cast<int>(plan.regime)] << " " << plan.threads << " x " << plan.blocks;
    }
    out << "\n";
  }
  return out.str();
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the build and the planners, and the CPU's lane functions, for tests.";
  m.def("isas", &isas, "Instruction sets built in and supported by this processor, best last.");
  m.def("losses", &losses, "The C++ list of losses: name -> what LossFacts says.");
  m.def("sums", &sums, py::arg("loss"), py::arg("params"), "What a call sums: calls of one name share their kernels.");
  m.def("algebra", &algebra, py::arg("loss"), py::arg("params"), py::arg("student"), py::arg("teacher"),
        py::arg("from"), py::arg("to"), py::arg("numbers"),
        "Statistics, gradients and refined classes of a row, relative to pivots, and moved there from others.");
  m.def("plan", &plan, py::arg("isa"), py::arg("rows"), py::arg("classes"), py::arg("class_strided") = false,
        "The regime the planner picks.");
  m.def(
      "gpu_devices",
      [] {
        std::map<std::string, int> multiprocessors;
        for (const gpu::KnownDevice& known : gpu::kDevices) multiprocessors[known.name] = known.device.multiprocessors;
        return multiprocessors;
      },
      "The known devices, with their multiprocessors.");
  m.def("gpu_plan", &gpu_plan, py::kw_only(), py::arg("device"), py::arg("rows"), py::arg("classes"),
        py::arg("itemsize") = 2, py::arg("teacher") = true, py::arg("kept") = 2, py::arg("alike") = true,
        py::arg("strided") = false, py::arg("wide") = false, py::arg("backward") = false, py::arg("writes") = true,
        py::arg("override") = "",
        "What the CUDA planner picks on a known device, for logits of so many bytes; override: as KDKERNELS_PLAN.");
  m.def("gpu_table", &gpu_table, py::arg("device") = "H200", "The CUDA planner's rules and some of its choices.");
  m.def("stats_width", [] { return kd::kStatsWidth; });
  m.def("large_temperature", [] { return kd::kLargeTemperature; });
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
