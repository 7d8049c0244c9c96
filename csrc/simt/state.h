// What the parts of the emulation share: threads, warps, blocks and clusters, the one launch that runs, and what each
// file offers the others. There is one state because there is one launch at a time, on one host thread. Nothing outside
// of the emulation includes this; it sees simt.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "clocks.h"
#include "context.h"
#include "shadow.h"
#include "simt.h"

namespace kd {
namespace simt {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 232448;  // what a block of compute capability 9.0 can have
constexpr int kMaxResident = 3;             // clusters
constexpr int kMaxCluster = 16;
constexpr int kMaxSlots = 2 * kMaxCluster;  // resident blocks
constexpr int kMaxFibers = 8192;            // of more than one cluster: each stack is a mapping, and those are limited
constexpr uint32_t kMaxBytes = (1u << 20) - 1;  // what the count of an mbarrier holds

// What copy_async began.
struct AsyncCopy {
  size_t to = 0;  // in the block's shared memory
  const void* from = nullptr;
  uint32_t group = 0;
  bool moved = false;
};

struct Block;
struct Cluster;

// A CUDA thread.
struct Fiber {
  Context context;
  Block* block = nullptr;
  int thread = 0;
  uint32_t moment = 1;
  std::shared_ptr<const Clock> clock;
  std::vector<AsyncCopy> copies;  // in flight, oldest first
  uint32_t groups = 0;            // committed
  uint64_t answer = 0;            // of a shuffle

  Event now() const;
  uint32_t lane_bit() const { return 1u << (thread % 32); }
};

enum class WarpOperation { kSync, kShuffle };

// An operation of some lanes of a warp that has begun. Lanes meet where everything but arrived and values is equal.
struct Meeting {
  WarpOperation kind;
  uint32_t mask;
  int lane_mask, bytes;
  uint32_t arrived;
  uint64_t values[32];
};

struct Warp {
  uint32_t lanes = 0, exited = 0, at_block_barrier = 0;  // or at that of the cluster
  std::vector<Meeting> meetings;
};

struct Mbarrier {
  size_t offset = 0;
  uint16_t thread = 0;  // that it is in clocks
  uint32_t count = 0;
  Event init, fence;
  uint32_t phase = 0;  // the incomplete one: so many are complete
  // Of that phase.
  uint32_t arrived = 0;
  uint64_t expected = 0, issued = 0, landed = 0;
  // Phases are counted from 1 here, 0 is none.
  uint32_t with_bytes = 0, waited = 0;     // the last with bytes, and that anybody waited for
  uint32_t sent[2] = {};                   // the last with bytes of a peer, by parity
  Clock gathering;                         // what arrivals and messages released, since ever
  std::shared_ptr<const Clock> completed;  // the same, when the last phase was complete
  // The clock of the last thread that waited, and what it became: most of them come with one and the same.
  std::shared_ptr<const Clock> clock_before, clock_after;
  std::vector<Fiber*> waiting;
};

struct Block {
  int64_t id = 0;
  Cluster* cluster = nullptr;
  int at_cluster_barrier = 0;
  std::deque<Mbarrier> bars;
  bool live = false;
  int running = 0, exited = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> at_barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  Shadow shadow;
};

struct Cluster {
  Block* blocks = nullptr;
  int exited = 0;  // threads
  std::vector<Fiber*> at_barrier;
};

// Bytes on their way to an mbarrier and its block.
struct Piece {
  Block* block;
  Mbarrier* bar;
  size_t to;
  const char* from;  // nullptr: value
  uint32_t bytes;
  char value[16];
  uintptr_t range_begin, range_end;  // what `from` may be read of
};

enum class Use { kInput, kOutput, kScratch };

// Memory that was registered.
struct Range {
  std::string name;
  uintptr_t begin;
  size_t bytes;
  Use use;
  const Memory* owner;
  uint64_t launch;  // the one its shadow is about
  Shadow shadow;
};

// What the blocks have in common that called last_block with one counter.
struct LastBlockCounter {
  std::shared_ptr<Others> released = std::make_shared<Others>();
  std::unordered_set<int64_t> arrived;
};

struct Schedule {
  enum Order { kFirst, kLast, kRandom } order;
  int resident;  // clusters
  int arrival;   // of copies: at issue, at the wait, in between, or a mixture
};

struct State {
  Options options;
  Counters counters;
  std::string fault;
  std::vector<std::unique_ptr<Range>> ranges;
  Range* last_range = nullptr;
  uint64_t random = 0;

  // of the launch
  Schedule schedule;
  int threads = 0;
  int64_t blocks = 0;
  int cluster = 1;
  size_t shared_bytes = 0;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  Context host;
  Fiber* current = nullptr;
  bool failed = false;
  Block resident[kMaxSlots];
  Cluster clusters[kMaxResident];
  std::vector<Piece> arrive_soon, arrive_last;  // in between, or when nobody can run
  std::deque<Fiber*> ready;
  std::vector<Fiber*> with_late_copies;  // which arrive in between
  std::unordered_map<const uint32_t*, LastBlockCounter> last_block_counters;
};

extern State g;  // global, hence the name

// ---- state.cpp: chance, faults, what orders ----------------------------------------------------

uint64_t random();
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
std::shared_ptr<const Moments> released();

// Whether an event is ordered before what the current thread does now.
inline bool ordered(const Event& e) {
  const Fiber& me = *g.current;
  if (e.moment == 0) return true;
  if (e.block == me.block->id) return e.thread == me.thread || last_known(me.clock->seen, e.thread) >= e.moment;
  if (!me.clock->others) return false;
  const auto entry = me.clock->others->find(e.block);
  return entry != me.clock->others->end() && last_known(*entry->second, e.thread) >= e.moment;
}

// ---- schedule.cpp ------------------------------------------------------------------------------

inline void make_ready(Fiber* f) { g.ready.push_back(f); }
void pause();

// ---- global_memory.cpp -------------------------------------------------------------------------

Range& range_of(const char* verb, const void* p, size_t bytes, size_t align);
Range& range_around(const char* verb, const void* p, size_t bytes);

// ---- shared_memory.cpp -------------------------------------------------------------------------

// Of element i of an array in the block's shared memory; a fault where it is outside.
size_t checked_offset(const char* verb, size_t array, int size, int i, size_t bytes);
void check_shared_write(const char* verb, Block& block, size_t at, size_t bytes, bool bulk = false);
void move_bytes(Block& block, AsyncCopy& copy);

// ---- mbarriers.cpp -----------------------------------------------------------------------------

void land_one_of(std::vector<Piece>& pieces);

}  // namespace simt
}  // namespace kd
