#include "runtime.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <unordered_map>
#include <utility>

namespace kd {
namespace fake {

namespace {

constexpr int kSharedOfAll = 48 << 10, kReserved = 1 << 10;  // of a block: without asking; the driver's own
constexpr int kPortableCluster = 8;
constexpr int64_t kMostBlocks = INT32_MAX;
constexpr int kRegisters = 64 << 10, kPartitions = 4, kRegisterUnit = 256;  // of a multiprocessor; what a warp takes

struct Kernel {
  std::string name;
  Compiled compiled;
  struct OnDevice {
    bool loaded = false, all_clusters = false;
    int shared = kSharedOfAll;
  };
  std::map<int, OnDevice> on;
};

struct OwnDevice : Device {
  int error = 0;  // sticky
};

struct Stream {
  int device;
  bool capturing = false, valid = true;
  Mode mode = Mode::global;
  std::thread::id thread;
};

// Never destroyed: objects register themselves before main() and go after it.
struct State {
  std::mutex mutex;
  std::condition_variable moved;
  std::vector<OwnDevice> devices;
  std::unordered_map<const void*, Kernel> kernels;
  std::map<const void*, std::string> variables;
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<Launch> launches;
  std::vector<std::string> refusals;
  struct {
    std::string function;
    int error = 0, calls = 0, after = 0;
  } planted;         // as in plant_error()
  std::string held;  // the function at whose call a thread shall wait
  bool waiting = false;
};
State& state() {
  static State& all = *new State;
  return all;
}

struct Thread {
  int device = 0, last_error = 0;
  Mode mode = Mode::global;
};
thread_local Thread self;

using Lock = std::unique_lock<std::mutex>;

OwnDevice& device_of(int index) {
  if (index < 0 || index >= static_cast<int>(state().devices.size())) throw std::out_of_range("no such device");
  return state().devices[index];
}
Stream& stream_of(void* stream) {
  for (const auto& known : state().streams)
    if (known.get() == stream) return *known;
  throw std::out_of_range("no such stream");
}

cudaError_t refuse(cudaError_t error, const std::string& why) {
  state().refusals.push_back(why);
  return error;
}
std::string text(int64_t x) { return std::to_string(x); }

// A potentially unsafe call: not while a graph is captured, by the rules of cudaThreadExchangeStreamCaptureMode().
cudaError_t unsafe(const char* what) {
  if (self.mode == Mode::relaxed) return cudaSuccess;
  const auto me = std::this_thread::get_id();
  bool prohibited = false;
  for (const auto& x : state().streams) {
    const bool own = x->thread == me && x->mode != Mode::relaxed;
    const bool other = x->thread != me && x->mode == Mode::global && self.mode == Mode::global;
    if (!x->capturing || !(own || other)) continue;
    x->valid = false;
    prohibited = true;
  }
  if (!prohibited) return cudaSuccess;
  return refuse(cudaErrorStreamCaptureUnsupported, std::string(what) + " while a graph is captured");
}

enum class On { process, device };  // whether a call needs a device that works

// What every function of the API begins and ends with.
template <class Body>
cudaError_t api(const char* function, On on, Body body) {
  Lock lock(state().mutex);
  if (state().held == function && !state().waiting) {
    state().waiting = true;
    state().moved.notify_all();
    state().moved.wait(lock, [] { return state().held.empty(); });
  }
  cudaError_t error = cudaSuccess;
  auto& planted = state().planted;
  if (planted.calls > 0 && planted.function == function && planted.after-- <= 0) {
    error = static_cast<cudaError_t>(planted.error);
    --planted.calls;
  } else if (on == On::device && self.device >= static_cast<int>(state().devices.size())) {
    error = cudaErrorInvalidDevice;
  } else if (on == On::device && device_of(self.device).error) {
    error = static_cast<cudaError_t>(device_of(self.device).error);
  } else {
    error = body();
  }
  if (error != cudaSuccess) self.last_error = error;
  return error;
}

// body(kernel, what the current device has of it)
template <class Body>
cudaError_t with_kernel(const char* api_function, const void* function, Body body) {
  return api(api_function, On::device, [&] {
    const auto found = state().kernels.find(function);
    if (found == state().kernels.end()) return refuse(cudaErrorInvalidDeviceFunction, "a function that is no kernel");
    return body(found->second, found->second.on[self.device]);
  });
}

cudaError_t load(Kernel::OnDevice& here) {
  if (here.loaded) return cudaSuccess;
  if (const cudaError_t error = unsafe("loading a kernel")) return error;
  here.loaded = true;
  return cudaSuccess;
}

int warps_of(int registers) {
  const int each = (registers * 32 + kRegisterUnit - 1) / kRegisterUnit * kRegisterUnit;
  return kPartitions * (kRegisters / kPartitions / each);
}

int resident_blocks(const Kernel& kernel, const Device& device, int64_t threads, int64_t shared) {
  const bool small = device.capability == 86 || device.capability == 89 || device.capability >= 120;
  const int64_t most_threads = small ? 1536 : 2048, warps = threads / 32;
  const int64_t by_shared = device.shared_per_multiprocessor / (shared + kernel.compiled.shared + kReserved);
  return static_cast<int>(std::min({most_threads / threads, warps_of(kernel.compiled.registers) / warps, by_shared}));
}

// The size of its clusters, 0 where an attribute is none that is known here.
unsigned cluster_of(const cudaLaunchConfig_t& config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) return 0;
    const auto& dim = config.attrs[i].val.clusterDim;
    size = dim.x * dim.y * dim.z;
  }
  return size;
}

cudaError_t check_cluster(const Kernel& kernel, const Kernel::OnDevice& here, unsigned size) {
  const int largest = device_of(self.device).largest_cluster;
  const auto no = [&](cudaError_t error, const std::string& why) {
    return refuse(error, kernel.name + ": a cluster of " + text(size) + " blocks " + why);
  };
  if (size == 0) return no(cudaErrorInvalidValue, "or an attribute that is not known here");
  if (size == 1) return cudaSuccess;
  if (largest == 1) return no(cudaErrorNotSupported, "on a device that has no clusters");
  if (size > kPortableCluster && !here.all_clusters)
    return no(cudaErrorInvalidClusterSize, "without NonPortableClusterSizeAllowed");
  if (static_cast<int>(size) > largest)
    return no(cudaErrorInvalidClusterSize, "on a device whose largest has " + text(largest));
  return cudaSuccess;
}

cudaError_t check_block(const Kernel& kernel, const Kernel::OnDevice& here, const cudaLaunchConfig_t& config) {
  const dim3 block = config.blockDim;
  const int64_t threads = int64_t(block.x) * block.y * block.z;
  const auto no = [&](cudaError_t error, const std::string& why) {
    return refuse(error, kernel.name + ": a block of " + text(threads) + " threads " + why);
  };
  if (threads == 0 || threads > 1024) return no(cudaErrorInvalidConfiguration, "cannot be");
  if (threads % 32) return no(cudaErrorInvalidConfiguration, "is no number of warps (a rule of ours)");
  if (threads > kernel.compiled.most_threads)
    return no(cudaErrorInvalidValue, "of a kernel for " + text(kernel.compiled.most_threads));
  if (threads / 32 > warps_of(kernel.compiled.registers))
    return no(cudaErrorLaunchOutOfResources, "of " + text(kernel.compiled.registers) + " registers");
  if (config.dynamicSmemBytes > static_cast<size_t>(here.shared))
    return no(cudaErrorInvalidValue,
              "with " + text(config.dynamicSmemBytes) + " bytes of shared memory, allowed are " + text(here.shared));
  return cudaSuccess;
}

cudaError_t launch(Kernel& kernel, Kernel::OnDevice& here, const cudaLaunchConfig_t& config) {
  Stream* const stream = config.stream ? &stream_of(config.stream) : nullptr;
  if (stream && stream->device != self.device)
    return refuse(cudaErrorInvalidResourceHandle, kernel.name + ": a stream of device " + text(stream->device) +
                                                      " while the current one is " + text(self.device));
  if (const cudaError_t error = load(here)) return error;
  if (const cudaError_t error = check_block(kernel, here, config)) return error;
  const unsigned size = cluster_of(config);
  if (const cudaError_t error = check_cluster(kernel, here, size)) return error;
  const dim3 grid = config.gridDim;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  if (blocks == 0 || grid.x > kMostBlocks || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, kernel.name + ": a grid of " + text(blocks) + " blocks");
  if (blocks % size)
    return refuse(cudaErrorInvalidConfiguration,
                  kernel.name + ": " + text(blocks) + " blocks in clusters of " + text(size));
  if (stream && stream->capturing && !stream->valid)
    return refuse(cudaErrorStreamCaptureInvalidated, kernel.name + ": the graph has been given up");
  const int64_t threads = int64_t(config.blockDim.x) * config.blockDim.y * config.blockDim.z;
  const int64_t shared = static_cast<int64_t>(config.dynamicSmemBytes);
  state().launches.push_back({&kernel.name, blocks, threads, shared, size, self.device, stream && stream->capturing,
                              resident_blocks(kernel, device_of(self.device), threads, shared)});
  return cudaSuccess;
}

}  // namespace

