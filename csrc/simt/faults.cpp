#include "faults.h"

#include <stdio.h>
#include <string.h>

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

// ---- the table ------------------------------------------------------------------------------

struct Planted {
  const char* name;
  void (*kernel)(const Args);
};

#define KD_PLANTED(name) {#name, name}
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
};
#undef KD_PLANTED

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
  void (*kernel)(const Args) = name == "schedule" ? schedule : name == "results" ? results : nullptr;
  for (const Planted& p : kPlanted)
    if (plain == p.name) kernel = p.kernel;
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
      kBlocks, kThreads, kSharedBytes,
      [](const void* context) {
        const Call& c = *static_cast<const Call*>(context);
        c.kernel(*c.args);
      },
      &call);
  set_options(before);

  std::string said = fault();
  if (said.empty() && name == "schedule")
    for (const int who : trace) said += std::to_string(who) + " ";
  if (said.empty() && name == "results")
    for (int i = 0; i < kBlocks; ++i) {
      char text[40];
      snprintf(text, sizeof(text), "%a ", static_cast<double>(m.out[i]));
      said += text;
    }
  return said;
}

}  // namespace simt
}  // namespace kd
