// A call on a GPU, from its description to launches: what the binding and the tests' emulation share.
#pragma once

#include "../losses/list.h"
#include "../stored.h"
#include "plan.h"

namespace kd {
namespace gpu {

struct Call {
  Problem problem;
  // A reduction, Pass::forward_grad: what its sum is divided by, and where it goes, in the type of the problem's
  // numbers.
  const void* normalizer = nullptr;
  bool mean = false;
  void* total = nullptr;
  void* scratch = nullptr;      // scratch_bytes(), aligned to 16
  uint32_t* counter = nullptr;  // 0 before and after the call; nobody else's meanwhile
  void* stream = nullptr;
};

// One function per set of logit types, each compiled on its own: 0, or an error code of the runtime.
int run_f32(const Call&, const Plan&);
int run_f16(const Call&, const Plan&);
int run_bf16(const Call&, const Plan&);
int run_mixed(const Call&, const Plan&);
int run_f64(const Call&, const Plan&);

// A dense gradient, multiplied in place by a number on the device of the type of the loss.
struct ScaleCall {
  void* data;
  DType dtype;
  int64_t size;
  const void* factor;
  bool in_double;  // the factor's type
  void* stream;
};
int scale_f32(const ScaleCall&);
int scale_f16(const ScaleCall&);
int scale_bf16(const ScaleCall&);
int scale_f64(const ScaleCall&);

constexpr const LossFacts* kLosses = Losses::facts;
constexpr int kLossCount = Losses::size;

// Features kept per class by a call, as registers count them.
inline int kept_by(const Problem& p) {
  return Losses::chosen(p, [](auto tag) { return decltype(tag)::type::Sums::held; });
}
// Sums of its second round.
inline int refined_by(const Problem& p) {
  return Losses::chosen(p, [](auto tag) { return decltype(tag)::type::Sums::refined; });
}

// Whether every row of two tensors begins at the same place between two 16-byte boundaries.
inline bool lie_alike(const Problem& p, const Logits& a, const Logits& b) {
  if (!b.data) return true;
  const int64_t size = bytes_of(a.dtype);
  const auto differ = [](int64_t x) { return x % 16 != 0; };
  return a.dtype == b.dtype && b.class_stride == a.class_stride &&
         !differ(reinterpret_cast<intptr_t>(a.data) - reinterpret_cast<intptr_t>(b.data)) &&
         !(p.outer > 1 && differ((a.outer_stride - b.outer_stride) * size)) &&
         !(p.inner > 1 && differ((a.inner_stride - b.inner_stride) * size));
}

inline Shape shape_of(const Problem& p) {
  const auto strided = [&](const Logits& x) { return x.data && x.class_stride != 1 && p.classes > 1; };
  const bool teacher = kLosses[p.loss].teacher;
  Shape out = {};
  out.rows = p.rows_total();
  out.classes = p.classes;
  out.wide = p.computes_in_double() || (teacher && p.teacher.dtype != p.student.dtype);
  out.vector = p.computes_in_double() ? 2 : out.wide ? 8 : static_cast<int>(16 / bytes_of(p.student.dtype));
  out.pair_bytes = static_cast<int>(bytes_of(p.student.dtype) + (teacher ? bytes_of(p.teacher.dtype) : 0));
  out.kept = kept_by(p);
  out.alike = !out.wide && lie_alike(p, p.student, p.teacher) && lie_alike(p, p.student, p.grad);
  out.strided = strided(p.student) || strided(p.teacher) || strided(p.grad);
  out.writes = p.grad.data != nullptr;
  out.pass = p.pass;
  return out;
}

// Scratch memory: counts, sums, statistics of parts and their second round's sums, in this order.
inline int64_t count_blocks(const Call& c, const Plan& plan) {
  const int64_t rows = c.problem.rows_total();
  const bool alone = plan.regime != Regime::split && rows <= kTargetsPerThread * plan.threads;
  return c.mean && !alone ? std::min(kMostCountBlocks, ceil_div(rows, 16 * kCountThreads)) : 0;
}
inline int64_t sum_count(const Call& c, const Plan& plan) {
  if (!c.total) return 0;
  const bool parts = plan.regime == Regime::split || plan.regime == Regime::cluster;  // one sum per row
  return parts ? c.problem.rows_total() : plan.blocks;
}
inline int64_t split_stats_offset(const Call& c, const Plan& plan) {
  return ceil_div((count_blocks(c, plan) + sum_count(c, plan)) * 8, 16) * 16;
}
inline int64_t scratch_bytes(const Call& c, const Plan& plan) {
  const bool parts = plan.regime == Regime::split && c.problem.pass != Pass::backward;
  const int width = kStatsWidth + (refined_by(c.problem) ? kMostRefined : 0);
  const int64_t stats = parts ? plan.wave * plan.parts * width * (c.problem.computes_in_double() ? 8 : 4) : 0;
  return split_stats_offset(c, plan) + stats;
}

inline int run(const Call& c, const Plan& plan) {
  const Problem& p = c.problem;
  if (p.computes_in_double()) return run_f64(c, plan);
  if (shape_of(p).wide) return run_mixed(c, plan);
  switch (p.student.dtype) {
    case DType::f16:
      return run_f16(c, plan);
    case DType::bf16:
      return run_bf16(c, plan);
    default:
      return run_f32(c, plan);
  }
}

inline int scale(const ScaleCall& c) {
  switch (c.dtype) {
    case DType::f64:
      return scale_f64(c);
    case DType::f16:
      return scale_f16(c);
    case DType::bf16:
      return scale_bf16(c);
    default:
      return scale_f32(c);
  }
}

}  // namespace gpu
}  // namespace kd
