// Global memory: the ranges that a launch may touch, and the checks of every load and store of them. A GPU would let
// most of these faults pass; here an access outside of a range, a race or a store to an input says what it is.
#include <algorithm>
#include <stdexcept>

#include "state.h"

namespace kd {
namespace simt {
namespace {

void register_range(const Memory* owner, const std::string& name, const void* data, size_t bytes, Use use) {
  if (bytes == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  for (const auto& r : g.ranges)
    if (begin < r->begin + r->bytes && r->begin < begin + bytes && !(use == Use::kInput && r->use == Use::kInput))
      throw std::invalid_argument("memory '" + name + "' overlaps '" + r->name + "'");
  g.ranges.emplace_back(new Range{name, begin, bytes, use, owner, 0, Shadow()});
}

[[noreturn]] void fail_global(const char* verb, const Range& r, size_t offset, const char* why, const Event& other) {
  fail("%s '%s' at offset %lld: %s block %d thread %d", verb, r.name.c_str(), static_cast<long long>(offset), why,
       other.block, other.thread);
}

}  // namespace

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

}  // namespace device

}  // namespace simt
}  // namespace kd
