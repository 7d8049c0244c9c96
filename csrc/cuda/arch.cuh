// What the kernels ask of the machine: threads, barriers, shuffles, memory. Every PTX instruction and every intrinsic
// stands here behind a name, and nowhere else. Without nvcc the same names come from the emulation in simt/, so that
// one source of a kernel runs on a GPU and in the tests.
#pragma once

#if !defined(__CUDACC__)

#include "../simt/arch.h"
#define KD_EXP2F kd::arch::exp2
#define KD_LOG2F log2f
#define KD_UNROLL
#define KD_ROLL
#include "../stored.h"

namespace kd {
namespace arch {

constexpr bool kHasClusters = true, kFewerRegisters = false;

inline void from_halves(uint32_t bits, float& low, float& high) {
  low = to_float(F16{static_cast<uint16_t>(bits)});
  high = to_float(F16{static_cast<uint16_t>(bits >> 16)});
}
template <class T>
inline uint32_t stored_pair(float low, float high) {
  T a, b;
  from_float(a, low);
  from_float(b, high);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
inline uint32_t to_halves(float low, float high) { return stored_pair<F16>(low, high); }
inline uint32_t to_bfloats(float low, float high) { return stored_pair<BF16>(low, high); }
template <class T>
inline uint32_t max_pair(uint32_t a, uint32_t b) {
  float x[2], y[2];
  for (int i = 0; i < 2; ++i) {
    x[i] = to_float(T{static_cast<uint16_t>(a >> 16 * i)});
    y[i] = to_float(T{static_cast<uint16_t>(b >> 16 * i)});
  }
  return stored_pair<T>(fmaxf(x[0], y[0]), fmaxf(x[1], y[1]));
}
inline uint32_t max_halves(uint32_t a, uint32_t b) { return max_pair<F16>(a, b); }
inline uint32_t max_bfloats(uint32_t a, uint32_t b) { return max_pair<BF16>(a, b); }
inline uint32_t funnel(uint32_t low, uint32_t high, int shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift);
}

}  // namespace arch
}  // namespace kd

#else

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#define KD_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define KD_ARGUMENT(T) const __grid_constant__ T
#define KD_DEVICE __device__ __forceinline__
#define KD_EXP2F kd::arch::exp2
#define KD_LOG2F kd::arch::log2
#define KD_RECIPROCALF kd::arch::reciprocal
#define KD_UNROLL _Pragma("unroll")
#define KD_ROLL _Pragma("unroll 1")

namespace kd {
namespace arch {

// Whether blocks see each other's shared memory, with barriers in memory and bulk copies. Kernels that use them are
// empty where they do not.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

// Whether the compiler needs so many registers for itself that kernels must do with fewer.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr bool kFewerRegisters = true;
#else
constexpr bool kFewerRegisters = false;
#endif

struct alignas(16) Granule {  // what one memory instruction moves
  uint32_t w[4];
};

// ---- threads ------------------------------------------------------------------------------------------------------

KD_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
KD_DEVICE int threads() { return static_cast<int>(blockDim.x); }
KD_DEVICE int lane() { return static_cast<int>(threadIdx.x % 32); }
KD_DEVICE int64_t block() { return blockIdx.x; }
KD_DEVICE int64_t blocks() { return gridDim.x; }

KD_DEVICE void sync_block() { __syncthreads(); }
KD_DEVICE void sync_warp(uint32_t mask = ~0u) { __syncwarp(mask); }

// Of this block among the blocks of its cluster.
KD_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
KD_DEVICE int cluster_blocks() {
  uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}
KD_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

template <class T>
KD_DEVICE T shfl_xor(T v, int lane_mask, uint32_t mask = ~0u) {
  return __shfl_xor_sync(mask, v, lane_mask);
}
KD_DEVICE uint32_t ballot(bool x, uint32_t mask = ~0u) { return __ballot_sync(mask, x); }
KD_DEVICE int bits(uint32_t x) { return __popc(x); }  // how many are set

// ---- shared memory ------------------------------------------------------------------------------------------------

extern __shared__ __align__(16) char dynamic_shared_memory[];

// An array in the block's shared memory: an offset, which takes one register and not two.
template <class T>
class Shared {
 public:
  Shared() = default;
  __host__ KD_DEVICE explicit Shared(uint32_t offset) : offset_(offset) {}
  KD_DEVICE T ld(int i) const { return *at(i); }
  KD_DEVICE void st(int i, const T& v) const { *at(i) = v; }
  template <class U>
  KD_DEVICE Shared<U> as() const {
    return Shared<U>(offset_);
  }
  KD_DEVICE T* at(int i) const { return reinterpret_cast<T*>(dynamic_shared_memory + offset_) + i; }  // for this file

