// Both directions of KL: T^2 (ratio KL(q || p) + (1 - ratio) KL(p || q)), as NeMo-RL and torchtune have it.
#pragma once

#include "reverse.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct MixedKl : ReverseLoss<kVariant, true> {
  static constexpr const char* name = "mixed_kl";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 1;
  static constexpr bool needs_target = false;

  template <class S>
  struct Params : PairParams<S> {
    S ratio;
    explicit KD_FN Params(const double* p) : PairParams<S>(p), ratio(static_cast<S>(*this->own(p))) {}
  };
};

KD_NAMESPACE_END
