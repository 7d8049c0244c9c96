// KL in either direction: the sums of reverse KL, KL(p || q) of student p and teacher q, alone or beside forward KL.
//
// Reverse KL is averaged over the student, so its features are e_s and e_s x, where x = t - s, times kShare: classes
// that the teacher alone masks by the lowest number of float do not overflow the sum. A class that the teacher has at
// -inf and the student has not is lost: it makes the loss infinite, and counts as log(p / q) = 0 in the gradient. It is
// told by the sign of its first feature, -e_s, and summed apart.
#pragma once

#include "pair.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant, bool kForward>
struct ReverseSums : Kept<2 + kForward + (kVariant == Variant::smooth), kVariant> {
 private:
  using Base = Kept<2 + kForward + (kVariant == Variant::smooth), kVariant>;
  static constexpr bool kSmooth = Base::smooth;
  // More than no class has: a lost class stays lost when its mass underflows.
  static constexpr double kLeast = 1e-37;

 public:
  static constexpr bool teacher = true, has_parts = kSmooth, sums_at_one = kSmooth, loses = true;
  template <class S>
  using Scales = kd::Scales<S>;
  static constexpr int held = Base::kept + 1;  // one sum and one coefficient more than features tell of
  static constexpr int count = 4 + kForward + (kSmooth ? 3 : 0);
  // alive: of e_s over the classes that are not lost; lost: over those that are. mean_r: of e_s x, mean_x: of e_t x.
  enum { sum_s, sum_t, lost, mean_r, mean_x, sum_s1 = 4 + kForward };
  enum { at_student, at_difference, at_teacher };  // features
  static constexpr int at_one = kSmooth ? sum_s1 : sum_s, kept_at_one = kSmooth ? Base::kept - 1 : at_student;
  static constexpr int coefs = Base::coefs + 1, at_lost = Base::coefs;

  template <class V>
  struct Coef {
    V c[coefs];
    V y;
  };
  template <class V>
  struct Exps {
    V e[Base::kept];
    V es, et, x, ds;
  };
  template <class V>
  struct Stats {
    V v[count];
  };

  template <class V>
  static KD_FN Exps<V> exps(const Scales<ScalarOf<V>>& scales, V ds, V dt) {
    const V none = -infinity<V>(), zero = lit<V>(0);
    Exps<V> out;
    out.es = Ops<V>::exp2(ds * scales.k);
    out.et = Ops<V>::exp2(dt * scales.k);
    out.ds = ds;
    const auto lacking = dt == none;
    out.x = dt - ds;
    // -0.0 of a class at -inf in both is as good as 0.
    out.e[at_student] = select(lacking, -out.es, out.es);
    out.e[at_difference] = out.es * (select(lacking, zero, select(ds == none, zero, out.x)) * lit<V>(kShare));
    if constexpr (kForward) out.e[at_teacher] = out.et;
    if constexpr (kSmooth) out.e[kept_at_one] = Base::marked(Ops<V>::exp2(ds * lit<V>(kLog2e)), ds);
    return out;
  }

  template <class V>
  static KD_FN void add(Stats<V>& a, const Exps<V>& x) {
    const V zero = lit<V>(0);
    const auto lacking = Ops<V>::negative(x.e[at_student]);
    a.v[sum_s] += select(lacking, zero, x.es);
    a.v[sum_t] += x.et;
    a.v[lost] += select(lacking, select(x.ds == -infinity<V>(), zero, x.es + lit<V>(kLeast)), zero);
    a.v[mean_r] += x.e[at_difference];
    if constexpr (kForward) a.v[mean_x] = x.et * select(x.et > zero, x.x, zero) + a.v[mean_x];
    if constexpr (kSmooth) {
      a.v[sum_s1] += x.e[kept_at_one];
      Base::count(a.v, x.ds);
    }
  }

  template <class V>
  static KD_FN Stats<V> moved_to(const Scales<ScalarOf<V>>& scales, const Stats<V>& a, const Pivots<V>& from,
                                 const Pivots<V>& to) {
    const V ds = moved(from.s, to.s), dt = moved(from.t, to.t), zero = lit<V>(0);
    const V fs = Ops<V>::exp2(ds * scales.k), ft = Ops<V>::exp2(dt * scales.k);
    Stats<V> out;
    out.v[sum_s] = a.v[sum_s] * fs;
    out.v[sum_t] = a.v[sum_t] * ft;
    out.v[lost] = a.v[lost] * fs + select(a.v[lost] > zero, lit<V>(kLeast), zero);
    out.v[mean_r] = weighted(fs, a.v[mean_r] + weighted(a.v[sum_s], (dt - ds) * lit<V>(kShare)));
    if constexpr (kForward) out.v[mean_x] = weighted(ft, a.v[mean_x] + weighted(a.v[sum_t], dt - ds));
    if constexpr (kSmooth) out.v[sum_s1] = a.v[sum_s1] * Ops<V>::exp2(ds * lit<V>(kLog2e));
    Base::move_counted(out.v, a.v, ds);
    return out;
  }

