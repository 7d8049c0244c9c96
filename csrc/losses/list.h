// The one list of losses: an include, and a place in `Losses`.
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
  static constexpr bool has(Variant x) { return Plain::variant == x || ((Others::variant == x) || ...); }
  static_assert(Plain::param_count <= kMaxParams, "a call has room for so many");
  static constexpr LossFacts facts = {Plain::name,         Plain::outputs,    Plain::param_count,  Plain::Sums::teacher,
                                      Plain::needs_target, has(Variant::two), has(Variant::smooth)};

  // What use(Tag<Loss>()) makes of the one that the call wants.
  template <class Use>
  static auto chosen(const Problem& p, Use use) {
    return pick<Plain, Others...>(Plain::wanted(p.params, p.parts != nullptr), use);
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

// Losses, each with its variants. The place of one in the list is its number.
template <class... Entries>
struct List {
  static constexpr int size = sizeof...(Entries);
  static constexpr LossFacts facts[] = {Entries::facts...};

  // What use(Tag<Loss>()) makes of the loss and variant that the call wants.
  template <class Use>
  static auto chosen(const Problem& p, Use use) {
    return pick<Entries...>(p.loss, p, use);
  }

 private:
  template <class Entry, class... Rest, class Use>
  static auto pick(int number, const Problem& p, Use use) {
    if constexpr (sizeof...(Rest) > 0)
      if (number > 0) return pick<Rest...>(number - 1, p, use);
    return Entry::chosen(p, use);
  }
};

using Losses = List<PairVariants<Kd>, PairVariants<Dkd>, PairVariants<Nkd>, PairVariants<Aekt>,
                    Variants<CrossEntropy<Variant::plain>, CrossEntropy<Variant::smooth>>, Variants<TargetSplit>>;

KD_NAMESPACE_END
