#include "simt.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "context.h"

namespace kd {
namespace simt {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 232448;  // what a block of compute capability 9.0 can have
constexpr int kMaxResident = 3;             // clusters
constexpr int kMaxCluster = 16;
constexpr int kMaxSlots = 2 * kMaxCluster;  // resident blocks
constexpr int kMaxFibers = 8192;            // of more than one cluster: each stack is a mapping, and those are limited
constexpr uint32_t kMaxBytes = (1u << 20) - 1;  // what the count of an mbarrier holds
constexpr size_t kCellBytes = 2;

// ---- clocks ---------------------------------------------------------------------------------

// A moment of a thread. Thread a's clock holds, per thread b, the last moment of b that is ordered before what a does
// now. Threads that meet at a barrier leave with one clock, which they share; a thread's own moment is kept beside it.
//
// An mbarrier is one more thread of its block: what asynchronous bytes write, it writes, in its moment n + 1 if they
// count in phase n. Whoever waited for that phase knows the moment, and nobody else does.
struct Event {
  uint32_t moment = 0;  // 0: never
  uint16_t thread = 0;  // mbarriers follow the threads
  int32_t block = 0;
};

using Moments = std::vector<uint32_t>;
using Others = std::unordered_map<int32_t, std::shared_ptr<const Moments>>;  // what is known of other blocks

struct Clock {
  Moments seen;
  std::shared_ptr<const Others> others;
};

// Moments of mbarriers are there as far as they are known.
uint32_t known(const Moments& moments, size_t thread) { return thread < moments.size() ? moments[thread] : 0; }

void raise(Moments& to, const Moments& from, size_t first = 0) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = first; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void raise(Others& to, const Others& from) {
  for (const auto& entry : from) {
    std::shared_ptr<const Moments>& mine = to[entry.first];
    if (!mine) {
      mine = entry.second;
    } else if (mine != entry.second) {
      auto both = std::make_shared<Moments>(*mine);
      raise(*both, *entry.second);
      mine = both;
    }
  }
}

void raise(std::shared_ptr<const Others>& to, const std::shared_ptr<const Others>& from) {
  if (!from || to == from) return;
  if (!to) {
    to = from;
    return;
  }
  auto both = std::make_shared<Others>(*to);
  raise(*both, *from);
  to = both;
}

// ---- threads, warps, blocks -----------------------------------------------------------------

struct Copy {
  size_t to = 0;  // in the block's shared memory
  const void* from = nullptr;
  uint32_t group = 0;
  bool moved = false;
};

struct Block;
struct Cluster;

struct Fiber {
  Context context;
  Block* block = nullptr;
  int thread = 0;
  uint32_t moment = 1;
  std::shared_ptr<const Clock> clock;
  std::vector<Copy> copies;  // in flight, oldest first
  uint32_t groups = 0;       // committed
  uint64_t answer = 0;       // of a shuffle

  Event now() const;
  uint32_t bit() const { return 1u << (thread % 32); }
};

enum class Kind { kSync, kShuffle };

// An operation of some lanes of a warp that has begun. Lanes meet where everything but arrived and values is equal.
struct Meeting {
  Kind kind;
  uint32_t mask;
  int lane_mask, bytes;
  uint32_t arrived;
  uint64_t values[32];
};

struct Warp {
  uint32_t lanes = 0, exited = 0, at_block_barrier = 0;  // or at that of the cluster
  std::vector<Meeting> meetings;
};

// The last write of a cell and the reads since, for whatever memory it shadows.
struct Cell {
  uint32_t generation = 0;
  uint32_t readers = 0;  // a list, where one reader is not enough
  Event writer, reader;
  bool in_flight = false, by_copy = false, constant = false;
  bool stored = false;   // by other than bulk copies
  bool barrier = false;  // part of an mbarrier
};

struct Readers {
  std::vector<Event> events;
  size_t limit = 8;
};

class Shadow {
 public:
  // Every cell forgets.
  void renew(size_t bytes) {
    const size_t cells = (bytes + kCellBytes - 1) / kCellBytes;
    if (cells_.size() < cells) cells_.resize(cells);
    ++generation_;
    lists_.resize(1);
    free_.clear();
  }
  Cell& at(size_t i) {
    Cell& cell = cells_[i];
    if (cell.generation != generation_) {
      cell = Cell();
      cell.generation = generation_;
    }
    return cell;
  }
  void read(Cell& cell);
  bool readers_ordered(const Cell& cell, Event* who) const;
  void write(Cell& cell, bool by_copy);
  void write_async(Cell& cell, const Event& writer, bool bulk);

