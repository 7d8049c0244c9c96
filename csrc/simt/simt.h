// Runs GPU kernels on the CPU and checks what a GPU leaves undefined: races, bounds, alignment, masks, divergence.
//
// A CUDA thread is a fiber, and all fibers run on the calling thread. A seed picks the schedule, but what is a fault
// does not depend on it: races are found by vector clocks, so an order that happened is not taken for one that was
// ensured. What orders two accesses is this memory model's: barriers, phases of mbarriers, messages, the counter of the
// last block. A store is seen by all at once; what the hardware's weak memory order makes of kernels is not found here.
//
// Kernels see arch.h; this is what the code around them uses. One launch at a time, from one host thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace kd {
namespace simt {

// The seed decides in which order fibers and blocks run, how many clusters are resident at once, when the bytes of an
// asynchronous copy or a message arrive, and what unwritten shared memory holds.
struct Options {
  uint64_t seed = 0;
};
void set_options(const Options& options);
const Options& options();

struct Counters {
  uint64_t launches = 0, blocks = 0, switches = 0;
  uint64_t block_barriers = 0, warp_barriers = 0, shuffles = 0;  // each counted once, not once per thread
  uint64_t cluster_barriers = 0;                                 // so are these
  uint64_t copies = 0, bulk_copies = 0, messages = 0;
  uint64_t schedule = 0;  // a hash of the order in which fibers ran
};
const Counters& counters();
void reset_counters();

// What was wrong with the last launch; empty where nothing was.
const std::string& fault();

// The global memory that kernels may touch: what is registered here, as long as the object lives.
// Inputs may overlap each other, nothing else may; std::invalid_argument says so. Leave a gap between ranges: an access
// that misses one and hits the next is no fault.
class Memory {
 public:
  Memory() = default;
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void input(const std::string& name, const void* data, size_t bytes);
  void output(const std::string& name, void* data, size_t bytes);   // a launch writes each byte once at most
  void scratch(const std::string& name, void* data, size_t bytes);  // read and written, in an order that is ensured
};

// What arch.h is made of. Sizes and offsets are in bytes.
namespace device {

int thread();
int threads();
int64_t block();
int64_t blocks();
size_t shared_bytes();

enum class Path { kConstant, kCoherent };  // kConstant: a cache that does not see what the launch writes
void check_load(const void* from, size_t bytes, Path path);
void check_store(const void* to, size_t bytes);

// The place of element i of a shared array, after the checks.
const void* shared_load(size_t array, int size, int i, size_t bytes);
void* shared_store(size_t array, int size, int i, size_t bytes);
[[noreturn]] void shared_too_small(size_t need);

void copy_async(size_t array, int size, int i, const void* from);
void copy_commit();
void copy_wait(int pending);

void sync_block();
void sync_warp(uint32_t mask);
uint64_t shuffle_xor(uint64_t bits, int bytes, int lane_mask, uint32_t mask);
bool last_block(uint32_t* counter);

// Blocks of a cluster, and what they can send each other. mbarrier i of n lies at bars + 8 * i.
int cluster_rank();
int cluster_blocks();
void sync_cluster();
void bar_init(size_t bars, int n, int i, uint32_t count);
void bar_init_fence();
void bar_expect(size_t bars, int n, int i, uint32_t bytes);
void bar_wait(size_t bars, int n, int i, uint32_t parity, bool of_cluster);
void bulk_load(size_t array, int size, int i, const void* from, uint32_t bytes, size_t bars, int n, int bar);
void send(size_t array, int size, int i, int rank, const void* value, size_t bars, int n, int bar);

int run(int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*), const void* context,
        int cluster = 1);

}  // namespace device
}  // namespace simt
}  // namespace kd