int add_device(const Device& device) {
  const Lock lock(state().mutex);
  state().devices.push_back({device, 0});
  return static_cast<int>(state().devices.size()) - 1;
}
void forget() {
  const Lock lock(state().mutex);
  for (const auto& stream : state().streams) stream->capturing = false;
  state().launches.clear();
  state().refusals.clear();
  state().planted = {};
  state().held.clear();
  state().waiting = false;
  self.last_error = 0;
  self.mode = Mode::global;
}
void use_device(int index) {
  const Lock lock(state().mutex);
  device_of(index);
  self.device = index;
}
void break_device(int index, int error) {
  const Lock lock(state().mutex);
  device_of(index).error = error;
}

std::vector<std::string> kernels() {
  const Lock lock(state().mutex);
  std::vector<std::string> out;
  for (const auto& [_, kernel] : state().kernels) out.push_back(kernel.name);
  std::sort(out.begin(), out.end());
  return out;
}
int launch(const std::string& name, int64_t blocks, int threads, size_t shared, int cluster, void* stream) {
  const void* function = nullptr;
  for (const auto& [host, kernel] : state().kernels)
    if (kernel.name == name) function = host;
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &size;
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, function, nullptr);
}
void know_kernel(const std::string& name, const Compiled& compiled) {
  const Lock lock(state().mutex);
  for (auto& [_, kernel] : state().kernels)
    if (kernel.name == name) {
      kernel.compiled = compiled;
      return;
    }
  throw std::out_of_range("no kernel " + name);
}

