// The arithmetic a loss may use, for any lane type: float and double here, SIMD vectors in cpu/simd.h.
// A lane may be a class (a row swept in vectors, or by GPU threads) or a row (many short rows at once), so nothing
// in the algebra branches on a lane's value: it selects.
#pragma once

#include <math.h>

// GPUs have an instruction for it; cuda/arch.cuh says so before it includes this.
#ifndef KD_EXP2F
#define KD_EXP2F exp2f
#endif
#ifndef KD_LOG2F
#define KD_LOG2F log2f
#endif
#ifndef KD_RECIPROCALF
#define KD_RECIPROCALF(x) (1.f / (x))
#endif

#if defined(__CUDACC__)
#define KD_FN __host__ __device__ __forceinline__
#else
#define KD_FN inline __attribute__((always_inline))
#endif

// Every translation unit that is compiled for another instruction set puts its templates into a namespace of its own:
// the linker would otherwise keep one copy of them for all, and run AVX-512 code on a machine without it.
#ifndef KD_ISA
#define KD_ISA scalar
#endif
#define KD_NAMESPACE_BEGIN \
  namespace kd {           \
  inline namespace KD_ISA {
#define KD_NAMESPACE_END \
  }                      \
  }

KD_NAMESPACE_BEGIN

constexpr double kLog2e = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

// Scalar, splat, exp2, exp, log, log1p, negative (also of -0.0), abs, and
//   all(mask)          whether a comparison holds in every lane, of vectors of doubles, which may branch on it to leave
//                      out work; false of a single lane
//   reciprocal(x)      1 / x of an ordinary x > 0
//   product(a, b)      a * b, rounded: fused with a subtraction, two equal products would not differ by 0
//   log2_near(u, z)    log2 u of a u >= 0, z = u - 1 known to more digits than u has near 1: relatively accurate
//                      there, and finite at 0. NaN in u may be lost.
template <class V>
struct Ops;

template <>
struct Ops<float> {
  using Scalar = float;
  static KD_FN float splat(float x) { return x; }
  static KD_FN float exp2(float x) { return KD_EXP2F(x); }
  static KD_FN float exp(float x) { return expf(x); }
  static KD_FN float log(float x) { return logf(x); }
  static KD_FN float log1p(float x) { return log1pf(x); }
  static KD_FN bool negative(float x) { return signbit(x); }
  static KD_FN constexpr bool all(bool) { return false; }
  static KD_FN float abs(float x) { return fabsf(x); }
  static KD_FN float reciprocal(float x) { return KD_RECIPROCALF(x); }
  static KD_FN float product(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    volatile float x = a * b;
    return x;
#endif
  }
  static KD_FN float log2_near(float u, float z) {  // Taylor: beyond 1/16 the logarithm itself is as good
    const float near = z * (1.442695f + z * (-.7213475f + z * (.4808983f + z * (-.3606738f + z * .2885390f))));
    return fabsf(z) < .0625f ? near : KD_LOG2F(u > 1.2e-38f ? u : 1.2e-38f);
  }
};

template <>
struct Ops<double> {
  using Scalar = double;
  static KD_FN double splat(double x) { return x; }
  static KD_FN double exp2(double x) { return ::exp2(x); }
  static KD_FN double exp(double x) { return ::exp(x); }
  static KD_FN double log(double x) { return ::log(x); }
  static KD_FN double log1p(double x) { return ::log1p(x); }
  static KD_FN bool negative(double x) { return signbit(x); }
  static KD_FN constexpr bool all(bool) { return false; }
  static KD_FN double abs(double x) { return fabs(x); }
  static KD_FN double reciprocal(double x) { return 1 / x; }
  static KD_FN double product(double a, double b) {
#if defined(__CUDA_ARCH__)
    return __dmul_rn(a, b);
#else
    volatile double x = a * b;
    return x;
#endif
  }
  static KD_FN double log2_near(double u, double z) {
    return kLog2e * (fabs(z) < .5 ? ::log1p(z) : ::log(u > 1e-300 ? u : 1e-300));
  }
};

template <class V>
using ScalarOf = typename Ops<V>::Scalar;

// A constant as a lane: lit<V>(0.5).
template <class V>
KD_FN V lit(double x) {
  return Ops<V>::splat(static_cast<ScalarOf<V>>(x));
}

template <class V>
KD_FN V infinity() {
  return Ops<V>::splat(static_cast<ScalarOf<V>>(__builtin_huge_val()));
}

// mask is a comparison of two lanes: bool, or a vector of them.
template <class M, class V>
KD_FN V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

// NaN in x is skipped (it reaches the sums by its exponential), NaN in the running maximum never arises.
template <class V>
KD_FN V max_of(V running, V x) {
  return select(x > running, x, running);
}

#if defined(__CUDACC__)
// The same in one instruction: of a number and NaN, fmax takes the number.
KD_FN float max_of(float running, float x) { return fmaxf(running, x); }
KD_FN double max_of(double running, double x) { return fmax(running, x); }
#endif

template <class V>
KD_FN V min_of(V a, V b) {  // NaN in a stays
  return select(b < a, b, a);
}

// weight * x where a weight of exactly 0 wins over an infinite x: 0 * log 0 = 0. NaN in the weight stays.
template <class V>
KD_FN V weighted(V weight, V x) {
  return select(weight == lit<V>(0), lit<V>(0), weight * x);
}

// 1 / sum, or 0 where there is nothing to share out. NaN stays.
template <class V>
KD_FN V inverse(V sum) {
  return select(sum == lit<V>(0), lit<V>(0), lit<V>(1) / sum);
}

KD_NAMESPACE_END
