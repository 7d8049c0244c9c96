// What calls need beside the losses: the count of rows, a gradient times a number.
#pragma once

#include "plan.h"
#include "row.cuh"

KD_NAMESPACE_BEGIN

namespace cuda {

using namespace gpu;

// How many rows are not ignored, one number per block.
struct CountArgs {
  const int64_t* target;
  int64_t rows, ignore_index;
  double* counts;
};
inline size_t count_bytes() {
  arch::Carver carver = arch::Carver::counting();
  carver.take<double>(33);
  return carver.bytes();
}

template <int kThreads>
KD_KERNEL(kThreads, 1)
count(KD_ARGUMENT(CountArgs) a) {
  arch::Carver carver = arch::shared();
  const arch::Shared<double> doubles = carver.take<double>(33);
  const int64_t each = (a.rows + arch::blocks() - 1) / arch::blocks(), begin = arch::block() * each;
  const int64_t here = begin + each < a.rows ? each : a.rows > begin ? a.rows - begin : 0;
  double counted = thread_sum<int>(here, [&](int64_t i) { return arch::load(a.target + begin + i) != a.ignore_index; });
  counted = block_sum(doubles, counted);
  if (arch::thread() == 0) arch::store(a.counts + arch::block(), counted);
}

// A gradient of `size` adjacent elements times a number on the device. Writes nothing where that is 1, the ordinary
// case of loss.backward(). The compute type is that of the losses.
template <class S>
struct ScaleArgs {
  void* data;
  int64_t size;
  const S* factor;
};

template <class T, class S>
KD_KERNEL(kScaleThreads, 1)
scale(KD_ARGUMENT(ScaleArgs<S>) a) {
  constexpr int E = 16 / sizeof(T);
  const S factor = arch::load(a.factor);
  if (factor == 1) return;
  T* const data = static_cast<T*>(a.data);
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
  const int64_t first = shift ? 1 : 0, end = (shift + a.size) / E, step = arch::blocks() * arch::threads();
  const int64_t rank = arch::block() * arch::threads() + arch::thread();
  Granule* const vectors = reinterpret_cast<Granule*>(data - shift);
  for (int64_t i = first + rank; i < end; i += step) {
    // Not by the path of constant data: it is written here.
    Granule g = arch::load_written(vectors + i);
    if constexpr (sizeof(T) == 8) {
      double x[2];
      memcpy(x, &g, 16);
      x[0] *= factor, x[1] *= factor;
      memcpy(&g, x, 16);
    } else {
      float x[8];
      unpack<T>(g, x);
      KD_UNROLL
      for (int e = 0; e < E; ++e) x[e] = static_cast<float>(x[e] * factor);
      g = pack<T>(x);
    }
    arch::store(vectors + i, g);
  }
  // Before the first vector and behind the last one.
  int64_t head = first * E - shift, tail = end * E - shift;
  head = head < a.size ? head : a.size;
  tail = tail > head ? tail : head;
  for (int64_t i = rank; i < head + a.size - tail; i += step) {
    T* const at = data + (i < head ? i : tail + i - head);
    T value;
    from_float(value, static_cast<S>(to_float(arch::load_written(at))) * factor);
    arch::store(at, value);
  }
}

}  // namespace cuda

KD_NAMESPACE_END
