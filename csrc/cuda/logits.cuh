// Logits in memory as the kernels see them: rows that begin anywhere, moved 16 bytes at a time.
//
// A row is cut at the 16-byte boundaries of the tensor that is written (of the student where nothing is). What lies
// between the first and the last boundary are its vectors of kVector logits, loaded and stored as whole granules; the
// few logits before and after them are its edges, moved one by one. Nothing outside a row is ever touched. A tensor
// whose rows lie otherwise (a sliced vocabulary, a padded teacher) is still read in granules, one more per vector, and
// shifted into place; the first and the last vector count as edges then, since their granules reach out of the row.
#pragma once

#include <type_traits>

#include "arch.cuh"

// arch.cuh comes first: it says what an exponential is.
#include "../stats.h"
#include "../stored.h"

KD_NAMESPACE_BEGIN

namespace cuda {

using arch::Granule;

// ---- one vector of logits -----------------------------------------------------------------------------------------

// The granules that hold a vector, one more than its size makes them where it begins `skew` bytes behind the first.
template <int kGranules>
struct Raw {
  Granule g[kGranules + 1];
  int skew;
};

KD_DEVICE const Granule* granules(const char* base) { return reinterpret_cast<const Granule*>(base); }

// Where a tensor's vectors lie: `skew` bytes behind `base`, which is on a 16-byte boundary. kLast: nobody reads that
// again.
struct Place {
  const char* base;
  int skew;
  template <bool kLast>
  KD_DEVICE Granule granule(int64_t i) const {
    const Granule* const g = granules(base) + i;
    return kLast ? arch::load_streaming(g) : arch::load(g);
  }
};
// A row in shared memory. Class 0 begins, or would begin, at byte `zero`.
struct StagedRow {
  arch::Shared<Granule> data;
  int64_t zero;
  template <class T>
  KD_DEVICE T ld(int64_t offset) const {
    return data.template as<T>().ld(static_cast<int>(zero / static_cast<int>(sizeof(T)) + offset));
  }
};
// The same as Place, of vectors whose granules were copied to shared memory; that of number 0 would be at `zero`.
struct StagedPlace {
  arch::Shared<Granule> data;
  int zero;
  int skew;
  template <bool kLast>
  KD_DEVICE Granule granule(int64_t i) const {
    return data.ld(zero + static_cast<int>(i));
  }
};

// The bytes of the vector moved to the front; skew is even.
template <int kGranules>
KD_DEVICE void unskew(Raw<kGranules>& raw) {
  const int skew = raw.skew;
  uint32_t w[4 * kGranules + 4];
  KD_UNROLL
  for (int i = 0; i < 4 * kGranules + 4; ++i) w[i] = raw.g[i / 4].w[i % 4];
  KD_UNROLL
  for (int i = 0; i < 4 * kGranules + 2; ++i) w[i] = (skew & 8) ? w[i + 2] : w[i];
  KD_UNROLL
  for (int i = 0; i < 4 * kGranules + 1; ++i) w[i] = (skew & 4) ? w[i + 1] : w[i];
  KD_UNROLL
  for (int i = 0; i < 4 * kGranules; ++i) raw.g[i / 4].w[i % 4] = arch::funnel(w[i], w[i + 1], (skew & 2) * 8);
}

template <class T>
KD_DEVICE void unpack(const Granule& g, float* out);
template <>
KD_DEVICE void unpack<float>(const Granule& g, float* out) {
  KD_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = as_float(g.w[i]);
}
template <>
KD_DEVICE void unpack<BF16>(const Granule& g, float* out) {
  KD_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = as_float(g.w[i] << 16);
    out[2 * i + 1] = as_float(g.w[i] & 0xffff0000u);
  }
}
template <>
KD_DEVICE void unpack<F16>(const Granule& g, float* out) {
  KD_UNROLL
  for (int i = 0; i < 4; ++i) arch::from_halves(g.w[i], out[2 * i], out[2 * i + 1]);
}

// The largest logit of a granule, if it is above `running`.
template <class T>
KD_DEVICE float top(float running, const Granule& g);
template <>
KD_DEVICE float top<float>(float running, const Granule& g) {
  KD_UNROLL
  for (int i = 0; i < 4; ++i) running = max_of(running, as_float(g.w[i]));
  return running;
}
template <>
KD_DEVICE float top<BF16>(float running, const Granule& g) {
  const uint32_t two = arch::max_bfloats(arch::max_bfloats(g.w[0], g.w[1]), arch::max_bfloats(g.w[2], g.w[3]));
  return max_of(max_of(running, as_float(two << 16)), as_float(two & 0xffff0000u));
}
template <>
KD_DEVICE float top<F16>(float running, const Granule& g) {
  float low, high;
  arch::from_halves(arch::max_halves(arch::max_halves(g.w[0], g.w[1]), arch::max_halves(g.w[2], g.w[3])), low, high);
  return max_of(max_of(running, low), high);
}

