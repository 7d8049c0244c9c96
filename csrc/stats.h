// The mergeable pieces that losses are made of: what is summed over the classes of a row, target class left out.
//
// A class enters through its logits relative to the pivots (ds = s - pivot, dt = t - pivot). They stay in
// units of logits, temperature not applied: differences t - s are then exact however small or large the temperature is,
// and one pivot serves every temperature.
//
//   Sums::exps(scales, ds, dt)   the exponentials of a class, e[0..kept) are what the gradient needs again
//   Sums::add(stats, exps)       statistics of one more class
//   Sums::moved_to(...)          statistics that fit other pivots; merge<Sums>() joins two disjoint sets of classes,
//                                each a Summary: pivots, the target's logits, statistics
//   Sums::rebase(...)            coefficients that fit exponentials relative to other pivots: the transpose of how
//                                these move. Of Sums with a second round: what opens it, whatever that does to a class
//   Sums::gradient(e, coef)      d loss / d logit of a class: no new exponential
//
// With Variant::smooth every class whose logit is not -inf counts, and adds a constant to its
// gradient. Which ones do is told by the sign of their first exponential: -0.0 of a class at -inf, which no sum sees.
//
// Losses that need p and q of every class, normalised, take a second round over what the first one kept:
//
//   Sums::refined                how many sums it has; 0: there is none
//   Sums::open(scales, row, multipliers)
//                                from the Summary of the first round, what turns the kept of a class into its
//                                probabilities: multiplies exponentials, or is added to logits; the loops rebase it to
//                                the pivots that these are relative to
//   Sums::refine(scales, e, multipliers, sums)
//                                a class: what is kept of it, in place, and plain sums. What is kept is absolute from
//                                then on, relative to no pivot: its coefficients are not rebased
//
// In stats.v the second round's sums stand behind the first one's, where only finish looks at them: no merge has any.
// For a backward pass they are stored at the end of a row of statistics, so that a variant finds them where another
// one of its loss has left them. It opens and refines its classes again, sums nothing, and needs no exchange.
#pragma once

#include <type_traits>

#include "lane.h"
#include "problem.h"

KD_NAMESPACE_BEGIN

template <class V>
struct Pivots {
  V s, t;  // maxima of the logits, or a little less (cuda/row.cuh); -inf where there is no class
};

// The pivot to subtract: 0 where no class has a finite logit, so that -inf - pivot stays -inf.
template <class V>
KD_FN V usable(V pivot) {
  return select(pivot == -infinity<V>(), lit<V>(0), pivot);
}

// A row once its classes are summed up: all that its loss and its gradient's coefficients are finished from, whoever
// has summed them, in however many parts. A part of a row is one, too, of which only pivots and statistics count: the
// target is the row's.
template <class Sums, class V>
struct Summary {
  Pivots<V> pivots;
  V s_y, t_y;  // the target's logits, which the sums leave out; -inf where there is no target
  typename Sums::template Stats<V> stats;

  KD_FN Summary() : pivots{-infinity<V>(), -infinity<V>()}, s_y(-infinity<V>()), t_y(s_y), stats{} {}
  // The target's logits relative to the pivots.
  KD_FN V relative_s() const { return s_y - usable(pivots.s); }
  KD_FN V relative_t() const { return t_y - usable(pivots.t); }
};

// How far logits relative to `from` move when they are taken relative to `to`.
template <class V>
KD_FN V moved(V from, V to) {
  return usable(from) - select(from == -infinity<V>(), lit<V>(0), usable(to));
}

// x -> 2^(k x) is softmax at the row's temperature. Temperatures are from 1e-4 to 1e4: in this range k, 1 / T and T^2
// are numbers that float holds.
template <class S>
struct Scales {
  S temperature, k;
  explicit KD_FN Scales(double t) : temperature(static_cast<S>(t)), k(static_cast<S>(kLog2e / t)) {}
  KD_FN S of_teacher() const { return temperature; }
  KD_FN S k_teacher() const { return k; }
  // A difference t - s of logits, in units of the student's.
  template <class V>
  KD_FN V apart(V ds, V dt) const {
    return dt - ds;
  }
};

