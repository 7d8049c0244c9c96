// NKD: -b log c at temperature 1 plus gamma T^2 times the cross-entropy of the non-target softmaxes at temperature T;
// b and c are teacher's and student's probability of the target. Yang et al., arXiv 2208.10139 and 2303.13005 (eq. 7).
#pragma once

#include "pair.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct Nkd : PairSums<kVariant, true> {
  using Sums = PairSums<kVariant, true>;
  static constexpr const char* name = "nkd";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 1;
  static constexpr bool needs_target = true;
  static constexpr bool has_temperature = true;
  static bool serves(const double* params, bool parts) { return pair_serves<kVariant>(params, parts, true); }

  template <class S>
  struct Params : PairParams<S> {
    S gamma;
    explicit KD_FN Params(const double* p)
        : PairParams<S>(p), gamma(static_cast<S>(this->own(p)[0] * this->gain_of(p))) {}
  };

  template <class V>
  static KD_FN void finish(const Params<ScalarOf<V>>& params, const Summary<Sums, V>& row, const V* upstream, V* loss,
                           typename Sums::template Coef<V>& coef) {
    const auto& a = row.stats;
    const V gamma = Ops<V>::splat(params.gamma), kd_weight = Ops<V>::splat(params.kd_weight);
    const V sum_s = a.v[Sums::sum_s], sum_t = a.v[Sums::sum_t];
    const V inverse_s = inverse(sum_s), inverse_t = inverse(sum_t);
    const V rest =
        weighted(gamma, non_target<V>(params.temperature, sum_s, sum_t, a.v[Sums::mean_x] * inverse_t, lit<V>(0)));
    loss[0] = weighted(kd_weight, rest);
    pair_gradient<V>(params.temperature, inverse_s, inverse_t, lit<V>(0), gamma, upstream[0] * kd_weight, coef);
    const Split<V> q = Split<V>::of(row.relative_t(), 1, a.v[Sums::sums_at_one ? Sums::sum_t1 : Sums::sum_t]);
    // The target term is cross-entropy weighted by the teacher's confidence; extra cross-entropy joins it for free.
    [[maybe_unused]] const V surprise =
        add_cross_entropy<Sums, true>(params, kd_weight * q.p, a, row.relative_s(), upstream[0], loss, coef);
    if constexpr (Sums::smooth) loss[1] = rest + weighted(q.p, surprise);
  }
};

KD_NAMESPACE_END
