// A CUDA runtime for the tests, linked to the objects that nvcc made in place of NVIDIA's. It runs nothing. It keeps
// what a process tells of devices, kernels, streams and captures, and refuses what a device or its driver would refuse;
// where documentation leaves room, it is the stricter one:
//   - every kernel is loaded lazily, and nothing but being asked for its attributes or its launch loads it;
//   - telling a kernel something, asking for clusters, and looking for a variable are unsafe while a graph is captured.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kd {
namespace fake {

struct Device {
  int capability;  // major * 10 + minor
  int code;        // the architecture that the code it loads was compiled for, by way of PTX perhaps
  int multiprocessors, shared_per_block, shared_per_multiprocessor, l2;
  int largest_cluster;        // 1: it has none
  std::vector<int> clusters;  // of 1, 2, 4, .. blocks that take all of the shared memory: how many are resident
};
int add_device(const Device&);  // its index
// Everything but devices, streams, and what kernels have been told: what a test begins with.
void forget();
void use_device(int index);  // by this thread
// As after an illegal access: every call on the device fails with this error from now on.
void break_device(int index, int error);

// What nvcc made of a kernel. Until it is told: as little as there can be.
struct Compiled {
  int registers = 16, shared = 0, most_threads = 1024;
};
std::vector<std::string> kernels();  // mangled names
void know_kernel(const std::string& name, const Compiled&);

enum class Mode { global, thread_local_, relaxed };
void* new_stream(int device);
void begin_capture(void* stream, Mode mode);
bool end_capture(void* stream);  // whether there is a graph
Mode mode();                     // of this thread

struct Launch {
  const std::string* kernel;
  int64_t blocks, threads, shared, cluster;
  int device;
  bool captured;
  int resident;  // blocks of a multiprocessor
};
// The call of the API that this is, for the tests of the rules themselves.
int launch(const std::string& kernel, int64_t blocks, int threads, size_t shared, int cluster, void* stream);
std::vector<Launch> take_launches();  // those since the last time
// Why calls were refused, since the last time. Errors that were planted are not among them.
std::vector<std::string> take_refusals();
int last_error();  // cudaGetLastError()

// So many calls of this function of the API fail, after so many that do not.
void plant_error(const std::string& function, int error, int calls, int after);
// The next thread that calls it waits there until release().
void hold(const std::string& function);
bool await_held();  // until one waits, or release() is called: whether one waited
void release();

}  // namespace fake
}  // namespace kd