 private:
  std::vector<Cell> cells_;
  std::vector<Readers> lists_;  // [0] stands for none
  std::vector<uint32_t> free_;
  uint32_t generation_ = 0;
};

struct Bar {
  size_t offset = 0;
  uint16_t thread = 0;  // that it is in clocks
  uint32_t count = 0;
  Event init, fence;
  uint32_t phase = 0;  // the incomplete one: so many are complete
  // Of that phase.
  uint32_t arrived = 0;
  uint64_t expected = 0, issued = 0, landed = 0;
  // Phases are counted from 1 here, 0 is none.
  uint32_t with_bytes = 0, waited = 0;         // the last with bytes, and that anybody waited for
  uint32_t sent[2] = {};                       // the last with bytes of a peer, by parity
  Clock gathering;                             // what arrivals and messages released, since ever
  std::shared_ptr<const Clock> completed;      // the same, when the last phase was complete
  std::shared_ptr<const Clock> before, after;  // threads that wait mostly come with one clock
  std::vector<Fiber*> waiting;
};

struct Block {
  int64_t id = 0;
  Cluster* cluster = nullptr;
  int at_cluster_barrier = 0;
  std::deque<Bar> bars;
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
  Bar* bar;
  size_t to;
  const char* from;  // nullptr: value
  uint32_t bytes;
  char value[16];
  uintptr_t range_begin, range_end;  // what `from` may be read of
};

enum class Use { kInput, kOutput, kScratch };

struct Range {
  std::string name;
  uintptr_t begin;
  size_t bytes;
  Use use;
  const Memory* owner;
  uint64_t launch;  // the one its shadow is about
  Shadow shadow;
};

// What the blocks have in common that meet at one counter.
struct Counter {
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
  std::vector<Piece> soon, last;  // arrive in between, or when nobody can run
  std::deque<Fiber*> ready;
  std::vector<Fiber*> late;  // have copies that arrive in between
  std::unordered_map<const uint32_t*, Counter> arrivals;
};

State& state() {
  static State s;
  return s;
}
State& g = state();

uint64_t random() {  // splitmix64
  uint64_t z = (g.random += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

Event Fiber::now() const {
  Event e;
  e.moment = moment;
  e.thread = static_cast<uint16_t>(thread);
  e.block = static_cast<int32_t>(block->id);
  return e;
}

// Records the fault and leaves the fiber for good: its frames are abandoned, so no caller may own memory.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  char text[512];
  int used = 0;
  if (g.current)
    used = snprintf(text, sizeof(text), "block %lld thread %d: ", static_cast<long long>(g.current->block->id),
                    g.current->thread);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text + used, sizeof(text) - static_cast<size_t>(used), format, arguments);
  va_end(arguments);
  g.fault = text;
  g.failed = true;
  Fiber& me = *g.current;
  g.current = nullptr;
  Context::change(me.context, g.host);
  __builtin_unreachable();
}

bool ordered(const Event& e) {
  const Fiber& me = *g.current;
  if (e.moment == 0) return true;
  if (e.block == me.block->id) return e.thread == me.thread || known(me.clock->seen, e.thread) >= e.moment;
  if (!me.clock->others) return false;
  const auto entry = me.clock->others->find(e.block);
  return entry != me.clock->others->end() && known(*entry->second, e.thread) >= e.moment;
}

void Shadow::read(Cell& cell) {
  const Event now = g.current->now();
  if (!cell.readers) {
    if (ordered(cell.reader)) {  // whoever is ordered after this read is ordered after that one
      cell.reader = now;
      return;
    }
    if (free_.empty()) {
      cell.readers = static_cast<uint32_t>(lists_.size());
      lists_.emplace_back();
    } else {
      cell.readers = free_.back();
      free_.pop_back();
    }
    lists_[cell.readers].events.assign(1, cell.reader);
  }
  Readers& list = lists_[cell.readers];
  const Event& last = list.events.back();
  if (last.moment == now.moment && last.thread == now.thread && last.block == now.block) return;
  if (list.events.size() >= list.limit) {
    list.events.erase(std::remove_if(list.events.begin(), list.events.end(), ordered), list.events.end());
    list.limit = std::max<size_t>(8, 2 * list.events.size());
  }
  list.events.push_back(now);
}

bool Shadow::readers_ordered(const Cell& cell, Event* who) const {
  *who = cell.reader;
  if (!cell.readers) return ordered(cell.reader);
  for (const Event& e : lists_[cell.readers].events) {
    *who = e;
    if (!ordered(e)) return false;
  }
  return true;
}

void Shadow::write(Cell& cell, bool by_copy) {
  if (cell.readers) free_.push_back(cell.readers);
  cell.readers = 0;
  cell.reader = Event();
  cell.writer = g.current->now();
  cell.by_copy = by_copy;
  cell.stored = true;
}

void Shadow::write_async(Cell& cell, const Event& writer, bool bulk) {
  const bool stored = cell.stored;
  write(cell, true);
  cell.writer = writer;
  cell.stored = stored || !bulk;
}

// All who meet leave with what any of them knew, and with what they did before.
template <class Fibers>
void join(const Fibers& fibers) {
  auto joined = std::make_shared<Clock>(*fibers[0]->clock);
  const bool everyone = fibers.size() == static_cast<size_t>(g.threads);
  const Clock* merged = fibers[0]->clock.get();
  for (const Fiber* f : fibers) {
    if (f->clock.get() == merged) continue;
    merged = f->clock.get();
    raise(joined->seen, merged->seen, everyone ? fibers.size() : 0);  // no one knows more of a thread than it does
    raise(joined->others, merged->others);
  }
  for (const Fiber* f : fibers) joined->seen[static_cast<size_t>(f->thread)] = f->moment;
  for (Fiber* f : fibers) {
    f->clock = joined;
    ++f->moment;
  }
}

// The same for all threads of a cluster, which come in any order.
void join_cluster(const std::vector<Fiber*>& fibers) {
  std::unordered_map<Block*, std::shared_ptr<Clock>> own;
  std::shared_ptr<const Others> all;
  const Clock* merged = nullptr;
  for (const Fiber* f : fibers) {
    std::shared_ptr<Clock>& clock = own[f->block];
    if (!clock) clock = std::make_shared<Clock>(*f->clock);
    if (f->clock.get() != merged) {
      merged = f->clock.get();
      raise(clock->seen, merged->seen, static_cast<size_t>(g.threads));
      raise(all, merged->others);
    }
    clock->seen[static_cast<size_t>(f->thread)] = f->moment;
  }
  auto others = all ? std::make_shared<Others>(*all) : std::make_shared<Others>();
  for (const auto& entry : own)
    (*others)[static_cast<int32_t>(entry.first->id)] = std::make_shared<Moments>(entry.second->seen);
  for (const auto& entry : own) entry.second->others = others;
  for (Fiber* f : fibers) {
    f->clock = own[f->block];
    ++f->moment;
  }
}

// Release: what is ordered before this, the thread's own doing included.
std::shared_ptr<const Moments> released() {
  Fiber& me = *g.current;
  auto mine = std::make_shared<Moments>(me.clock->seen);
  (*mine)[static_cast<size_t>(me.thread)] = me.moment++;
  return mine;
}

// ---- the schedule ---------------------------------------------------------------------------

void make_ready(Fiber* f) { g.ready.push_back(f); }

void move_bytes(Block& block, Copy& copy) {
  if (!copy.moved) memcpy(block.shared.get() + copy.to, copy.from, 16);
  copy.moved = true;
}

void complete_if_all_came(Bar& bar) {
  if (bar.arrived != bar.count || bar.landed != bar.expected) return;
  ++bar.phase;
  if (bar.landed) bar.with_bytes = bar.phase;
  bar.arrived = 0;
  bar.expected = bar.issued = bar.landed = 0;
  if (bar.gathering.seen.size() <= bar.thread) bar.gathering.seen.resize(bar.thread + size_t(1));
  bar.gathering.seen[bar.thread] = bar.phase;
  bar.completed = std::make_shared<Clock>(bar.gathering);
  bar.before = nullptr;
  for (Fiber* f : bar.waiting) make_ready(f);
  bar.waiting.clear();
}

void land(const Piece& piece) {
  char* const to = piece.block->shared.get() + piece.to;
  if (piece.from) {
    // Beside the range, where a bulk copy may reach as far as a granule does, is anything.
    static const unsigned char beside[] = {0xff, 0x7f, 0xfb};  // NaN, large, lowest
    memset(to, beside[random() % 3], piece.bytes);
    const uintptr_t from = reinterpret_cast<uintptr_t>(piece.from);
    const uintptr_t begin = std::max(from, piece.range_begin), end = std::min(from + piece.bytes, piece.range_end);
    memcpy(to + (begin - from), piece.from + (begin - from), end - begin);
  } else {
    memcpy(to, piece.value, piece.bytes);
  }
  piece.bar->landed += piece.bytes;
  complete_if_all_came(*piece.bar);
}

void land_one_of(std::vector<Piece>& pieces) {
  std::swap(pieces[random() % pieces.size()], pieces.back());
  const Piece piece = pieces.back();
  pieces.pop_back();
  land(piece);
}

void issue(const Piece& piece) {
  const int arrival = g.schedule.arrival < 3 ? g.schedule.arrival : static_cast<int>(random() % 3);
  if (arrival == 0) return land(piece);
  (arrival == 1 ? g.last : g.soon).push_back(piece);
}

Fiber* pick() {
  if (!g.soon.empty() && random() % 4 == 0) land_one_of(g.soon);
  while (g.ready.empty() && !(g.soon.empty() && g.last.empty())) land_one_of(g.soon.empty() ? g.last : g.soon);
  if (!g.late.empty() && random() % 4 == 0) {
    Fiber* f = g.late.back();
    g.late.pop_back();
    for (Copy& copy : f->copies) move_bytes(*f->block, copy);
  }
  if (g.ready.empty()) return nullptr;
  if (g.schedule.order == Schedule::kRandom) std::swap(g.ready[random() % g.ready.size()], g.ready.back());
  Fiber* f = g.schedule.order == Schedule::kFirst ? g.ready.front() : g.ready.back();
  if (g.schedule.order == Schedule::kFirst)
    g.ready.pop_front();
  else
    g.ready.pop_back();
  ++g.counters.switches;
  const uint64_t who = static_cast<uint64_t>(f->block->id) * kMaxThreads + static_cast<uint64_t>(f->thread);
  g.counters.schedule = (g.counters.schedule ^ who) * 0x100000001b3u;
  return f;
}

// Runs others until somebody makes this fiber ready again.
void pause() {
  Fiber* me = g.current;
  Fiber* next = pick();
  if (next == me) return;
  g.current = next;
  Context::change(me->context, next ? next->context : g.host);
}

void exit_checks() {
  Fiber& me = *g.current;
  Block& block = *me.block;
  if (!me.copies.empty())
    fail("exits with %d asynchronous copies in flight; copy_wait was not called, or a group was not committed",
         static_cast<int>(me.copies.size()));
  if (!block.at_barrier.empty())
    fail("divergent barrier: exits while %d threads of the block wait at sync_block, the first of them thread %d",
         static_cast<int>(block.at_barrier.size()), block.at_barrier[0]->thread);
  if (!block.cluster->at_barrier.empty())
    fail(
        "divergent barrier: exits while %d threads of the cluster wait at sync_cluster, the first of them block %lld "
        "thread %d",
        static_cast<int>(block.cluster->at_barrier.size()),
        static_cast<long long>(block.cluster->at_barrier[0]->block->id), block.cluster->at_barrier[0]->thread);
  for (const Meeting& m : block.warps[static_cast<size_t>(me.thread) / 32].meetings)
    if (m.mask & me.bit())
      fail("wrong mask: exits, so that this lane never arrives where lanes 0x%08x wait with mask 0x%08x", m.arrived,
           m.mask);
  if (block.running > 1) return;
  for (const Bar& bar : block.bars) {
    if (bar.issued || bar.expected)
      fail(
          "exits, the last of its block, while bytes of the mbarrier at byte %lld are in flight: %lld of %lld that "
          "phase %u expects were sent, and no thread of the block has waited for it",
          static_cast<long long>(bar.offset), static_cast<long long>(bar.issued), static_cast<long long>(bar.expected),
          bar.phase);
    if (bar.with_bytes > bar.waited)
      fail(
          "exits, the last of its block, where bytes of the mbarrier at byte %lld may be in flight: no thread of the "
          "block has waited for its phase %u",
          static_cast<long long>(bar.offset), bar.with_bytes - 1);
  }
}

void fiber_main() {
  g.current->context.entered();
  g.body(g.context);
  exit_checks();
  Fiber& me = *g.current;
  Block& block = *me.block;
  block.warps[static_cast<size_t>(me.thread) / 32].exited |= me.bit();
  ++block.exited;
  ++block.cluster->exited;
  if (--block.running == 0) {
    block.live = false;
    g.current = nullptr;  // the host starts the next block
    Context::change(me.context, g.host);
  }
  pause();
  __builtin_unreachable();
}

void start(Block& block, int64_t id, const std::shared_ptr<const Clock>& clock) {
  const size_t n = static_cast<size_t>(g.threads);
  block.id = id;
  block.live = true;
  block.running = g.threads;
  block.exited = 0;
  block.at_barrier.clear();
  block.at_cluster_barrier = 0;
  block.bars.clear();
  block.warps.assign((n + 31) / 32, Warp());
  block.shadow.renew(g.shared_bytes);
  static const uint32_t poisons[] = {0xffffffffu, 0x7fc07fc0u, 0xffc0ffc0u, 0x7fff7fffu};  // NaN in each float type
  const uint32_t poison = poisons[random() % 4];
  for (size_t i = 0; i < g.shared_bytes; ++i) block.shared[i] = reinterpret_cast<const char*>(&poison)[i % 4];
  while (block.fibers.size() < n) block.fibers.emplace_back(new Fiber);
  const size_t slot = static_cast<size_t>(&block - g.resident);
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = *block.fibers[i];
    f.context.reset(fiber_main, i + slot * 43);
    f.block = &block;
    f.thread = static_cast<int>(i);
    f.moment = 1;
    f.clock = clock;
    f.copies.clear();
    f.groups = 0;
    block.warps[i / 32].lanes |= f.bit();
    make_ready(&f);
  }
  ++g.counters.blocks;
}

// Nobody can run. Names the first few who wait.
void report_deadlock() {
  g.fault = "deadlock:";
  int named = 0;
  for (const Block& block : g.resident) {
    if (!block.live) continue;
    const std::string where = " block " + std::to_string(block.id);
    if (block.at_cluster_barrier)
      g.fault += where + ": " + std::to_string(block.at_cluster_barrier) + " threads wait at sync_cluster;";
    for (const Bar& bar : block.bars) {
      if (bar.waiting.empty()) continue;
      if (++named > 4) return;
      char text[200];
      snprintf(text, sizeof(text),
               ": %d threads, the first of them thread %d, wait at the mbarrier at byte %lld for its phase %u, which "
               "misses %u of %u arrivals and %lld of %lld bytes;",
               static_cast<int>(bar.waiting.size()), bar.waiting[0]->thread, static_cast<long long>(bar.offset),
               bar.phase, bar.count - bar.arrived, bar.count, static_cast<long long>(bar.expected - bar.landed),
               static_cast<long long>(bar.expected));
      g.fault += where + text;
    }
    if (!block.at_barrier.empty())
      g.fault += where + ": " + std::to_string(block.at_barrier.size()) + " threads wait at sync_block;";
    for (size_t w = 0; w < block.warps.size(); ++w)
      for (const Meeting& m : block.warps[w].meetings) {
        if (++named > 4) return;
        char text[160];
        snprintf(text, sizeof(text), " warp %d: lanes 0x%08x wait at %s with mask 0x%08x, lanes 0x%08x never arrive;",
                 static_cast<int>(w), m.arrived, m.kind == Kind::kSync ? "sync_warp" : "shfl_xor", m.mask,
                 m.mask & ~m.arrived);
        g.fault += where + text;
      }
  }
}

void run_blocks() {
  std::vector<int64_t> order(static_cast<size_t>(g.blocks / g.cluster));  // of clusters
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (g.schedule.order == Schedule::kLast) std::reverse(order.begin(), order.end());
  if (g.schedule.order == Schedule::kRandom)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);

