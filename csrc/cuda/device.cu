#include "device.h"

#include <cuda_runtime.h>

#include <array>
#include <atomic>

namespace kd {
namespace gpu {

namespace {

constexpr uint32_t kCounters = 1 << 16;
__device__ uint32_t counters[kCounters];  // zeros, per device, from the moment the module is loaded

__global__ void probe() {}  // stands for kernels that take a multiprocessor's shared memory per block

// How many clusters of so many blocks are resident at a time; 0 where there can be none, whatever the reason.
int most_clusters(int blocks, int shared) {
  const void* const kernel = reinterpret_cast<const void*>(probe);
  int found = 0;
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.attrs = &size;
  config.numAttrs = 1;
  const bool known = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) == cudaSuccess &&
                     cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
                     cudaOccupancyMaxActiveClusters(&found, probe, &config) == cudaSuccess;
  if (!known) cudaGetLastError();  // or the next caller who asks is blamed for it
  return known ? found : 0;
}

}  // namespace

int device_facts(int index, Device& out) {
  int multiprocessors = 0, per_block = 0, per_multiprocessor = 0, l2 = 0;
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(&value, attribute, index);
  };
  for (const cudaError_t error :
       {get(multiprocessors, cudaDevAttrMultiProcessorCount), get(per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin),
        get(per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor), get(l2, cudaDevAttrL2CacheSize)})
    if (error != cudaSuccess) return static_cast<int>(error);
  out = {multiprocessors, per_block, per_multiprocessor, l2, {}};
  int major = 0;
  if (const cudaError_t error = get(major, cudaDevAttrComputeCapabilityMajor)) return static_cast<int>(error);
  for (int i = 0; major >= 9 && i < kClusterSizes; ++i) out.clusters[i] = most_clusters(1 << i, per_block);
  return 0;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int is_captured(void* stream, bool& out) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  out = status != cudaStreamCaptureStatusNone;
  return static_cast<int>(error);
}

int take_counter(int device, void* stream, uint32_t* offered, uint32_t** out) {
  if (offered) {
    *out = offered;
    return static_cast<int>(cudaMemsetAsync(offered, 0, sizeof(uint32_t), static_cast<cudaStream_t>(stream)));
  }
  static std::atomic<uint32_t> next{0};
  static std::array<std::atomic<uint32_t*>, kMostDevices> rings;  // asked for once: it takes as long as a launch
  uint32_t* ring = rings[device].load();
  if (!ring) {
    void* found = nullptr;
    if (const cudaError_t error = cudaGetSymbolAddress(&found, counters)) return static_cast<int>(error);
    rings[device] = ring = static_cast<uint32_t*>(found);
  }
  *out = ring + next++ % kCounters;
  return 0;
}

}  // namespace gpu
}  // namespace kd
