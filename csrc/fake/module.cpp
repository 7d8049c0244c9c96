// kdkernels._fake: launches of the CUDA kernels, the very objects that a build has, on a runtime that runs nothing and
// refuses what a device would refuse. Built for the tests only, where there is an nvcc (KDKERNELS_SIMT=1).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "../cuda/call.h"
#include "../cuda/plan_dict.h"
#include "runtime.h"

namespace py = pybind11;

namespace {

using namespace kd;

// ---- calls --------------------------------------------------------------------------------------------------------

// What decides about the launches of a call.
struct Spec {
  int loss = 0;
  Pass pass = Pass::forward;
  DType student = DType::f32, teacher = DType::f32;
  int64_t rows = 1, classes = 1;
  Variant variant = Variant::plain;
  // How the tensors lie: all alike; all alike, a class away from a granule; each row of the teacher otherwise; classes
  // apart.
  enum class Lie { aligned, shifted, skewed, strided } lie = Lie::aligned;
  bool mean = true;    // reductions count rows
  bool large = false;  // temperature, where there is one that is not 1
};
constexpr const char* kPasses[] = {"forward", "backward", "forward_grad"};
constexpr const char* kVariants[] = {"plain", "at_one", "smooth", "apart", "apart_smooth"};
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);
constexpr const char* kLies[] = {"aligned", "shifted", "skewed", "strided"};
constexpr const char* kTypes[] = {"float32", "float64", "float16", "bfloat16"};

template <size_t kCount>
int index_of(const char* what, const std::string& name, const char* const (&names)[kCount]) {
  for (size_t i = 0; i < kCount; ++i)
    if (name == names[i]) return static_cast<int>(i);
  throw py::value_error(std::string(what) + ": unknown name '" + name + "'");
}
int loss_of(const std::string& name) {
  for (int i = 0; i < gpu::kLossCount; ++i)
    if (name == gpu::kLosses[i].name) return i;
  throw py::value_error("loss: unknown name '" + name + "'");
}

std::string shown(const Spec& x) {
  const auto name = [](const char* const* names, auto i) { return std::string(names[static_cast<int>(i)]); };
  return std::string(gpu::kLosses[x.loss].name) + ", " + name(kVariants, x.variant) + (x.large ? ", large T, " : ", ") +
         name(kPasses, x.pass) + ", " + std::to_string(x.rows) + " x " + std::to_string(x.classes) + ", " +
         name(kTypes, x.student) + " and " + name(kTypes, x.teacher) + ", " + name(kLies, x.lie);
}
std::string shown(const gpu::Plan& x) {
  return std::string(gpu::kRegimes[static_cast<int>(x.regime)]) + ": " + std::to_string(x.blocks) + " x " +
         std::to_string(x.threads) + " threads, parts " + std::to_string(x.parts) + ", stages " +
         std::to_string(x.stages) + ", slots " + std::to_string(x.stage_slots) + ", lanes " + std::to_string(x.lanes);
}

// Addresses only: nothing is read.
char* memory(int tensor) { return reinterpret_cast<char*>(uintptr_t(tensor + 1) << 44); }

// Parameters of a loss by which a call takes this variant, at a temperature that is computed in double or not. False if
// it has none.
bool set_params(Problem& p, int loss, Variant variant, bool large) {
  const LossFacts& facts = gpu::kLosses[loss];
  for (const double temperature : {1., large ? 2 * kLargeTemperature : 4.})
    for (const double of_others : {0., 0.5, 1.})          // weights, smoothing
      for (const double last : {0.5, 1., temperature}) {  // the teacher's temperature is a loss's last parameter
        double numbers[kMaxParams];
        std::fill(numbers, numbers + kMaxParams, of_others);
        if (facts.temperature) numbers[0] = temperature;
        numbers[facts.params - 1] = facts.params > 1 ? last : numbers[0];
        p.set_loss(loss, facts, numbers);
        const bool found = Losses::chosen(p, [&](auto tag) { return decltype(tag)::type::variant == variant; });
        if (found && large == (p.temperature > kLargeTemperature)) return true;
      }
  return false;
}