template <class T>
KD_DEVICE Granule pack(const float* x);
template <>
KD_DEVICE Granule pack<float>(const float* x) {
  Granule g;
  KD_UNROLL
  for (int i = 0; i < 4; ++i) g.w[i] = as_bits(x[i]);
  return g;
}
template <>
KD_DEVICE Granule pack<BF16>(const float* x) {
  Granule g;
  KD_UNROLL
  for (int i = 0; i < 4; ++i) g.w[i] = arch::to_bfloats(x[2 * i], x[2 * i + 1]);
  return g;
}
template <>
KD_DEVICE Granule pack<F16>(const float* x) {
  Granule g;
  KD_UNROLL
  for (int i = 0; i < 4; ++i) g.w[i] = arch::to_halves(x[2 * i], x[2 * i + 1]);
  return g;
}

// ---- formats ------------------------------------------------------------------------------------------------------

// Logits of one type that the kernel is compiled for. A vector is fetched first and looked at later, so that others are
// on their way meanwhile. Not kSkewed: the call's tensors all lie alike.
template <class T>
struct Format {
  using S = float;
  using Vector = Raw<1>;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr bool wide = false;
  KD_FN explicit Format(const Logits&) {}

  KD_FN int size() const { return sizeof(T); }
  template <bool kLast, bool kSkewed, class From>
  KD_DEVICE Vector fetch(const From& from, int vector) const {
    Vector raw = {};  // or what is not loaded would hold registers from before
    raw.skew = kSkewed ? from.skew : 0;
    raw.g[0] = from.template granule<kLast>(vector);
    if (kSkewed && from.skew) raw.g[1] = from.template granule<kLast>(vector + 1);
    return raw;
  }
  KD_DEVICE void values(Vector& raw, float* out) const {
    if (raw.skew) unskew(raw);
    unpack<T>(raw.g[0], out);
  }
  KD_DEVICE float top(float running, Vector& raw) const {
    if (raw.skew) unskew(raw);
    return cuda::top<T>(running, raw.g[0]);
  }
  KD_DEVICE void put_vector(char* base, int vector, const float* x) const {
    arch::store_streaming(reinterpret_cast<Granule*>(base) + vector, pack<T>(x));
  }
  KD_DEVICE float get(const char* row, int64_t offset) const {
    return to_float(arch::load(reinterpret_cast<const T*>(row) + offset));
  }
  KD_DEVICE float get(const StagedRow& row, int64_t offset) const { return to_float(row.ld<T>(offset)); }
  KD_DEVICE void put(char* row, int64_t offset, float x) const {
    T value;
    from_float(value, x);
    arch::store(reinterpret_cast<T*>(row) + offset, value);
  }
};

// Logits of whatever type the call says, for what is not worth a kernel of its own: mixed types, and float64.
template <class C>
struct AnyFormat {
  using S = C;
  static constexpr int kVector = sizeof(S) == 8 ? 2 : 8, kGranules = sizeof(S) == 8 ? 1 : 2;
  using Vector = Raw<kGranules>;
  static constexpr bool wide = true;
  DType dtype;
  KD_FN explicit AnyFormat(const Logits& x) : dtype(x.dtype) {}

  KD_FN int size() const { return static_cast<int>(bytes_of(dtype)); }
  template <bool kLast, bool kSkewed, class From>
  KD_DEVICE Vector fetch(const From& from, int vector) const {
    Vector raw = {};
    const int bytes = kVector * size();
    const int64_t at = static_cast<int64_t>(vector) * bytes + from.skew;
    raw.skew = static_cast<int>(at % 16);
    KD_UNROLL
    for (int i = 0; i <= kGranules; ++i)
      if (16 * i < raw.skew + bytes) raw.g[i] = from.template granule<kLast>(at / 16 + i);
    return raw;
  }
  KD_DEVICE void values(Vector& raw, S* out) const {
    if (raw.skew) unskew(raw);
    if constexpr (sizeof(S) == 8) {
      if (dtype == DType::f64) {
        memcpy(out, &raw.g[0], 16);
        return;
      }
    }
    float x[8];
    if (dtype == DType::f32) {
      unpack<float>(raw.g[0], x);
      if (kVector == 8) unpack<float>(raw.g[1], x + 4);
    } else if (dtype == DType::f16) {
      unpack<F16>(raw.g[0], x);
    } else {
      unpack<BF16>(raw.g[0], x);
    }
    KD_UNROLL
    for (int i = 0; i < kVector; ++i) out[i] = x[i];
  }
  KD_DEVICE float top(float running, Vector& raw) const {
    static_assert(sizeof(S) == 4, "for clusters, which have no double");
    if (raw.skew) unskew(raw);
    if (dtype == DType::f16) return cuda::top<F16>(running, raw.g[0]);
    if (dtype == DType::bf16) return cuda::top<BF16>(running, raw.g[0]);
    return cuda::top<float>(cuda::top<float>(running, raw.g[0]), raw.g[1]);
  }
  KD_DEVICE void put_vector(char* base, int vector, const S* out) const {
    char* const to = base + static_cast<int64_t>(vector) * (kVector * size());
    if constexpr (sizeof(S) == 8) {
      if (dtype == DType::f64) {
        Granule g;
        memcpy(&g, out, 16);
        arch::store_streaming(reinterpret_cast<Granule*>(to), g);
        return;
      }
    }
    float x[8];
    KD_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = static_cast<float>(out[i % kVector]);
    const Granule g = dtype == DType::f32 ? pack<float>(x) : dtype == DType::f16 ? pack<F16>(x) : pack<BF16>(x);
    if constexpr (kVector == 8) {
      arch::store_streaming(reinterpret_cast<Granule*>(to), g);
      if (dtype == DType::f32) arch::store_streaming(reinterpret_cast<Granule*>(to) + 1, pack<float>(x + 4));
    } else if (dtype == DType::f32) {
      arch::store_streaming(reinterpret_cast<uint64_t*>(to), static_cast<uint64_t>(g.w[1]) << 32 | g.w[0]);
    } else {
      arch::store_streaming(reinterpret_cast<uint32_t*>(to), g.w[0]);
    }
  }
  KD_DEVICE S get(const char* row, int64_t offset) const {
    return with_type(dtype, const_cast<char*>(row),
                     [&](auto* p) { return static_cast<S>(to_float(arch::load(p + offset))); });
  }
  KD_DEVICE S get(const StagedRow& row, int64_t offset) const {
    return with_type(dtype, static_cast<char*>(nullptr), [&](auto* p) {
      return static_cast<S>(to_float(row.ld<std::remove_pointer_t<decltype(p)>>(offset)));
    });
  }
  KD_DEVICE void put(char* row, int64_t offset, S x) const {
    with_type(dtype, row, [&](auto* p) {
      std::remove_pointer_t<decltype(p)> value;
      from_float(value, x);
      arch::store(p + offset, value);
    });
  }
};

