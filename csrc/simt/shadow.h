// The shadow of a piece of memory: of every cell, who wrote it last and who has read it since. Both global ranges and
// the shared memory of blocks have one, and races are found by asking it before each access.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "clocks.h"

namespace kd {
namespace simt {

constexpr size_t kCellBytes = 2;

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

}  // namespace simt
}  // namespace kd
