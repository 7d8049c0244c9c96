#include "faults.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>

#include "arch.h"

namespace kd {
namespace simt {
namespace {

using namespace arch;

constexpr int kThreads = 64;
constexpr int kBlocks = 4;
constexpr int kValues = 256;  // of each kind of memory
constexpr size_t kSharedBytes = 2560;

struct Args {
  bool ok;  // without the fault
  const float* in;
  float* out;
  float* partial;
  uint32_t* counter;
  std::vector<int>* trace;  // host memory, which a real kernel could not reach
};

// An element per thread that everybody has written and may access.
Shared<float> prepared() {
  Shared<float> s = shared().take<float>(kThreads);
  s.st(thread(), 1.0f);
  sync_block();
  return s;
}

// The same for a slot per thread, as copies fill it.
Shared<Granule> prepared_slots() {
  Shared<Granule> s = shared().take<Granule>(kThreads);
  s.st(thread(), Granule{{1, 2, 3, 4}});
  sync_block();
  return s;
}

// ---- barriers -------------------------------------------------------------------------------

KD_KERNEL(kThreads, 1) read_before_write(KD_ARGUMENT(Args) a) {
  const Shared<float> s = prepared();
  if (thread() == 0) s.st(0, 2.0f);
  if (a.ok) sync_block();
  s.ld(0);
}

KD_KERNEL(kThreads, 1) write_after_read(KD_ARGUMENT(Args) a) {
  const Shared<float> s = prepared();
  s.ld(0);
  if (a.ok) sync_block();
  if (thread() == kThreads - 1) s.st(0, 2.0f);
}

KD_KERNEL(kThreads, 1) barrier_of_a_warp_for_a_block(KD_ARGUMENT(Args) a) {
  const Shared<float> s = prepared();
  s.st(thread(), 2.0f);
  if (a.ok)
    sync_block();
  else
    sync_warp();
  s.ld((thread() + 1) % kThreads);
}

KD_KERNEL(kThreads, 1) two_writers_of_a_shared_element(KD_ARGUMENT(Args) a) {
  const Shared<float> s = prepared();
  s.st(a.ok ? thread() : thread() / 2, 2.0f);
}

KD_KERNEL(kThreads, 1) divergent_barrier(KD_ARGUMENT(Args) a) {
  if (a.ok || thread() % 2)
    sync_block();
  else
    sync_warp(~0u);
}

KD_KERNEL(kThreads, 1) exit_before_barrier(KD_ARGUMENT(Args) a) {
  if (!a.ok && thread() == 5) return;
  sync_block();
}

KD_KERNEL(kThreads, 1) missing_sync_warp(KD_ARGUMENT(Args) a) {
  const Shared<float> s = prepared();
  s.st(thread(), 2.0f);
  if (a.ok)
    sync_warp();
  else
    shfl_xor(1.0f, 1);  // meets, but orders nothing
  s.ld(thread() ^ 1);
}

KD_KERNEL(kThreads, 1) sync_warp_of_others(KD_ARGUMENT(Args) a) {
  const Shared<float> s = prepared();
  s.st(thread(), 2.0f);
  sync_warp(a.ok ? ~0u : lane() < 16 ? 0x0000ffffu : 0xffff0000u);
  s.ld(thread() ^ 16);
}

// ---- masks ----------------------------------------------------------------------------------

KD_KERNEL(kThreads, 1) mask_without_itself(KD_ARGUMENT(Args) a) {
  const uint32_t half = lane() < 16 ? 0x0000ffffu : 0xffff0000u;
  shfl_xor(1.0, 1, a.ok || lane() != 3 ? half : 0xffff0000u);
}

KD_KERNEL(kThreads, 1) mask_without_the_source(KD_ARGUMENT(Args) a) {
  shfl_xor(1.0f, a.ok ? 8 : 16, lane() < 16 ? 0x0000ffffu : 0xffff0000u);
}

KD_KERNEL(kThreads, 1) mask_names_an_absent_lane(KD_ARGUMENT(Args) a) {
  if (lane() < 16) shfl_xor(1.0f, 1, a.ok ? 0x0000ffffu : ~0u);
}

KD_KERNEL(kThreads, 1) masks_differ(KD_ARGUMENT(Args) a) {
  const bool narrow = lane() == 0 && !a.ok;
  shfl_xor(1.0f, 1, narrow ? 0x3u : ~0u);
}

KD_KERNEL(kThreads, 1) lane_masks_differ(KD_ARGUMENT(Args) a) { shfl_xor(1.0f, a.ok || lane() < 16 ? 1 : 2); }

KD_KERNEL(kThreads, 1) operations_differ(KD_ARGUMENT(Args) a) {
  if (a.ok || lane() < 16)
    shfl_xor(1.0f, 1);
  else
    sync_warp();
}

KD_KERNEL(kThreads, 1) circular_masks(KD_ARGUMENT(Args) a) {
  const uint32_t circle[] = {0x3, 0x6, 0x5};
  if (lane() < 3) sync_warp(a.ok ? 0x7u : circle[lane()]);
}

KD_KERNEL(kThreads, 1) absent_at_the_warp_barrier(KD_ARGUMENT(Args) a) {
  if (a.ok || lane() < 31) sync_warp();
  sync_block();
}

// ---- bounds, alignment, contents ------------------------------------------------------------

KD_KERNEL(kThreads, 1) shared_below(KD_ARGUMENT(Args) a) { prepared().ld(a.ok ? 0 : -1); }

KD_KERNEL(kThreads, 1) shared_above(KD_ARGUMENT(Args) a) {
  const Shared<float> s = prepared();
  if (thread() == kThreads - 1) s.st(a.ok ? thread() : kThreads, 1.0f);
}

KD_KERNEL(kThreads, 1) shared_too_much(KD_ARGUMENT(Args) a) {
  shared().take<Granule>(kSharedBytes / 16 + (a.ok ? 0 : 1));
}

KD_KERNEL(kThreads, 1) shared_unwritten(KD_ARGUMENT(Args) a) {
  const Shared<float> s = shared().take<float>(kThreads + 1);
  s.st(thread(), 1.0f);
  sync_block();
  s.ld(a.ok ? kThreads - 1 : kThreads);
}

KD_KERNEL(kThreads, 1) global_load_outside(KD_ARGUMENT(Args) a) {
  load(a.in + (a.ok ? thread() : thread() + kValues - kThreads + 1));
}

KD_KERNEL(kThreads, 1) global_store_outside(KD_ARGUMENT(Args) a) {
  if (block() == 0) store(a.out + thread() - (a.ok ? 0 : 1), 1.0f);
}

KD_KERNEL(kThreads, 1) global_misaligned(KD_ARGUMENT(Args) a) {
  load(reinterpret_cast<const Granule*>(a.in + (a.ok ? 4 : 3)));
}

KD_KERNEL(kThreads, 1) store_to_an_input(KD_ARGUMENT(Args) a) {
  float* const to = a.ok ? a.out : const_cast<float*>(a.in);
  store(to + block() * kThreads + thread(), 1.0f);
}

KD_KERNEL(kThreads, 1) output_written_twice(KD_ARGUMENT(Args) a) {
  store(a.out + (a.ok ? block() : 0) * kThreads + thread(), 1.0f);
}

// ---- copies ---------------------------------------------------------------------------------

const float* source(const Args& a) { return a.in + thread() * 4; }

KD_KERNEL(kThreads, 1) copy_read_before_its_wait(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  copy_async(s, thread(), source(a));
  copy_commit();
  if (a.ok) copy_wait<0>();
  s.ld(thread());
  copy_wait<0>();
}

KD_KERNEL(kThreads, 1) copy_of_a_later_group(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  if (thread() < 32) {
    copy_async(s, thread(), source(a));
    copy_commit();
    copy_async(s, thread() + 32, source(a));
    copy_commit();
    copy_wait<1>();
    s.ld(a.ok ? thread() : thread() + 32);
    copy_wait<0>();
  }
}

KD_KERNEL(kThreads, 1) copy_wait_without_commit(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  copy_async(s, thread(), source(a));
  if (a.ok) copy_commit();
  copy_wait<0>();
  s.ld(thread());
  copy_commit();
  copy_wait<0>();
}

KD_KERNEL(kThreads, 1) copy_waited_for_by_another(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  copy_async(s, thread(), source(a));
  copy_commit();
  copy_wait<0>();
  if (a.ok) sync_block();
  s.ld((thread() + 1) % kThreads);
}

KD_KERNEL(kThreads, 1) copy_wait_after_the_barrier(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  copy_async(s, thread(), source(a));
  copy_commit();
  if (a.ok) copy_wait<0>();
  sync_block();
  copy_wait<0>();
  s.ld((thread() + 1) % kThreads);
}

KD_KERNEL(kThreads, 1) slot_refilled_too_early(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  s.ld((thread() + 1) % kThreads);
  if (a.ok) sync_block();
  copy_async(s, thread(), source(a));
  copy_commit();
  copy_wait<0>();
}

KD_KERNEL(kThreads, 1) store_under_a_copy(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  copy_async(s, thread(), source(a));
  copy_commit();
  if (a.ok) copy_wait<0>();
  s.st(thread(), Granule{{5, 6, 7, 8}});
  copy_wait<0>();
}

KD_KERNEL(kThreads, 1) copy_misaligned(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  copy_async(s, thread(), a.in + (a.ok ? 4 : 2));
  copy_commit();
  copy_wait<0>();
}

KD_KERNEL(kThreads, 1) copy_from_outside(KD_ARGUMENT(Args) a) {
  const Shared<Granule> s = prepared_slots();
  copy_async(s, thread(), a.in + (a.ok ? 0 : kValues));
  copy_commit();
  copy_wait<0>();
}

KD_KERNEL(kThreads, 1) exit_with_a_copy_in_flight(KD_ARGUMENT(Args) a) {
  copy_async(prepared_slots(), thread(), source(a));
  copy_commit();
  if (a.ok) copy_wait<0>();
}

// ---- blocks ---------------------------------------------------------------------------------

KD_KERNEL(kThreads, 1) load_of_what_the_launch_writes(KD_ARGUMENT(Args) a) {
  if (block() != 0) return;
  store(a.partial + thread(), 1.0f);
  if (a.ok)
    load_written(a.partial + thread());
  else
    load(a.partial + thread());
}

// Sums within blocks, and in the block that comes last over the blocks.
void partial_sums(const Args& a, bool wait, bool barrier, bool coherent) {
  const Shared<uint32_t> last = shared().take<uint32_t>(1);
  store(a.partial + block() * kThreads + thread(), load(a.in + block() * kThreads + thread()));
  if (barrier) sync_block();
  if (thread() == 0) last.st(0, wait && last_block(a.counter));
  sync_block();
  if (wait ? !last.ld(0) : block() != 0) return;
  float sum = 0;
  for (int b = 0; b < kBlocks; ++b) {
    const float* from = a.partial + b * kThreads + (thread() + 1) % kThreads;
    sum += coherent ? load_written(from) : load(from);
  }
  store(a.out + thread(), sum);
}

KD_KERNEL(kThreads, 1) partial_without_the_last_block(KD_ARGUMENT(Args) a) { partial_sums(a, a.ok, true, true); }

KD_KERNEL(kThreads, 1) partial_without_the_barrier(KD_ARGUMENT(Args) a) { partial_sums(a, true, a.ok, true); }

KD_KERNEL(kThreads, 1) partial_by_the_constant_path(KD_ARGUMENT(Args) a) { partial_sums(a, true, true, a.ok); }

KD_KERNEL(kThreads, 1) counted_twice(KD_ARGUMENT(Args) a) {
  if (thread() < (a.ok ? 1 : 2)) last_block(a.counter);
}

KD_KERNEL(kThreads, 1) not_counted(KD_ARGUMENT(Args) a) {
  if (thread() == 0 && (a.ok || block() > 0)) last_block(a.counter);
}

// ---- bulk copies and mbarriers --------------------------------------------------------------

constexpr uint32_t kRow = 512;  // bytes of a bulk copy

struct Landing {
  Shared<Granule> s;
  Bars bars;
};

// Room for bulk copies and messages, and two mbarriers of one arrival each that all blocks of the cluster know.
Landing landing(bool fence = true) {
  Carver carver = shared();
  const Landing at = {carver.take<Granule>(kRow / 16), carver.bars(2)};
  if (thread() == 0) {
    bar_init(at.bars, 0, 1);
    bar_init(at.bars, 1, 1);
    if (fence) bar_init_fence();
  }
  sync_cluster();
  return at;
}

void fill(const Landing& at, const Args& a) {
  if (thread() != 0) return;
  bar_expect(at.bars, 0, kRow);
  bulk_load(at.s, 0, a.in, kRow, at.bars, 0);
}

KD_KERNEL(kThreads, 1) bulk_read_before_its_wait(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  fill(at, a);
  sync_block();
  if (a.ok) bar_wait(at.bars, 0, 0);
  at.s.ld(thread() % 32);
}

KD_KERNEL(kThreads, 1) bulk_wait_of_the_wrong_parity(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  fill(at, a);
  sync_block();
  bar_wait(at.bars, 0, a.ok ? 0 : 1);
  at.s.ld(thread() % 32);
}

KD_KERNEL(kThreads, 1) bulk_waited_for_by_another(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  fill(at, a);
  sync_block();
  if (thread() == 0) bar_wait(at.bars, 0, 0);
  if (a.ok) sync_block();
  at.s.ld(thread() % 32);
}

KD_KERNEL(kThreads, 1) bulk_refill_before_release(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  fill(at, a);
  bar_wait(at.bars, 0, 0);
  at.s.ld(thread() % 32);
  if (a.ok) sync_block();
  fill(at, a);
  bar_wait(at.bars, 0, 1);
}

KD_KERNEL(kThreads, 1) store_under_a_bulk_copy(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  fill(at, a);
  if (thread() != 0) return;
  if (a.ok) bar_wait(at.bars, 0, 0);
  at.s.st(31, Granule{{5, 6, 7, 8}});
}

KD_KERNEL(kThreads, 1) store_before_a_bulk_copy(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  if (!a.ok && thread() == 1) at.s.st(5, Granule{{5, 6, 7, 8}});
  sync_block();
  fill(at, a);
  bar_wait(at.bars, 0, 0);
}

// One copy of the first thread, waited for by all.
void bulk_copy(const Landing& at, const Shared<Granule>& to, int i, const void* from, uint32_t bytes,
               uint32_t expected) {
  if (thread() == 0) {
    bar_expect(at.bars, 0, expected);
    bulk_load(to, i, from, bytes, at.bars, 0);
  }
  bar_wait(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) bulk_to_misaligned(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, Shared<Granule>(at.s.offset() + (a.ok ? 16 : 8), 16), 0, a.in, 64, 64);
}

KD_KERNEL(kThreads, 1) bulk_from_misaligned(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, at.s, 0, a.in + (a.ok ? 4 : 2), 64, 64);
}

KD_KERNEL(kThreads, 1) bulk_of_an_odd_size(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, at.s, 0, a.in, a.ok ? 32 : 24, a.ok ? 32 : 24);
}

KD_KERNEL(kThreads, 1) bulk_of_nothing(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, at.s, 0, a.in, a.ok ? 16 : 0, a.ok ? 16 : 0);
}

