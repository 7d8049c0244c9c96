// Compiled once per set of logit types, KD_TYPES: f32, f16, bf16, mixed (any types computed in float) or f64 (any types
// computed in double). By nvcc for GPUs, by the host compiler for the emulation.
#include "beside.cuh"
#include "cluster.cuh"
#include "resident.cuh"
#include "split.cuh"
#include "staged.cuh"
#include "strided.cuh"
#include "sweeps.cuh"
// The kernels decide first what an exponential is.
#include "run.h"

#define KD_JOIN_(a, b) a##b
#define KD_JOIN(a, b) KD_JOIN_(a, b)

KD_NAMESPACE_BEGIN

namespace cuda {
namespace {

using namespace gpu;

struct Formats {
  using f32 = Format<float>;
  using f16 = Format<F16>;
  using bf16 = Format<BF16>;
  using mixed = AnyFormat<float>;
  using f64 = AnyFormat<double>;
};

template <class Sums, class S>
Args<S> arguments(const Call& c, const Plan& plan) {
  const Problem& p = c.problem;
  Args<S> a;
  a.student = p.student;
  a.teacher = p.teacher;
  a.grad = p.grad;
  a.inner = p.inner;
  a.rows = p.rows_total();
  a.classes = static_cast<int>(p.classes);
  a.loss = Chosen<S>(p);
  a.backward = p.pass == Pass::backward;
  a.mean = c.mean;
  a.target = p.target;
  a.ignore_index = p.ignore_index;
  const auto& scales = a.loss.template scales<Sums>();  // scales_of() is for the device alone
  const double steepest = std::max<double>({scales.k, scales.k_teacher(), Sums::sums_at_one ? kLog2e : 0});
  // Finite, so that -inf and the margin make -inf.
  a.margin = static_cast<S>(std::min(1e30, 8 / steepest));
  a.narrow = !p.in_double();
  a.row_weight = p.row_weight;
  a.upstream = p.grad_rows;
  a.scale = static_cast<S>(p.scale);
  a.normalizer = c.normalizer;
  a.stats_in = a.backward ? p.stats : nullptr;
  a.stats_out = a.backward ? nullptr : p.stats;
  a.losses = p.rows;
  a.parts_out = p.parts;
  double* const doubles = static_cast<double*>(c.scratch);
  a.count_blocks = static_cast<int>(count_blocks(c, plan));
  a.counts = a.count_blocks ? doubles : nullptr;
  a.sums = doubles + a.count_blocks;
  a.sum_count = sum_count(c, plan);
  a.total = c.total;
  a.counter = c.total ? c.counter : nullptr;
  a.parts = plan.parts;
  a.part_vectors = plan.part_vectors;
  a.stage_slots = plan.stage_slots;
  a.stages = plan.stages;
  a.clusters = static_cast<int>(plan.blocks / plan.parts);
  a.split_stats = reinterpret_cast<S*>(static_cast<char*>(c.scratch) + split_stats_offset(c, plan));
  a.split_refined = a.split_stats + plan.wave * plan.parts * kStatsWidth;
  return a;
}

template <class Sums, class F>
int launch_parts(arch::Launch how, const Plan& plan, Args<typename F::S> a) {
  uint32_t* const counter = a.counter;
  for (; a.first_row < a.rows; a.first_row += plan.wave) {
    const int64_t rows = std::min(plan.wave, a.rows - a.first_row);
    a.counter = a.first_row + rows == a.rows ? counter : nullptr;
    how.blocks = rows * plan.parts;
    int error = a.backward ? 0 : arch::launch<split_stats<Sums, F>>(how, a);
    if constexpr (Sums::refined > 0)
      if (!error && !a.backward) error = arch::launch<split_refined<Sums, F>>(how, a);
    if (!a.grad.data) how.blocks = rows;
    if (!error) error = arch::launch<split_gradient<Sums, F>>(how, a);
    if (error) return error;
  }
  return 0;
}

template <class Sums, class F>
int launch_sweeps(const arch::Launch& how, const Plan& plan, const Args<typename F::S>& a) {
  if constexpr (!F::wide)
    if (plan.alike) return arch::launch<sweeps<Sums, F, false>>(how, a);
  return arch::launch<sweeps<Sums, F, true>>(how, a);
}

template <class Sums, class F>
int launch_cluster(arch::Launch how, const Plan& plan, const Args<typename F::S>& a) {
  if constexpr (sizeof(typename F::S) == 8) {
    return 1;  // the planner gives these no clusters
  } else {
    const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
    how.cluster = plan.parts;
    how.shared_bytes = ClusterScratch<Sums, typename F::S>::bytes(
        plan.parts, plan.stages, span_granules(plan.part_vectors, F::kVector, fs.size()),
        Sums::teacher ? span_granules(plan.part_vectors, F::kVector, ft.size()) : 0);
    if constexpr (!F::wide)
      if (plan.alike) return arch::launch<cluster<Sums, F, false>>(how, a);
    return arch::launch<cluster<Sums, F, true>>(how, a);
  }
}

template <class Sums, class F>
int launch(const Call& c, const Plan& plan, const Args<typename F::S>& a) {
  arch::Launch how = {plan.blocks, plan.threads, Scratch<Sums, typename F::S>::bytes(), c.stream};
  if (plan.regime == Regime::split) return launch_parts<Sums, F>(how, plan, a);
  if (plan.regime == Regime::cluster) return launch_cluster<Sums, F>(how, plan, a);
  if (plan.regime == Regime::sweeps) return launch_sweeps<Sums, F>(how, plan, a);
  if (plan.regime == Regime::strided) return arch::launch<strided<Sums, F>>(how, a);
  if constexpr (F::wide) {
    return 1;  // the planner gives these no other regime
  } else {
    if (plan.regime == Regime::block) return arch::launch<block<Sums, F>>(how, a);
    if (plan.regime == Regime::staged) {
      how.shared_bytes = (how.shared_bytes + 15) / 16 * 16 + static_cast<size_t>(plan.stage_slots) * plan.threads *
                                                                 sizeof(Granule) * (Sums::teacher ? 2 : 1);
      return arch::launch<staged<Sums, F>>(how, a);
    }
    if constexpr (Sums::held < 3)
      if (plan.lane_classes == kManyRowsClasses)
        return plan.lanes == 8 ? arch::launch<lanes<Sums, F, 8, kManyRowsClasses>>(how, a)
                               : arch::launch<lanes<Sums, F, 16, kManyRowsClasses>>(how, a);
    return plan.lanes == 8    ? arch::launch<lanes<Sums, F, 8, kFewRowsClasses>>(how, a)
           : plan.lanes == 16 ? arch::launch<lanes<Sums, F, 16, kFewRowsClasses>>(how, a)
                              : arch::launch<lanes<Sums, F, 32, kFewRowsClasses>>(how, a);
  }
}

template <class Sums, class F>
int run_one(const Call& c, const Plan& plan) {
  const Args<typename F::S> a = arguments<Sums, typename F::S>(c, plan);
  if (a.count_blocks) {
    const CountArgs count_args = {a.target, a.rows, a.ignore_index, static_cast<double*>(c.scratch)};
    constexpr int kThreads = kCountThreads;
    const arch::Launch how = {a.count_blocks, kThreads, count_bytes(), c.stream};
    if (const int error = arch::launch<count<kThreads>>(how, count_args)) return error;
  }
  return launch<Sums, F>(c, plan, a);
}

template <class F>
int run_loss(const Call& c, const Plan& plan) {
  return Losses::chosen(c.problem, [&](auto tag) { return run_one<typename decltype(tag)::type::Sums, F>(c, plan); });
}

template <class T, class S>
int launch_scale(const ScaleCall& c) {
  const ScaleArgs<S> a = {c.data, c.size, static_cast<const S*>(c.factor)};
  const int64_t blocks = ceil_div(c.size, kScaleThreads * 4 * (16 / sizeof(T)));
  return arch::launch<scale<T, S>>({std::min(blocks, kMostScaleBlocks), kScaleThreads, 0, c.stream}, a);
}

// Gradients have the type of the student, which is this set's; losses are double if the teacher alone is.
template <class T>
int scale_own(const ScaleCall& c, const Format<T>*) {
  return c.in_double ? launch_scale<T, double>(c) : launch_scale<T, float>(c);
}
template <class S>
int scale_own(const ScaleCall& c, const AnyFormat<S>*) {
  return launch_scale<double, double>(c);
}

}  // namespace
}  // namespace cuda

KD_NAMESPACE_END

namespace kd {
namespace gpu {
int KD_JOIN(run_, KD_TYPES)(const Call& c, const Plan& plan) {
  return kd::KD_ISA::cuda::run_loss<kd::KD_ISA::cuda::Formats::KD_TYPES>(c, plan);
}
int KD_JOIN(scale_, KD_TYPES)(const ScaleCall& c) {
  return kd::KD_ISA::cuda::scale_own(c, static_cast<const kd::KD_ISA::cuda::Formats::KD_TYPES*>(nullptr));
}
}  // namespace gpu
}  // namespace kd