// ---- one row ------------------------------------------------------------------------------------------------------

KD_DEVICE char* row_of(const Logits& x, int size, int64_t outer, int64_t inner) {
  return static_cast<char*>(x.data) + (outer * x.outer_stride + inner * x.inner_stride) * size;
}

constexpr int kMostEdges = 32;

// Classes are adjacent. Vector i of the row begins at class i * kVector - shift; its vectors are those from `first` to
// `first + count`.
template <class F>
struct Row {
  static constexpr int kVector = F::kVector;
  static constexpr int kEdges = kMostEdges;  // half of them at either end

  const char *s, *t;
  char* g;
  Place s_place, t_place;
  char* g_base;
  int first, count;
  int head, tail, classes;   // edges: classes below head, and from tail on
  int hot_vector, hot_lane;  // the target, if it is in a vector

  Row() = default;
  KD_DEVICE Row(const F& fs, const F& ft, const Logits& student, const Logits& teacher, const Logits& grad,
                bool has_teacher, int64_t outer, int64_t inner, int row_classes, int target)
      : classes(row_classes) {
    s = row_of(student, fs.size(), outer, inner);
    t = has_teacher ? row_of(teacher, ft.size(), outer, inner) : s;
    g = grad.data ? row_of(grad, fs.size(), outer, inner) : nullptr;
    const int t_size = has_teacher ? ft.size() : fs.size();
    const int smallest = kVector * (fs.size() < t_size ? fs.size() : t_size), own = kVector * fs.size();
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(g ? g : s) % (own < 16 ? own : 16)) / fs.size();
    s_place = place(s, shift * fs.size());
    t_place = place(t, shift * t_size);
    g_base = g ? g - shift * fs.size() : nullptr;
    first = shift ? 1 : 0;
    int end = (shift + classes) / kVector;
    // So many vectors that their granules may reach out of the row.
    const int reach = smallest < 16 ? 16 / smallest : (s_place.skew | t_place.skew) != 0;
    first += reach;
    end -= reach;
    if (end < first) end = first;
    count = end - first;
    head = first * kVector - shift;
    head = head < classes ? head : classes;
    tail = end * kVector - shift;
    tail = tail < classes ? tail : classes;
    hot_vector = -1;
    hot_lane = 0;
    if (target >= head && target < tail) {
      hot_vector = (target + shift) / kVector;
      hot_lane = (target + shift) % kVector;
    }
  }

  // Puts `value` at the target, for the vector that has it: a branch around this costs less than comparing every
  // class.
  template <class S>
  KD_DEVICE void at_target(S (&x)[kVector], S value) const {
    KD_UNROLL
    for (int e = 0; e < kVector; ++e) x[e] = e == hot_lane ? value : x[e];
  }

  // The class of edge j < kEdges, or -1.
  KD_DEVICE int edge(int j) const {
    const int c = j < kEdges / 2 ? j : tail + j - kEdges / 2;
    return c < (j < kEdges / 2 ? head : classes) ? c : -1;
  }

 private:
  static KD_DEVICE Place place(const char* row, int before) {
    const char* const from = row - before;
    const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16);
    return {from - skew, skew};
  }
};

}  // namespace cuda

KD_NAMESPACE_END
