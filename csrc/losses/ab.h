// Alpha-beta divergence (ABKD, arXiv 2505.04560): T^2 times the sum of
//
//   f = -1 / (a b) (q^a p^b - a / (a + b) q^(a+b) - b / (a + b) p^(a+b)),   p h = p df / dp = (p^(a+b) - q^a p^b) / a
//
// Written so, terms of first order cancel near p = q, and where a or b goes to 0 all of them do. With l = log(p / q),
// base the larger one of p and q, and A = expm1(-a |l|) / a, B = expm1(-b |l|) / b, which become -|l| in these limits,
//
//   l <= 0   f = base^(a+b) (A e^(-b |l|) - B) / (a + b)      p h = base^(a+b) e^(-b |l|) A
//   l > 0    f = base^(a+b) (B e^(-a |l|) - A) / (a + b)      p h = -base^(a+b) B
//
// No exponential exceeds 1, and of the difference in f, where |l| is small, what has cancelled is left out. So one code
// serves all a and b from 0 to 1, and equal logits give exactly 0.
//
// That takes l by the difference of logits, not of logarithms, and log2 of p and q rather than these: base^(a+b) of a
// class counts long after its probability has underflown, where a + b is small. So what the first round keeps are the
// logits ds and dt, and what opens the second one is added:
//
//   log2 p = k ds + c[0]     log2 q = k dt + c[kept]     log2(p / q) = k (ds - dt) + c[1]
//
// The third is the difference of the first two, but one that does not cancel where they are alike; nor would the second
// be that of the others, where all classes of one tensor lie far below the target.
//
// A class at -inf in student or teacher has the value that the formula gives; where that is infinite (the teacher lacks
// it and a is 0, or the student does and b is 0) it counts as h = 0 in the gradient, as in reverse KL.
#pragma once

#include "score.h"

KD_NAMESPACE_BEGIN

struct AbForm {
  static constexpr bool crowded = true;   // by what opens its second round
  static constexpr double kLimit = 1e-4;  // below it a or b is taken to be 0

  template <class S>
  struct Scales : kd::KD_ISA::Scales<S> {
    // Both, their inverses or 0, that of a + b or 0, and a / (a + b), 1/2 where both are 0.
    S a, b, inverse_a, inverse_b, inverse_sum, share_a;
    KD_FN Scales(double t, const double* own) : Scales(t, limited(own[0]), limited(own[1])) {}

   private:
    KD_FN Scales(double t, double alpha, double beta)
        : kd::KD_ISA::Scales<S>(t),
          a(static_cast<S>(alpha)),
          b(static_cast<S>(beta)),
          inverse_a(static_cast<S>(inverse_of(alpha))),
          inverse_b(static_cast<S>(inverse_of(beta))),
          inverse_sum(static_cast<S>(inverse_of(alpha + beta))),
          share_a(static_cast<S>(alpha + beta > 0 ? alpha / (alpha + beta) : .5)) {}
    static KD_FN double limited(double x) { return x < kLimit ? 0 : x; }
    static KD_FN double inverse_of(double x) { return x > 0 ? 1 / x : 0; }
  };

  // f and p h of a class, from log2 of p, q and p / q. apart: ds - dt, infinite where one of them lacks the class, and
  // no number where both do: it has no part in the row, or, of NaN logits, has made its sums NaN.
  template <class V>
  static KD_FN void at(const Scales<ScalarOf<V>>& x, V log_p, V log_q, V ratio, V apart, V& value, V& score) {
    const auto none = apart != apart;
    const V zero = lit<V>(0), one = lit<V>(1), half = lit<V>(.5);
    const auto less = ratio <= zero;  // p <= q
    const V a = Ops<V>::splat(x.a), b = Ops<V>::splat(x.b), share_a = Ops<V>::splat(x.share_a);
    // Finite: 0 times it is 0.
    const V base = max_of(lit<V>(-1e30), select(less, log_q, log_p));
    const V power = select(none, zero, Ops<V>::exp2((a + b) * base));
    const V distance = -Ops<V>::abs(ratio),
            near2 = select(none, zero, select(distance < -far<V>(), -far<V>(), distance));
    const V m = near2 * lit<V>(kLn2), xa = a * m, xb = b * m;
    const V ea = Ops<V>::exp2(a * near2), eb = Ops<V>::exp2(b * near2);
    const V phi_a = phi(xa), phi_b = phi(xb);
    const V A = select(xa > -half, m * xa * phi_a + m, (ea - one) * Ops<V>::splat(x.inverse_a));
    const V B = select(xb > -half, m * xb * phi_b + m, (eb - one) * Ops<V>::splat(x.inverse_b));
    const V first = select(less, A, B), second = select(less, B, A), e = select(less, eb, ea);
    // (first e - second) / (a + b); near m = 0, where first and second are both m to first order, by what is beyond it.
    const V beyond = share_a * phi_a - (one - share_a) * phi_b;
    const V small = m * (m * select(less, beyond, -beyond)) + select(less, one - share_a, share_a) * (A * B);
    const V large = (first * e - second) * Ops<V>::splat(x.inverse_sum);
    score = power * select(less, e * first, -second);
    value = power * select(min_of(xa, xb) > -half, small, large);
    // Where the other one's power is the 0th, a class that only one of them has, or nearly so, has an infinite value;
    // and the former counts as h = 0.
    const V beyond_all = select(select(less, b, a) == zero, distance, zero);
    value = select(beyond_all == -infinity<V>(), infinity<V>(), value);
    score = select(max_of(beyond_all, -Ops<V>::abs(apart)) == -infinity<V>(), zero, score);
  }

