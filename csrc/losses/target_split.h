// The target/non-target decomposition of one set of logits at temperature T: log p_y, log(1 - p_y) and the logsumexp of
// the other classes. What DKD and NKD are built on, as an op of its own.
#pragma once

#include "../stats.h"

KD_NAMESPACE_BEGIN

struct TargetSplit : StudentSums<Variant::plain> {
  using Sums = StudentSums<Variant::plain>;
  static constexpr const char* name = "target_split";
  static constexpr int outputs = 3, param_count = 1;
  static constexpr bool needs_target = true, has_temperature = true;

  template <class S>
  struct Params : Scales<S> {
    explicit KD_FN Params(const double* p) : Scales<S>(p[0]) {}
  };

  template <class V>
  static KD_FN void finish(const Params<ScalarOf<V>>& params, const Summary<Sums, V>& row, const V* upstream, V* out,
                           Coef<V>& coef) {
    const V sum = row.stats.v[sum_s];
    const V per_t = Ops<V>::splat(1 / params.temperature);
    const Split<V> p = Split<V>::of(row.relative_s(), params.temperature, sum);
    out[0] = p.log_p;
    out[1] = p.log_rest;
    out[2] = usable(row.pivots.s) * per_t + Ops<V>::log(sum);
    // d/d u_i of the three: -(1 - p) ph_i, p ph_i, ph_i; of the target: 1 - p, -p, 0.
    const V h = upstream[0] * p.rest - upstream[1] * p.p;
    coef.c[0] = (upstream[2] - h) * per_t * inverse(sum);
    coef.y = h * per_t;
  }
};

KD_NAMESPACE_END
