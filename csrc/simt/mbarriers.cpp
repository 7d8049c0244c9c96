// Mbarriers, and the bytes that they count: bulk copies from global memory and messages between the blocks of a
// cluster. Such bytes arrive in pieces, at any time until the phase that counts them is complete, and only who has
// waited for that phase may use them.
#include <string.h>

#include <algorithm>
#include <utility>

#include "state.h"

namespace kd {
namespace simt {
namespace {

void complete_if_all_came(Mbarrier& bar) {
  if (bar.arrived != bar.count || bar.landed != bar.expected) return;
  ++bar.phase;
  if (bar.landed) bar.with_bytes = bar.phase;
  bar.arrived = 0;
  bar.expected = bar.issued = bar.landed = 0;
  if (bar.gathering.seen.size() <= bar.thread) bar.gathering.seen.resize(bar.thread + size_t(1));
  bar.gathering.seen[bar.thread] = bar.phase;
  bar.completed = std::make_shared<Clock>(bar.gathering);
  bar.clock_before = nullptr;
  for (Fiber* f : bar.waiting) make_ready(f);
  bar.waiting.clear();
}

void land_piece(const Piece& piece) {
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

void issue_piece(const Piece& piece) {
  const int arrival = g.schedule.arrival < 3 ? g.schedule.arrival : static_cast<int>(random() % 3);
  if (arrival == 0) return land_piece(piece);
  (arrival == 1 ? g.arrive_last : g.arrive_soon).push_back(piece);
}

size_t checked_offset_of_bar(const char* verb, size_t bars, int n, int i) {
  if (i < 0 || i >= n)
    fail("%s mbarrier %d of %d at byte %lld: out of bounds", verb, i, n, static_cast<long long>(bars));
  const size_t at = bars + static_cast<size_t>(i) * 8;
  if (at % 8 != 0) fail("%s an mbarrier at byte %lld: misaligned", verb, static_cast<long long>(at));
  if (at + 8 > g.shared_bytes)
    fail("%s an mbarrier at byte %lld, out of bounds: the block has %lld", verb, static_cast<long long>(at),
         static_cast<long long>(g.shared_bytes));
  return at;
}

Mbarrier* find_bar(Block& block, size_t at) {
  for (Mbarrier& bar : block.bars)
    if (bar.offset == at) return &bar;
  return nullptr;
}

// The mbarrier, where this thread, or its asynchronous doing, may use it.
Mbarrier& usable_bar(const char* verb, Block& block, size_t bars, int n, int i, bool async) {
  const size_t at = checked_offset_of_bar(verb, bars, n, i);
  Mbarrier* const bar = find_bar(block, at);
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

uint32_t phases_known(const Block& block, const Mbarrier& bar) {
  const Fiber& me = *g.current;
  if (me.block == &block) return last_known(me.clock->seen, bar.thread);
  if (!me.clock->others) return 0;
  const auto entry = me.clock->others->find(static_cast<int32_t>(block.id));
  return entry == me.clock->others->end() ? 0 : last_known(*entry->second, bar.thread);
}

// What counts in a phase comes when the one before is known to be complete, or it might count in that one.
void check_phase(const char* verb, const Block& block, const Mbarrier& bar) {
  const uint32_t phase = phases_known(block, bar);
  if (phase != bar.phase)
    fail(
        "%s phase %u of the mbarrier at byte %lld of block %lld, which is complete: it expects less, or a wait for it "
        "is missing",
        verb, phase, static_cast<long long>(bar.offset), static_cast<long long>(block.id));
}

void check_bytes(const char* verb, const Block& block, const Mbarrier& bar) {
  if (bar.arrived == bar.count && bar.issued > bar.expected)
    fail("%s phase %u of the mbarrier at byte %lld of block %lld: more bytes came than were expected, %lld and %lld",
         verb, bar.phase, static_cast<long long>(bar.offset), static_cast<long long>(block.id),
         static_cast<long long>(bar.issued), static_cast<long long>(bar.expected));
}

// The cells of asynchronous bytes, which count from now on.
void write_async(const char* verb, Block& block, Mbarrier& bar, size_t at, size_t bytes, bool bulk) {
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

void acquire(Mbarrier& bar) {
  Fiber& me = *g.current;
  if (bar.clock_before != me.clock) {
    auto clock = std::make_shared<Clock>(*me.clock);
    learn(clock->seen, bar.completed->seen);
    learn(clock->others, bar.completed->others);
    if (clock->others) {  // peers may tell of threads of this block
      const auto own = clock->others->find(static_cast<int32_t>(me.block->id));
      if (own != clock->others->end()) learn(clock->seen, *own->second);
    }
    bar.clock_before = me.clock;
    bar.clock_after = clock;
  }
  me.clock = bar.clock_after;
}

}  // namespace

void land_one_of(std::vector<Piece>& pieces) {
  std::swap(pieces[random() % pieces.size()], pieces.back());
  const Piece piece = pieces.back();
  pieces.pop_back();
  land_piece(piece);
}

namespace device {

void bar_init(size_t bars, int n, int i, uint32_t count) {
  Fiber& me = *g.current;
  Block& block = *me.block;
  const size_t at = checked_offset_of_bar("initializes", bars, n, i);
  if (const Mbarrier* const bar = find_bar(block, at))
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
  Mbarrier& bar = block.bars.back();
  bar.offset = at;
  bar.thread = static_cast<uint16_t>(static_cast<size_t>(g.threads) + block.bars.size() - 1);
  bar.count = count;
  bar.init = me.now();
}

void bar_init_fence() {
  const Fiber& me = *g.current;
  for (Mbarrier& bar : me.block->bars)
    if (bar.init.thread == me.thread && !bar.fence.moment) bar.fence = me.now();
}

void bar_expect(size_t bars, int n, int i, uint32_t bytes) {
  const char* const verb = "arrives at";
  Fiber& me = *g.current;
  Mbarrier& bar = usable_bar(verb, *me.block, bars, n, i, false);
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
  learn(bar.gathering.others, me.clock->others);
  learn(bar.gathering.seen, *released());
  complete_if_all_came(bar);
}

void bar_wait(size_t bars, int n, int i, uint32_t parity, bool of_cluster) {
  const char* const verb = of_cluster ? "bar_wait_cluster: waits for" : "bar_wait: waits for";
  Fiber& me = *g.current;
  Mbarrier& bar = usable_bar(verb, *me.block, bars, n, i, false);
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
  const size_t at = checked_offset(verb, array, size, i, 16);
  if (static_cast<size_t>(size - i) < bytes / 16)
    checked_offset(verb, array, size, size, 16);  // names the first outside
  checked_offset(verb, array, size, i + static_cast<int>(bytes / 16) - 1, 16);
  if (at % 16 != 0) fail("%s byte %lld of shared memory: misaligned", verb, static_cast<long long>(at));
  const char* const source = static_cast<const char*>(from);
  const Range& r = range_around("bulk_load: copies", from, bytes);
  if (r.use == Use::kOutput) fail("bulk_load: copies from '%s', which the launch writes", r.name.c_str());
  if (r.use == Use::kScratch)
    for (uint32_t k = 0; k < bytes; k += 16) check_load(source + k, 16, Path::kConstant);
  Mbarrier& bar = usable_bar("bulk_load: uses", block, bars, n, bar_index, true);
  write_async(verb, block, bar, at, bytes, true);
  ++g.counters.bulk_copies;
  // In pieces, so that other things happen between them.
  const uint32_t piece = (bytes / 16 + 2) / 3 * 16;
  for (uint32_t k = 0; k < bytes; k += piece)
    issue_piece(Piece{&block, &bar, at + k, source + k, std::min(piece, bytes - k), {}, r.begin, r.begin + r.bytes});
}

void send(size_t array, int size, int i, int rank, const void* value, size_t bars, int n, int bar_index) {
  const char* const verb = "st_async: sends to";
  Fiber& me = *g.current;
  if (rank < 0 || rank >= g.cluster)
    fail("%s rank %d, outside of the cluster, which has %d blocks", verb, rank, g.cluster);
  Block& block = me.block->cluster->blocks[rank];
  if (!block.live) fail("%s block %lld, which has exited", verb, static_cast<long long>(block.id));
  const size_t at = checked_offset(verb, array, size, i, 16);
  if (at % 16 != 0) fail("%s byte %lld of shared memory: misaligned", verb, static_cast<long long>(at));
  Mbarrier& bar = usable_bar("st_async: uses", block, bars, n, bar_index, true);
  write_async(verb, block, bar, at, 16, false);
  // Release: whoever waits for the message knows what this thread knew.
  auto others = me.clock->others ? std::make_shared<Others>(*me.clock->others) : std::make_shared<Others>();
  (*others)[static_cast<int32_t>(me.block->id)] = released();
  learn(bar.gathering.others, std::shared_ptr<const Others>(others));
  if (&block != me.block) bar.sent[bar.phase % 2] = bar.phase + 1;
  ++g.counters.messages;
  Piece piece{&block, &bar, at, nullptr, 16, {}, 0, 0};
  memcpy(piece.value, value, 16);
  issue_piece(piece);
}

}  // namespace device

}  // namespace simt
}  // namespace kd
