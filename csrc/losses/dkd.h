// DKD: T^2 (alpha TCKD + beta NCKD). Zhao et al. 2022, arXiv 2203.08679, eq. 7.
#pragma once

#include "pair.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct Dkd : SplitLoss<Dkd<kVariant>, kVariant> {
  static constexpr const char* name = "dkd";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 2;
  static constexpr bool needs_target = true;

  template <class S>
  struct Params : PairParams<S> {
    S alpha, beta;
    explicit KD_FN Params(const double* p)
        : PairParams<S>(p), alpha(static_cast<S>(this->own(p)[0])), beta(static_cast<S>(this->own(p)[1])) {}
  };

  template <class V>
  static KD_FN void combine(const Params<ScalarOf<V>>& params, const Split<V>& q, const Split<V>& p, V nckd, V& loss,
                            V& h, V& beta) {
    const V t = Ops<V>::splat(params.temperature), alpha = Ops<V>::splat(params.alpha);
    beta = Ops<V>::splat(params.beta);
    loss = weighted(alpha, t * (t * binary_kl(q, p))) + weighted(beta, nckd);
    h = weighted(alpha, difference(p, q));
  }
};

KD_NAMESPACE_END
