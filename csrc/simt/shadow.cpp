// What an access of the current thread leaves in a cell. Most cells have one reader, whom later ones replace; a list
// takes the others, and loses those that are ordered before the current thread when it grows.
#include "shadow.h"

#include <algorithm>

#include "state.h"

namespace kd {
namespace simt {

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

}  // namespace simt
}  // namespace kd
