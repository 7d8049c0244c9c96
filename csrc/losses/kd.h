// KD: T^2 KL(q || p), q and p the softmax of teacher and student at temperature T. Hinton et al. 2015, arXiv
// 1503.02531.
#pragma once

#include "pair.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct Kd : SplitLoss<Kd<kVariant>, kVariant> {
  static constexpr const char* name = "kd";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 1;
  static constexpr bool needs_target = false;
  static bool serves(const double* p, bool parts) {
    const double of_teacher = *PairParams<double>::own(p);
    return pair_serves<kVariant>(p, parts || (PairSums<kVariant, false>::apart && p[2] != 0)) &&
           PairSums<kVariant, false>::apart == (of_teacher != p[0]);
  }

  // Its own parameter is the teacher's temperature.
  template <class S>
  struct Params : PairParams<S, typename PairSums<kVariant, false>::template Scales<S>> {
    using Base = PairParams<S, typename PairSums<kVariant, false>::template Scales<S>>;
    explicit KD_FN Params(const double* p) : Base(p, scales_of(p)) {}

   private:
    static KD_FN auto scales_of(const double* p) {
      if constexpr (PairSums<kVariant, false>::apart)
        return ApartScales<S>(p[0], *Base::own(p));
      else
        return Scales<S>(p[0]);
    }
  };

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
