// Which thread runs when, from a launch's first block to its last. Threads run until they wait for each other; the seed
// picks who goes on, and when asynchronous bytes arrive, so that different seeds try different orders.
#include <stdio.h>

#include <algorithm>
#include <utility>

#include "state.h"

namespace kd {
namespace simt {
namespace {

Fiber* next_to_run() {
  if (!g.arrive_soon.empty() && random() % 4 == 0) land_one_of(g.arrive_soon);
  while (g.ready.empty() && !(g.arrive_soon.empty() && g.arrive_last.empty()))
    land_one_of(g.arrive_soon.empty() ? g.arrive_last : g.arrive_soon);
  if (!g.with_late_copies.empty() && random() % 4 == 0) {
    Fiber* f = g.with_late_copies.back();
    g.with_late_copies.pop_back();
    for (AsyncCopy& copy : f->copies) move_bytes(*f->block, copy);
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

}  // namespace

// Runs others until somebody makes this fiber ready again.
void pause() {
  Fiber* me = g.current;
  Fiber* next = next_to_run();
  if (next == me) return;
  g.current = next;
  Context::change(me->context, next ? next->context : g.host);
}

namespace {

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
    if (m.mask & me.lane_bit())
      fail("wrong mask: exits, so that this lane never arrives where lanes 0x%08x wait with mask 0x%08x", m.arrived,
           m.mask);
  if (block.running > 1) return;
  for (const Mbarrier& bar : block.bars) {
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
  block.warps[static_cast<size_t>(me.thread) / 32].exited |= me.lane_bit();
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

void start_block(Block& block, int64_t id, const std::shared_ptr<const Clock>& clock) {
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
    block.warps[i / 32].lanes |= f.lane_bit();
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
    for (const Mbarrier& bar : block.bars) {
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
                 static_cast<int>(w), m.arrived, m.kind == WarpOperation::kSync ? "sync_warp" : "shfl_xor", m.mask,
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
      for (int b = 0; b < g.cluster; ++b) start_block(cluster.blocks[b], order[next] * g.cluster + b, clock);
      ++next;
    }
    if (!live) break;
    g.current = next_to_run();
    if (!g.current) return report_deadlock();
    Context::change(g.host, g.current->context);
    if (g.failed) return;
  }
  for (const auto& entry : g.last_block_counters)
    if (*entry.first != 0)
      g.fault = "last_block left its counter at " + std::to_string(*entry.first) + ": " +
                std::to_string(entry.second.arrived.size()) + " of " + std::to_string(g.blocks) +
                " blocks called it, or it did not start at 0";
}

}  // namespace

namespace device {

int thread() { return g.current->thread; }
int threads() { return g.threads; }
int64_t block() { return g.current->block->id; }
int64_t blocks() { return g.blocks; }
size_t shared_bytes() { return g.shared_bytes; }

int cluster_rank() { return static_cast<int>(g.current->block->id % g.cluster); }
int cluster_blocks() { return g.cluster; }

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
  g.with_late_copies.clear();
  g.last_block_counters.clear();
  g.arrive_soon.clear();
  g.arrive_last.clear();
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