 private:
  // |log2(p / q)| is taken to be at most this.
  template <class V>
  static KD_FN V far() {
    return lit<V>(sizeof(ScalarOf<V>) == 8 ? 1e300 : 1e37);
  }
  // (e^x - 1 - x) / x^2 for -1/2 < x <= 0, by its series.
  template <class V>
  static KD_FN V phi(V x) {
    constexpr double inverse_factorial[] = {
        1. / 2,         1. / 6,          1. / 24,          1. / 120,          1. / 720,
        1. / 5040,      1. / 40320,      1. / 362880,      1. / 3628800,      1. / 39916800,
        1. / 479001600, 1. / 6227020800, 1. / 87178291200, 1. / 1307674368000};
    constexpr int kTerms = sizeof(ScalarOf<V>) == 8 ? 14 : 7;
    V sum = lit<V>(inverse_factorial[kTerms - 1]);
    for (int i = kTerms - 2; i >= 0; --i) sum = sum * x + lit<V>(inverse_factorial[i]);
    return sum;
  }
};

// The features are logits, ds and dt; what they sum to and how that moves is as for any form.
template <Variant kVariant>
struct AbSums : ScoreSums<AbForm, kVariant> {
 private:
  using Of = ScoreSums<AbForm, kVariant>;
  using Base = Kept<Of::kept, kVariant, 2>;
  static constexpr bool kSmooth = Of::smooth;

 public:
  using Of::kept;
  static constexpr int openings = kept + 1;
  static constexpr int held = kept + 3;  // the powers and series of the second round need registers
  template <class S>
  using Scales = AbForm::Scales<S>;
  template <class V>
  using Stats = typename Of::template Stats<V>;

  template <class V>
  struct Exps {
    V e[kept];
    V es, et;
  };

  template <class V>
  static KD_FN Exps<V> exps(const Scales<ScalarOf<V>>& scales, V ds, V dt) {
    Exps<V> out;
    out.e[0] = ds;
    out.e[1] = dt;
    out.es = Ops<V>::exp2(ds * scales.k);
    out.et = Ops<V>::exp2(dt * scales.k);
    if constexpr (kSmooth) out.e[2] = Ops<V>::exp2(ds * lit<V>(kLog2e));
    return out;
  }
  template <class V>
  static KD_FN void add(Stats<V>& a, const Exps<V>& x) {
    a.v[Of::sum_s] += x.es;
    a.v[Of::sum_t] += x.et;
    if constexpr (kSmooth) a.v[Of::sum_s1] += x.e[2];
    if constexpr (kSmooth) Base::count(a.v, x.e[0]);
  }
  // Of what opens the second round.
  template <class V, class Coef>
  static KD_FN void rebase(const Scales<ScalarOf<V>>& scales, Coef& to, const Pivots<V>& row, const Pivots<V>& part) {
    const V ds = moved(part.s, row.s), dt = moved(part.t, row.t);
    to.c[0] += ds * scales.k;
    to.c[1] += (ds - dt) * scales.k;
    to.c[kept] += dt * scales.k;
    if constexpr (kSmooth) to.c[2] *= Ops<V>::exp2(ds * lit<V>(kLog2e));
  }