KD_KERNEL(kThreads, 1) bulk_from_outside(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, at.s, 0, a.in + kValues - 8, a.ok ? 32 : 48, a.ok ? 32 : 48);
}

KD_KERNEL(kThreads, 1) bulk_to_outside(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, at.s, 30, a.in, a.ok ? 32 : 48, a.ok ? 32 : 48);
}

KD_KERNEL(kThreads, 1) bulk_from_an_output(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, at.s, 0, a.ok ? a.in : a.out, 64, 64);
}

KD_KERNEL(kThreads, 1) bulk_from_what_the_launch_wrote(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  float* const from = a.partial + block() * kThreads;
  if (!a.ok) store(from + thread(), 1.0f);
  sync_block();
  bulk_copy(at, at.s, 0, from, 64, 64);
}

KD_KERNEL(kThreads, 1) bulk_expects_too_much(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, at.s, 0, a.in, 64, a.ok ? 64 : 80);
}

KD_KERNEL(kThreads, 1) bulk_expects_too_little(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  bulk_copy(at, at.s, 0, a.in, 64, a.ok ? 64 : 48);
}

KD_KERNEL(kThreads, 1) arrives_beyond_the_count(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  fill(at, a);
  if (thread() == 40 && !a.ok) bar_expect(at.bars, 0, 0);
  bar_wait(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) next_phase_before_its_wait(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  for (int i = 0; i < 2; ++i) {
    if (thread() == 0) {
      bar_expect(at.bars, 0, 64);
      bulk_load(at.s, 4 * i, a.in, 64, at.bars, 0);
    }
    if (a.ok || i == 1) bar_wait(at.bars, 0, static_cast<uint32_t>(i));
    if (a.ok) sync_block();
  }
}

KD_KERNEL(kThreads, 1) bar_outside(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  if (thread() == 1) bar_expect(at.bars, a.ok ? 1 : 2, 0);
}

KD_KERNEL(kThreads, 1) bar_before_its_init(KD_ARGUMENT(Args) a) {
  const Bars bars = shared().bars(2);
  if (thread() == 0) {
    bar_init(bars, a.ok ? 1 : 0, 1);
    bar_init_fence();
  }
  sync_block();
  if (thread() == 1) bar_expect(bars, 1, 0);
}

KD_KERNEL(kThreads, 1) bar_init_without_a_fence(KD_ARGUMENT(Args) a) {
  const Landing at = landing(a.ok);
  if (thread() == 1) bar_expect(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) bulk_without_the_init_fence(KD_ARGUMENT(Args) a) {
  const Landing at = landing(a.ok);
  fill(at, a);
  bar_wait(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) bar_init_without_a_barrier(KD_ARGUMENT(Args) a) {
  const Bars bars = shared().bars(1);
  if (thread() == 32) {
    bar_init(bars, 0, 1);
    bar_init_fence();
  }
  if (a.ok) sync_block();
  if (thread() == 0) bar_expect(bars, 0, 0);
}

KD_KERNEL(kThreads, 1) bar_init_twice(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  if (thread() == 0 && !a.ok) bar_init(at.bars, 1, 1);
}

KD_KERNEL(kThreads, 1) store_to_an_mbarrier(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  if (thread() == 0) Shared<float>(at.bars.offset(), 8).st(a.ok ? 5 : 2, 1.0f);
}

KD_KERNEL(kThreads, 1) exit_with_a_bulk_copy_in_flight(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  fill(at, a);
  if (a.ok && thread() == 0) bar_wait(at.bars, 0, 0);
}

// ---- clusters -------------------------------------------------------------------------------

// A message to the other block of the cluster and the expectation of its message. Cluster: 2 blocks.
void exchange(const Landing& at, int bar) {
  if (thread() != 0) return;
  bar_expect(at.bars, bar, 16);
  st_async(at.s, bar, cluster_rank() ^ 1, Granule{{1, 2, 3, 4}}, at.bars, bar);
}

KD_KERNEL(kThreads, 1) message_not_waited_for(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  exchange(at, 0);
  if (a.ok) bar_wait_cluster(at.bars, 0, 0);
  at.s.ld(0);
}

KD_KERNEL(kThreads, 1) message_ordered_by_a_barrier(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  exchange(at, 0);
  sync_cluster();
  if (a.ok) bar_wait_cluster(at.bars, 0, 0);
  at.s.ld(0);
}

KD_KERNEL(kThreads, 1) message_waited_for_by_the_block(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  exchange(at, 0);
  if (a.ok)
    bar_wait_cluster(at.bars, 0, 0);
  else
    bar_wait(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) message_into_a_slot_in_use(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  const Granule value = {{1, 2, 3, 4}};
  if (cluster_rank() == 1) {
    if (thread() == 0) {
      bar_expect(at.bars, 0, 16);
      bar_expect(at.bars, 1, 16);
    }
    bar_wait_cluster(at.bars, 0, 0);
    at.s.ld(0);
    sync_block();
    if (a.ok && thread() == 0) st_async(at.s, 1, 0, value, at.bars, 0);
    bar_wait_cluster(at.bars, 1, 0);
  } else if (thread() == 0) {
    if (a.ok) bar_expect(at.bars, 0, 16);
    st_async(at.s, 0, 1, value, at.bars, 0);
    if (a.ok) bar_wait_cluster(at.bars, 0, 0);
    st_async(at.s, 0, 1, value, at.bars, 1);
  }
}

KD_KERNEL(kThreads, 1) message_back_before_all_have_read(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  exchange(at, 0);
  bar_wait_cluster(at.bars, 0, 0);
  at.s.ld(0);
  if (a.ok) sync_block();
  exchange(at, 1);  // tells the peer that slot 0 is free
  bar_wait_cluster(at.bars, 1, 0);
  exchange(at, 0);
  bar_wait_cluster(at.bars, 0, 1);
}

KD_KERNEL(kThreads, 1) order_through_a_peer(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  const Granule value = {{1, 2, 3, 4}};
  const int peer = cluster_rank() ^ 1;
  if (thread() == 0) {
    at.s.st(5, value);
    bar_expect(at.bars, 0, 16);
    bar_expect(at.bars, 1, 16);
  }
  sync_block();
  if (thread() == 0) {
    at.s.ld(5);
    st_async(at.s, 0, peer, value, at.bars, 0);
    bar_wait_cluster(at.bars, 0, 0);
    st_async(at.s, 1, peer, value, at.bars, 1);
  }
  if (thread() == 32) {
    if (a.ok) bar_wait_cluster(at.bars, 1, 0);
    at.s.st(5, value);
    if (!a.ok) bar_wait_cluster(at.bars, 1, 0);
  }
}

KD_KERNEL(kThreads, 1) message_before_the_phase(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  for (int i = 0; i < 2; ++i) {  // without a wait in between, the second message may count in the first phase
    if (thread() == 0) {
      if (cluster_rank() == 1) bar_expect(at.bars, 0, 16);
      if (cluster_rank() == 0) st_async(at.s, i, 1, Granule{{1, 2, 3, 4}}, at.bars, 0);
    }
    if (cluster_rank() == 1) bar_wait_cluster(at.bars, 0, static_cast<uint32_t>(i));
    if (a.ok) sync_cluster();
  }
}

KD_KERNEL(kThreads, 1) messages_of_two_to_one_slot(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  const int rank = cluster_rank();
  if (thread() == 0 && rank == 0) bar_expect(at.bars, 0, 32);
  if (thread() == 0 && (rank == 1 || rank == 2)) st_async(at.s, a.ok ? rank : 0, 0, Granule{{1, 2, 3, 4}}, at.bars, 0);
  if (rank == 0) bar_wait_cluster(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) message_outside(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  if (thread() == 0) {
    bar_expect(at.bars, 0, 16);
    st_async(at.s, a.ok ? 31 : 32, cluster_rank() ^ 1, Granule{{1, 2, 3, 4}}, at.bars, 0);
  }
  bar_wait_cluster(at.bars, 0, 0);
}

// A block may send to itself; bar_wait is enough for that.
KD_KERNEL(kThreads, 1) phase_missed(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  for (uint32_t i = 0; i < 2; ++i) {
    if (thread() == 0) {
      bar_expect(at.bars, 0, 16);
      st_async(at.s, 0, cluster_rank(), Granule{{1, 2, 3, 4}}, at.bars, 0);
    }
    if (a.ok || thread() != 9) bar_wait(at.bars, 0, i);
    if (a.ok) sync_block();
  }
  if (!a.ok && thread() == 9) {
    for (const uint32_t parity : {1u, 0u}) bar_wait(at.bars, 0, parity);
    at.s.ld(0);
  }
}

KD_KERNEL(kThreads, 1) message_out_of_the_cluster(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  if (thread() == 0) {
    bar_expect(at.bars, 0, 16);
    st_async(at.s, 0, cluster_rank() == 0 ? 1 : a.ok ? 0 : 2, Granule{{1, 2, 3, 4}}, at.bars, 0);
  }
  bar_wait_cluster(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) message_to_an_exited_block(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  if (thread() != 0) return;
  if (cluster_rank() == 0) return st_async(at.s, 0, 1, Granule{{1, 2, 3, 4}}, at.bars, 0);
  if (!a.ok) return;
  bar_expect(at.bars, 0, 16);
  bar_wait_cluster(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) exit_with_a_message_in_flight(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  exchange(at, 0);
  if (a.ok) bar_wait_cluster(at.bars, 0, 0);
  sync_cluster();
}

KD_KERNEL(kThreads, 1) bar_of_a_peer_without_a_barrier(KD_ARGUMENT(Args) a) {
  Carver carver = shared();
  const Landing at = {carver.take<Granule>(1), carver.bars(1)};
  if (thread() == 0) {
    bar_init(at.bars, 0, 1);
    bar_init_fence();
  }
  if (a.ok)
    sync_cluster();
  else
    sync_block();
  exchange(at, 0);
  bar_wait_cluster(at.bars, 0, 0);
}

KD_KERNEL(kThreads, 1) exit_before_the_cluster_barrier(KD_ARGUMENT(Args) a) {
  if (!a.ok && cluster_rank() == 1 && thread() == 5) return;
  sync_cluster();
}

KD_KERNEL(kThreads, 1) cluster_barrier_of_one_block(KD_ARGUMENT(Args) a) {
  if (a.ok || cluster_rank() == 0)
    sync_cluster();
  else
    sync_block();
}

KD_KERNEL(kThreads, 1) cluster_barrier_of_some_threads(KD_ARGUMENT(Args) a) {
  if (a.ok || thread() % 2)
    sync_cluster();
  else
    sync_block();
}

KD_KERNEL(kThreads, 1) absent_at_the_cluster_barrier(KD_ARGUMENT(Args) a) {
  const Landing at = landing();
  if (!a.ok && cluster_rank() == 1) bar_wait(at.bars, 1, 0);
  sync_cluster();
}

KD_KERNEL(kThreads, 1) partial_of_a_peer(KD_ARGUMENT(Args) a) {
  store(a.partial + block() * kThreads + thread(), 1.0f);
  if (a.ok)
    sync_cluster();
  else
    sync_block();
  load_written(a.partial + (block() ^ 1) * kThreads + thread());
}

KD_KERNEL(kThreads, 1) nothing(KD_ARGUMENT(Args)) {}

// ---- what is no fault -----------------------------------------------------------------------

KD_KERNEL(kThreads, 1) schedule(KD_ARGUMENT(Args) a) {
  a.trace->push_back(static_cast<int>(block()) * kThreads + thread());
  sync_block();
  a.trace->push_back(static_cast<int>(block()) * kThreads + thread());
}

// Fills a ring of two slots per thread by copies, reduces over the warp and the block, then over the blocks.
KD_KERNEL(kThreads, 1) results(KD_ARGUMENT(Args) a) {
  Carver carver = shared();
  const Shared<Granule> ring = carver.take<Granule>(2 * kThreads);
  const Shared<float> warps = carver.take<float>(kThreads / 32);
  const Shared<uint32_t> last = carver.take<uint32_t>(1);
  for (int i = 0; i < 2; ++i) {
    copy_async(ring, i * kThreads + thread(), a.in + (thread() + i * 7) % kThreads * 4);
    copy_commit();
  }
  float sum = 0;
  for (int i = 0; i < 6; ++i) {
    copy_wait<1>();
    sync_block();
    const Granule g = ring.ld(i % 2 * kThreads + (thread() + 5) % kThreads);
    for (const uint32_t w : g.w) {
      float x;
      memcpy(&x, &w, sizeof(x));
      sum += exp2(-x) * static_cast<float>(1 + block() + (thread() + i) % 5);
    }
    sync_block();
    if (i < 4) copy_async(ring, i % 2 * kThreads + thread(), a.in + (thread() + i) % kThreads * 4);
    copy_commit();
  }
  copy_wait<0>();
  for (int l = 16; l >= 1; l /= 2) sum += shfl_xor(sum, l);
  if (lane() == 0) warps.st(thread() / 32, sum);
  sync_block();
  if (thread() == 0) {
    store(a.partial + block(), warps.ld(0) + warps.ld(1));
    last.st(0, last_block(a.counter));
  }
  sync_block();
  if (last.ld(0) && thread() < kBlocks) store(a.out + thread(), load_written(a.partial + thread()));
}

// Rows of 64 values. Each of two blocks loads its half through a ring of two stages and sums it up; the halves meet in
// both blocks.
KD_KERNEL(kThreads, 1) cluster_results(KD_ARGUMENT(Args) a) {
  constexpr int kRows = 4, kHalf = 32, kGranules = kHalf / 4;
  Carver carver = shared();
  const Shared<Granule> ring = carver.take<Granule>(2 * kGranules), sums = carver.take<Granule>(4);
  const Bars filled = carver.bars(2), sent = carver.bars(2);
  const int rank = cluster_rank();
  const int64_t cluster = block() / cluster_blocks();
  const auto fill = [&](int row) {
    if (thread() != 0 || row >= kRows) return;
    bar_expect(filled, row % 2, kHalf * 4);
    bulk_load(ring, row % 2 * kGranules, a.in + (row * 2 + rank) * kHalf, kHalf * 4, filled, row % 2);
  };
  if (thread() == 0) {
    for (int i = 0; i < 2; ++i) {
      bar_init(filled, i, 1);
      bar_init(sent, i, 1);
    }
    bar_init_fence();
  }
  sync_cluster();
  fill(0);
  fill(1);
  for (int row = 0; row < kRows; ++row) {
    const uint32_t parity = static_cast<uint32_t>(row / 2 % 2);
    bar_wait(filled, row % 2, parity);
    float sum = 0;
    if (thread() < kGranules) {
      const Granule g = ring.ld(row % 2 * kGranules + thread());
      for (const uint32_t w : g.w) {
        float x;
        memcpy(&x, &w, sizeof(x));
        sum += x;
      }
    }
    for (int l = 16; l >= 1; l /= 2) sum += shfl_xor(sum, l);
    sync_block();  // everyone has read this stage and the sums of the row before
    fill(row + 2);
    if (thread() == 0) bar_expect(sent, row % 2, 32);
    if (thread() < 2) {
      Granule g = {};
      memcpy(g.w, &sum, sizeof(sum));
      st_async(sums, row % 2 * 2 + rank, thread(), g, sent, row % 2);
    }
    bar_wait_cluster(sent, row % 2, parity);
    float total = 0;
    for (int i = 0; i < 2; ++i) {
      const Granule g = sums.ld(row % 2 * 2 + i);
      float x;
      memcpy(&x, g.w, sizeof(x));
      total = total / 2 + x * static_cast<float>(1 + cluster);
    }
    if (rank == row % 2 && thread() == kThreads - 1) store(a.out + cluster * kRows + row, total);
  }
  sync_cluster();
}

// ---- the table ------------------------------------------------------------------------------

struct Planted {
  const char* name;
  void (*kernel)(const Args);
  int cluster, broken_cluster;  // the latter with the fault
};

#define KD_PLANTED(name) {#name, name, 1, 1}
#define KD_PLANTED_CLUSTER(name) {#name, name, 2, 2}
const Planted kPlanted[] = {
    KD_PLANTED(read_before_write),
    KD_PLANTED(write_after_read),
    KD_PLANTED(barrier_of_a_warp_for_a_block),
    KD_PLANTED(two_writers_of_a_shared_element),
    KD_PLANTED(divergent_barrier),
    KD_PLANTED(exit_before_barrier),
    KD_PLANTED(missing_sync_warp),
    KD_PLANTED(sync_warp_of_others),
    KD_PLANTED(mask_without_itself),
    KD_PLANTED(mask_without_the_source),
    KD_PLANTED(mask_names_an_absent_lane),
    KD_PLANTED(masks_differ),
    KD_PLANTED(lane_masks_differ),
    KD_PLANTED(operations_differ),
    KD_PLANTED(circular_masks),
    KD_PLANTED(absent_at_the_warp_barrier),
    KD_PLANTED(shared_below),
    KD_PLANTED(shared_above),
    KD_PLANTED(shared_too_much),
    KD_PLANTED(shared_unwritten),
    KD_PLANTED(global_load_outside),
    KD_PLANTED(global_store_outside),
    KD_PLANTED(global_misaligned),
    KD_PLANTED(store_to_an_input),
    KD_PLANTED(output_written_twice),
    KD_PLANTED(copy_read_before_its_wait),
    KD_PLANTED(copy_of_a_later_group),
    KD_PLANTED(copy_wait_without_commit),
    KD_PLANTED(copy_waited_for_by_another),
    KD_PLANTED(copy_wait_after_the_barrier),
    KD_PLANTED(slot_refilled_too_early),
    KD_PLANTED(store_under_a_copy),
    KD_PLANTED(copy_misaligned),
    KD_PLANTED(copy_from_outside),
    KD_PLANTED(exit_with_a_copy_in_flight),
    KD_PLANTED(load_of_what_the_launch_writes),
    KD_PLANTED(partial_without_the_last_block),
    KD_PLANTED(partial_without_the_barrier),
    KD_PLANTED(partial_by_the_constant_path),
    KD_PLANTED(counted_twice),
    KD_PLANTED(not_counted),
    KD_PLANTED(bulk_read_before_its_wait),
    KD_PLANTED(bulk_wait_of_the_wrong_parity),
    KD_PLANTED(bulk_waited_for_by_another),
    KD_PLANTED(bulk_refill_before_release),
    KD_PLANTED(store_under_a_bulk_copy),
    KD_PLANTED(store_before_a_bulk_copy),
    KD_PLANTED(bulk_to_misaligned),
    KD_PLANTED(bulk_from_misaligned),
    KD_PLANTED(bulk_of_an_odd_size),
    KD_PLANTED(bulk_of_nothing),
    KD_PLANTED(bulk_from_outside),
    KD_PLANTED(bulk_to_outside),
    KD_PLANTED(bulk_from_an_output),
    KD_PLANTED(bulk_from_what_the_launch_wrote),
    KD_PLANTED(bulk_expects_too_much),
    KD_PLANTED(bulk_expects_too_little),
    KD_PLANTED(arrives_beyond_the_count),
    KD_PLANTED(next_phase_before_its_wait),
    KD_PLANTED(bar_outside),
    KD_PLANTED(bar_before_its_init),
    KD_PLANTED(bar_init_without_a_fence),
    KD_PLANTED(bulk_without_the_init_fence),
    KD_PLANTED(bar_init_without_a_barrier),
    KD_PLANTED(bar_init_twice),
    KD_PLANTED(store_to_an_mbarrier),
    KD_PLANTED(exit_with_a_bulk_copy_in_flight),
    KD_PLANTED_CLUSTER(message_not_waited_for),
    KD_PLANTED_CLUSTER(message_ordered_by_a_barrier),
    KD_PLANTED_CLUSTER(message_waited_for_by_the_block),
    KD_PLANTED_CLUSTER(message_into_a_slot_in_use),
    KD_PLANTED_CLUSTER(message_back_before_all_have_read),
    KD_PLANTED_CLUSTER(order_through_a_peer),
    KD_PLANTED_CLUSTER(message_before_the_phase),
    {"messages_of_two_to_one_slot", messages_of_two_to_one_slot, 4, 4},
    KD_PLANTED_CLUSTER(message_outside),
    KD_PLANTED_CLUSTER(phase_missed),
    KD_PLANTED_CLUSTER(message_out_of_the_cluster),
    KD_PLANTED_CLUSTER(message_to_an_exited_block),
    KD_PLANTED_CLUSTER(exit_with_a_message_in_flight),
    KD_PLANTED_CLUSTER(bar_of_a_peer_without_a_barrier),
    KD_PLANTED_CLUSTER(exit_before_the_cluster_barrier),
    KD_PLANTED_CLUSTER(cluster_barrier_of_one_block),
    KD_PLANTED_CLUSTER(cluster_barrier_of_some_threads),
    KD_PLANTED_CLUSTER(absent_at_the_cluster_barrier),
    KD_PLANTED_CLUSTER(partial_of_a_peer),
    {"launch_of_half_a_cluster", nothing, 2, 3},
    {"launch_of_a_large_cluster", nothing, 4, 32},
};
#undef KD_PLANTED
#undef KD_PLANTED_CLUSTER

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> out;
  for (const Planted& p : kPlanted) out.push_back(p.name);
  return out;
}

std::string run_fault(const std::string& name, uint64_t seed) {
  const std::string twin = "/ok";
  const bool ok = name.size() > twin.size() && name.compare(name.size() - twin.size(), twin.size(), twin) == 0;
  const std::string plain = ok ? name.substr(0, name.size() - twin.size()) : name;
  const bool clustered = name == "cluster_results";
  void (*kernel)(const Args) = name == "schedule"  ? schedule
                               : name == "results" ? results
                               : clustered         ? cluster_results
                                                   : nullptr;
  int cluster = clustered ? 2 : 1, blocks = kBlocks;
  for (const Planted& p : kPlanted)
    if (plain == p.name) {
      kernel = p.kernel;
      cluster = ok ? p.cluster : p.broken_cluster;
      blocks = std::max(kBlocks, cluster);
    }
  if (!kernel) throw std::invalid_argument("no planted fault is called '" + name + "'");

  // Gaps, lest an access that leaves one range lands in the next.
  struct {
    alignas(64) float in[kValues];
    alignas(64) float gap[16];
    alignas(64) float out[kValues];
    alignas(64) float second_gap[16];
    alignas(64) float partial[kValues];
    alignas(64) uint32_t counter;
  } m = {};
  for (int i = 0; i < kValues; ++i) m.in[i] = 0.37f * static_cast<float>(i % 19);
  Memory memory;
  memory.input("in", m.in, sizeof(m.in));
  memory.output("out", m.out, sizeof(m.out));
  memory.scratch("partial", m.partial, sizeof(m.partial));
  memory.scratch("counter", &m.counter, sizeof(m.counter));

  std::vector<int> trace;
  const Options before = options();
  Options now = before;
  now.seed = seed;
  set_options(now);
  const Args args{ok, m.in, m.out, m.partial, &m.counter, &trace};
  struct Call {
    void (*kernel)(const Args);
    const Args* args;
  } const call{kernel, &args};
  device::run(
      blocks, kThreads, kSharedBytes,
      [](const void* context) {
        const Call& c = *static_cast<const Call*>(context);
        c.kernel(*c.args);
      },
      &call, cluster);
  set_options(before);

  std::string said = fault();
  if (said.empty() && name == "schedule")
    for (const int who : trace) said += std::to_string(who) + " ";
  if (said.empty() && (name == "results" || clustered))
    for (int i = 0; i < (clustered ? 8 : kBlocks); ++i) {
      char text[40];
      snprintf(text, sizeof(text), "%a ", static_cast<double>(m.out[i]));
      said += text;
    }
  return said;
}

}  // namespace simt
}  // namespace kd
