// What the losses between student and teacher share. Every one of them has the gradient
//
//   target:  T H            others:  T [ (beta - H) ph_i - beta qh_i ]
//
// with ph, qh the softmax over the non-target classes of student and teacher and two scalars per row: H and beta.
// A loss brings its value, H and beta; cross-entropy at temperature 1 comes on top (add_cross_entropy).
#pragma once

#include "../stats.h"

KD_NAMESPACE_BEGIN

// Writes the coefficients of the gradient above, times the upstream gradient. Where the teacher has no mass on other
// classes (inverse_t is 0) nothing is learned about them: beta does not count.
template <class V, class Coef>
KD_FN void pair_gradient(ScalarOf<V> temperature, V inverse_s, V inverse_t, V h, V beta, V upstream, Coef& coef) {
  const V t = upstream * Ops<V>::splat(temperature);
  beta = select(inverse_t == lit<V>(0), lit<V>(0), beta);
  coef.c[0] = t * (beta - h) * inverse_s;
  coef.c[1] = -t * beta * inverse_t;
  coef.y = t * h;
  for (int i = 2; i < static_cast<int>(sizeof(coef.c) / sizeof(V)); ++i) coef.c[i] = lit<V>(0);
}

// What the parameters of every pair loss begin with, in the order of its reference; its own come after them.
template <class S, class Scales = Scales<S>>
struct PairParams : Scales {
  static constexpr int count = 5;
  S kd_weight, ce_weight, label_smoothing;
  // Distillations come times T^2; without t_squared that is taken back. gained: kd_weight * gain.
  S gain, gained;
  explicit KD_FN PairParams(const double* p) : PairParams(p, Scales(p[0])) {}
  KD_FN PairParams(const double* p, const Scales& scales)
      : Scales(scales),
        kd_weight(static_cast<S>(p[1])),
        ce_weight(static_cast<S>(p[2])),
        label_smoothing(static_cast<S>(p[3])),
        gain(static_cast<S>(gain_of(p))),
        gained(static_cast<S>(p[1] * gain_of(p))) {}
  static KD_FN double gain_of(const double* p) { return p[4] != 0 ? 1 : 1 / (p[0] * p[0]); }
  static KD_FN const double* own(const double* p) { return p + count; }
};

// Whether a variant of a pair loss serves a call; any does more than a plain one. always_at_one: the loss itself has a
// term at temperature 1. Where there is no `at_one`, `smooth` has its sums.
template <Variant kVariant, bool kHasAtOne = true>
bool pair_serves(const double* p, bool parts, bool always_at_one = false) {
  const bool ce = p[2] != 0;
  switch (kVariant) {
    case Variant::at_one:
      return p[0] != 1 && (always_at_one || ce);
    case Variant::smooth:
    case Variant::apart_smooth:
      return parts || (kHasAtOne ? ce && p[3] != 0 : ce);
    default:
      return true;
  }
}

// ce_weight * CE(student, target) at temperature 1, and `own` * -log p_y of a loss that has such a term itself, on top
// of a loss and its coefficients; and the CE as a part. Returns -log p_y. relative: the target's logit minus the pivot.
template <class Sums, bool kOwn, class V, class Params, class Stats, class Coef>
KD_FN V add_cross_entropy(const Params& params, V own, const Stats& a, V relative, V upstream, V* loss, Coef& coef) {
  const V sum = a.v[Sums::at_one], ce_weight = Ops<V>::splat(params.ce_weight);
  const Split<V> p = Split<V>::of(relative, 1, sum);
  V weight = kOwn ? own + ce_weight : ce_weight, both = weight;
  if constexpr (Sums::smooth) {
    const Smoothed<V> x = Smoothed<V>::of(p, relative, sum, a.v[Sums::count - 2], a.v[Sums::count - 1]);
    const V smoothing = Ops<V>::splat(params.label_smoothing), sharp = lit<V>(1) - smoothing;
    weight = own + ce_weight * sharp;
    const V spread = ce_weight * smoothing;
    both = weight + spread;
    loss[2] = weighted(sharp, -p.log_p) + weighted(smoothing, x.mean);
    loss[0] += weighted(spread, x.mean);
    coef.c[Sums::kept] = -upstream * spread * x.each;
    coef.y += upstream * spread * x.at_target;
  }
  loss[0] += weighted(weight, -p.log_p);
  coef.c[Sums::kept_at_one] += upstream * both * p.rest * inverse(sum);
  coef.y -= upstream * weight * p.rest;
  return -p.log_p;
}

// A loss made of the target's probabilities (b teacher, c student) and of NCKD, the KL of the non-target softmaxes:
// Loss::combine gives value, H and beta. Cross-entropy at T = 1 is added when asked for.
template <class Loss, Variant kVariant>
struct SplitLoss : PairSums<kVariant, false> {
  using Sums = PairSums<kVariant, false>;
  static constexpr bool has_temperature = true;
  static bool serves(const double* params, bool parts) { return pair_serves<kVariant>(params, parts); }

  template <class Params, class V>
  static KD_FN void finish(const Params& params, const Summary<Sums, V>& row, const V* upstream, V* loss,
                           typename Sums::template Coef<V>& coef) {
    const auto& a = row.stats;
    const V relative = row.relative_s(), sum_s = a.v[Sums::sum_s], sum_t = a.v[Sums::sum_t];
    const V inverse_s = inverse(sum_s), inverse_t = inverse(sum_t);
    const Split<V> p = Split<V>::of(relative, params.temperature, sum_s);
    const Split<V> q = Split<V>::of(row.relative_t(), params.of_teacher(), sum_t);
    const V nckd = non_target<V>(params.temperature, sum_s, sum_t, a.v[Sums::mean_x] * inverse_t, Ops<V>::log(sum_t));
    const V weight = Ops<V>::splat(params.gained);
    V distillation, h, beta;
    Loss::combine(params, q, p, nckd, distillation, h, beta);  // nckd comes times T^2
    loss[0] = weighted(weight, distillation);
    if constexpr (Sums::smooth) loss[1] = distillation * Ops<V>::splat(params.gain);
    pair_gradient<V>(params.temperature, inverse_s, inverse_t, h, beta, upstream[0] * weight, coef);
    if (Sums::smooth || params.ce_weight != 0)
      add_cross_entropy<Sums, false>(params, lit<V>(0), a, relative, upstream[0], loss, coef);
  }
};

KD_NAMESPACE_END
