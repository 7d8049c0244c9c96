// Losses that are a sum of f(p, q) over the classes, p and q the softmax of student and teacher at temperature T. They
// take two rounds over a row (stats.h):
//
//   first round   e_s, e_t and their sums
//   open          what turns them into p and q, from the sums
//   refine        p and q -> value f and score h = df / dp of the class. Kept from then on: p and p h
//   finish        gradient T p (h - H), H the mean of h under p; of the target T p_y ((1 - p_y) h_y - S), S the
//                 sum of the others' p h: nothing cancels where p_y is near 1
//
// A form brings at(p, q, d = p - q) -> value and score, and crowded (stats.h). A constant in the score counts for
// nothing: H takes it away.
#pragma once

#include "mixed_kl.h"
#include "pair.h"

KD_NAMESPACE_BEGIN

// The variant `smooth` also keeps the exponentials at temperature 1, as they are.
template <class Form, Variant kVariant>
struct ScoreSums : Kept<kVariant == Variant::smooth ? 3 : 2, kVariant, 2> {
 private:
  using Base = Kept<kVariant == Variant::smooth ? 3 : 2, kVariant, 2>;
  static constexpr bool kSmooth = Base::smooth;

 public:
  static constexpr bool teacher = true, has_parts = kSmooth, sums_at_one = kSmooth;
  template <class S>
  using Scales = typename Form::template Scales<S>;
  static constexpr int count = kSmooth ? 5 : 2;
  static constexpr int held = Base::kept + 1;  // beside them what opens the second round, and its sums
  static constexpr bool crowded = kSmooth || Form::crowded;
  enum { sum_s, sum_t, sum_s1, value = count, score };
  static constexpr int at_one = kSmooth ? sum_s1 : sum_s, kept_at_one = kSmooth ? 2 : 0;

  template <class V>
  struct Exps {
    V e[Base::kept];
    V ds;
  };
  template <class V>
  struct Stats {
    V v[count + Base::refined];
  };

  template <class V>
  static KD_FN Exps<V> exps(const Scales<ScalarOf<V>>& scales, V ds, V dt) {
    Exps<V> out;
    out.e[0] = Base::marked(Ops<V>::exp2(ds * scales.k), ds);
    out.e[1] = Ops<V>::exp2(dt * scales.k);
    if constexpr (kSmooth) out.e[2] = Ops<V>::exp2(ds * lit<V>(kLog2e));
    if constexpr (kSmooth) out.ds = ds;
    return out;
  }
  template <class V>
  static KD_FN void add(Stats<V>& a, const Exps<V>& x) {
    a.v[sum_s] += x.e[0];
    a.v[sum_t] += x.e[1];
    if constexpr (kSmooth) a.v[sum_s1] += x.e[2];
    if constexpr (kSmooth) Base::count(a.v, x.ds);
  }
  template <class V>
  static KD_FN Stats<V> moved_to(const Scales<ScalarOf<V>>& scales, const Stats<V>& a, const Pivots<V>& from,
                                 const Pivots<V>& to) {
    const V ds = moved(from.s, to.s), dt = moved(from.t, to.t);
    Stats<V> out = {};
    out.v[sum_s] = a.v[sum_s] * Ops<V>::exp2(ds * scales.k);
    out.v[sum_t] = a.v[sum_t] * Ops<V>::exp2(dt * scales.k);
    if constexpr (kSmooth) out.v[sum_s1] = a.v[sum_s1] * Ops<V>::exp2(ds * lit<V>(kLog2e));
    Base::move_counted(out.v, a.v, ds);
    return out;
  }
  template <class V, class Coef>
  static KD_FN void rebase(const Scales<ScalarOf<V>>& scales, Coef& coef, const Pivots<V>& row, const Pivots<V>& part) {
    const V ds = moved(part.s, row.s), dt = moved(part.t, row.t);
    coef.c[0] *= Ops<V>::exp2(ds * scales.k);
    coef.c[1] *= Ops<V>::exp2(dt * scales.k);
    if constexpr (kSmooth) coef.c[2] *= Ops<V>::exp2(ds * lit<V>(kLog2e));
  }