  // e_s of the row is f e_s of the part, and e_s x is f (e_s x + shift e_s).
  template <class V, class Coef>
  static KD_FN void rebase(const Scales<ScalarOf<V>>& scales, Coef& coef, const Pivots<V>& row, const Pivots<V>& part) {
    const V ds = moved(part.s, row.s), dt = moved(part.t, row.t), fs = Ops<V>::exp2(ds * scales.k);
    coef.c[at_student] = weighted(fs, coef.c[at_student] + weighted(coef.c[at_difference], (dt - ds) * lit<V>(kShare)));
    coef.c[at_difference] *= fs;
    coef.c[at_lost] *= fs;
    if constexpr (kForward) coef.c[at_teacher] *= Ops<V>::exp2(dt * scales.k);
    if constexpr (kSmooth) coef.c[kept_at_one] *= Ops<V>::exp2(ds * lit<V>(kLog2e));
  }

  template <class V>
  static KD_FN V gradient(const V (&e)[Base::kept], const V (&c)[coefs]) {
    V sum = select(Ops<V>::negative(e[at_student]), c[at_lost], c[at_student]) * e[at_student];
    for (int i = 1; i < Base::kept; ++i) sum = c[i] * e[i] + sum;
    if constexpr (kSmooth) sum += select(Ops<V>::negative(e[kept_at_one]), lit<V>(0), c[Base::kept]);
    return sum;
  }
};

// T^2 (ratio KL(q || p) + (1 - ratio) KL(p || q)); without kForward the ratio is 0.
template <Variant kVariant, bool kForward>
struct ReverseLoss : ReverseSums<kVariant, kForward> {
  using Sums = ReverseSums<kVariant, kForward>;
  static constexpr bool has_temperature = true;
  static bool serves(const double* params, bool parts) { return pair_serves<kVariant, false>(params, parts); }

  template <class Params, class V>
  static KD_FN void finish(const Params& params, const Summary<Sums, V>& row, const V* upstream, V* loss,
                           typename Sums::template Coef<V>& coef) {
    const auto& a = row.stats;
    const V zero = lit<V>(0), none = -infinity<V>(), t = Ops<V>::splat(params.temperature);
    const V weight = Ops<V>::splat(params.gained);
    const V relative = row.relative_s();
    const V alive = a.v[Sums::sum_s], lost = a.v[Sums::lost], sum_t = a.v[Sums::sum_t], sum_s = alive + lost;
    const V inverse_s = inverse(sum_s), share = alive * inverse_s;
    const Split<V> p = Split<V>::of(relative, params.temperature, sum_s);
    const Split<V> q = Split<V>::of(row.relative_t(), params.temperature, sum_t);

    // log(p / q): of the other classes alive log((1 - c) / (1 - b)) plus that of the softmaxes among them, whose mean
    // is `mean`; of the target `at_y`, 0 where it is lost. `base` is what the sums have in it.
    const auto any = alive > zero;
    const auto lost_y = select(row.t_y == none, row.s_y, none) > none;
    const V rest = select(any, p.log_rest - q.log_rest, zero);
    const V base = select(any, Ops<V>::log(sum_t) - Ops<V>::log(sum_s), zero);
    const V mean = select(any, base - a.v[Sums::mean_r] * inverse(alive) * (lit<V>(1 / kShare) / t), zero);
    const V at_y = select(p.p == zero, zero, select(lost_y, zero, p.log_p - q.log_p));
    const V all = weighted(p.p, at_y) + weighted(p.rest, share * (rest + mean));
    V value = t * (t * all);
    value = select(lost > zero, infinity<V>(), select(lost_y, infinity<V>(), value));

    // Of another class T p (log(p / q) - all), the constants in it put together so that nothing cancels near the
    // target; of the target T c (1 - c) (at_y - share (rest + mean)).
    const V others = p.p * (rest - at_y) + p.rest * (lost * inverse_s * rest - share * mean);
    const V g = upstream[0] * weight, per = p.rest * inverse_s;
    V reverse = lit<V>(1), distillation = value;
    if constexpr (kForward) {
      const V forward = Ops<V>::splat(params.ratio), inverse_t = inverse(sum_t);
      reverse = lit<V>(1) - forward;
      const V nckd = non_target<V>(params.temperature, sum_s, sum_t, a.v[Sums::mean_x] * inverse_t, Ops<V>::log(sum_t));
      distillation = weighted(forward, t * (t * binary_kl(q, p)) + weighted(q.rest, nckd)) + weighted(reverse, value);
    }
    const V slope = reverse * g;
    for (V& c : coef.c) c = zero;
    // Where they count for nothing they may be infinite.
    coef.c[Sums::at_student] = weighted(slope * t * per, base + others);
    coef.c[Sums::at_difference] = -slope * per * lit<V>(1 / kShare);
    coef.c[Sums::at_lost] = weighted(slope * t * per, all);  // of -e_s
    coef.y = weighted(slope * t * p.p * p.rest, at_y - share * (rest + mean));
    if constexpr (kForward) {
      const V forward = Ops<V>::splat(params.ratio) * g * t, h = difference(p, q);
      const V beta = select(sum_t == zero, zero, q.rest);
      const V at_student = forward * (beta - h) * inverse_s;
      coef.c[Sums::at_student] += at_student;
      coef.c[Sums::at_lost] -= at_student;
      coef.c[Sums::at_teacher] = -forward * beta * inverse(sum_t);
      coef.y += forward * h;
    }
    loss[0] = weighted(weight, distillation);
    if constexpr (Sums::smooth) {
      loss[1] = distillation * Ops<V>::splat(params.gain);
      add_cross_entropy<Sums, false>(params, zero, a, relative, upstream[0], loss, coef);
    }
  }
};

KD_NAMESPACE_END
