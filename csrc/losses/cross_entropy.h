// Cross-entropy of the student with the target, -log c at temperature 1, with label smoothing as torch's: the row term
// of tf-NKD (arXiv 2208.10139).
#pragma once

#include "../stats.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct CrossEntropy : StudentSums<kVariant> {
  using Sums = StudentSums<kVariant>;
  static constexpr const char* name = "cross_entropy";
  static constexpr int outputs = 1, param_count = 1;
  static constexpr bool needs_target = true;
  static Variant wanted(const double* params, bool) { return params[0] != 0 ? Variant::smooth : Variant::plain; }

  template <class S>
  struct Params : Scales<S> {
    S label_smoothing;
    explicit KD_FN Params(const double* p) : Scales<S>(1.0), label_smoothing(static_cast<S>(p[0])) {}
  };

  template <class V>
  static KD_FN void finish(const Params<ScalarOf<V>>& params, const typename Sums::template Stats<V>& a,
                           const Pivots<V>& pivots, V s_y, V, const V* upstream, V* loss,
                           typename Sums::template Coef<V>& coef) {
    const V relative = s_y - usable(pivots.s), sum = a.v[Sums::sum_s];
    const Split<V> p = Split<V>::of(relative, 1, sum);
    loss[0] = -p.log_p;
    coef.c[0] = upstream[0] * p.rest * inverse(sum);
    coef.y = -upstream[0] * p.rest;
    if constexpr (Sums::smooth) {
      const Smoothed<V> x = Smoothed<V>::of(p, relative, sum, a.v[Sums::count - 2], a.v[Sums::count - 1]);
      const V smoothing = Ops<V>::splat(params.label_smoothing), sharp = lit<V>(1) - smoothing;
      loss[0] = weighted(sharp, loss[0]) + weighted(smoothing, x.mean);
      coef.c[Sums::kept] = -upstream[0] * smoothing * x.each;
      coef.y = sharp * coef.y + upstream[0] * smoothing * x.at_target;
    }
  }
};

KD_NAMESPACE_END