 private:
  uint32_t offset_;
};

// Barriers in shared memory (mbarriers). A phase of one completes when its arrivals have come and as many bytes as they
// announced; phases alternate between the parities 0 and 1.
class Bars {
 public:
  Bars() = default;
  __host__ KD_DEVICE explicit Bars(Shared<uint64_t> data) : data_(data) {}
  KD_DEVICE uint32_t at(int i) const { return static_cast<uint32_t>(__cvta_generic_to_shared(data_.at(i))); }

 private:
  Shared<uint64_t> data_;
};

// Cuts a block's shared memory into arrays. The launcher counts with it what a kernel will take.
class Carver {
 public:
  static __host__ Carver counting() { return Carver(); }
  template <class T>
  __host__ KD_DEVICE Shared<T> take(int n) {
    used_ = (used_ + 15) / 16 * 16;
    const Shared<T> out(used_);
    used_ += static_cast<uint32_t>(sizeof(T)) * n;
    return out;
  }
  __host__ KD_DEVICE Bars bars(int n) { return Bars(take<uint64_t>(n)); }
  __host__ KD_DEVICE size_t bytes() const { return used_; }

 private:
  uint32_t used_ = 0;
};

KD_DEVICE Carver shared() { return Carver(); }

// Global to shared memory past the registers. Copies of a thread complete in groups; after copy_wait<n> all but its
// last n groups have arrived, for that thread.
KD_DEVICE void copy_async(const Shared<Granule>& to, int i, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to.at(i)));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
KD_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
KD_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// By one thread, which makes them known to the cluster and to copies afterwards; a barrier follows.
KD_DEVICE void bar_init(const Bars& bars, int i, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bars.at(i)), "r"(count) : "memory");
}
KD_DEVICE void bar_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Arrives, and announces bytes.
KD_DEVICE void bar_expect(const Bars& bars, int i, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(bars.at(i)), "r"(bytes)
               : "memory");
}
// Until the phase of that parity is complete.
KD_DEVICE void bar_wait(const Bars& bars, int i, uint32_t parity) {
  uint32_t done;
  do
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(bars.at(i)), "r"(parity)
        : "memory");
  while (!done);
}
// The same, for bytes that other blocks of the cluster sent.
KD_DEVICE void bar_wait_cluster(const Bars& bars, int i, uint32_t parity) {
  uint32_t done;
  do
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(bars.at(i)), "r"(parity)
        : "memory");
  while (!done);
}
// Global to shared memory by the copy engine: a multiple of 16 bytes, all on 16-byte boundaries.
KD_DEVICE void bulk_load(const Shared<Granule>& to, int i, const void* from, uint32_t bytes, const Bars& bars,
                         int bar) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to.at(i)));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address),
               "l"(from), "r"(bytes), "r"(bars.at(bar))
               : "memory");
}
// To the same place in the shared memory of the cluster's block `rank`, whose barrier it counts at.
KD_DEVICE void st_async(const Shared<Granule>& to, int i, int rank, const Granule& value, const Bars& bars, int bar) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to.at(i)));
  uint32_t there, bar_there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bar_there) : "r"(bars.at(bar)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
      "r"(value.w[0]), "r"(value.w[1]), "r"(value.w[2]), "r"(value.w[3]), "r"(bar_there)
      : "memory");
}

// ---- global memory ------------------------------------------------------------------------------------------------