gpu::Call call_of(const Spec& x, void* stream) {
  gpu::Call c;
  c.stream = stream;
  Problem& p = c.problem;
  if (!set_params(p, x.loss, x.variant, x.large)) throw py::value_error("variant: none of this loss");
  p.pass = x.pass;
  p.outer = 1;
  p.inner = x.rows;
  p.classes = x.classes;
  const bool strided = x.lie == Spec::Lie::strided, shifted = x.lie == Spec::Lie::shifted;
  const auto tensor = [&](int index, DType dtype) {
    Logits out = {memory(index) + (shifted ? bytes_of(dtype) : 0), dtype, 0, x.classes, 1};
    if (strided) out.inner_stride = 1, out.class_stride = x.rows + 1;
    return out;
  };
  p.student = tensor(0, x.student);
  if (gpu::kLosses[x.loss].teacher) {
    p.teacher = tensor(1, x.teacher);
    if (x.lie == Spec::Lie::skewed) ++p.teacher.inner_stride, p.teacher.data = memory(1) + bytes_of(x.teacher);
  }
  if (x.pass != Pass::forward) p.grad = tensor(2, x.student);
  if (x.pass == Pass::forward) p.rows = memory(3);
  if (x.pass != Pass::forward_grad) p.stats = memory(4);
  if (x.pass == Pass::backward) p.grad_rows = memory(5);
  p.target = reinterpret_cast<const int64_t*>(memory(6));
  if (x.pass == Pass::forward_grad) c.total = memory(7), c.mean = x.mean;
  return c;
}

// blocks: instead of those planned, if any.
int run(gpu::Call& c, gpu::Needs& needs, const gpu::Override& override, int64_t blocks = 0) {
  if (const int error = gpu::prepare(c, needs, override)) return error;
  if (blocks) needs.plan.blocks = blocks;
  return gpu::run(c, needs, needs.bytes ? memory(8) : nullptr);
}

[[noreturn]] void fail(int error) {
  std::string why;
  for (const std::string& x : fake::take_refusals()) why += (why.empty() ? "" : "; ") + x;
  throw std::runtime_error(gpu::error_text(error) + (why.empty() ? "" : ": " + why));
}

py::dict as_dict(const gpu::Device& x) {
  py::dict out;
  out["multiprocessors"] = x.multiprocessors;
  out["shared_per_block"] = x.shared_per_block;
  out["shared_per_multiprocessor"] = x.shared_per_multiprocessor;
  out["l2"] = x.l2;
  out["clusters"] = std::vector<int>(x.clusters, x.clusters + gpu::kClusterSizes);
  return out;
}
py::dict as_dict(const fake::Launch& x) {
  py::dict out;
  out["kernel"] = *x.kernel;
  out["blocks"] = x.blocks;
  out["threads"] = x.threads;
  out["shared"] = x.shared;
  out["cluster"] = x.cluster;
  out["device"] = x.device;
  out["captured"] = x.captured;
  out["resident"] = x.resident;
  return out;
}

// ---- many calls ---------------------------------------------------------------------------------------------------

struct Swept {
  int64_t calls = 0, launches = 0, refused = 0;           // refused: calls
  std::map<std::string, int64_t> regimes, clusters;       // calls
  std::set<std::string> not_possible;                     // the planner's words
  std::map<std::string, std::vector<std::string>> wrong;  // what, and the first calls that it happened to

  void add(const std::string& what, const Spec& x, const gpu::Plan& plan) {
    std::vector<std::string>& said = wrong[what];
    if (said.size() < 3) said.push_back(shown(x) + " -> " + shown(plan));
  }
};

// What decides about the kernel and its launch. Of numbers that only grow the grid, the magnitude: calls that differ in
// nothing else are made once.
using Key = std::array<int64_t, 18>;
struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (int64_t x : key) hash = (hash ^ static_cast<uint64_t>(x)) * 0x9e3779b97f4a7c15u, hash ^= hash >> 29;
    return hash;
  }
};
using Seen = std::unordered_set<Key, Hash>;