  template <class V>
  static KD_FN void open(const Scales<ScalarOf<V>>& scales, const Summary<AbSums, V>& row,
                         Multipliers<V, openings>& to) {
    const Split<V> p = Split<V>::of(row.relative_s(), scales.temperature, row.stats.v[Of::sum_s]);
    const Split<V> q = Split<V>::of(row.relative_t(), scales.temperature, row.stats.v[Of::sum_t]);
    const Apart<V> apart = Apart<V>::of(scales, row, p, q);
    to.c[0] = -apart.total * lit<V>(kLog2e);
    to.c[1] = -apart.totals * lit<V>(kLog2e);
    to.c[kept] = -apart.total_t * lit<V>(kLog2e);
    if constexpr (kSmooth) to.c[2] = lit<V>(1);
  }
  // p has the sign that tells what counts.
  template <class V>
  static KD_FN void refine(const Scales<ScalarOf<V>>& scales, V (&e)[kept], const Multipliers<V, openings>& to,
                           V (&sums)[2]) {
    const V ds = e[0], dt = e[1], k = Ops<V>::splat(scales.k);
    const V log_p = ds * k + to.c[0], log_q = dt * k + to.c[kept];
    V value_i;
    AbForm::at(scales, log_p, log_q, (ds - dt) * k + to.c[1], ds - dt, value_i, e[1]);
    e[0] = Base::marked(Ops<V>::exp2(log_p), ds);
    if constexpr (kSmooth) e[2] *= to.c[2];
    sums[0] += value_i;
    sums[1] += e[1];
  }

  // By p h itself: h may be no number.
  template <class V>
  static KD_FN V target(const Scales<ScalarOf<V>>& scales, const Summary<AbSums, V>& row, const Split<V>& p,
                        const Split<V>& q, V g, V& value_y, V& score_y) {
    const V log2e = lit<V>(kLog2e), ratio = Apart<V>::of(scales, row, p, q).target;
    AbForm::at(scales, p.log_p * log2e, q.log_p * log2e, ratio * log2e, row.relative_s() - row.relative_t(), value_y,
               score_y);
    score_y += nan_of(row);  // the gradient of a class without a number is that of its row
    return g * (p.rest * score_y - p.p * row.stats.v[Of::score]);
  }

 private:
  // What student and teacher are apart, without cancellation where they are alike, and exactly 0 where they are equal:
  // differences come before products, which would be fused with them.
  template <class V>
  struct Apart {
    V total, total_t;  // logs of the sums over all classes, relative to the pivots, of student and teacher
    V totals;          // their difference
    V target;          // log(p / q) of the target

    static KD_FN Apart of(const Scales<ScalarOf<V>>& scales, const Summary<AbSums, V>& row, const Split<V>& p,
                          const Split<V>& q) {
      const V over = Ops<V>::splat(1 / scales.temperature), relative = row.relative_s(), relative_t = row.relative_t();
      const V sum_s = row.stats.v[Of::sum_s], sum_t = row.stats.v[Of::sum_t];
      const V total = log_total(p, relative * over, sum_s), total_t = log_total(q, relative_t * over, sum_t);
      const V logits = (relative - relative_t) * over, targets = p.log_p - q.log_p;
      const V by_rest = select(min_of(sum_s, sum_t) == lit<V>(0), total - total_t,
                               Ops<V>::log(sum_s / sum_t) - (p.log_rest - q.log_rest));
      const auto large = min_of(p.p, q.p) > lit<V>(.5);
      // Of target's logarithms that are not alike nothing cancels, however far the other classes lie below.
      const auto unlike = Ops<V>::abs(targets) > lit<V>(-.25) * min_of(p.log_p, q.log_p);
      return {total, total_t, select(large, logits - targets, by_rest),
              select(large, targets, select(unlike, targets, logits - by_rest))};
    }
  };
};

template <Variant kVariant>
struct Ab : ScoreLoss<AbForm, kVariant, AbSums<kVariant>> {
  static constexpr const char* name = "ab";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 2;
  static constexpr bool needs_target = false;

  template <class S>
  struct Params : PairParams<S, AbForm::Scales<S>> {
    using Base = PairParams<S, AbForm::Scales<S>>;
    explicit KD_FN Params(const double* p) : Base(p, AbForm::Scales<S>(p[0], Base::own(p))) {}
  };
};

KD_NAMESPACE_END