// The same with a temperature of the teacher's own.
template <class S>
struct ApartScales : Scales<S> {
  S temperature_t, k_t, ratio;
  KD_FN ApartScales(double t, double teacher)
      : Scales<S>(t),
        temperature_t(static_cast<S>(teacher)),
        k_t(static_cast<S>(kLog2e / teacher)),
        ratio(static_cast<S>(t / teacher)) {}
  KD_FN S of_teacher() const { return temperature_t; }
  KD_FN S k_teacher() const { return k_t; }
  template <class V>
  KD_FN V apart(V ds, V dt) const {
    return dt * ratio - ds;
  }
};

// What opens a second round; nothing where there is none.
template <class V, int kOpenings>
struct Multipliers {
  V c[kOpenings];
};
template <class V>
struct Multipliers<V, 0> {};
template <class Sums, class V>
using Opening = Multipliers<V, Sums::refined ? Sums::openings : 0>;
// What a second round sums to.
template <class Sums, class V>
struct Refined {
  V v[Sums::refined];
};

// The sums of both rounds.
template <class Sums>
constexpr int kSums = Sums::count + Sums::refined;
// The place of one of them in a row of statistics.
template <class Sums>
KD_FN constexpr int stored_at(int sum) {
  return sum < Sums::count ? 2 + sum : kStatsWidth - kSums<Sums> + sum;
}
// And the sum of a place, or -1.
template <class Sums>
KD_FN constexpr int sum_stored_at(int place) {
  const int first = place - 2, second = place - (kStatsWidth - kSums<Sums>);
  return first < Sums::count ? first : second >= Sums::count ? second : -1;
}

// What counts is summed times it, so that classes masked by the lowest number of float do not overflow the sum of
// logits. A power of 2: nothing is rounded.
constexpr double kShare = 0x1p-24;

template <int kKept, Variant kVariant, int kRefined = 0>
struct Kept {
  static constexpr Variant variant = kVariant;
  static constexpr bool smooth = kVariant == Variant::smooth || kVariant == Variant::apart_smooth;
  static constexpr bool apart = kVariant == Variant::apart || kVariant == Variant::apart_smooth;
  static constexpr bool sums_at_one = kVariant == Variant::at_one || smooth;
  static constexpr bool loses = false;              // classes that the teacher lacks are summed apart
  static constexpr bool crowded = smooth || apart;  // more sums and numbers per row than features tell of
  static constexpr int held = kKept;                // what a kernel makes room for in registers, per class
  static constexpr int kept = kKept, coefs = kKept + smooth, refined = kRefined;
  static constexpr int openings = kKept;  // numbers that open a second round
  template <class V>
  struct Coef {
    V c[coefs];  // gradient of a class: sum of c[i] * e[i], and the last one by itself where classes count
    V y;         // gradient of the target class
  };
  template <class V, int kCoefs>
  static KD_FN V gradient(const V (&e)[kKept], const V (&c)[kCoefs]) {
    V sum = c[0] * e[0];
    for (int i = 1; i < kKept; ++i) sum = c[i] * e[i] + sum;
    if constexpr (smooth) sum += select(Ops<V>::negative(e[0]), lit<V>(0), c[kKept]);
    return sum;
  }

 protected:
  // The first exponential of a class.
  template <class V>
  static KD_FN V marked(V e, V ds) {
    return smooth ? select(ds == -infinity<V>(), -e, e) : e;
  }
  // The sums of what counts: of the logits and of the classes, times kShare. They are the last two of a variant's first
  // round.
  template <class V, int kCount>
  static KD_FN void count(V (&v)[kCount], V ds) {
    constexpr int kEnd = kCount - kRefined;
    if constexpr (smooth) {
      v[kEnd - 2] = select(ds == -infinity<V>(), lit<V>(0), ds) * lit<V>(kShare) + v[kEnd - 2];
      v[kEnd - 1] += select(ds == -infinity<V>(), lit<V>(0), lit<V>(kShare));
    }
  }
  template <class V, int kCount>
  static KD_FN void move_counted(V (&out)[kCount], const V (&v)[kCount], V ds) {
    constexpr int kEnd = kCount - kRefined;
    if constexpr (smooth) {
      out[kEnd - 2] = v[kEnd - 1] * ds + v[kEnd - 2];
      out[kEnd - 1] = v[kEnd - 1];
    }
  }
};