Key key_of(const Spec& x, const gpu::Call& c, const gpu::Plan& plan) {
  const auto magnitude = [](int64_t n) {
    int bits = 0;
    for (; n > 0; n /= 2) ++bits;
    return bits;
  };
  return {x.loss,
          static_cast<int>(x.variant),
          x.large,
          static_cast<int>(x.pass),
          static_cast<int>(x.student),
          static_cast<int>(x.teacher),
          static_cast<int>(plan.regime),
          plan.alike,
          plan.threads,
          magnitude(plan.blocks),
          plan.lanes,
          plan.lane_classes,
          plan.stage_slots,
          plan.parts,
          plan.regime == gpu::Regime::split ? magnitude(plan.part_vectors) : plan.part_vectors,
          plan.stages,
          magnitude(plan.wave),
          magnitude(gpu::count_blocks(c, plan))};
}

// None where the override asks for what the planner refuses.
std::optional<gpu::Plan> planned(const gpu::Call& c, const gpu::Device& device, const gpu::Override& override,
                                 Swept& out) {
  try {
    return gpu::plan(gpu::shape_of(c.problem), device, override);
  } catch (const std::invalid_argument& error) {
    out.not_possible.insert(error.what());
    return std::nullopt;
  }
}

void sweep_one(const Spec& x, const gpu::Device& device, const gpu::Override& override, Seen& seen, Swept& out) {
  gpu::Call c = call_of(x, nullptr);
  const std::optional<gpu::Plan> possible = planned(c, device, override, out);
  if (!possible) return;
  const gpu::Plan& plan = *possible;
  if (!seen.insert(key_of(x, c, plan)).second) return;
  ++out.calls;
  ++out.regimes[gpu::kRegimes[static_cast<int>(plan.regime)]];
  if (plan.regime == gpu::Regime::cluster) ++out.clusters[std::to_string(plan.parts)];
  gpu::Needs needs;
  const int error = run(c, needs, override);
  const std::vector<fake::Launch> launches = fake::take_launches();
  out.launches += static_cast<int64_t>(launches.size());
  std::vector<std::string> refusals = fake::take_refusals();
  if (error && refusals.empty()) refusals.push_back("error " + std::to_string(error));
  out.refused += !refusals.empty();
  for (const std::string& why : refusals) out.add(why, x, plan);
  if (error || launches.empty()) {
    if (!error) out.add("nothing was launched", x, plan);
    return;
  }
  const fake::Launch& last = launches.back();
  if (plan.regime != gpu::Regime::split) {  // persistent blocks, all resident at once
    if (last.blocks != plan.blocks || last.threads != plan.threads) out.add("launched otherwise than planned", x, plan);
    if (last.blocks > int64_t(last.resident) * device.multiprocessors)
      out.add("more blocks than are resident, " + std::to_string(last.resident) + " to a multiprocessor", x, plan);
  }
}

template <class F>
void for_types(int loss, const std::vector<DType>& types, F f) {
  for (DType student : types)
    for (DType teacher : types)
      if (gpu::kLosses[loss].teacher || teacher == student) f(student, teacher);
}

constexpr int64_t kMostLogits = int64_t(1) << 31;  // of a tensor; more are more of the same waves

