// The one list of losses: an include, and a place in `Losses`.
#pragma once

#include <new>
#include <type_traits>
#include <utility>

#include "ab.h"
#include "aekt.h"
#include "cross_entropy.h"
#include "dkd.h"
#include "kd.h"
#include "mixed_kl.h"
#include "nkd.h"
#include "reverse_kl.h"
#include "score.h"
#include "target_split.h"

KD_NAMESPACE_BEGIN

template <class Loss>
struct Tag {
  using type = Loss;
};

// A loss `As` which another one is computed, from what that one's own parameters become there: numbers(own, to). Else
// the loss itself.
template <class Loss, class = void>
struct ComputedAs {
  using type = Loss;
};
template <class Loss>
struct ComputedAs<Loss, std::void_t<typename Loss::As>> {
  using type = typename Loss::As;
};
template <class Loss>
using As = typename ComputedAs<Loss>::type;

// A loss, built for every kind of call that it has: the plain one first, then those that serve what it does not. A call
// is taken by the last one that serves it.
template <class Plain, class... Others>
struct Variants {
  static_assert(Plain::param_count <= kMaxParams, "a call has room for so many");
  static constexpr LossFacts facts = {Plain::name,
                                      Plain::outputs,
                                      Plain::param_count,
                                      Plain::Sums::teacher,
                                      Plain::needs_target,
                                      Plain::has_temperature,
                                      (Plain::Sums::has_parts || ... || Others::Sums::has_parts)};

  // What use(Tag<Loss>()) makes of the one that takes the call.
  template <class Use>
  static auto chosen(const Problem& p, Use use) {
    return pick<Plain, Others...>(p, use);
  }
  // Whether one of them is computed as this loss.
  template <class Loss>
  static constexpr bool computed_as = (std::is_same_v<As<Plain>, Loss> || ... || std::is_same_v<As<Others>, Loss>);

 private:
  template <class Loss, class... Rest, class Use>
  static auto pick(const Problem& p, Use use) {
    if constexpr (sizeof...(Rest) > 0)
      if ((Rest::serves(p.params, p.parts != nullptr) || ...)) return pick<Rest...>(p, use);
    return use(Tag<Loss>());
  }
};
template <template <Variant> class Loss, Variant... kMore>
using Of = Variants<Loss<Variant::plain>, Loss<kMore>...>;
// Mixtures, and what they are where they are one of the two.
template <template <Variant> class Loss>
using OfMixture = Variants<Loss<Variant::plain>, Loss<Variant::smooth>, AtAnEnd<Loss<Variant::plain>, Variant::plain>,
                           AtAnEnd<Loss<Variant::smooth>, Variant::smooth>>;

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
  // The first entry with a variant that is computed so.
  template <class Loss>
  static constexpr int first() {
    int at = 0, found = -1;
    ((found = found < 0 && Entries::template computed_as<Loss> ? at : found, ++at), ...);
    return found;
  }

 private:
  template <class Entry, class... Rest, class Use>
  static auto pick(int number, const Problem& p, Use use) {
    if constexpr (sizeof...(Rest) > 0)
      if (number > 0) return pick<Rest...>(number - 1, p, use);
    return Entry::chosen(p, use);
  }
};

using Losses =
    List<Of<Kd, Variant::at_one, Variant::smooth, Variant::apart, Variant::apart_smooth>,
         Of<Dkd, Variant::at_one, Variant::smooth>, Of<Nkd, Variant::at_one, Variant::smooth>,
         Of<Aekt, Variant::at_one, Variant::smooth>, Of<ReverseKl, Variant::smooth>, Of<MixedKl, Variant::smooth>,
         Of<Tvd, Variant::smooth>, OfMixture<Jsd>, OfMixture<SkewKl>, OfMixture<SkewReverseKl>, Of<Ab, Variant::smooth>,
         Of<CrossEntropy, Variant::smooth>, Variants<TargetSplit>>;

