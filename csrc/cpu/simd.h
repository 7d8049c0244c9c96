// SIMD lanes on the vector extensions of GCC and Clang: one source for SSE2, AVX2, AVX-512 and NEON. The width follows
// from the flags of the translation unit.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "../stored.h"

KD_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of its own headers where the plain forms of some intrinsics are used
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));
typedef float HalfF __attribute__((vector_size(kVectorBytes / 2)));      // as many lanes as VecD
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));  // as many lanes as VecF

// The compiler does not see through it: what comes out has been rounded, and is not fused with what follows.
template <class V>
KD_FN V opaque(V x) {
#if defined(__x86_64__) || defined(__i386__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <class S>
struct SimdOf;
template <>
struct SimdOf<float> {
  using type = VecF;
};
template <>
struct SimdOf<double> {
  using type = VecD;
};
template <class S>
using Vec = typename SimdOf<S>::type;
template <class S>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

template <class V, class T>
KD_FN V load_bits(const T* from) {
  V v;
  memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
KD_FN void store_bits(T* to, V v) {
  memcpy(to, &v, sizeof(V));
}

// a > b ? a : b, which x86 has as one instruction; of NaN and of equal zeros it gives b, as the comparison does.
KD_FN VecF larger(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(kAll, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
KD_FN VecF max_of(VecF running, VecF x) { return larger(x, running); }

// 2^x for x <= 0, the one exponential of all float32 sweeps. Relative error below 2e-7 (tests/test_lanes.py measures
// it on a grid of the floats): a minimax polynomial of degree 5 on [-1/2, 1/2] with p(0) = 1, 9.2e-8, and float
// rounding. 2^0 is exactly 1, 2^-inf exactly 0, results below 2^-126 are 0 (AVX-512 keeps subnormals), NaN stays NaN.
template <>
struct Ops<VecF> {
  using Scalar = float;
  static KD_FN VecF splat(float x) { return VecF{} + x; }
  static KD_FN auto negative(VecF x) { return (VecU32)x > 0x7fffffffu; }

  static KD_FN VecF exp2(VecF x) {
#if defined(__AVX512DQ__)
    const VecF f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 at -inf
    return _mm512_maskz_scalef_ps(kAll, power(f), x - f);
#else
    const VecF low = splat(-127.f), magic = splat(12582912.f);  // 1.5 * 2^23: rounds to integer in the low bits
    x = larger(low, x);                                         // keeps NaN
    const VecF rounded = x + magic;
    const VecU32 exponent = ((VecU32)rounded + (127u - 0x4B400000u)) << 23;
    return power(x - (rounded - magic)) * (VecF)exponent;
#endif
  }

  static KD_FN VecF abs(VecF x) { return (VecF)((VecU32)x & 0x7fffffffu); }
  // 1 / x of a normal x whose inverse is one, too.
  static KD_FN VecF reciprocal(VecF x) {
#if defined(__AVX512DQ__)
    const VecF r = _mm512_maskz_rcp14_ps(kAll, x);  // 14 bits, and by Newton's step all
    return r * (splat(1.f) - x * r) + r;
#else
    return splat(1.f) / x;
#endif
  }
  static KD_FN VecF product(VecF a, VecF b) { return opaque<VecF>(a * b); }

  // The exponent, and a polynomial in z, or in the mantissa minus 1, from sqrt(1/2) to sqrt 2.
  static KD_FN VecF log2_near(VecF u, VecF z) {
    const VecI32 bits = (VecI32)u - 0x3f3504f3, exponent = bits >> 23;
    const VecF m = (VecF)((bits & 0x7fffff) + 0x3f3504f3) - splat(1.f);
    const VecF f = exponent == 0 ? z : m;
    VecF p = splat(-.14580816f);
    constexpr float coefficients[] = {.23404087f, -.24887734f, .28709891f, -.36023962f,
                                      .48092324f, -.72135282f, 1.4426949f};
    for (float c : coefficients) p = p * f + splat(c);
    return p * f + __builtin_convertvector(exponent, VecF);
  }

 private:
  static KD_FN VecF power(VecF f) {
    VecF p = splat(1.3264727e-3f);
    p = p * f + splat(9.6715127e-3f);
    p = p * f + splat(5.5507337e-2f);
    p = p * f + splat(2.4022242e-1f);
    p = p * f + splat(6.9314698e-1f);
    return p * f + splat(1.f);
  }
};

// c[0] + c[1] x + c[2] x^2 + ..., by halves: the end of a row waits for few such sums, one after the other.
template <int kFrom, int kN, int kAll>
KD_FN VecD polynomial(VecD x, const double (&c)[kAll]) {
  if constexpr (kN == 1) {
    return VecD{} + c[kFrom];
  } else {
    constexpr int kLow = kN > 16 ? 16 : kN > 8 ? 8 : kN > 4 ? 4 : kN > 2 ? 2 : 1;
    VecD power = x;
    for (int i = 1; i < kLow; i *= 2) power *= power;
    return polynomial<kFrom + kLow, kN - kLow>(x, c) * power + polynomial<kFrom, kLow>(x, c);
  }
}

// float64: the sweep of float64 logits, and the end of every row (statistics leave the sweep in double).
template <>
struct Ops<VecD> {
  using Scalar = double;
  static KD_FN VecD splat(double x) { return VecD{} + x; }
  static KD_FN auto negative(VecD x) { return (VecU64)x > 0x7fffffffffffffffull; }
  static KD_FN bool all(decltype(VecD() == VecD()) mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi64_mask((__m512i)mask) == 0xff;
#elif defined(__AVX2__)
    return _mm256_movemask_pd((__m256d)mask) == 0xf;
#else
    return mask[0] && mask[1];
#endif
  }

  static KD_FN VecD exp2(VecD x) {
    const VecD low = splat(-1023.), high = splat(1024.), magic = splat(6755399441055744.);  // 1.5 * 2^52
    x = low > x ? low : x;                                                                  // keeps NaN
    x = high < x ? high : x;
    const VecD rounded = x + magic;
    const VecU64 exponent = ((VecU64)rounded + (1023ull - 0x4338000000000000ull)) << 52;
    const VecD f = (x - (rounded - magic)) * splat(kLn2);
    // Taylor to 13!: |f| <= ln2 / 2, remainder 4e-18
    constexpr double inverse_factorials[] = {
        1.,          1. / 2,       1. / 6,        1. / 24,        1. / 120,        1. / 720,        1. / 5040.,
        1. / 40320., 1. / 362880., 1. / 3628800., 1. / 39916800., 1. / 479001600., 1. / 6227020800.};
    const VecD p = f * polynomial<0, 13>(f, inverse_factorials) + splat(1.);
    return p * (VecD)exponent;
  }

  static KD_FN VecD exp(VecD x) { return exp2(x * splat(kLog2e)); }

  static KD_FN VecD abs(VecD x) { return (VecD)((VecU64)x & 0x7fffffffffffffffull); }
  static KD_FN VecD reciprocal(VecD x) { return splat(1.) / x; }
  static KD_FN VecD product(VecD a, VecD b) { return opaque<VecD>(a * b); }

  static KD_FN VecD log2_near(VecD u, VecD z) {
    const VecD near = artanh(z / (splat(2.) + z));  // |z| < 1/4: of less than 1/7
    return splat(kLog2e) * (abs(z) < splat(.25) ? near : log(max_of(splat(1e-300), u)));
  }

  // For x = 0, normal positive x, +inf and NaN: all that sums of exponentials can be.
  static KD_FN VecD log(VecD x) {
    const VecU64 bits = (VecU64)x;
    VecD m = (VecD)((bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull);
    VecD exponent = (VecD)((bits >> 52) | 0x4330000000000000ull) - splat(4503599627370496. + 1023.);
    const auto high = m > splat(1.4142135623730951);
    m = high ? m * splat(.5) : m;
    exponent = high ? exponent + splat(1.) : exponent;
    const VecD of_m = artanh((m - splat(1.)) / (m + splat(1.)));
    VecD y = exponent * splat(6.93147180369123816490e-01) + (exponent * splat(1.90821492927058770002e-10) + of_m);
    y = x == splat(0.) ? -infinity<VecD>() : y;
    return x < infinity<VecD>() ? y : x;  // +inf and NaN pass
  }

  // For x in [0, 1], with full relative accuracy for small x: log(1 + x), or ln 2 + log((1 + x) / 2).
  static KD_FN VecD log1p(VecD x) {
    const auto high = x > splat(.41421356237309503);
    const VecD y = artanh((high ? x - splat(1.) : x) / ((high ? splat(3.) : splat(2.)) + x));
    return high ? y + splat(kLn2) : y;
  }

 private:
  // 2 artanh s for |s| <= 0.172: log((1 + s) / (1 - s)).
  static KD_FN VecD artanh(VecD s) {
    constexpr double twice[] = {2. / 3, 2. / 5, 2. / 7, 2. / 9, 2. / 11, 2. / 13, 2. / 15, 2. / 17, 2. / 19, 2. / 21};
    const VecD s2 = s * s;
    return s * s2 * polynomial<0, 10>(s2, twice) + (s + s);  // what is rounded several times is small
  }
};

// ---- stored values -------------------------------------------------------------------------------------------------

// kLanes<S> stored values as a vector of S, and back.
template <class S, class T>
KD_FN Vec<S> load(const T* from) {
  Vec<S> v;
  for (int i = 0; i < kLanes<S>; ++i) v[i] = static_cast<S>(to_float(from[i]));
  return v;
}
template <>
KD_FN VecF load<float, float>(const float* from) {
  return load_bits<VecF>(from);
}
template <>
KD_FN VecD load<double, double>(const double* from) {
  return load_bits<VecD>(from);
}
template <>
KD_FN VecF load<float, BF16>(const BF16* from) {
  return (VecF)(__builtin_convertvector(load_bits<VecU16>(from), VecU32) << 16);
}

template <class S, class T>
KD_FN void store(T* to, Vec<S> v) {
  for (int i = 0; i < kLanes<S>; ++i) from_float(to[i], v[i]);
}
template <>
KD_FN void store<float, float>(float* to, VecF v) {
  store_bits(to, v);
}
template <>
KD_FN void store<double, double>(double* to, VecD v) {
  store_bits(to, v);
}
template <>
KD_FN void store<float, BF16>(BF16* to, VecF v) {
  const VecU32 bits = (VecU32)v;
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 out = v == v ? rounded : (bits >> 16) | 0x40u;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i x = (__m256i)out;  // GCC 12 masks these 16 bits before it packs them
  store_bits(to, _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
#else
  store_bits(to, __builtin_convertvector(out, VecU16));
#endif
}

#if defined(__F16C__)
template <>
KD_FN VecF load<float, F16>(const F16* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}
template <>
KD_FN void store<float, F16>(F16* to, VecF v) {
  constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(kAll, v, rounding));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, rounding));
#endif
}
#endif

// ---- between lanes ----------------------------------------------------------------------------------------------

// VecD number `part` of a vector of S: float vectors hold two, double vectors one.
template <class S>
constexpr int kParts = static_cast<int>(sizeof(double) / sizeof(S));
KD_FN VecD widen(const float* from, int part) {
  return __builtin_convertvector(load_bits<HalfF>(from + part * kLanes<double>), VecD);
}
KD_FN VecD widen(const double* from, int) { return load_bits<VecD>(from); }
template <class V>
KD_FN VecD widen_part(V v, int part) {
  alignas(kVectorBytes) ScalarOf<V> lanes[sizeof(V) / sizeof(ScalarOf<V>)];
  store_bits(lanes, v);
  return widen(lanes, part);
}
KD_FN void narrow(float* to, int part, VecD v) {
  store_bits(to + part * kLanes<double>, __builtin_convertvector(v, HalfF));
}
KD_FN void narrow(double* to, int, VecD v) { store_bits(to, v); }

template <int... kI>
struct Indices {};
template <int kN, int... kI>
struct MakeIndices : MakeIndices<kN - 1, kN - 1, kI...> {};
template <int... kI>
struct MakeIndices<0, kI...> {
  using type = Indices<kI...>;
};

// Lanes kI... of the concatenation of a and b.
template <int... kI, class V>
KD_FN V shuffle(V a, V b) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KD_SHUFFLEVECTOR
#endif
#endif
#if defined(KD_SHUFFLEVECTOR)
  return __builtin_shufflevector(a, b, kI...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{kI...});
#endif
}

template <int kStep, class V, int... kI>
KD_FN V swap_lanes(V v, Indices<kI...>) {
  return shuffle<(kI ^ kStep)...>(v, v);
}

// Every lane gets the result over all lanes, in a fixed order.
template <int kStep, int kN, class V, class F>
KD_FN V across_lanes(V v, F combine) {
  v = combine(v, swap_lanes<kStep>(v, typename MakeIndices<kN>::type{}));
  if constexpr (2 * kStep < kN)
    return across_lanes<2 * kStep, kN>(v, combine);
  else
    return v;
}

template <class S>
KD_FN double sum_lanes(Vec<S> v) {
  VecD sum = widen_part(v, 0);
  for (int part = 1; part < kParts<S>; ++part) sum += widen_part(v, part);
  return across_lanes<1, kLanes<double>>(sum, [](VecD a, VecD b) { return a + b; })[0];
}

template <class S>
KD_FN S max_lanes(Vec<S> v) {
  return across_lanes<1, kLanes<S>>(v, [](Vec<S> a, Vec<S> b) { return max_of(a, b); })[0];
}

// Transposes a square of kN vectors of kN lanes: log2 rounds that exchange blocks of 1, 2, 4, ... lanes between two
// vectors.
template <int kStep, class V, int kN, int... kI>
KD_FN void transpose_step(V (&m)[kN], Indices<kI...> indices) {
  for (int i = 0; i < kN; ++i) {
    if (i & kStep) continue;
    const V a = m[i], b = m[i + kStep];
    m[i] = shuffle<((kI & kStep) ? kN + kI - kStep : kI)...>(a, b);
    m[i + kStep] = shuffle<((kI & kStep) ? kN + kI : kI + kStep)...>(a, b);
  }
  if constexpr (2 * kStep < kN) transpose_step<2 * kStep>(m, indices);
}
template <class V, int kN>
KD_FN void transpose(V (&m)[kN]) {
  transpose_step<1>(m, typename MakeIndices<kN>::type{});
}

KD_NAMESPACE_END
