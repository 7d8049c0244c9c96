#include "device.h"

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <mutex>
#include <optional>

#include "arch.cuh"

namespace kd {

namespace {

constexpr uint32_t kCounters = 1 << 16;
__device__ uint32_t counters[kCounters];  // zeros, per device, from the moment the module is loaded

__global__ void probe() {}  // stands for kernels that take a multiprocessor's shared memory per block

int code(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();  // or the next caller who asks is blamed for it
  return static_cast<int>(error);
}

// What loads code, or asks or tells something about a kernel, may not be done while a graph is captured, be it by
// another thread: CUDA would refuse it and give up the graph. None of it belongs into a graph, so it is done beside.
class Beside {
 public:
  Beside() : relaxed_(code(cudaThreadExchangeStreamCaptureMode(&mode_)) == 0) {}
  ~Beside() {
    if (relaxed_) code(cudaThreadExchangeStreamCaptureMode(&mode_));
  }
  Beside(const Beside&) = delete;
  Beside& operator=(const Beside&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // afterwards what it was
  bool relaxed_;
};

int current_device(int& out) {
  if (const int error = code(cudaGetDevice(&out))) return error;
  return out < arch::kMostDevices ? 0 : static_cast<int>(cudaErrorInvalidDevice);
}

int shared_per_block(int device, int& out) {
  return code(cudaDeviceGetAttribute(&out, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

}  // namespace

// ---- launches -----------------------------------------------------------------------------------------------------

namespace arch {

namespace {

// What every launch may have. For more a kernel must ask.
constexpr size_t kSharedBytes = 48 << 10;
constexpr int kClusterBlocks = 8;
// Of a kernel on a device: its code is there; all of the shared memory, clusters of any size are allowed.
enum : uint8_t { kLoaded = 1, kShared = 2, kClusters = 4 };

int tell(const void* kernel, int device, uint8_t what) {
  const Beside beside;
  cudaFuncAttributes attributes;
  int most = 0;
  if (what & kLoaded)
    if (const int error = code(cudaFuncGetAttributes(&attributes, kernel))) return error;
  if (what & kShared) {
    // All that there is, because calls on other threads may need more than this one.
    if (const int error = shared_per_block(device, most)) return error;
    if (const int error = code(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)))
      return error;
  }
  if (what & kClusters) return code(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  return 0;
}

}  // namespace

int launch_kernel(const void* kernel, Told& told, const Launch& how, void** arguments) {
  int device = 0;
  if (const int error = current_device(device)) return error;
  std::atomic<uint8_t>& known = told.devices[device];
  uint8_t wanted = kLoaded;
  if (how.shared_bytes > kSharedBytes) wanted |= kShared;
  if (how.cluster > kClusterBlocks) wanted |= kClusters;
  if (const uint8_t missing = wanted & ~known.load()) {
    if (const int error = tell(kernel, device, missing)) return error;
    known |= missing;  // not before it is true: other threads go by it
  }
  if (how.blocks < 1 || how.blocks > INT32_MAX) return static_cast<int>(cudaErrorInvalidConfiguration);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = static_cast<cudaStream_t>(how.stream);
  cudaLaunchAttribute clusters = {};
  clusters.id = cudaLaunchAttributeClusterDimension;
  clusters.val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  config.attrs = &clusters;
  config.numAttrs = how.cluster > 1;
  return code(cudaLaunchKernelExC(&config, kernel, arguments));
}

}  // namespace arch

// ---- devices ------------------------------------------------------------------------------------------------------

namespace gpu {

namespace {

// How many clusters of so many blocks are resident at a time, in `out`; 0 where there are none of that size, and where
// the device does not say: then false is returned.
bool most_clusters(const void* kernel, int index, int blocks, int shared, int& out) {
  out = 0;
  if (blocks > arch::kClusterBlocks && arch::tell(kernel, index, arch::kClusters)) return false;
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.attrs = &size;
  config.numAttrs = 1;
  int found = 0;
  const int error = code(cudaOccupancyMaxActiveClusters(&found, kernel, &config));
  if (!error) out = found;
  return !error || error == cudaErrorInvalidClusterSize;
}

// A cluster size that the device does not answer for is no error, because the call may do without: there are then none
// of this size, and the facts are not `complete`.
int ask_device(int index, Device& out, bool& complete) {
  const Beside beside;
  const void* const kernel = reinterpret_cast<const void*>(probe);
  int multiprocessors = 0, per_block = 0, per_multiprocessor = 0, l2 = 0, has_clusters = 0;
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    return code(cudaDeviceGetAttribute(&value, attribute, index));
  };
  if (const int error = shared_per_block(index, per_block)) return error;
  if (const int error = get(multiprocessors, cudaDevAttrMultiProcessorCount)) return error;
  if (const int error = get(per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor)) return error;
  if (const int error = get(l2, cudaDevAttrL2CacheSize)) return error;
  if (const int error = get(has_clusters, cudaDevAttrClusterLaunch)) return error;
  out = {multiprocessors, per_block, per_multiprocessor, l2, {}};
  complete = true;
  // A build for older devices runs here too, from its PTX, but its cluster kernels are empty (arch::kHasClusters).
  cudaFuncAttributes compiled;
  if (const int error = code(cudaFuncGetAttributes(&compiled, kernel))) return error;
  if (!has_clusters || compiled.ptxVersion < 90) return 0;
  if (const int error = arch::tell(kernel, index, arch::kShared)) return error;
  for (int i = 0; i < kClusterSizes; ++i)
    complete = most_clusters(kernel, index, 1 << i, per_block, out.clusters[i]) && complete;
  return 0;
}

}  // namespace

int device_facts(Device& out) {
  static std::array<std::optional<Device>, arch::kMostDevices> known;
  static std::mutex mutex;
  int index = 0;
  if (const int error = current_device(index)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known[index]) {
    out = *known[index];
    return 0;
  }
  bool complete = false;
  if (const int error = ask_device(index, out, complete)) return error;
  if (complete) known[index] = out;
  return 0;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int is_captured(void* stream, bool& out) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const int error = code(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  out = status != cudaStreamCaptureStatusNone;
  return error;
}

int take_counter(void* stream, uint32_t* offered, uint32_t** out) {
  if (offered) {
    *out = offered;
    return code(cudaMemsetAsync(offered, 0, sizeof(uint32_t), static_cast<cudaStream_t>(stream)));
  }
  static std::atomic<uint32_t> next{0};
  static std::array<std::atomic<uint32_t*>, arch::kMostDevices> rings;  // asked for once: it takes as long as a launch
  int device = 0;
  if (const int error = current_device(device)) return error;
  uint32_t* ring = rings[device].load();
  if (!ring) {
    const Beside beside;
    void* found = nullptr;
    if (const int error = code(cudaGetSymbolAddress(&found, counters))) return error;
    rings[device] = ring = static_cast<uint32_t*>(found);
  }
  *out = ring + next++ % kCounters;
  return 0;
}

}  // namespace gpu
}  // namespace kd