py::dict sweep(std::vector<int64_t> classes, std::vector<int64_t> rows, bool large_first,
               const std::vector<std::string>& types, const std::string& override) {
  const gpu::Override wanted = gpu::parse_override(override);
  std::vector<DType> dtypes;
  for (const std::string& name : types) dtypes.push_back(DType(index_of("types", name, kTypes)));
  gpu::Device device;
  if (const int error = gpu::device_facts(device)) fail(error);
  if (large_first) {
    std::reverse(classes.begin(), classes.end());
    std::reverse(rows.begin(), rows.end());
  }
  Swept out;
  {
    const py::gil_scoped_release release;
    Seen seen;
    for (int64_t n : classes)
      for (int64_t r : rows) {
        if (n > kMostLogits / r) continue;
        for (int loss = 0; loss < gpu::kLossCount; ++loss)
          for_types(loss, dtypes, [&](DType student, DType teacher) {
            for (int pass = 0; pass < 3; ++pass)
              for (int variant = 0; variant < kVariantCount; ++variant)
                for (int lie = 0; lie < 4; ++lie)
                  for (bool mean : {false, true})
                    for (bool large : {false, true}) {
                      if (mean && Pass(pass) != Pass::forward_grad) continue;
                      Problem any;
                      if (large && Variant(variant) == Variant::plain) continue;
                      if (!set_params(any, loss, Variant(variant), large)) continue;
                      // Reductions have one output to reduce.
                      if (Pass(pass) == Pass::forward_grad && gpu::kLosses[loss].outputs > 1) continue;
                      sweep_one(
                          {loss, Pass(pass), student, teacher, r, n, Variant(variant), Spec::Lie(lie), mean, large},
                          device, wanted, seen, out);
                    }
          });
      }
  }
  py::dict found;
  found["calls"] = out.calls;
  found["launches"] = out.launches;
  found["refused"] = out.refused;
  found["regimes"] = out.regimes;
  found["clusters"] = out.clusters;
  found["not_possible"] = out.not_possible;
  found["wrong"] = out.wrong;
  return found;
}

}  // namespace

