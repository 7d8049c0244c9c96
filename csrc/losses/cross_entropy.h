// Cross-entropy of the student with the target, -log c at temperature 1, with label smoothing as torch's, plus z_weight
// times the square of the logsumexp (the z-loss of PaLM, arXiv 2204.02311). The row term of tf-NKD (arXiv 2208.10139).
#pragma once

#include "../stats.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct CrossEntropy : StudentSums<kVariant> {
  using Sums = StudentSums<kVariant>;
  static constexpr const char* name = "cross_entropy";
  static constexpr int outputs = 1, param_count = 2;
  static constexpr bool needs_target = true, has_temperature = false;
  static bool serves(const double* params, bool) { return !Sums::smooth || params[0] != 0; }

  template <class S>
  struct Params : Scales<S> {
    S label_smoothing, z_weight;
    explicit KD_FN Params(const double* p)
        : Scales<S>(1.0), label_smoothing(static_cast<S>(p[0])), z_weight(static_cast<S>(p[1])) {}
  };

  template <class V>
  static KD_FN void finish(const Params<ScalarOf<V>>& params, const Summary<Sums, V>& row, const V* upstream, V* loss,
                           typename Sums::template Coef<V>& coef) {
    const auto& a = row.stats;
    const V relative = row.relative_s(), sum = a.v[Sums::sum_s];
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
    if (params.z_weight != 0) {
      // By the target itself where its probability is not small: the pivot of the others may be far below.
      const V z = Ops<V>::splat(params.z_weight),
              total = select(p.p > lit<V>(.5), row.s_y - p.log_p, Ops<V>::log(sum) - p.log_rest + usable(row.pivots.s));
      const V slope = upstream[0] * (lit<V>(2) * z * total);
      loss[0] += z * (total * total);
      coef.c[0] += slope * p.rest * inverse(sum);
      coef.y += slope * p.p;
    }
  }
};

KD_NAMESPACE_END