  auto clock = std::make_shared<Clock>();
  clock->seen.resize(static_cast<size_t>(g.threads));
  for (size_t next = 0;;) {
    bool live = false;
    for (int i = 0; i < g.schedule.resident; ++i) {
      Cluster& cluster = g.clusters[i];
      bool any = false;
      for (int b = 0; b < g.cluster; ++b) any |= cluster.blocks[b].live;
      live |= any || next < order.size();
      if (any || next == order.size()) continue;
      cluster.exited = 0;
      cluster.at_barrier.clear();
      for (int b = 0; b < g.cluster; ++b) start(cluster.blocks[b], order[next] * g.cluster + b, clock);
      ++next;
    }
    if (!live) break;
    g.current = pick();
    if (!g.current) return report_deadlock();
    Context::change(g.host, g.current->context);
    if (g.failed) return;
  }
  for (const auto& entry : g.arrivals)
    if (*entry.first != 0)
      g.fault = "last_block left its counter at " + std::to_string(*entry.first) + ": " +
                std::to_string(entry.second.arrived.size()) + " of " + std::to_string(g.blocks) +
                " blocks called it, or it did not start at 0";
}

// ---- global memory --------------------------------------------------------------------------

void register_range(const Memory* owner, const std::string& name, const void* data, size_t bytes, Use use) {
  if (bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  for (const auto& r : g.ranges)
    if (begin < r->begin + r->bytes && r->begin < begin + bytes && !(use == Use::kInput && r->use == Use::kInput))
      throw std::invalid_argument("memory '" + name + "' overlaps '" + r->name + "'");
  g.ranges.emplace_back(new Range{name, begin, bytes, use, owner, 0, Shadow()});
}

// The range that holds an access; a fault where none does.
Range& range_of(const char* verb, const void* p, size_t bytes, size_t align) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  const auto holds = [&](const Range& r) { return at >= r.begin && at - r.begin + bytes <= r.bytes; };
  if (!g.last_range || !holds(*g.last_range)) {
    g.last_range = nullptr;
    const Range* near = nullptr;
    uintptr_t distance = UINTPTR_MAX;
    for (const auto& r : g.ranges) {
      if (holds(*r)) g.last_range = r.get();
      const uintptr_t d = at < r->begin ? r->begin - at : at >= r->begin + r->bytes ? at - r->begin - r->bytes + 1 : 0;
      if (d < distance) near = r.get();
      distance = std::min(distance, d);
    }
    if (!g.last_range && !near)
      fail("%s %d bytes of global memory, out of bounds: nothing is registered", verb, static_cast<int>(bytes));
    if (!g.last_range)
      fail("%s %d bytes of global memory, out of bounds: at offset %lld of '%s', which has %lld bytes", verb,
           static_cast<int>(bytes), static_cast<long long>(at - near->begin), near->name.c_str(),
           static_cast<long long>(near->bytes));
  }
  Range& r = *g.last_range;
  if (at % align != 0)
    fail("%s %d bytes at offset %lld of '%s': misaligned", verb, static_cast<int>(bytes),
         static_cast<long long>(at - r.begin), r.name.c_str());
  if (r.use != Use::kInput && r.launch != g.counters.launches) {
    r.launch = g.counters.launches;
    r.shadow.renew(r.bytes + 1);
  }
  return r;
}

