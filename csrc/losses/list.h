// The one list of losses: an include, and KD_LOSS(name in Python, its variants).
#pragma once

#include "aekt.h"
#include "cross_entropy.h"
#include "dkd.h"
#include "kd.h"
#include "nkd.h"
#include "target_split.h"

KD_NAMESPACE_BEGIN

template <class Loss>
struct Tag {
  using type = Loss;
};

// A loss, built once for every variant that its calls may want; the plain one first.
template <class Plain, class... Others>
struct Variants {
  static constexpr int outputs = Plain::outputs;
  static constexpr bool teacher = Plain::Sums::teacher;
  static constexpr bool has(Variant x) { return Plain::variant == x || ((Others::variant == x) || ...); }

  // What use(Tag<Loss>()) makes of the one that a call with these parameters wants; parts: whether it asks for them.
  template <class Use>
  static auto chosen(const double* params, bool parts, Use use) {
    return pick<Plain, Others...>(Plain::wanted(params, parts), use);
  }

 private:
  template <class Loss, class... Rest, class Use>
  static auto pick(Variant wanted, Use use) {
    if constexpr (sizeof...(Rest) > 0)
      if (wanted != Loss::variant) return pick<Rest...>(wanted, use);
    return use(Tag<Loss>());
  }
};
template <template <Variant> class Loss>
using PairVariants = Variants<Loss<Variant::plain>, Loss<Variant::two>, Loss<Variant::smooth>>;

KD_NAMESPACE_END

#define KD_LOSSES(KD_LOSS)                                                                      \
  KD_LOSS(kd, PairVariants<Kd>)                                                                 \
  KD_LOSS(dkd, PairVariants<Dkd>)                                                               \
  KD_LOSS(nkd, PairVariants<Nkd>)                                                               \
  KD_LOSS(aekt, PairVariants<Aekt>)                                                             \
  KD_LOSS(cross_entropy, Variants<CrossEntropy<Variant::plain>, CrossEntropy<Variant::smooth>>) \
  KD_LOSS(target_split, Variants<TargetSplit>)

// What is known of each without its code: LossFacts.
#define KD_FACTS(name, ...)                                                           \
  {#name, __VA_ARGS__::outputs, __VA_ARGS__::teacher, __VA_ARGS__::has(Variant::two), \
   __VA_ARGS__::has(Variant::smooth)},