void* new_stream(int device) {
  const Lock lock(state().mutex);
  device_of(device);
  state().streams.push_back(std::make_unique<Stream>(Stream{device, false, true, Mode::global, {}}));
  return state().streams.back().get();
}
void begin_capture(void* stream, Mode mode) {
  const Lock lock(state().mutex);
  Stream& x = stream_of(stream);
  x = {x.device, true, true, mode, std::this_thread::get_id()};
}
bool end_capture(void* stream) {
  const Lock lock(state().mutex);
  Stream& x = stream_of(stream);
  x.capturing = false;
  return x.valid;
}
Mode mode() { return self.mode; }

std::vector<Launch> take_launches() {
  const Lock lock(state().mutex);
  return std::exchange(state().launches, {});
}
std::vector<std::string> take_refusals() {
  const Lock lock(state().mutex);
  return std::exchange(state().refusals, {});
}
int last_error() { return cudaGetLastError(); }

void plant_error(const std::string& function, int error, int calls, int after) {
  const Lock lock(state().mutex);
  state().planted = {function, error, calls, after};
}
void hold(const std::string& function) {
  const Lock lock(state().mutex);
  state().held = function;
  state().waiting = false;
}
bool await_held() {
  Lock lock(state().mutex);
  state().moved.wait(lock, [] { return state().waiting || state().held.empty(); });
  return state().waiting;
}
void release() {
  const Lock lock(state().mutex);
  state().held.clear();
  state().moved.notify_all();
}

}  // namespace fake
}  // namespace kd

// ---- the API ------------------------------------------------------------------------------------------------------

using namespace kd::fake;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  state().kernels[host].name = name;
}
void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t, int, int) {
  state().variables[host] = name;
}

// What <<< >>> is made of; nothing here uses it.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaGetDevice(int* out) {
  return api("cudaGetDevice", On::process, [&] {
    *out = self.device;
    return cudaSuccess;
  });
}

cudaError_t cudaGetLastError() {
  const Lock lock(state().mutex);
  const int sticky = self.device < static_cast<int>(state().devices.size()) ? device_of(self.device).error : 0;
  const int error = sticky ? sticky : self.last_error;
  self.last_error = sticky;
  return static_cast<cudaError_t>(error);
}

const char* cudaGetErrorString(cudaError_t error) {
  static thread_local std::string said;
  said = "error " + text(error);
  return said.c_str();
}

cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr attribute, int index) {
  return api("cudaDeviceGetAttribute", On::process, [&] {
    if (index < 0 || index >= static_cast<int>(state().devices.size()))
      return refuse(cudaErrorInvalidDevice, "device " + text(index));
    const Device& x = device_of(index);
    switch (attribute) {
      case cudaDevAttrMultiProcessorCount:
        *out = x.multiprocessors;
        return cudaSuccess;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *out = x.shared_per_block;
        return cudaSuccess;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *out = x.shared_per_multiprocessor;
        return cudaSuccess;
      case cudaDevAttrL2CacheSize:
        *out = x.l2;
        return cudaSuccess;
      case cudaDevAttrComputeCapabilityMajor:
        *out = x.capability / 10;
        return cudaSuccess;
      case cudaDevAttrClusterLaunch:
        *out = x.largest_cluster > 1;
        return cudaSuccess;
      default:
        return refuse(cudaErrorInvalidValue, "device attribute " + text(attribute) + " is not known here");
    }
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  return with_kernel("cudaFuncGetAttributes", function, [&](Kernel& kernel, Kernel::OnDevice& here) {
    if (const cudaError_t error = load(here)) return error;
    *out = {};
    out->sharedSizeBytes = kernel.compiled.shared;
    out->maxThreadsPerBlock = kernel.compiled.most_threads;
    out->numRegs = kernel.compiled.registers;
    out->ptxVersion = device_of(self.device).code;
    out->binaryVersion = device_of(self.device).capability;
    out->maxDynamicSharedSizeBytes = here.shared;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return with_kernel("cudaFuncSetAttribute", function, [&](Kernel& kernel, Kernel::OnDevice& here) {
    if (const cudaError_t error = unsafe("cudaFuncSetAttribute")) return error;
    const Device& device = device_of(self.device);
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
      const int most = device.shared_per_block - kernel.compiled.shared;
      if (value < 0 || value > most)
        return refuse(cudaErrorInvalidValue,
                      kernel.name + ": wants " + text(value) + " of " + text(most) + " bytes of shared memory");
      here.shared = value;
      return cudaSuccess;
    }
    if (attribute != cudaFuncAttributeNonPortableClusterSizeAllowed || device.largest_cluster == 1)
      return refuse(cudaErrorInvalidValue, kernel.name + ": attribute " + text(attribute) + " on this device");
    here.all_clusters = value != 0;
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveClusters(int* out, const void* function, const cudaLaunchConfig_t* config) {
  return with_kernel("cudaOccupancyMaxActiveClusters", function, [&](Kernel& kernel, Kernel::OnDevice& here) {
    if (const cudaError_t error = unsafe("cudaOccupancyMaxActiveClusters")) return error;
    if (const cudaError_t error = check_block(kernel, here, *config)) return error;
    const unsigned size = cluster_of(*config);
    const Device& device = device_of(self.device);
    // To ask for a size that a device has not is no fault.
    if (static_cast<int>(size) > device.largest_cluster) return cudaErrorInvalidClusterSize;
    if (const cudaError_t error = check_cluster(kernel, here, size)) return error;
    size_t log = 0;
    while (1u << log < size) ++log;
    *out = log < device.clusters.size() ? device.clusters[log] : 0;
    return cudaSuccess;
  });
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return with_kernel("cudaLaunchKernelExC", function,
                     [&](Kernel& kernel, Kernel::OnDevice& here) { return launch(kernel, here, *config); });
}

cudaError_t cudaGetSymbolAddress(void** out, const void* variable) {
  return api("cudaGetSymbolAddress", On::device, [&] {
    if (!state().variables.count(variable)) return refuse(cudaErrorInvalidSymbol, "a variable that is not known");
    if (const cudaError_t error = unsafe("cudaGetSymbolAddress")) return error;
    *out = reinterpret_cast<void*>((uintptr_t(1) << 41) + (uintptr_t(self.device) << 20));
    return cudaSuccess;
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* out) {
  return api("cudaStreamIsCapturing", On::device, [&] {
    const Stream* const x = stream ? &stream_of(stream) : nullptr;
    *out = !x || !x->capturing ? cudaStreamCaptureStatusNone
           : x->valid          ? cudaStreamCaptureStatusActive
                               : cudaStreamCaptureStatusInvalidated;
    return cudaSuccess;
  });
}

cudaError_t cudaMemsetAsync(void* to, int, size_t, cudaStream_t stream) {
  return api("cudaMemsetAsync", On::device, [&] {
    const Stream* const x = stream ? &stream_of(stream) : nullptr;
    if (!to) return refuse(cudaErrorInvalidValue, "cudaMemsetAsync of no memory");
    if (x && x->device != self.device)
      return refuse(cudaErrorInvalidResourceHandle, "cudaMemsetAsync in a stream of another device");
    if (x && x->capturing && !x->valid)
      return refuse(cudaErrorStreamCaptureInvalidated, "cudaMemsetAsync: the graph has been given up");
    return cudaSuccess;
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return api("cudaThreadExchangeStreamCaptureMode", On::process, [&] {
    const Mode before = self.mode;
    self.mode = *mode == cudaStreamCaptureModeRelaxed  ? Mode::relaxed
                : *mode == cudaStreamCaptureModeGlobal ? Mode::global
                                                       : Mode::thread_local_;
    *mode = before == Mode::relaxed  ? cudaStreamCaptureModeRelaxed
            : before == Mode::global ? cudaStreamCaptureModeGlobal
                                     : cudaStreamCaptureModeThreadLocal;
    return cudaSuccess;
  });
}

}  // extern "C"