// The range that holds an access but for what shares a 16-byte granule with its ends: no page ends within a granule.
Range& range_around(const char* verb, const void* p, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % 16 == 0)
    for (const auto& r : g.ranges) {
      const uintptr_t begin = r->begin / 16 * 16, end = (r->begin + r->bytes + 15) / 16 * 16;
      if (r->use == Use::kInput && at >= begin && at + bytes <= end) return *r;
    }
  return range_of(verb, p, bytes, 16);
}

[[noreturn]] void fail_global(const char* verb, const Range& r, size_t offset, const char* why, const Event& other) {
  fail("%s '%s' at offset %lld: %s block %d thread %d", verb, r.name.c_str(), static_cast<long long>(offset), why,
       other.block, other.thread);
}

// ---- shared memory --------------------------------------------------------------------------

size_t place(const char* verb, size_t array, int size, int i, size_t bytes) {
  if (i < 0 || i >= size)
    fail("%s element %d of an array of %d in shared memory: out of bounds (its offset is %lld)", verb, i, size,
         static_cast<long long>(array));
  const size_t at = array + static_cast<size_t>(i) * bytes;
  if (at + bytes > g.shared_bytes)  // an array that was taken while counting
    fail("%s byte %lld of shared memory, out of bounds: the block has %lld", verb, static_cast<long long>(at),
         static_cast<long long>(g.shared_bytes));
  return at;
}

// Names who did something. The text lives until the next call.
const char* name_of(const Event& e) {
  static char text[160];
  if (e.thread < g.threads) {
    if (e.block == g.current->block->id)
      snprintf(text, sizeof(text), "thread %d", e.thread);
    else
      snprintf(text, sizeof(text), "block %d thread %d", e.block, e.thread);
    return text;
  }
  for (const Block& block : g.resident)
    if (block.live && block.id == e.block)
      snprintf(text, sizeof(text), "the mbarrier at byte %lld of block %d, phase %u",
               static_cast<long long>(block.bars[e.thread - static_cast<size_t>(g.threads)].offset), e.block,
               e.moment - 1);
  return text;
}

// Whether it is about bytes that an mbarrier still waits for.
bool in_flight(const Block& block, const Event& writer) {
  return writer.thread >= g.threads && writer.moment &&
         writer.moment > block.bars[writer.thread - static_cast<size_t>(g.threads)].phase;
}

[[noreturn]] void fail_shared(const char* verb, size_t cell, const char* why, const Event& other, const char* rest) {
  fail("%s byte %lld of shared memory: %s %s%s", verb, static_cast<long long>(cell * kCellBytes), why, name_of(other),
       rest);
}

void check_shared_write(const char* verb, Block& block, size_t at, size_t bytes, bool bulk = false) {
  for (size_t i = at / kCellBytes; i < (at + bytes) / kCellBytes; ++i) {
    Cell& cell = block.shadow.at(i);
    Event who;
    if (cell.in_flight)
      fail_shared(verb, i, "an asynchronous copy is in flight to it, of", cell.writer, ", which has not waited for it");
    if (cell.barrier) fail_shared(verb, i, "it is part of an mbarrier, initialized by", cell.writer, "");
    if (!ordered(cell.writer)) {
      if (in_flight(block, cell.writer))
        fail_shared(verb, i, "bytes are in flight to it, of", cell.writer, ", which is not complete");
      fail_shared(verb, i, "race with the write of", cell.writer, ", which nothing orders");
    }
    if (!block.shadow.readers_ordered(cell, &who))
      fail_shared(verb, i, "race with the read of", who, ", which nothing orders before the write");
    if (bulk && cell.stored)
      fail_shared(verb, i, "stored to before the bulk copy, without a proxy fence, by", cell.writer, "");
  }
}

