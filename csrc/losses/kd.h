// KD: T^2 KL(q || p), q and p the softmax of teacher and student at temperature T. Hinton et al. 2015, arXiv
// 1503.02531.
#pragma once

#include "pair.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct Kd : SplitLoss<Kd<kVariant>, kVariant> {
  static constexpr const char* name = "kd";
  static constexpr int outputs = 1, param_count = PairParams<double>::count;
  static constexpr bool needs_target = false;

  template <class S>
  using Params = PairParams<S>;

  // The chain rule of KL over (target, not target): binary KL + (1 - b) * non-target KL.
  template <class V>
  static KD_FN void combine(const Params<ScalarOf<V>>& params, const Split<V>& q, const Split<V>& p, V nckd, V& loss,
                            V& h, V& beta) {
    const V t = Ops<V>::splat(params.temperature);
    loss = t * (t * binary_kl(q, p)) + weighted(q.rest, nckd);
    h = difference(p, q);
    beta = q.rest;
  }
};

KD_NAMESPACE_END