// Student and teacher. kCross chooses what is averaged over the teacher's non-target softmax: t - s (for a divergence)
// or -s (for a cross-entropy). All variants but the plain one add the sums at temperature 1 that cross-entropy
// (student) and NKD (both) need beside those at the row's temperature. The sums of a variant begin with those of a
// smaller one: a forward pass that was asked for parts leaves more than its backward pass reads.
template <Variant kVariant, bool kCross>
struct PairSums : Kept<kVariant == Variant::plain || kVariant == Variant::apart ? 2 : 3, kVariant> {
 private:
  using Base = Kept<kVariant == Variant::plain || kVariant == Variant::apart ? 2 : 3, kVariant>;
  static constexpr bool kAtOne = Base::sums_at_one;

 public:
  static constexpr bool teacher = true;
  static constexpr bool has_parts = Base::smooth;  // finish gives them behind the loss
  template <class S>
  using Scales = std::conditional_t<Base::apart, ApartScales<S>, kd::Scales<S>>;
  static constexpr int held = Base::kept + Base::apart;  // one more: the numbers of the second temperature
  static constexpr int count = 3 + (kAtOne ? (kCross ? 2 : 1) : 0) + (Base::smooth ? 2 : 0);
  enum { sum_s, sum_t, mean_x, sum_s1, sum_t1 };
  // The student's sum and exponential at temperature 1, where one is asked for: without `at_one` that is the row's.
  static constexpr int at_one = kAtOne ? sum_s1 : sum_s, kept_at_one = kAtOne ? 2 : 0;

  template <class V>
  struct Exps {
    V e[kAtOne ? 3 : 2];  // 2^(k ds), 2^(k dt), e^ds
    V x, t1, ds;
  };
  template <class V>
  struct Stats {
    V v[count];
  };

  template <class V>
  static KD_FN Exps<V> exps(const Scales<ScalarOf<V>>& scales, V ds, V dt) {
    Exps<V> out;
    out.e[0] = Base::marked(Ops<V>::exp2(ds * scales.k), ds);
    out.e[1] = Ops<V>::exp2(dt * scales.k_teacher());
    if constexpr (kAtOne) out.e[2] = Ops<V>::exp2(ds * lit<V>(kLog2e));
    if constexpr (kAtOne && kCross) out.t1 = Ops<V>::exp2(dt * lit<V>(kLog2e));
    out.x = kCross ? -ds : scales.apart(ds, dt);
    if constexpr (Base::smooth) out.ds = ds;
    return out;
  }

  template <class V>
  static KD_FN void add(Stats<V>& a, const Exps<V>& x) {
    a.v[sum_s] += x.e[0];
    a.v[sum_t] += x.e[1];
    // Without teacher mass the class is out, also where it is -inf - -inf. NaN logits arrive through the sums.
    a.v[mean_x] = x.e[1] * select(x.e[1] > lit<V>(0), x.x, lit<V>(0)) + a.v[mean_x];
    if constexpr (kAtOne) a.v[sum_s1] += x.e[2];
    if constexpr (kAtOne && kCross) a.v[sum_t1] += x.t1;
    if constexpr (Base::smooth) Base::count(a.v, x.ds);
  }

