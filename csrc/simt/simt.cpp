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

#include "fiber.h"

namespace kd {
namespace simt {
namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 232448;  // what a block of compute capability 9.0 can have
constexpr int kMaxResident = 3;
constexpr size_t kCellBytes = 2;

// ---- clocks ---------------------------------------------------------------------------------

// A moment of a thread. Thread a's clock holds, per thread b, the last moment of b that is ordered before what a does
// now. Threads that meet at a barrier leave with one clock, which they share; a thread's own moment is kept beside it.
struct Event {
  uint32_t moment = 0;  // 0: never
  uint16_t thread = 0;
  int32_t block = 0;
};

using Moments = std::vector<uint32_t>;
using Others = std::unordered_map<int32_t, std::shared_ptr<const Moments>>;  // what is known of other blocks

struct Clock {
  Moments seen;
  std::shared_ptr<const Others> others;
};

void raise(Moments& to, const Moments& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
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
  uint32_t lanes = 0, exited = 0, at_block_barrier = 0;
  std::vector<Meeting> meetings;
};

// The last write of a cell and the reads since, for whatever memory it shadows.
struct Cell {
  uint32_t generation = 0;
  uint32_t readers = 0;  // a list, where one reader is not enough
  Event writer, reader;
  bool in_flight = false, by_copy = false, constant = false;
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

 private:
  std::vector<Cell> cells_;
  std::vector<Readers> lists_;  // [0] stands for none
  std::vector<uint32_t> free_;
  uint32_t generation_ = 0;
};

struct Block {
  int64_t id = 0;
  bool live = false;
  int running = 0, exited = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> at_barrier;
  std::vector<Warp> warps;
  std::unique_ptr<char[]> shared;
  Shadow shadow;
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
  int resident;
  int arrival;  // of copies: at issue, at the wait, in between, or a mixture
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
  size_t shared_bytes = 0;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  Context host;
  Fiber* current = nullptr;
  bool failed = false;
  Block resident[kMaxResident];
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
  if (e.block == me.block->id) return e.thread == me.thread || me.clock->seen[e.thread] >= e.moment;
  if (!me.clock->others) return false;
  const auto known = me.clock->others->find(e.block);
  return known != me.clock->others->end() && (*known->second)[e.thread] >= e.moment;
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
}

// All who meet leave with what any of them knew, and with what they did before.
template <class Fibers>
void join(const Fibers& fibers) {
  auto joined = std::make_shared<Clock>(*fibers[0]->clock);
  const bool everyone = fibers.size() == joined->seen.size();
  const Clock* merged = fibers[0]->clock.get();
  for (const Fiber* f : fibers) {
    if (f->clock.get() == merged) continue;
    merged = f->clock.get();
    if (!everyone) raise(joined->seen, merged->seen);  // no one knows more of a thread than it does itself
    raise(joined->others, merged->others);
  }
  for (const Fiber* f : fibers) joined->seen[static_cast<size_t>(f->thread)] = f->moment;
  for (Fiber* f : fibers) {
    f->clock = joined;
    ++f->moment;
  }
}

// ---- the schedule ---------------------------------------------------------------------------

void make_ready(Fiber* f) { g.ready.push_back(f); }

void move_bytes(Block& block, Copy& copy) {
  if (!copy.moved) memcpy(block.shared.get() + copy.to, copy.from, 16);
  copy.moved = true;
}

Fiber* pick() {
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
  for (const Meeting& m : block.warps[static_cast<size_t>(me.thread) / 32].meetings)
    if (m.mask & me.bit())
      fail("wrong mask: exits, so that this lane never arrives where lanes 0x%08x wait with mask 0x%08x", m.arrived,
           m.mask);
}

void fiber_main() {
  g.current->context.entered();
  g.body(g.context);
  exit_checks();
  Fiber& me = *g.current;
  Block& block = *me.block;
  block.warps[static_cast<size_t>(me.thread) / 32].exited |= me.bit();
  ++block.exited;
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
  std::vector<int64_t> order(static_cast<size_t>(g.blocks));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  if (g.schedule.order == Schedule::kLast) std::reverse(order.begin(), order.end());
  if (g.schedule.order == Schedule::kRandom)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);

