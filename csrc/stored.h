// The types that logits are stored in, as float and back.
#pragma once

#include <cstdint>
#include <cstring>

#include "lane.h"
#include "problem.h"

KD_NAMESPACE_BEGIN

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

KD_FN float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
KD_FN uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

KD_FN float to_float(float x) { return x; }
KD_FN double to_float(double x) { return x; }
KD_FN float to_float(BF16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
KD_FN float to_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float value = as_float(magnitude) * 0x1p112f;  // rebias; exact for subnormals too
  const bool special = (x.bits & 0x7c00u) == 0x7c00u;  // inf, NaN
  return as_float((special ? magnitude | 0x7f800000u : as_bits(value)) | sign);
}

KD_FN void from_float(float& to, float x) { to = x; }
KD_FN void from_float(float& to, double x) { to = static_cast<float>(x); }
KD_FN void from_float(double& to, double x) { to = x; }
KD_FN void from_float(BF16& to, float x) {  // round to nearest even; NaN apart, its payload must not round to inf
  const uint32_t bits = as_bits(x);
  to.bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
KD_FN void from_float(F16& to, float x) {  // round to nearest even
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to 65536 or more
  } else if (magnitude < 0x38800000u) {
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // subnormal: 0.5 has the unit of half's subnormals
  } else {
    half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // rebias by -112, round
  }
  to.bits = static_cast<uint16_t>(half | sign);
}
KD_FN void from_float(BF16& to, double x) { from_float(to, static_cast<float>(x)); }
KD_FN void from_float(F16& to, double x) { from_float(to, static_cast<float>(x)); }

// Applies f to a pointer of the stored type.
template <class F>
KD_FN auto with_type(DType dtype, void* data, F f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(data));
    case DType::f16:
      return f(static_cast<F16*>(data));
    case DType::bf16:
      return f(static_cast<BF16*>(data));
    default:
      return f(static_cast<float*>(data));
  }
}

KD_FN int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

KD_NAMESPACE_END