  template <class V, class Row>
  static KD_FN void open(const Scales<ScalarOf<V>>& scales, const Row& row, Multipliers<V, Base::openings>& to) {
    const V of_s = row.stats.v[sum_s], of_t = row.stats.v[sum_t];
    to.c[0] = Split<V>::of(row.relative_s(), scales.temperature, of_s).rest * inverse(of_s);
    to.c[1] = Split<V>::of(row.relative_t(), scales.temperature, of_t).rest * inverse(of_t);
    if constexpr (kSmooth) to.c[2] = lit<V>(1);
  }
  // p keeps the sign of what does not count.
  template <class V>
  static KD_FN void refine(const Scales<ScalarOf<V>>& scales, V (&e)[Base::kept],
                           const Multipliers<V, Base::openings>& to, V (&sums)[2]) {
    const V p = Ops<V>::product(e[0], to.c[0]), q = Ops<V>::product(e[1], to.c[1]);
    V value, h;
    Form::at(scales, p, q, p - q, value, h);
    e[0] = p;
    e[1] = p * h;
    if constexpr (kSmooth) e[2] *= to.c[2];
    sums[0] += value;
    sums[1] += e[1];
  }
  // Of the target, by its splits: value and p h. Returns g times its gradient.
  template <class V, class Row>
  static KD_FN V target(const Scales<ScalarOf<V>>& scales, const Row& row, const Split<V>& p, const Split<V>& q, V g,
                        V& value_y, V& score_y) {
    V h;
    Form::at(scales, p.p, q.p, difference(p, q), value_y, h);
    score_y = p.p * h;
    return g * p.p * (p.rest * h - row.stats.v[score]);
  }
};

// A loss of such a form; its parameters begin with PairParams.
template <class Form, Variant kVariant, class Own = ScoreSums<Form, kVariant>>
struct ScoreLoss : Own {
  using Sums = Own;
  static constexpr bool has_temperature = true;
  static bool serves(const double* params, bool parts) { return pair_serves<kVariant, false>(params, parts); }

  template <class Params, class V>
  static KD_FN void finish(const Params& params, const Summary<Sums, V>& row, const V* upstream, V* loss,
                           typename Sums::template Coef<V>& coef) {
    const auto& a = row.stats;
    const V t = Ops<V>::splat(params.temperature), weight = Ops<V>::splat(params.gained);
    const Split<V> p = Split<V>::of(row.relative_s(), params.temperature, a.v[Sums::sum_s]);
    const Split<V> q = Split<V>::of(row.relative_t(), params.temperature, a.v[Sums::sum_t]);
    const V g = upstream[0] * weight * t;
    V value, score;
    coef.y = Sums::target(params, row, p, q, g, value, score);
    const V distillation = t * (t * (a.v[Sums::value] + value));
    for (V& c : coef.c) c = lit<V>(0);
    coef.c[0] = -g * (a.v[Sums::score] + score);
    coef.c[1] = g;
    loss[0] = weighted(weight, distillation);
    if constexpr (Sums::smooth) {
      loss[1] = distillation * Ops<V>::splat(params.gain);
      add_cross_entropy<Sums, false>(params, lit<V>(0), a, row.relative_s(), upstream[0], loss, coef);
    }
  }
};

// |p - q| / 2.
struct TvdForm {
  static constexpr bool crowded = false;
  template <class S>
  using Scales = kd::KD_ISA::Scales<S>;
  template <class V>
  static KD_FN void at(const Scales<ScalarOf<V>>&, V, V, V d, V& value, V& h) {
    const V half = lit<V>(.5), zero = lit<V>(0);
    value = half * Ops<V>::abs(d);
    h = select(d > zero, half, select(d < zero, -half, zero * d));  // NaN stays
  }
};

// With m = a q + b p, b = 1 - a:  A q log(q / m) + B p log(p / m), whose score is B log(p / m) + D q / m.
// What is summed is A (q log(q / m) - q + m) + B (p log(p / m) - p + m): the additions sum to 0 over a row, and every
// class is positive then, and of second order in p - q.
struct MixtureForm {
  static constexpr bool crowded = true;  // by its numbers
  template <class S>
  struct Scales : kd::KD_ISA::Scales<S> {
    S a, b, A, B, D, E;
    KD_FN Scales(double t, const double* x)
        : kd::KD_ISA::Scales<S>(t),
          a(static_cast<S>(x[0])),
          b(static_cast<S>(x[1])),
          A(static_cast<S>(x[2] * kLn2)),
          B(static_cast<S>(x[3] * kLn2)),
          D(static_cast<S>(x[4])),
          E(static_cast<S>(x[3] * x[0] - x[2] * x[1])) {}
  };
  // Skew KL and its reverse need one of the logarithms; they share the code of all mixtures, and so its kernels.
  template <class V>
  static KD_FN void at(const Scales<ScalarOf<V>>& x, V p, V q, V d, V& value, V& h) {
    // 1 / m must not overflow. Where m is less than this the class has no value, and next to no score: p times a
    // logarithm of whatever.
    const V tiny = lit<V>(sizeof(ScalarOf<V>) == 8 ? 1e-300 : 1e-37);
    const V m = x.a * q + x.b * p, r = Ops<V>::reciprocal(max_of(tiny, m));
    const V z = d * r, from_m = -x.b * z;  // p / m - 1 is a z, and q / m - 1 is -b z
    V log_p = lit<V>(0), log_q = lit<V>(0);
    if (x.B != 0) log_p = Ops<V>::log2_near(p * r, x.a * z);
    if (x.A != 0) log_q = Ops<V>::log2_near(q * r, from_m);
    value = select(m < tiny, lit<V>(0), x.A * q * log_q + x.B * p * log_p - x.E * d);
    h = x.B * log_p + x.D * from_m;
  }
};