void no_wait_elsewhere(const char* verb) {
  const Fiber& me = *g.current;
  for (const Meeting& m : me.block->warps[static_cast<size_t>(me.thread) / 32].meetings)
    if (m.mask & me.bit())
      fail("divergent barrier: %s, while lanes 0x%08x of the warp wait for this one at %s with mask 0x%08x", verb,
           m.arrived, m.kind == Kind::kSync ? "sync_warp" : "shfl_xor", m.mask);
}

// ---- mbarriers ------------------------------------------------------------------------------

size_t place_of_bar(const char* verb, size_t bars, int n, int i) {
  if (i < 0 || i >= n)
    fail("%s mbarrier %d of %d at byte %lld: out of bounds", verb, i, n, static_cast<long long>(bars));
  const size_t at = bars + static_cast<size_t>(i) * 8;
  if (at % 8 != 0) fail("%s an mbarrier at byte %lld: misaligned", verb, static_cast<long long>(at));
  if (at + 8 > g.shared_bytes)
    fail("%s an mbarrier at byte %lld, out of bounds: the block has %lld", verb, static_cast<long long>(at),
         static_cast<long long>(g.shared_bytes));
  return at;
}

Bar* find_bar(Block& block, size_t at) {
  for (Bar& bar : block.bars)
    if (bar.offset == at) return &bar;
  return nullptr;
}

// The mbarrier, where this thread, or its asynchronous doing, may use it.
Bar& usable_bar(const char* verb, Block& block, size_t bars, int n, int i, bool async) {
  const size_t at = place_of_bar(verb, bars, n, i);
  Bar* const bar = find_bar(block, at);
  const long long where = static_cast<long long>(at), whose = static_cast<long long>(block.id);
  if (!bar) fail("%s the mbarrier at byte %lld of block %lld before bar_init", verb, where, whose);
  const Fiber& me = *g.current;
  const bool mine = me.block == &block && bar->init.thread == me.thread;
  if (!bar->fence.moment && (async || !mine))
    fail("%s the mbarrier at byte %lld of block %lld, which thread %d initialized without bar_init_fence", verb, where,
         whose, bar->init.thread);
  if (!ordered(bar->fence.moment ? bar->fence : bar->init))
    fail("%s the mbarrier at byte %lld of block %lld: race with its bar_init by thread %d, which nothing orders before",
         verb, where, whose, bar->init.thread);
  return *bar;
}

uint32_t phases_known(const Block& block, const Bar& bar) {
  const Fiber& me = *g.current;
  if (me.block == &block) return known(me.clock->seen, bar.thread);
  if (!me.clock->others) return 0;
  const auto entry = me.clock->others->find(static_cast<int32_t>(block.id));
  return entry == me.clock->others->end() ? 0 : known(*entry->second, bar.thread);
}

// What counts in a phase comes when the one before is known to be complete, or it might count in that one.
void check_phase(const char* verb, const Block& block, const Bar& bar) {
  const uint32_t phase = phases_known(block, bar);
  if (phase != bar.phase)
    fail(
        "%s phase %u of the mbarrier at byte %lld of block %lld, which is complete: it expects less, or a wait for it "
        "is missing",
        verb, phase, static_cast<long long>(bar.offset), static_cast<long long>(block.id));
}

void check_bytes(const char* verb, const Block& block, const Bar& bar) {
  if (bar.arrived == bar.count && bar.issued > bar.expected)
    fail("%s phase %u of the mbarrier at byte %lld of block %lld: more bytes came than were expected, %lld and %lld",
         verb, bar.phase, static_cast<long long>(bar.offset), static_cast<long long>(block.id),
         static_cast<long long>(bar.issued), static_cast<long long>(bar.expected));
}

// The cells of asynchronous bytes, which count from now on.
void write_async(const char* verb, Block& block, Bar& bar, size_t at, size_t bytes, bool bulk) {
  check_phase(verb, block, bar);
  check_shared_write(verb, block, at, bytes, bulk);
  Event writer;
  writer.moment = bar.phase + 1;
  writer.thread = bar.thread;
  writer.block = static_cast<int32_t>(block.id);
  for (size_t c = at / kCellBytes; c < (at + bytes) / kCellBytes; ++c)
    block.shadow.write_async(block.shadow.at(c), writer, bulk);
  bar.issued += bytes;
  check_bytes(verb, block, bar);
}

void acquire(Bar& bar) {
  Fiber& me = *g.current;
  if (bar.before != me.clock) {
    auto clock = std::make_shared<Clock>(*me.clock);
    raise(clock->seen, bar.completed->seen);
    raise(clock->others, bar.completed->others);
    if (clock->others) {  // peers may tell of threads of this block
      const auto own = clock->others->find(static_cast<int32_t>(me.block->id));
      if (own != clock->others->end()) raise(clock->seen, *own->second);
    }
    bar.before = me.clock;
    bar.after = clock;
  }
  me.clock = bar.after;
}