namespace detail {

template <class T, class Raw>
KD_DEVICE T cast(const Raw& raw) {
  static_assert(sizeof(T) == sizeof(Raw), "the same bytes");
  T out;
  memcpy(&out, &raw, sizeof(T));
  return out;
}
template <int kBytes>
struct RawOf;
template <>
struct RawOf<2> {
  using type = unsigned short;
};
template <>
struct RawOf<4> {
  using type = unsigned int;
};
template <>
struct RawOf<8> {
  using type = unsigned long long;
};
template <>
struct RawOf<16> {
  using type = uint4;
};
template <class T>
using Raw = typename RawOf<sizeof(T)>::type;

}  // namespace detail

// Data that no kernel writes while this one runs.
template <class T>
KD_DEVICE T load(const T* p) {
  return detail::cast<T>(__ldg(reinterpret_cast<const detail::Raw<T>*>(p)));
}
// The same, read for the last time.
template <class T>
KD_DEVICE T load_streaming(const T* p) {
  return detail::cast<T>(__ldcs(reinterpret_cast<const detail::Raw<T>*>(p)));
}
// Data that other blocks of this kernel wrote before they arrived at last_block().
template <class T>
KD_DEVICE T load_written(const T* p) {
  return detail::cast<T>(__ldcg(reinterpret_cast<const detail::Raw<T>*>(p)));
}
template <class T>
KD_DEVICE void store(T* p, const T& v) {
  *reinterpret_cast<detail::Raw<T>*>(p) = detail::cast<detail::Raw<T>>(v);
}
// Data that this kernel does not need again.
template <class T>
KD_DEVICE void store_streaming(T* p, const T& v) {
  __stcs(reinterpret_cast<detail::Raw<T>*>(p), detail::cast<detail::Raw<T>>(v));
}

// By one thread of every block, after the block's last store of what the last one will read. Leaves the counter at 0.
KD_DEVICE bool last_block(uint32_t* counter) {
  __threadfence();
  const bool last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  __threadfence();
  return last;
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

// 2^x by the special function unit: relative error 2^-22.5, 0 below 2^-126.
KD_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__host__ KD_DEVICE float exp2(float x) {
#if defined(__CUDA_ARCH__)
  return exp2_approx(x);
#else
  return ::exp2f(x);
#endif
}
// log2 x by the same unit: absolute error 2^-22 from 1/2 to 2, relative 2^-22 elsewhere.
__host__ KD_DEVICE float log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::log2f(x);
#endif
}
// 1 / x by the same unit, of x from 2^-126 to 2^126: within one unit in the last place.
__host__ KD_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// Two stored values in 32 bits, lower address first.
KD_DEVICE void from_halves(uint32_t bits, float& low, float& high) {
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(low), "=f"(high)
      : "r"(bits));
}
KD_DEVICE uint32_t to_halves(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
KD_DEVICE uint32_t to_bfloats(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// The larger of each two values. Of a number and NaN, the number.
KD_DEVICE uint32_t max_halves(uint32_t a, uint32_t b) {
  uint32_t bits;
  asm("max.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(a), "r"(b));
  return bits;
}
KD_DEVICE uint32_t max_bfloats(uint32_t a, uint32_t b) {
  uint32_t bits;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(bits) : "r"(a), "r"(b));
  return bits;
}

// Bits shift.. shift + 32 of high:low.
KD_DEVICE uint32_t funnel(uint32_t low, uint32_t high, int shift) { return __funnelshift_r(low, high, shift); }

// ---- launching ----------------------------------------------------------------------------------------------------

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  void* stream;
  int cluster = 1;  // blocks of a cluster
};

constexpr int kMostDevices = 256;

// What devices have been told about a kernel, bits of device.cu. One per kernel, all 0 to begin with.
struct Told {
  std::atomic<uint8_t> devices[kMostDevices];
};

// On the current device: 0, or CUDA's error code. In device.cu, because nothing of it depends on the kernel.
int launch_kernel(const void* kernel, Told& told, const Launch& how, void** arguments);

template <auto kKernel, class Args>
int launch(const Launch& how, const Args& args) {
  static Told told;
  void* arguments[] = {const_cast<Args*>(&args)};
  return launch_kernel(reinterpret_cast<const void*>(kKernel), told, how, arguments);
}

}  // namespace arch
}  // namespace kd

#endif
