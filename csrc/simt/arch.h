// The twin of cuda/arch.cuh for the emulation in simt.h: the same names and the same meaning, every use checked.
#pragma once

#include <float.h>
#include <math.h>
#include <string.h>

#include <type_traits>

#include "simt.h"

// The bounds are promises to a compiler that allots registers; nothing here does.
#define KD_KERNEL(max_threads, min_blocks) void
#define KD_ARGUMENT(T) const T
#define KD_DEVICE inline

namespace kd {
namespace arch {

struct alignas(16) Granule {
  uint32_t w[4];
};

inline int thread() { return simt::device::thread(); }
inline int threads() { return simt::device::threads(); }
inline int lane() { return thread() % 32; }
inline int64_t block() { return simt::device::block(); }
inline int64_t blocks() { return simt::device::blocks(); }

inline int cluster_rank() { return simt::device::cluster_rank(); }
inline int cluster_blocks() { return simt::device::cluster_blocks(); }

inline void sync_block() { simt::device::sync_block(); }
inline void sync_warp(uint32_t mask = ~0u) { simt::device::sync_warp(mask); }
inline void sync_cluster() { simt::device::sync_cluster(); }

template <class T>
T shfl_xor(T v, int lane_mask, uint32_t mask = ~0u) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = simt::device::shuffle_xor(bits, sizeof(T), lane_mask, mask);
  memcpy(&v, &bits, sizeof(T));
  return v;
}

inline uint32_t ballot(bool x, uint32_t mask = ~0u) {
  uint32_t all = x ? 1u << lane() : 0;
  for (int step = 16; step > 0; step /= 2) all |= shfl_xor(all, step, mask);
  return all;
}
inline int bits(uint32_t x) { return __builtin_popcount(x); }

// ---- shared memory --------------------------------------------------------------------------

// An array in the shared memory of the block. It is a place, not an address: it can be taken before there is a block.
template <class T>
class Shared {
  static_assert(std::is_trivially_copyable<T>::value, "moved as bytes");
  static_assert(sizeof(T) % 2 == 0, "races are tracked per 2 bytes");

 public:
  Shared() = default;
  Shared(size_t offset, int size) : offset_(offset), size_(size) {}

  T ld(int i) const {
    T v;
    memcpy(&v, simt::device::shared_load(offset_, size_, i, sizeof(T)), sizeof(T));
    return v;
  }
  void st(int i, const T& v) const { memcpy(simt::device::shared_store(offset_, size_, i, sizeof(T)), &v, sizeof(T)); }
  template <class U>
  Shared<U> as() const {
    return Shared<U>(offset_, static_cast<int>(size_ * sizeof(T) / sizeof(U)));
  }
  int size() const { return size_; }
  size_t offset() const { return offset_; }

 private:
  size_t offset_ = 0;
  int size_ = 0;
};

// mbarriers in the shared memory of the block: places too.
class Bars {
 public:
  static constexpr size_t kBytes = 8;  // of one

  Bars() = default;
  Bars(size_t offset, int size) : offset_(offset), size_(size) {}
  int size() const { return size_; }
  size_t offset() const { return offset_; }

 private:
  size_t offset_ = 0;
  int size_ = 0;
};

// Hands out shared memory from its beginning on. A launcher that needs the size runs the same layout while counting.
class Carver {
 public:
  explicit Carver(size_t limit) : limit_(limit) {}
  static Carver counting() { return Carver(SIZE_MAX); }

  template <class T>
  Shared<T> take(int n) {
    return Shared<T>(place(n, sizeof(T), alignof(T) > 16 ? alignof(T) : 16), n);
  }
  Bars bars(int n) { return Bars(place(n, Bars::kBytes, 16), n); }
  size_t bytes() const { return used_; }

 private:
  size_t place(int n, size_t size, size_t align) {
    const size_t offset = (used_ + align - 1) / align * align;
    used_ = offset + static_cast<size_t>(n) * size;
    if (used_ > limit_) simt::device::shared_too_small(used_);
    return offset;
  }

