// Reverse KL: T^2 KL(p || q), p and q the softmax of student and teacher at temperature T. Gu et al. 2023, arXiv
// 2306.08543.
#pragma once

#include "reverse.h"

KD_NAMESPACE_BEGIN

template <Variant kVariant>
struct ReverseKl : ReverseLoss<kVariant, false> {
  static constexpr const char* name = "reverse_kl";
  static constexpr int outputs = 1, param_count = PairParams<double>::count;
  static constexpr bool needs_target = false;

  template <class S>
  using Params = PairParams<S>;
};

KD_NAMESPACE_END