  auto clock = std::make_shared<Clock>();
  clock->seen.resize(static_cast<size_t>(g.threads));
  for (size_t next = 0;;) {
    bool live = false;
    for (int slot = 0; slot < g.schedule.resident; ++slot) {
      Block& block = g.resident[slot];
      if (!block.live && next < order.size()) start(block, order[next++], clock);
      live |= block.live;
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
Range& range_of(const char* verb, const void* p, size_t bytes) {
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
  if (at % bytes != 0)
    fail("%s %d bytes at offset %lld of '%s': misaligned", verb, static_cast<int>(bytes),
         static_cast<long long>(at - r.begin), r.name.c_str());
  if (r.use != Use::kInput && r.launch != g.counters.launches) {
    r.launch = g.counters.launches;
    r.shadow.renew(r.bytes + 1);
  }
  return r;
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

[[noreturn]] void fail_shared(const char* verb, size_t cell, const char* why, const Event& other, const char* rest) {
  fail("%s byte %lld of shared memory: %s thread %d%s", verb, static_cast<long long>(cell * kCellBytes), why,
       other.thread, rest);
}

void check_shared_write(const char* verb, size_t at, size_t bytes) {
  Block& block = *g.current->block;
  for (size_t i = at / kCellBytes; i < (at + bytes) / kCellBytes; ++i) {
    Cell& cell = block.shadow.at(i);
    Event who;
    if (cell.in_flight)
      fail_shared(verb, i, "an asynchronous copy is in flight to it, of", cell.writer, ", which has not waited for it");
    if (!ordered(cell.writer)) fail_shared(verb, i, "race with the write of", cell.writer, ", which nothing orders");
    if (!block.shadow.readers_ordered(cell, &who))
      fail_shared(verb, i, "race with the read of", who, ", which nothing orders before the write");
  }
}

void no_wait_elsewhere(const char* verb) {
  const Fiber& me = *g.current;
  for (const Meeting& m : me.block->warps[static_cast<size_t>(me.thread) / 32].meetings)
    if (m.mask & me.bit())
      fail("divergent barrier: %s, while lanes 0x%08x of the warp wait for this one at %s with mask 0x%08x", verb,
           m.arrived, m.kind == Kind::kSync ? "sync_warp" : "shfl_xor", m.mask);
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
    fail("divergent barrier: %s with mask 0x%08x, while lanes 0x%08x of it wait at sync_block", verb, mask, away);
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
  Range& r = range_of("loads", from, bytes);
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
  Range& r = range_of("stores", to, bytes);
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
    if (!cell.writer.moment)
      fail("loads byte %lld of shared memory: unwritten", static_cast<long long>(c * kCellBytes));
    if (!ordered(cell.writer))
      fail_shared("loads", c, cell.by_copy ? "race with the asynchronous copy of" : "race with the write of",
                  cell.writer, ", which nothing orders before the load");
    block.shadow.read(cell);
  }
  return block.shared.get() + at;
}

void* shared_store(size_t array, int size, int i, size_t bytes) {
  const size_t at = place("stores", array, size, i, bytes);
  check_shared_write("stores", at, bytes);
  Block& block = *g.current->block;
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
  range_of("copies", from, 16);
  check_load(from, 16, Path::kCoherent);
  check_shared_write("copies to", at, 16);
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

void sync_warp(uint32_t mask) { meet(Kind::kSync, mask, 0, 0, 0); }

uint64_t shuffle_xor(uint64_t bits, int bytes, int lane_mask, uint32_t mask) {
  return meet(Kind::kShuffle, mask, lane_mask, bytes, bits);
}

bool last_block(uint32_t* counter) {
  Fiber& me = *g.current;
  make_ready(&me);
  pause();
  const Range& r = range_of("counts", counter, sizeof(uint32_t));
  if (r.use != Use::kScratch) fail("last_block: its counter is in '%s', which is not scratch", r.name.c_str());
  Counter& meeting = g.arrivals[counter];
  if (!meeting.arrived.insert(me.block->id).second) fail("last_block: called twice by the block");

  // Release: everything that is ordered before this, the thread's own doing included.
  auto mine = std::make_shared<Moments>(me.clock->seen);
  (*mine)[static_cast<size_t>(me.thread)] = me.moment++;
  if (me.clock->others) raise(*meeting.released, *me.clock->others);
  (*meeting.released)[static_cast<int32_t>(me.block->id)] = mine;

  const uint32_t limit = static_cast<uint32_t>(g.blocks - 1), old = *counter;
  *counter = old >= limit ? 0 : old + 1;
  if (old != limit) return false;
  auto clock = std::make_shared<Clock>(*me.clock);  // acquire: nobody but the last one may use what the others wrote
  raise(clock->others, meeting.released);
  me.clock = clock;
  return true;
}

int run(int64_t blocks, int threads, size_t shared_bytes, void (*body)(const void*), const void* context) {
  g.fault.clear();
  ++g.counters.launches;
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes) {
    g.fault = "launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
              std::to_string(shared_bytes) + " bytes of shared memory: no GPU takes it";
    return 1;
  }
  g.random = g.options.seed * 0x2545f4914f6cdd1du + 1;
  const uint64_t order = g.options.seed % 4;
  g.schedule.order = order == 0 ? Schedule::kFirst : order == 1 ? Schedule::kLast : Schedule::kRandom;
  g.schedule.resident = 1 + static_cast<int>(random() % kMaxResident);
  g.schedule.arrival = static_cast<int>(random() % 4);
  g.threads = threads;
  g.blocks = blocks;
  g.shared_bytes = shared_bytes;
  g.body = body;
  g.context = context;
  g.failed = false;
  g.current = nullptr;
  g.ready.clear();
  g.late.clear();
  g.arrivals.clear();
  for (Block& block : g.resident) {
    block.live = false;
    block.shared.reset(new char[shared_bytes + 1]);
  }
  run_blocks();
  g.current = nullptr;
  return g.fault.empty() ? 0 : 1;
}

}  // namespace device
}  // namespace simt
}  // namespace kd