uint64_t meet(Kind kind, uint32_t mask, int lane_mask, int bytes, uint64_t value) {
  Fiber& me = *g.current;
  Block& block = *me.block;
  const size_t first = static_cast<size_t>(me.thread) / 32 * 32;
  Warp& warp = block.warps[first / 32];
  const int lane = me.thread % 32;
  const char* const verb = kind == Kind::kSync ? "sync_warp" : "shfl_xor";
  if (!(mask & me.bit())) fail("%s: wrong mask: lane %d is outside its own mask 0x%08x", verb, lane, mask);
  if (const uint32_t gone = mask & (~warp.lanes | warp.exited))
    fail("%s: wrong mask: 0x%08x names lanes 0x%08x, which never arrive: they exited or are not in the block", verb,
         mask, gone);
  if (const uint32_t away = mask & warp.at_block_barrier)
    fail("divergent barrier: %s with mask 0x%08x, while lanes 0x%08x of it wait at %s", verb, mask, away,
         block.at_cluster_barrier ? "sync_cluster" : "sync_block");
  if (kind == Kind::kShuffle) {
    if (lane_mask < 0 || lane_mask > 31) fail("shfl_xor: a lane mask of %d is not in 0..31", lane_mask);
    if (!(mask >> (lane ^ lane_mask) & 1))
      fail("shfl_xor: wrong mask: lane %d reads lane %d, which is outside of mask 0x%08x", lane, lane ^ lane_mask,
           mask);
  }

  Meeting* mine = nullptr;
  for (Meeting& m : warp.meetings) {
    if (m.kind == kind && m.mask == mask && m.lane_mask == lane_mask && m.bytes == bytes) {
      mine = &m;
    } else if ((m.mask & me.bit()) && (m.arrived & mask)) {  // they wait for this lane, and it would wait for them
      fail("%s: masks or operations differ: this lane has mask 0x%08x, lanes 0x%08x wait for it at %s with 0x%08x",
           verb, mask, m.arrived, m.kind == Kind::kSync ? "sync_warp" : "shfl_xor", m.mask);
    }
  }
  if (!mine) {
    warp.meetings.push_back(Meeting{kind, mask, lane_mask, bytes, 0, {}});
    mine = &warp.meetings.back();
  }
  mine->arrived |= me.bit();
  mine->values[lane] = value;
  if (mine->arrived != mask) {
    pause();
    return me.answer;
  }

  const Meeting done = *mine;
  *mine = warp.meetings.back();
  warp.meetings.pop_back();
  struct {
    Fiber* fibers[32];
    size_t n = 0;
    size_t size() const { return n; }
    Fiber* operator[](size_t i) const { return fibers[i]; }
    Fiber* const* begin() const { return fibers; }
    Fiber* const* end() const { return fibers + n; }
  } all;
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Fiber* f = block.fibers[first + static_cast<size_t>(l)].get();
    all.fibers[all.n++] = f;
    f->answer = done.values[l ^ lane_mask];
    if (f != &me) make_ready(f);
  }
  if (kind == Kind::kSync) {
    join(all);
    ++g.counters.warp_barriers;
  } else {
    ++g.counters.shuffles;  // it moves values and orders nothing
  }
  return me.answer;
}

}  // namespace

void set_options(const Options& options) { g.options = options; }
const Options& options() { return g.options; }
const Counters& counters() { return g.counters; }
void reset_counters() {
  const uint64_t launches = g.counters.launches;  // shadows go by it
  g.counters = Counters();
  g.counters.launches = launches;
}
const std::string& fault() { return g.fault; }

Memory::~Memory() {
  g.last_range = nullptr;
  const auto mine = [this](const std::unique_ptr<Range>& r) { return r->owner == this; };
  g.ranges.erase(std::remove_if(g.ranges.begin(), g.ranges.end(), mine), g.ranges.end());
}
void Memory::input(const std::string& name, const void* data, size_t bytes) {
  register_range(this, name, data, bytes, Use::kInput);
}
void Memory::output(const std::string& name, void* data, size_t bytes) {
  register_range(this, name, data, bytes, Use::kOutput);
}
void Memory::scratch(const std::string& name, void* data, size_t bytes) {
  register_range(this, name, data, bytes, Use::kScratch);
}

namespace device {

int thread() { return g.current->thread; }
int threads() { return g.threads; }
int64_t block() { return g.current->block->id; }
int64_t blocks() { return g.blocks; }
size_t shared_bytes() { return g.shared_bytes; }

void check_load(const void* from, size_t bytes, Path path) {
  Range& r = range_of("loads", from, bytes, bytes);
  if (r.use == Use::kInput) return;
  const size_t offset = reinterpret_cast<uintptr_t>(from) - r.begin;
  for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    Cell& cell = r.shadow.at(i);
    if (path == Path::kConstant && cell.writer.moment)
      fail_global("loads", r, i * kCellBytes, "written in the same launch, which this load may not see, by",
                  cell.writer);
    if (!ordered(cell.writer))
      fail_global("loads", r, i * kCellBytes, "race: nothing orders this after the write of", cell.writer);
    cell.constant |= path == Path::kConstant;
    r.shadow.read(cell);
  }
}

void check_store(const void* to, size_t bytes) {
  Range& r = range_of("stores", to, bytes, bytes);
  const size_t offset = reinterpret_cast<uintptr_t>(to) - r.begin;
  if (r.use == Use::kInput)
    fail("stores %d bytes at offset %lld of '%s': an input is read-only", static_cast<int>(bytes),
         static_cast<long long>(offset), r.name.c_str());
  for (size_t i = offset / kCellBytes; i <= (offset + bytes - 1) / kCellBytes; ++i) {
    Cell& cell = r.shadow.at(i);
    Event who;
    if (r.use == Use::kOutput && cell.writer.moment)
      fail_global("stores to", r, i * kCellBytes, "written twice, before by", cell.writer);
    if (!ordered(cell.writer))
      fail_global("stores to", r, i * kCellBytes, "race: nothing orders this after the write of", cell.writer);
    if (cell.constant)
      fail_global("stores to", r, i * kCellBytes, "written in the same launch that loads it as constant, last read by",
                  cell.reader);
    if (!r.shadow.readers_ordered(cell, &who))
      fail_global("stores to", r, i * kCellBytes, "race: nothing orders this after the read of", who);
    r.shadow.write(cell, false);
  }
}

const void* shared_load(size_t array, int size, int i, size_t bytes) {
  const size_t at = place("loads", array, size, i, bytes);
  Block& block = *g.current->block;
  for (size_t c = at / kCellBytes; c < (at + bytes) / kCellBytes; ++c) {
    Cell& cell = block.shadow.at(c);
    if (cell.in_flight)
      fail_shared("loads", c, "an asynchronous copy is in flight to it, of", cell.writer,
                  ", which has not waited for it");
    if (cell.barrier) fail_shared("loads", c, "it is part of an mbarrier, initialized by", cell.writer, "");
    if (!cell.writer.moment)
      fail("loads byte %lld of shared memory: unwritten", static_cast<long long>(c * kCellBytes));
    if (!ordered(cell.writer)) {
      if (in_flight(block, cell.writer))
        fail_shared("loads", c, "bytes are in flight to it, of", cell.writer, ", which is not complete");
      fail_shared("loads", c, cell.by_copy ? "race with the asynchronous copy of" : "race with the write of",
                  cell.writer, ", which nothing orders before the load");
    }
    block.shadow.read(cell);
  }
  return block.shared.get() + at;
}

void* shared_store(size_t array, int size, int i, size_t bytes) {
  const size_t at = place("stores", array, size, i, bytes);
  Block& block = *g.current->block;
  check_shared_write("stores", block, at, bytes);
  for (size_t c = at / kCellBytes; c < (at + bytes) / kCellBytes; ++c) block.shadow.write(block.shadow.at(c), false);
  return block.shared.get() + at;
}

void shared_too_small(size_t need) {
  fail("takes %lld bytes of shared memory, the launch gives %lld", static_cast<long long>(need),
       static_cast<long long>(g.shared_bytes));
}

