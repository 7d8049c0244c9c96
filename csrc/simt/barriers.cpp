// Where threads meet: barriers of a warp, a block and a cluster, shuffles, and the counter by which the last block
// finds out that it is the last. Who meets at a barrier or is the last learns what the others did before; a shuffle
// orders nothing. Threads that wait for each other at different places would hang on a GPU, and are a fault here.
#include <algorithm>
#include <unordered_map>

#include "state.h"

namespace kd {
namespace simt {
namespace {

// All who meet leave with what any of them knew, and with what they did before.
template <class Fibers>
void join_clocks(const Fibers& fibers) {
  auto joined = std::make_shared<Clock>(*fibers[0]->clock);
  const bool everyone = fibers.size() == static_cast<size_t>(g.threads);
  const Clock* merged = fibers[0]->clock.get();
  for (const Fiber* f : fibers) {
    if (f->clock.get() == merged) continue;
    merged = f->clock.get();
    learn(joined->seen, merged->seen, everyone ? fibers.size() : 0);  // no one knows more of a thread than it does
    learn(joined->others, merged->others);
  }
  for (const Fiber* f : fibers) joined->seen[static_cast<size_t>(f->thread)] = f->moment;
  for (Fiber* f : fibers) {
    f->clock = joined;
    ++f->moment;
  }
}

// The same for all threads of a cluster, which come in any order.
void join_clocks_of_cluster(const std::vector<Fiber*>& fibers) {
  std::unordered_map<Block*, std::shared_ptr<Clock>> own;
  std::shared_ptr<const Others> all;
  const Clock* merged = nullptr;
  for (const Fiber* f : fibers) {
    std::shared_ptr<Clock>& clock = own[f->block];
    if (!clock) clock = std::make_shared<Clock>(*f->clock);
    if (f->clock.get() != merged) {
      merged = f->clock.get();
      learn(clock->seen, merged->seen, static_cast<size_t>(g.threads));
      learn(all, merged->others);
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

void no_wait_elsewhere(const char* verb) {
  const Fiber& me = *g.current;
  for (const Meeting& m : me.block->warps[static_cast<size_t>(me.thread) / 32].meetings)
    if (m.mask & me.lane_bit())
      fail("divergent barrier: %s, while lanes 0x%08x of the warp wait for this one at %s with mask 0x%08x", verb,
           m.arrived, m.kind == WarpOperation::kSync ? "sync_warp" : "shfl_xor", m.mask);
}

uint64_t meet_lanes(WarpOperation kind, uint32_t mask, int lane_mask, int bytes, uint64_t value) {
  Fiber& me = *g.current;
  Block& block = *me.block;
  const size_t first = static_cast<size_t>(me.thread) / 32 * 32;
  Warp& warp = block.warps[first / 32];
  const int lane = me.thread % 32;
  const char* const verb = kind == WarpOperation::kSync ? "sync_warp" : "shfl_xor";
  if (!(mask & me.lane_bit())) fail("%s: wrong mask: lane %d is outside its own mask 0x%08x", verb, lane, mask);
  if (const uint32_t gone = mask & (~warp.lanes | warp.exited))
    fail("%s: wrong mask: 0x%08x names lanes 0x%08x, which never arrive: they exited or are not in the block", verb,
         mask, gone);
  if (const uint32_t away = mask & warp.at_block_barrier)
    fail("divergent barrier: %s with mask 0x%08x, while lanes 0x%08x of it wait at %s", verb, mask, away,
         block.at_cluster_barrier ? "sync_cluster" : "sync_block");
  if (kind == WarpOperation::kShuffle) {
    if (lane_mask < 0 || lane_mask > 31) fail("shfl_xor: a lane mask of %d is not in 0..31", lane_mask);
    if (!(mask >> (lane ^ lane_mask) & 1))
      fail("shfl_xor: wrong mask: lane %d reads lane %d, which is outside of mask 0x%08x", lane, lane ^ lane_mask,
           mask);
  }

  Meeting* mine = nullptr;
  for (Meeting& m : warp.meetings) {
    if (m.kind == kind && m.mask == mask && m.lane_mask == lane_mask && m.bytes == bytes) {
      mine = &m;
    } else if ((m.mask & me.lane_bit()) && (m.arrived & mask)) {  // they wait for this lane, and it would wait for them
      fail("%s: masks or operations differ: this lane has mask 0x%08x, lanes 0x%08x wait for it at %s with 0x%08x",
           verb, mask, m.arrived, m.kind == WarpOperation::kSync ? "sync_warp" : "shfl_xor", m.mask);
    }
  }
  if (!mine) {
    warp.meetings.push_back(Meeting{kind, mask, lane_mask, bytes, 0, {}});
    mine = &warp.meetings.back();
  }
  mine->arrived |= me.lane_bit();
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
  if (kind == WarpOperation::kSync) {
    join_clocks(all);
    ++g.counters.warp_barriers;
  } else {
    ++g.counters.shuffles;  // it moves values and orders nothing
  }
  return me.answer;
}

}  // namespace

namespace device {

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
    warp.at_block_barrier |= me.lane_bit();
    return pause();
  }
  join_clocks(block.at_barrier);
  for (Warp& w : block.warps) w.at_block_barrier = 0;
  for (Fiber* f : block.at_barrier)
    if (f != &me) make_ready(f);
  block.at_barrier.clear();
  ++g.counters.block_barriers;
}

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
    block.warps[static_cast<size_t>(me.thread) / 32].at_block_barrier |= me.lane_bit();
    ++block.at_cluster_barrier;
    return pause();
  }
  join_clocks_of_cluster(cluster.at_barrier);
  for (int b = 0; b < g.cluster; ++b) {
    for (Warp& w : cluster.blocks[b].warps) w.at_block_barrier = 0;
    cluster.blocks[b].at_cluster_barrier = 0;
  }
  for (Fiber* f : cluster.at_barrier)
    if (f != &me) make_ready(f);
  cluster.at_barrier.clear();
  ++g.counters.cluster_barriers;
}

void sync_warp(uint32_t mask) { meet_lanes(WarpOperation::kSync, mask, 0, 0, 0); }

uint64_t shuffle_xor(uint64_t bits, int bytes, int lane_mask, uint32_t mask) {
  return meet_lanes(WarpOperation::kShuffle, mask, lane_mask, bytes, bits);
}

bool last_block(uint32_t* counter) {
  Fiber& me = *g.current;
  make_ready(&me);
  pause();
  const Range& r = range_of("counts", counter, sizeof(uint32_t), sizeof(uint32_t));
  if (r.use != Use::kScratch) fail("last_block: its counter is in '%s', which is not scratch", r.name.c_str());
  LastBlockCounter& meeting = g.last_block_counters[counter];
  if (!meeting.arrived.insert(me.block->id).second) fail("last_block: called twice by the block");

  if (me.clock->others) learn(*meeting.released, *me.clock->others);
  (*meeting.released)[static_cast<int32_t>(me.block->id)] = released();

  const uint32_t limit = static_cast<uint32_t>(g.blocks - 1), old = *counter;
  *counter = old >= limit ? 0 : old + 1;
  if (old != limit) return false;
  auto clock = std::make_shared<Clock>(*me.clock);  // acquire: nobody but the last one may use what the others wrote
  learn(clock->others, meeting.released);
  me.clock = clock;
  return true;
}

}  // namespace device

}  // namespace simt
}  // namespace kd