  size_t limit_;
  size_t used_ = 0;
};

inline Carver shared() { return Carver(simt::device::shared_bytes()); }

inline void copy_async(const Shared<Granule>& to, int i, const void* from) {
  simt::device::copy_async(to.offset(), to.size(), i, from);
}
inline void copy_commit() { simt::device::copy_commit(); }

template <int kPending>
void copy_wait() {
  static_assert(kPending >= 0, "a number of groups");
  simt::device::copy_wait(kPending);
}

// ---- asynchronous bytes and mbarriers -------------------------------------------------------

// A phase of an mbarrier completes when all its arrivals and exactly the bytes they expect have come; the phases have
// the parities 0, 1, 0, ... Bytes may come before the arrival that expects them.
inline void bar_init(const Bars& bars, int i, uint32_t count) {
  simt::device::bar_init(bars.offset(), bars.size(), i, count);
}
inline void bar_init_fence() { simt::device::bar_init_fence(); }
inline void bar_expect(const Bars& bars, int i, uint32_t bytes) {
  simt::device::bar_expect(bars.offset(), bars.size(), i, bytes);
}
inline void bar_wait(const Bars& bars, int i, uint32_t parity) {
  simt::device::bar_wait(bars.offset(), bars.size(), i, parity, false);
}
inline void bar_wait_cluster(const Bars& bars, int i, uint32_t parity) {
  simt::device::bar_wait(bars.offset(), bars.size(), i, parity, true);
}

inline void bulk_load(const Shared<Granule>& to, int i, const void* from, uint32_t bytes, const Bars& bars, int bar) {
  simt::device::bulk_load(to.offset(), to.size(), i, from, bytes, bars.offset(), bars.size(), bar);
}

template <class T>
void st_async(const Shared<T>& to, int i, int rank, const T& value, const Bars& bars, int bar) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) == 16, "16 bytes");
  simt::device::send(to.offset(), to.size(), i, rank, &value, bars.offset(), bars.size(), bar);
}

// ---- global memory --------------------------------------------------------------------------

template <class T>
T load_along(const T* p, simt::device::Path path) {
  static_assert(std::is_trivially_copyable<T>::value, "moved as bytes");
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "what one instruction loads");
  simt::device::check_load(p, sizeof(T), path);
  T v;
  memcpy(&v, static_cast<const void*>(p), sizeof(T));
  return v;
}

template <class T>
T load(const T* p) {
  return load_along(p, simt::device::Path::kConstant);
}
template <class T>
T load_streaming(const T* p) {
  return load_along(p, simt::device::Path::kConstant);
}
template <class T>
T load_written(const T* p) {
  return load_along(p, simt::device::Path::kCoherent);
}

template <class T>
void store(T* p, const T& v) {
  static_assert(std::is_trivially_copyable<T>::value, "moved as bytes");
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0, "what one instruction stores");
  static_assert(sizeof(T) % 2 == 0, "races are tracked per 2 bytes");
  simt::device::check_store(p, sizeof(T));
  memcpy(static_cast<void*>(p), &v, sizeof(T));
}
template <class T>
void store_streaming(T* p, const T& v) {
  store(p, v);
}

inline bool last_block(uint32_t* counter) { return simt::device::last_block(counter); }

// ---- arithmetic and launch ------------------------------------------------------------------

inline float exp2(float x) {
  const float y = exp2f(fabsf(x) < FLT_MIN ? 0.0f : x);
  return y < FLT_MIN ? 0.0f : y;  // NaN stays
}

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  void* stream;
  int cluster = 1;  // blocks per cluster; blocks is a multiple of it
};

// 0, or 1 after a fault, which simt::fault() tells.
template <auto kKernel, class Args>
int launch(const Launch& at, const Args& args) {
  const auto body = [](const void* context) { kKernel(*static_cast<const Args*>(context)); };
  return simt::device::run(at.blocks, at.threads, at.shared_bytes, body, &args, at.cluster);
}

}  // namespace arch
}  // namespace kd