void copy_async(size_t array, int size, int i, const void* from) {
  Fiber& me = *g.current;
  Block& block = *me.block;
  const size_t at = place("copies to", array, size, i, 16);
  range_of("copies", from, 16, 16);
  check_load(from, 16, Path::kCoherent);
  check_shared_write("copies to", block, at, 16);
  for (size_t c = at / kCellBytes; c < (at + 16) / kCellBytes; ++c) {
    Cell& cell = block.shadow.at(c);
    block.shadow.write(cell, true);
    cell.in_flight = true;
  }
  Copy copy;
  copy.to = at;
  copy.from = from;
  copy.group = me.groups;
  const int arrival = g.schedule.arrival < 3 ? g.schedule.arrival : static_cast<int>(random() % 3);
  if (arrival == 0) move_bytes(block, copy);
  if (arrival == 2 && (g.late.empty() || g.late.back() != &me)) g.late.push_back(&me);
  me.copies.push_back(copy);
  ++g.counters.copies;
}

void copy_commit() { ++g.current->groups; }

void copy_wait(int pending) {
  Fiber& me = *g.current;
  make_ready(&me);
  pause();
  Block& block = *me.block;
  size_t done = 0;
  for (; done < me.copies.size(); ++done) {
    Copy& copy = me.copies[done];
    if (copy.group + static_cast<uint64_t>(pending) >= me.groups) break;
    move_bytes(block, copy);
    for (size_t c = copy.to / kCellBytes; c < (copy.to + 16) / kCellBytes; ++c) {
      Cell& cell = block.shadow.at(c);
      cell.in_flight = false;
      block.shadow.write(cell, true);  // as of now, and to this thread alone
    }
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + static_cast<ptrdiff_t>(done));
}

void sync_block() {
  Fiber& me = *g.current;
  Block& block = *me.block;
  if (block.exited) fail("divergent barrier: waits at sync_block, after %d threads of the block exited", block.exited);
  if (block.at_cluster_barrier)
    fail("divergent barrier: waits at sync_block, while %d threads of the block wait at sync_cluster",
         block.at_cluster_barrier);
  no_wait_elsewhere("waits at sync_block");
  block.at_barrier.push_back(&me);
  Warp& warp = block.warps[static_cast<size_t>(me.thread) / 32];
  if (static_cast<int>(block.at_barrier.size()) < g.threads) {
    warp.at_block_barrier |= me.bit();
    return pause();
  }
  join(block.at_barrier);
  for (Warp& w : block.warps) w.at_block_barrier = 0;
  for (Fiber* f : block.at_barrier)
    if (f != &me) make_ready(f);
  block.at_barrier.clear();
  ++g.counters.block_barriers;
}

int cluster_rank() { return static_cast<int>(g.current->block->id % g.cluster); }
int cluster_blocks() { return g.cluster; }

void sync_cluster() {
  Fiber& me = *g.current;
  Block& block = *me.block;
  Cluster& cluster = *block.cluster;
  if (cluster.exited)
    fail("divergent barrier: waits at sync_cluster, after %d threads of the cluster exited", cluster.exited);
  if (!block.at_barrier.empty())
    fail("divergent barrier: waits at sync_cluster, while %d threads of the block wait at sync_block",
         static_cast<int>(block.at_barrier.size()));
  no_wait_elsewhere("waits at sync_cluster");
  cluster.at_barrier.push_back(&me);
  if (static_cast<int>(cluster.at_barrier.size()) < g.threads * g.cluster) {
    block.warps[static_cast<size_t>(me.thread) / 32].at_block_barrier |= me.bit();
    ++block.at_cluster_barrier;
    return pause();
  }
  join_cluster(cluster.at_barrier);
  for (int b = 0; b < g.cluster; ++b) {
    for (Warp& w : cluster.blocks[b].warps) w.at_block_barrier = 0;
    cluster.blocks[b].at_cluster_barrier = 0;
  }
  for (Fiber* f : cluster.at_barrier)
    if (f != &me) make_ready(f);
  cluster.at_barrier.clear();
  ++g.counters.cluster_barriers;
}

void bar_init(size_t bars, int n, int i, uint32_t count) {
  Fiber& me = *g.current;
  Block& block = *me.block;
  const size_t at = place_of_bar("initializes", bars, n, i);
  if (const Bar* const bar = find_bar(block, at))
    fail("initializes the mbarrier at byte %lld twice, before by thread %d", static_cast<long long>(at),
         bar->init.thread);
  if (count < 1 || count > kMaxBytes)
    fail("initializes the mbarrier at byte %lld with a count of %u", static_cast<long long>(at), count);
  check_shared_write("initializes", block, at, 8);
  for (size_t c = at / kCellBytes; c < (at + 8) / kCellBytes; ++c) {
    block.shadow.write(block.shadow.at(c), false);
    block.shadow.at(c).barrier = true;
  }
  block.bars.emplace_back();
  Bar& bar = block.bars.back();
  bar.offset = at;
  bar.thread = static_cast<uint16_t>(static_cast<size_t>(g.threads) + block.bars.size() - 1);
  bar.count = count;
  bar.init = me.now();
}

void bar_init_fence() {
  const Fiber& me = *g.current;
  for (Bar& bar : me.block->bars)
    if (bar.init.thread == me.thread && !bar.fence.moment) bar.fence = me.now();
}

void bar_expect(size_t bars, int n, int i, uint32_t bytes) {
  const char* const verb = "arrives at";
  Fiber& me = *g.current;
  Bar& bar = usable_bar(verb, *me.block, bars, n, i, false);
  check_phase(verb, *me.block, bar);
  if (bar.arrived == bar.count)
    fail("arrives at phase %u of the mbarrier at byte %lld, beyond its count of %u, or a wait for it is missing",
         bar.phase, static_cast<long long>(bar.offset), bar.count);
  ++bar.arrived;
  bar.expected += bytes;
  if (bar.expected > kMaxBytes)
    fail("expects %lld bytes in a phase of the mbarrier at byte %lld, which counts to %u",
         static_cast<long long>(bar.expected), static_cast<long long>(bar.offset), kMaxBytes);
  check_bytes(verb, *me.block, bar);
  raise(bar.gathering.others, me.clock->others);
  raise(bar.gathering.seen, *released());
  complete_if_all_came(bar);
}

void bar_wait(size_t bars, int n, int i, uint32_t parity, bool of_cluster) {
  const char* const verb = of_cluster ? "bar_wait_cluster: waits for" : "bar_wait: waits for";
  Fiber& me = *g.current;
  Bar& bar = usable_bar(verb, *me.block, bars, n, i, false);
  if (parity > 1) fail("%s a parity of %u", verb, parity);
  if (random() % 2) {
    make_ready(&me);
    pause();
  }
  const uint32_t next = phases_known(*me.block, bar);
  const bool again = next % 2 != parity;  // waits for the phase before, which it knows to be complete
  if (bar.phase > next + (again ? 0 : 1))
    fail("%s parity %u of the mbarrier at byte %lld: phase error: it has waited for %u phases, %u are complete", verb,
         parity, static_cast<long long>(bar.offset), next, bar.phase);
  if (again) return;
  if (bar.phase == next) {
    bar.waiting.push_back(&me);
    pause();
  }
  if (bar.phase > next + 1)
    fail("%s parity %u of the mbarrier at byte %lld: phase error: phase %u went by before this thread could see it",
         verb, parity, static_cast<long long>(bar.offset), bar.phase - 1);
  if (!of_cluster && bar.sent[next % 2] == bar.phase)
    fail("%s phase %u of the mbarrier at byte %lld, to which a peer sent: this takes bar_wait_cluster", verb, next,
         static_cast<long long>(bar.offset));
  bar.waited = bar.phase;
  acquire(bar);
}

