// AEKT: T^2 (alpha phi + beta NCKD), phi a term on the target's probability. Park & Lee 2024, arXiv 2409.01679: the
// preprint is public, but its full text was not available when this was built. The forms of phi are ours, derived from
// a published summary of it: confidence is learned adaptively, by the ratio r = b / c of teacher's and student's.
//
// The forms differ in phi and in one scalar per row, H = (1 - c) d phi / d log c, and share everything else with DKD.
#pragma once

#include "pair.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct Aekt : SplitLoss<Aekt<kVariant>, kVariant> {
  static constexpr const char* name = "aekt";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 4;
  static constexpr bool needs_target = true;

  enum Form {  // in the order of kdkernels.reference.AEKT_VARIANTS
    kRatioWeightedTckd,
    kRatioWeightedCe,
    kConfidenceWeightedCe,
    kRatioDivergence,
    kRatioCoupledTckd,
  };

  template <class S>
  struct Params : PairParams<S> {
    S alpha, beta;
    int variant;
    S log_ratio_max;
    explicit KD_FN Params(const double* p)
        : PairParams<S>(p),
          alpha(static_cast<S>(this->own(p)[0])),
          beta(static_cast<S>(this->own(p)[1])),
          variant(static_cast<int>(this->own(p)[2])),
          log_ratio_max(static_cast<S>(this->own(p)[3])) {}
  };

  // phi and H of the target term. q is the teacher's split (b), p the student's (c).
  template <class V>
  static KD_FN void target_term(const Params<ScalarOf<V>>& params, const Split<V>& q, const Split<V>& p, V& phi, V& h) {
    const V zero = lit<V>(0), one = lit<V>(1), bound = Ops<V>::splat(params.log_ratio_max);
    // A target masked in both, probability 0 against 0, counts as equal.
    const auto masked = select(q.log_p == -infinity<V>(), p.log_p, zero) == -infinity<V>();
    const V log_ratio = select(masked, zero, q.log_p - p.log_p), clamped = min_of(log_ratio, bound),
            ratio = Ops<V>::exp(clamped);
    const V tckd = binary_kl(q, p), d = difference(p, q);
    switch (params.variant) {
      case kRatioWeightedTckd:
        phi = weighted(ratio, tckd);
        h = ratio * d;
        break;
      case kRatioWeightedCe:
        phi = weighted(select(masked, zero, ratio), -p.log_p);
        h = -select(masked, zero, ratio) * p.rest;
        break;
      case kConfidenceWeightedCe:
        phi = weighted(q.p, -p.log_p);
        h = -q.p * p.rest;
        break;
      case kRatioDivergence:
        // Beyond the bound the ratio stands still and phi goes on linearly in log r, with the slope it has there.
        phi = ratio - clamped - one + select(log_ratio > bound, (ratio - one) * (log_ratio - bound), zero);
        h = (one - ratio) * p.rest;
        break;
      default:  // kRatioCoupledTckd
        phi = weighted(ratio, tckd);
        h = ratio * d - select(log_ratio < bound, ratio * weighted(p.rest, tckd), zero);
        break;
    }
  }

  template <class V>
  static KD_FN void combine(const Params<ScalarOf<V>>& params, const Split<V>& q, const Split<V>& p, V nckd, V& loss,
                            V& h, V& beta) {
    const V t = Ops<V>::splat(params.temperature), alpha = Ops<V>::splat(params.alpha);
    beta = Ops<V>::splat(params.beta);
    V phi;
    target_term(params, q, p, phi, h);
    loss = weighted(alpha, t * (t * phi)) + weighted(beta, nckd);
    h = weighted(alpha, h);
  }
};

KD_NAMESPACE_END