  template <class V>
  static KD_FN Stats<V> moved_to(const Scales<ScalarOf<V>>& scales, const Stats<V>& a, const Pivots<V>& from,
                                 const Pivots<V>& to) {
    const V ds = moved(from.s, to.s), dt = moved(from.t, to.t);
    const V ft = Ops<V>::exp2(dt * scales.k_teacher());
    Stats<V> out;
    out.v[sum_s] = a.v[sum_s] * Ops<V>::exp2(ds * scales.k);
    out.v[sum_t] = a.v[sum_t] * ft;
    out.v[mean_x] = weighted(ft, a.v[mean_x] + weighted(a.v[sum_t], kCross ? -ds : scales.apart(ds, dt)));
    if constexpr (kAtOne) out.v[sum_s1] = a.v[sum_s1] * Ops<V>::exp2(ds * lit<V>(kLog2e));
    if constexpr (kAtOne && kCross) out.v[sum_t1] = a.v[sum_t1] * Ops<V>::exp2(dt * lit<V>(kLog2e));
    Base::move_counted(out.v, a.v, ds);
    return out;
  }

  template <class V, class Coef>
  static KD_FN void rebase(const Scales<ScalarOf<V>>& scales, Coef& coef, const Pivots<V>& row, const Pivots<V>& part) {
    const V ds = moved(part.s, row.s), dt = moved(part.t, row.t);
    coef.c[0] *= Ops<V>::exp2(ds * scales.k);
    coef.c[1] *= Ops<V>::exp2(dt * scales.k_teacher());
    if constexpr (kAtOne) coef.c[2] *= Ops<V>::exp2(ds * lit<V>(kLog2e));
  }
};

// One tensor alone (cross-entropy, the target split of one set of logits).
template <Variant kVariant>
struct StudentSums : Kept<1, kVariant> {
 private:
  using Base = Kept<1, kVariant>;

 public:
  static constexpr bool teacher = false;
  static constexpr bool has_parts = false;
  static constexpr bool sums_at_one = false;  // its one temperature is whatever the loss says
  template <class S>
  using Scales = kd::Scales<S>;
  static constexpr int count = Base::smooth ? 3 : 1;
  enum { sum_s };

  template <class V>
  struct Exps {
    V e[1];
    V ds;
  };
  template <class V>
  struct Stats {
    V v[count];
  };
  template <class V>
  static KD_FN Exps<V> exps(const Scales<ScalarOf<V>>& scales, V ds, V) {
    return {{Base::marked(Ops<V>::exp2(ds * scales.k), ds)}, ds};
  }
  template <class V>
  static KD_FN void add(Stats<V>& a, const Exps<V>& x) {
    a.v[sum_s] += x.e[0];
    if constexpr (Base::smooth) Base::count(a.v, x.ds);
  }
  template <class V>
  static KD_FN Stats<V> moved_to(const Scales<ScalarOf<V>>& scales, const Stats<V>& a, const Pivots<V>& from,
                                 const Pivots<V>& to) {
    const V ds = moved(from.s, to.s);
    Stats<V> out;
    out.v[sum_s] = a.v[sum_s] * Ops<V>::exp2(ds * scales.k);
    Base::move_counted(out.v, a.v, ds);
    return out;
  }
  template <class V, class Coef>
  static KD_FN void rebase(const Scales<ScalarOf<V>>& scales, Coef& coef, const Pivots<V>& row, const Pivots<V>& part) {
    coef.c[0] *= Ops<V>::exp2(moved(part.s, row.s) * scales.k);
  }
};

// a takes over what b, a disjoint set of classes, sums to. The target stays a's.
template <class Sums, class V>
KD_FN void merge(const typename Sums::template Scales<ScalarOf<V>>& scales, Summary<Sums, V>& a,
                 const Summary<Sums, V>& b) {
  const Pivots<V> p = {max_of(a.pivots.s, b.pivots.s), max_of(a.pivots.t, b.pivots.t)};
  const auto sum = Sums::moved_to(scales, b.stats, b.pivots, p);
  a.stats = Sums::moved_to(scales, a.stats, a.pivots, p);
  for (int i = 0; i < Sums::count; ++i) a.stats.v[i] += sum.v[i];
  a.pivots = p;
}