template <Variant kVariant>
struct Tvd : ScoreLoss<TvdForm, kVariant> {
  static constexpr const char* name = "tvd";
  static constexpr int outputs = 1, param_count = PairParams<double>::count;
  static constexpr bool needs_target = false;

  template <class S>
  using Params = PairParams<S>;
};

// What all mixtures compute, from these numbers (MixtureForm). A loss says what they are.
template <Variant kVariant>
struct Mixture : ScoreLoss<MixtureForm, kVariant> {
  static void set(double* to, double a, double b, double of_q, double of_p, double ratio) {
    const double numbers[] = {a, b, of_q, of_p, ratio};
    for (int i = 0; i < 5; ++i) to[i] = numbers[i];
  }
  using As = Mixture;
  template <class S>
  struct Params : PairParams<S, MixtureForm::Scales<S>> {
    using Base = PairParams<S, MixtureForm::Scales<S>>;
    explicit KD_FN Params(const double* p) : Base(p, MixtureForm::Scales<S>(p[0], Base::own(p))) {}
  };
};

// Generalised Jensen-Shannon divergence: T^2 (beta KL(q || m) + (1 - beta) KL(p || m)), m = beta q + (1 - beta) p. GKD,
// arXiv 2306.13649. Where beta is 0 or 1 it is KL in one direction.
template <Variant kVariant>
struct Jsd : Mixture<kVariant> {
  static constexpr const char* name = "jsd";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 1;
  static constexpr bool needs_target = false;

  static void numbers(const double* own, double* to) {
    const double beta = own[0];
    Mixture<kVariant>::set(to, beta, 1 - beta, beta, 1 - beta, 0);
  }
  static bool ends(const double* own) { return own[0] == 0 || own[0] == 1; }
  static double forward(const double* own) { return 1 - own[0]; }
};

// Skew KL: T^2 KL(q || alpha q + (1 - alpha) p). DistiLLM, arXiv 2402.03898.
template <Variant kVariant>
struct SkewKl : Mixture<kVariant> {
  static constexpr const char* name = "skew_kl";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 1;
  static constexpr bool needs_target = false;

  static void numbers(const double* own, double* to) {
    const double alpha = own[0];
    Mixture<kVariant>::set(to, alpha, 1 - alpha, 1, 0, alpha - 1);
  }
  static bool ends(const double* own) { return own[0] == 0; }
  static double forward(const double*) { return 1; }
};

// Skew reverse KL: T^2 KL(p || alpha p + (1 - alpha) q), the mixture differentiated or not. DistiLLM, arXiv 2402.03898,
// and DistiLLM-2, arXiv 2503.07067, which does not.
template <Variant kVariant>
struct SkewReverseKl : Mixture<kVariant> {
  static constexpr const char* name = "skew_reverse_kl";
  static constexpr int outputs = 1, param_count = PairParams<double>::count + 2;
  static constexpr bool needs_target = false;

  static void numbers(const double* own, double* to) {
    const double alpha = own[0];
    Mixture<kVariant>::set(to, 1 - alpha, alpha, 0, 1, own[1] != 0 ? 0 : 1 - alpha);
  }
  static bool ends(const double* own) { return own[0] == 0; }
  static double forward(const double*) { return 0; }
};

// What they are at an end of their parameter: KL in one direction.
template <class Loss, Variant kVariant>
struct AtAnEnd : MixedKl<kVariant> {
  static constexpr int param_count = Loss::param_count;
  static bool serves(const double* p, bool parts) {
    return Loss::ends(PairParams<double>::own(p)) && pair_serves<kVariant, false>(p, parts);
  }
  using As = MixedKl<kVariant>;
  static void numbers(const double* own, double* to) { to[0] = Loss::forward(own); }
};

KD_NAMESPACE_END
