// The shared memory of a block: bounds and races of every load and store, and the copies of 16 bytes that arrive some
// time before the thread that issued them has waited for them. Whatever they fill is nobody's until then.
#include <stdio.h>
#include <string.h>

#include "state.h"

namespace kd {
namespace simt {

void move_bytes(Block& block, AsyncCopy& copy) {
  if (!copy.moved) memcpy(block.shared.get() + copy.to, copy.from, 16);
  copy.moved = true;
}

size_t checked_offset(const char* verb, size_t array, int size, int i, size_t bytes) {
  if (i < 0 || i >= size)
    fail("%s element %d of an array of %d in shared memory: out of bounds (its offset is %lld)", verb, i, size,
         static_cast<long long>(array));
  const size_t at = array + static_cast<size_t>(i) * bytes;
  if (at + bytes > g.shared_bytes)  // an array that was taken while counting
    fail("%s byte %lld of shared memory, out of bounds: the block has %lld", verb, static_cast<long long>(at),
         static_cast<long long>(g.shared_bytes));
  return at;
}

namespace {

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

}  // namespace

void check_shared_write(const char* verb, Block& block, size_t at, size_t bytes, bool bulk) {
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

namespace device {

const void* shared_load(size_t array, int size, int i, size_t bytes) {
  const size_t at = checked_offset("loads", array, size, i, bytes);
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
  const size_t at = checked_offset("stores", array, size, i, bytes);
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
  const size_t at = checked_offset("copies to", array, size, i, 16);
  range_of("copies", from, 16, 16);
  check_load(from, 16, Path::kCoherent);
  check_shared_write("copies to", block, at, 16);
  for (size_t c = at / kCellBytes; c < (at + 16) / kCellBytes; ++c) {
    Cell& cell = block.shadow.at(c);
    block.shadow.write(cell, true);
    cell.in_flight = true;
  }
  AsyncCopy copy;
  copy.to = at;
  copy.from = from;
  copy.group = me.groups;
  const int arrival = g.schedule.arrival < 3 ? g.schedule.arrival : static_cast<int>(random() % 3);
  if (arrival == 0) move_bytes(block, copy);
  if (arrival == 2 && (g.with_late_copies.empty() || g.with_late_copies.back() != &me))
    g.with_late_copies.push_back(&me);
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
    AsyncCopy& copy = me.copies[done];
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

}  // namespace device

}  // namespace simt
}  // namespace kd