// The loss of a call and its parameters: its sums are known to the compiler, which loss it is only at run time. So
// losses that sum alike share their kernels, and those that are computed alike their code.
template <class S>
class Chosen {
 public:
  int outputs = 1;

  Chosen() = default;
  explicit Chosen(const Problem& p) : outputs(Losses::facts[p.loss].outputs) {
    Losses::chosen(p, [&](auto tag) {
      using Loss = typename decltype(tag)::type;
      using Params = typename As<Loss>::template Params<S>;
      using OwnScales = typename Loss::Sums::template Scales<S>;
      static_assert(sizeof(Params) <= kRoom, "room for every loss's parameters");
      static_assert(std::is_trivially_copyable_v<Params>, "they are copied to the device");
      static_assert(std::is_base_of_v<OwnScales, Params>, "they begin with the scales");
      double params[kMaxParams];
      for (int i = 0; i < kMaxParams; ++i) params[i] = p.params[i];
      if constexpr (!std::is_same_v<As<Loss>, Loss>)
        Loss::numbers(Params::own(p.params), params + (Params::own(p.params) - p.params));
      number_ = Losses::first<As<Loss>>();
      scales_ = *new (params_) Params(params);
    });
  }

  template <class Sums>
  KD_FN const typename Sums::template Scales<S>& scales() const {
    // Plain ones from a member of their type: taken from bytes they cost the cluster kernel registers that it has not.
    if constexpr (std::is_same_v<typename Sums::template Scales<S>, Scales<S>>)
      return scales_;
    else
      return *reinterpret_cast<const typename Sums::template Scales<S>*>(params_);
  }

  // values[k] and the coefficients, by the loss of this call. Of its variants it is the one that sums so.
  template <class Sums, class V, class Coef>
  KD_FN void finish(const Summary<Sums, V>& row, const V* upstream, V* values, Coef& coef) const {
    in_list<Sums>(Tag<Losses>(), std::make_integer_sequence<int, Losses::size>(), row, upstream, values, coef);
  }

 private:
  template <class Sums, class... Entries, int... kNumbers, class... Arguments>
  KD_FN void in_list(Tag<List<Entries...>>, std::integer_sequence<int, kNumbers...>, Arguments&&... arguments) const {
    // Where one loss alone sums so, nothing is asked.
    constexpr bool kAlone = (users<Sums, kNumbers>(Tag<Entries>()) + ...) == 1;
    ((kAlone || number_ == kNumbers ? in_variants<Sums, kNumbers>(Tag<Entries>(), arguments...) : void()), ...);
  }
  template <class Sums, int kNumber, class... Variant>
  static constexpr KD_FN int users(Tag<Variants<Variant...>>) {
    return (is_user<Sums, kNumber, Variant> + ...);
  }
  template <class Sums, int kNumber, class... Variant, class... Arguments>
  KD_FN void in_variants(Tag<Variants<Variant...>>, Arguments&&... arguments) const {
    (in_one<Sums, kNumber, As<Variant>>(arguments...), ...);
  }
  template <class Sums, int kNumber, class Loss, class... Arguments>
  KD_FN void in_one(Arguments&&... arguments) const {
    if constexpr (is_user<Sums, kNumber, Loss>)
      Loss::finish(*reinterpret_cast<const typename Loss::template Params<S>*>(params_), arguments...);
  }
  template <class Sums, int kNumber, class Loss>
  static constexpr bool is_user =
      std::is_same_v<typename Loss::Sums, Sums> && Losses::template first<As<Loss>>() == kNumber;

  static constexpr size_t kRoom = 104;
  int number_ = 0;
  Scales<S> scales_ = Scales<S>(1.0);
  alignas(8) char params_[kRoom] = {};
};

constexpr int kMostValues = 3;  // of a row: outputs, or a loss and its two parts

KD_NAMESPACE_END
