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

inline void sync_block() { simt::device::sync_block(); }
inline void sync_warp(uint32_t mask = ~0u) { simt::device::sync_warp(mask); }

template <class T>
T shfl_xor(T v, int lane_mask, uint32_t mask = ~0u) {
  static_assert(std::is_trivially_copyable<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = simt::device::shuffle_xor(bits, sizeof(T), lane_mask, mask);
  memcpy(&v, &bits, sizeof(T));
  return v;
}

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
    constexpr size_t align = alignof(T) > 16 ? alignof(T) : 16;
    const size_t offset = (used_ + align - 1) / align * align;
    used_ = offset + static_cast<size_t>(n) * sizeof(T);
    if (used_ > limit_) simt::device::shared_too_small(used_);
    return Shared<T>(offset, n);
  }
  size_t bytes() const { return used_; }

 private:
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
};

// 0, or 1 after a fault, which simt::fault() tells.
template <auto kKernel, class Args>
int launch(const Launch& at, const Args& args) {
  const auto body = [](const void* context) { kKernel(*static_cast<const Args*>(context)); };
  return simt::device::run(at.blocks, at.threads, at.shared_bytes, body, &args);
}

}  // namespace arch
}  // namespace kd