void bulk_load(size_t array, int size, int i, const void* from, uint32_t bytes, size_t bars, int n, int bar_index) {
  const char* const verb = "bulk_load: copies to";
  Block& block = *g.current->block;
  if (bytes == 0 || bytes % 16 != 0) fail("%s shared memory %u bytes, not a multiple of 16 above 0", verb, bytes);
  const size_t at = place(verb, array, size, i, 16);
  if (static_cast<size_t>(size - i) < bytes / 16) place(verb, array, size, size, 16);  // names the first outside
  place(verb, array, size, i + static_cast<int>(bytes / 16) - 1, 16);
  if (at % 16 != 0) fail("%s byte %lld of shared memory: misaligned", verb, static_cast<long long>(at));
  const char* const source = static_cast<const char*>(from);
  const Range& r = range_around("bulk_load: copies", from, bytes);
  if (r.use == Use::kOutput) fail("bulk_load: copies from '%s', which the launch writes", r.name.c_str());
  if (r.use == Use::kScratch)
    for (uint32_t k = 0; k < bytes; k += 16) check_load(source + k, 16, Path::kConstant);
  Bar& bar = usable_bar("bulk_load: uses", block, bars, n, bar_index, true);
  write_async(verb, block, bar, at, bytes, true);
  ++g.counters.bulk_copies;
  // In pieces, so that other things happen between them.
  const uint32_t piece = (bytes / 16 + 2) / 3 * 16;
  for (uint32_t k = 0; k < bytes; k += piece)
    issue(Piece{&block, &bar, at + k, source + k, std::min(piece, bytes - k), {}, r.begin, r.begin + r.bytes});
}

void send(size_t array, int size, int i, int rank, const void* value, size_t bars, int n, int bar_index) {
  const char* const verb = "st_async: sends to";
  Fiber& me = *g.current;
  if (rank < 0 || rank >= g.cluster)
    fail("%s rank %d, outside of the cluster, which has %d blocks", verb, rank, g.cluster);
  Block& block = me.block->cluster->blocks[rank];
  if (!block.live) fail("%s block %lld, which has exited", verb, static_cast<long long>(block.id));
  const size_t at = place(verb, array, size, i, 16);
  if (at % 16 != 0) fail("%s byte %lld of shared memory: misaligned", verb, static_cast<long long>(at));
  Bar& bar = usable_bar("st_async: uses", block, bars, n, bar_index, true);
  write_async(verb, block, bar, at, 16, false);
  // Release: whoever waits for the message knows what this thread knew.
  auto others = me.clock->others ? std::make_shared<Others>(*me.clock->others) : std::make_shared<Others>();
  (*others)[static_cast<int32_t>(me.block->id)] = released();
  raise(bar.gathering.others, std::shared_ptr<const Others>(others));
  if (&block != me.block) bar.sent[bar.phase % 2] = bar.phase + 1;
  ++g.counters.messages;
  Piece piece{&block, &bar, at, nullptr, 16, {}, 0, 0};
  memcpy(piece.value, value, 16);
  issue(piece);
}

void sync_warp(uint32_t mask) { meet(Kind::kSync, mask, 0, 0, 0); }

uint64_t shuffle_xor(uint64_t bits, int bytes, int lane_mask, uint32_t mask) {
  return meet(Kind::kShuffle, mask, lane_mask, bytes, bits);
}

bool last_block(uint32_t* counter) {
  Fiber& me = *g.current;
  make_ready(&me);
  pause();
  const Range& r = range_of("counts", counter, sizeof(uint32_t), sizeof(uint32_t));
  if (r.use != Use::kScratch) fail("last_block: its counter is in '%s', which is not scratch", r.name.c_str());
  Counter& meeting = g.arrivals[counter];
  if (!meeting.arrived.insert(me.block->id).second) fail("last_block: called twice by the block");

  if (me.clock->others) raise(*meeting.released, *me.clock->others);
  (*meeting.released)[static_cast<int32_t>(me.block->id)] = released();

  const uint32_t limit = static_cast<uint32_t>(g.blocks - 1), old = *counter;
  *counter = old >= limit ? 0 : old + 1;
  if (old != limit) return false;
  auto clock = std::make_shared<Clock>(*me.clock);  // acquire: nobody but the last one may use what the others wrote
  raise(clock->others, meeting.released);
  me.clock = clock;
  return true;
}

int run(int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*), const void* context, int cluster) {
  g.fault.clear();
  ++g.counters.launches;
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes) {
    g.fault = "launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
              std::to_string(shared_bytes) + " bytes of shared memory: no GPU takes it";
    return 1;
  }
  if (cluster < 1 || cluster > kMaxCluster || blocks % cluster != 0) {
    g.fault = "launch of " + std::to_string(blocks) + " blocks in clusters of " + std::to_string(cluster) +
              ": no GPU takes it";
    return 1;
  }
  g.random = g.options.seed * 0x2545f4914f6cdd1du + 1;
  const uint64_t order = g.options.seed % 4;
  g.schedule.order = order == 0 ? Schedule::kFirst : order == 1 ? Schedule::kLast : Schedule::kRandom;
  g.schedule.resident = 1 + static_cast<int>(random() % kMaxResident);
  g.schedule.arrival = static_cast<int>(random() % 4);
  if (cluster > 1)  // fewer, of which each is more
    g.schedule.resident =
        std::min({g.schedule.resident, kMaxSlots / cluster, std::max(1, kMaxFibers / (cluster * threads))});
  g.threads = threads;
  g.blocks = blocks;
  g.cluster = cluster;
  g.shared_bytes = shared_bytes;
  g.body = body;
  g.context = context;
  g.failed = false;
  g.current = nullptr;
  g.ready.clear();
  g.late.clear();
  g.arrivals.clear();
  g.soon.clear();
  g.last.clear();
  for (Block& block : g.resident) block.live = false;
  for (int i = 0; i < g.schedule.resident; ++i) {
    Cluster& all = g.clusters[i];
    all.blocks = g.resident + i * cluster;
    for (int b = 0; b < cluster; ++b) {
      all.blocks[b].cluster = &all;
      all.blocks[b].shared.reset(new char[shared_bytes + 1]);
    }
  }
  run_blocks();
  g.current = nullptr;
  return g.fault.empty() ? 0 : 1;
}

}  // namespace device
}  // namespace simt
}  // namespace kd