PYBIND11_MODULE(_fake, m) {
  m.doc() = "Launches of the CUDA kernels, checked without a device.";
  m.def(
      "add_device",
      [](int capability, int code, int multiprocessors, int shared_per_block, int shared_per_multiprocessor, int l2,
         int largest_cluster, const std::vector<int>& clusters) {
        return fake::add_device({capability, code, multiprocessors, shared_per_block, shared_per_multiprocessor, l2,
                                 largest_cluster, clusters});
      },
      py::kw_only(), py::arg("capability"), py::arg("code"), py::arg("multiprocessors"), py::arg("shared_per_block"),
      py::arg("shared_per_multiprocessor"), py::arg("l2"), py::arg("largest_cluster"), py::arg("clusters"),
      "The index of one more device.");
  m.def(
      "known_devices",
      [] {
        py::dict out;
        for (const gpu::KnownDevice& known : gpu::kDevices) out[known.name] = as_dict(known.device);
        return out;
      },
      "The planner's list of devices.");
  m.def("forget", &fake::forget, "Captures, records, errors: what a test begins without.");
  m.def("use_device", &fake::use_device, py::arg("index"), "Makes it this thread's current one.");
  m.def("break_device", &fake::break_device, py::arg("index"), py::arg("error"), "As an illegal access does.");
  m.def("kernels", &fake::kernels, "The mangled names of all kernels.");
  m.def(
      "know_kernel",
      [](const std::string& name, int registers, int shared, int most_threads) {
        fake::know_kernel(name, {registers, shared, most_threads});
      },
      py::arg("name"), py::kw_only(), py::arg("registers"), py::arg("shared"), py::arg("most_threads"),
      "What nvcc made of a kernel.");
  m.def(
      "new_stream", [](int device) { return reinterpret_cast<uintptr_t>(fake::new_stream(device)); },
      py::arg("device"));
  m.def(
      "begin_capture",
      [](uintptr_t stream, const std::string& mode) {
        fake::begin_capture(reinterpret_cast<void*>(stream),
                            fake::Mode(index_of("mode", mode, {"global", "thread_local", "relaxed"})));
      },
      py::arg("stream"), py::arg("mode") = "global");
  m.def(
      "end_capture", [](uintptr_t stream) { return fake::end_capture(reinterpret_cast<void*>(stream)); },
      py::arg("stream"), "Whether there is a graph.");
  m.def("mode", [] { return std::vector<std::string>{"global", "thread_local", "relaxed"}[int(fake::mode())]; });
  m.def(
      "launch",
      [](const std::string& kernel, int64_t blocks, int threads, size_t shared, int cluster, uintptr_t stream) {
        return fake::launch(kernel, blocks, threads, shared, cluster, reinterpret_cast<void*>(stream));
      },
      py::arg("kernel"), py::kw_only(), py::arg("blocks") = 8, py::arg("threads") = 128, py::arg("shared") = 0,
      py::arg("cluster") = 1, py::arg("stream") = 0, "An error code, for the tests of the rules themselves.");
  m.def("take_launches", [] {
    std::vector<py::dict> out;
    for (const fake::Launch& x : fake::take_launches()) out.push_back(as_dict(x));
    return out;
  });
  m.def("take_refusals", &fake::take_refusals);
  m.def("last_error", &fake::last_error, "What cudaGetLastError() says to this thread.");
  m.def("plant_error", &fake::plant_error, py::arg("function"), py::arg("error"), py::kw_only(), py::arg("calls") = 1,
        py::arg("after") = 0, "Of so many of its calls, after so many others.");
  m.def("hold", &fake::hold, py::arg("function"), "The next thread that calls it waits for release().");
  m.def("await_held", &fake::await_held, py::call_guard<py::gil_scoped_release>(),
        "Until a thread waits, or release() is called: whether one waited.");
  m.def("release", &fake::release);

  m.def(
      "device_facts",
      [] {
        gpu::Device found;
        int error;
        {
          const py::gil_scoped_release release;
          error = gpu::device_facts(found);
        }
        if (error) fail(error);
        return as_dict(found);
      },
      "What device.cu says of the current device.");
  m.def(
      "call",
      [](const std::string& loss, const std::string& pass, int64_t rows, int64_t classes, const std::string& student,
         const std::string& teacher, const std::string& variant, const std::string& lie, bool mean, uintptr_t stream,
         int64_t blocks, const std::string& override) {
        const Spec spec = {loss_of(loss),
                           Pass(index_of("pass", pass, kPasses)),
                           DType(index_of("student", student, kTypes)),
                           DType(index_of("teacher", teacher, kTypes)),
                           rows,
                           classes,
                           Variant(index_of("variant", variant, kVariants)),
                           Spec::Lie(index_of("lie", lie, kLies)),
                           mean};
        gpu::Call c = call_of(spec, reinterpret_cast<void*>(stream));
        const gpu::Override wanted = gpu::parse_override(override);
        gpu::Needs needs;
        int error;
        {
          const py::gil_scoped_release release;
          error = run(c, needs, wanted, blocks);
        }
        if (error) fail(error);
        py::dict out = gpu::as_dict(needs.plan);
        out["counter"] = reinterpret_cast<uintptr_t>(c.counter);
        out["own_counter"] = needs.counter_at >= 0;
        return out;
      },
      py::arg("loss") = "kd", py::kw_only(), py::arg("pass_") = "forward_grad", py::arg("rows") = 4096,
      py::arg("classes") = 1000, py::arg("student") = "bfloat16", py::arg("teacher") = "bfloat16",
      py::arg("variant") = "plain", py::arg("lie") = "aligned", py::arg("mean") = true, py::arg("stream") = 0,
      py::arg("blocks") = 0, py::arg("override") = "",
      "A call as the binding makes it, on the current device: its plan. An error is a RuntimeError.");
  m.def(
      "scale",
      [](const std::string& dtype, int64_t size, bool in_double) {
        const int error =
            gpu::scale({memory(0), DType(index_of("dtype", dtype, kTypes)), size, memory(1), in_double, nullptr});
        if (error) fail(error);
      },
      py::arg("dtype"), py::arg("size"), py::arg("in_double"));
  const std::vector<std::string> types(kTypes, kTypes + 4);
  m.def("sweep", &sweep, py::arg("classes"), py::arg("rows"), py::kw_only(), py::arg("large_first") = false,
        py::arg("types") = types, py::arg("override") = "",
        "Calls of all losses, passes, types and layouts, of each kernel and plan one: what went wrong.");
  m.attr("types") = types;
}
