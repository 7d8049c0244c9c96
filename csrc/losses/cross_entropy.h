// Cross-entropy of the student with the target, -log c at temperature 1: the row term of tf-NKD (arXiv 2208.10139).
#pragma once

#include "../stats.h"

KD_NAMESPACE_BEGIN

struct CrossEntropy : StudentSums {
  using Sums = StudentSums;
  static constexpr int outputs = 1;

  template <class S>
  struct Params : Scales<S> {
    explicit KD_FN Params(const double*) : Scales<S>(1.0) {}
  };

  template <class V>
  static KD_FN void finish(const Params<ScalarOf<V>>&, const Stats<V>& a, const Pivots<V>& pivots, V s_y, V,
                           const V* upstream, V* loss, Coef<V>& coef) {
    const Split<V> p = Split<V>::of(s_y - usable(pivots.s), 1, a.v[sum_s]);
    loss[0] = -p.log_p;
    coef.c[0] = upstream[0] * p.rest * inverse(a.v[sum_s]);
    coef.y = -upstream[0] * p.rest;
  }
};

KD_NAMESPACE_END