// NaN if a logit of the row is, else 0: added to the losses, it wins over infinities and over whatever is switched off.
// A class's NaN has made the sums NaN; the target's is in its logits.
template <class Sums, class V>
KD_FN V nan_of(const Summary<Sums, V>& row) {
  V all = row.stats.v[Sums::sum_s] + row.s_y;
  if constexpr (Sums::teacher) all += row.stats.v[Sums::sum_t] + row.t_y;
  if constexpr (Sums::loses) all += row.stats.v[Sums::lost];
  return select(all == all, lit<V>(0), all);
}

// The target against all other classes, from g = log(p / (1 - p)). Nothing cancels and nothing underflows early: log p
// and log(1 - p) keep full relative accuracy however close p is to 0 or 1.
template <class V>
struct Split {
  V log_p, log_rest, p, rest;

  // relative: the target's logit minus the pivot; sum: sum over the other classes of exp((logit - pivot) / T).
  static KD_FN Split of(V relative, ScalarOf<V> temperature, V sum) {
    return of_odds(relative * Ops<V>::splat(1 / temperature) - Ops<V>::log(sum));
  }

  static KD_FN Split of_odds(V g) {
    const V zero = lit<V>(0), one = lit<V>(1);
    if (Ops<V>::all(g == -infinity<V>())) return {g, zero, zero, one};  // rows without a target
    const V e = Ops<V>::exp(select(g < zero, g, -g));
    const V l = Ops<V>::log1p(e), large = one / (one + e), small = e * large;
    return {select(g < zero, g, zero) - l, select(g < zero, zero, -g) - l, select(g < zero, small, large),
            select(g < zero, large, small)};
  }
};

// log of the sum over all classes at temperature 1, relative to the pivot: by the one whose probability is not small.
template <class V>
KD_FN V log_total(const Split<V>& p, V relative, V sum) {
  return select(p.p > lit<V>(0.5), relative - p.log_p, Ops<V>::log(sum) - p.log_rest);
}

// Cross-entropy at temperature 1 with a share `smoothing` of the target spread over the classes that count, those that
// are not at -inf. What it is of: the target's logit minus the pivot, and the other classes' sums, at temperature 1.
template <class V>
struct Smoothed {
  V mean;       // of -log p over the classes that count
  V each;       // one over their number
  V at_target;  // d mean / d logit of the target

  static KD_FN Smoothed of(const Split<V>& p, V relative, V sum, V sum_ds, V counted) {
    const V zero = lit<V>(0);
    const auto masked = relative == -infinity<V>();
    const V total = log_total(p, relative, sum), share = lit<V>(kShare),
            shares = inverse(counted + select(masked, zero, share)), each = shares * share;
    const V mean = total - shares * (sum_ds + select(masked, zero, relative) * share);
    return {mean, each, p.p - select(masked, zero, each)};
  }
};

// p - q of two splits, without cancellation when both are near 1.
template <class V>
KD_FN V difference(const Split<V>& p, const Split<V>& q) {
  return select(p.p > lit<V>(0.5), q.rest - p.rest, p.p - q.p);
}

// KL between the two Bernoulli distributions (target, not target): q is the teacher's, p the student's.
template <class V>
KD_FN V binary_kl(const Split<V>& q, const Split<V>& p) {
  return weighted(q.p, q.log_p - p.log_p) + weighted(q.rest, q.log_rest - p.log_rest);
}

// T^2 times the mean of x under the teacher's non-target softmax, plus T^2 (log sum_s - log_t): the non-target KL
// (log_t = log sum_t, x = t - s) or cross-entropy (log_t = 0, x = -s). 0 without teacher mass, +inf where the teacher
// has mass and the student none.
template <class V>
KD_FN V non_target(ScalarOf<V> temperature, V sum_s, V sum_t, V mean_x, V log_t) {
  const V t = Ops<V>::splat(temperature);
  const V value = t * (mean_x + t * (Ops<V>::log(sum_s) - log_t));
  return select(sum_t == lit<V>(0), lit<V>(0), select(sum_s == lit<V>(0), infinity<V>(), value));
}

KD_NAMESPACE_END
