// Which kernel takes a call on a GPU, and how it is launched: a pure function of the shape, the types and the device.
//
//   lanes    a few lanes of a warp per row, several rows per warp; everything in registers
//   block    a block per row, its exponentials in registers: read once, written once
//   staged   a block per row, the row pair in shared memory; while one row's gradient is written, the next row arrives
//   cluster  several blocks per row, with the row pair in the shared memory of all of them (compute capability 9 and
//   up) sweeps   a block per row, read twice: once for the statistics, then in reverse for the gradient split several
//   blocks per row and two launches, for rows that are few or long; in waves of rows whose second read
//            finds the L2 cache
//   strided  a thread per row, for classes that are apart in memory
//
// The thresholds are designed from the byte and register counts of the kernels; they wait for measurements.
#pragma once

#include <algorithm>

#include "../problem.h"

namespace kd {
namespace gpu {

constexpr int kClusterSizes = 5;  // of 1, 2, 4, 8, 16 blocks

struct Device {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor, l2;  // bytes; per block: what a kernel may opt in to
  // How many clusters of 1 << i blocks are resident at a time, a block per multiprocessor; 0: none can be.
  int clusters[kClusterSizes];
};

// What some devices say of themselves, for the tests and for the table that is printed.
struct KnownDevice {
  const char* name;
  Device device;
};
// Of clusters, what multiprocessors in groups of 16 to 20 can hold; a device is asked.
constexpr KnownDevice kDevices[] = {
    {"A100", {108, 163 << 10, 164 << 10, int64_t(40) << 20, {}}},
    {"RTX 3090", {82, 99 << 10, 100 << 10, int64_t(6) << 20, {}}},
    {"L40S", {142, 99 << 10, 100 << 10, int64_t(96) << 20, {}}},
    {"H100", {132, 227 << 10, 228 << 10, int64_t(50) << 20, {132, 66, 32, 16, 8}}},
    {"H200", {132, 227 << 10, 228 << 10, int64_t(60) << 20, {132, 66, 32, 16, 8}}},
    {"B200", {148, 227 << 10, 228 << 10, int64_t(126) << 20, {148, 74, 36, 16, 8}}},
    {"RTX 5090", {170, 99 << 10, 100 << 10, int64_t(96) << 20, {170, 85, 41, 19, 0}}},
};

enum class Regime : int32_t { lanes, block, staged, cluster, sweeps, split, strided };
constexpr const char* kRegimes[] = {"lanes", "block", "staged", "cluster", "sweeps", "split", "strided"};

// What the planner looks at.
struct Shape {
  int64_t rows, classes;
  int vector;      // logits that a thread handles at a time
  int pair_bytes;  // of one student and one teacher logit
  int kept;        // exponentials that are kept per class
  bool alike;      // student, teacher and gradient are of one type and begin at the same place in their granules
  bool strided;    // classes are apart
  bool wide;       // computed in double, or of mixed types: fewer threads for more registers
  bool writes;     // a gradient
  Pass pass;
};

struct Plan {
  Regime regime;
  int threads;           // per block
  int64_t blocks;        // per launch; with split, of the largest wave
  int lanes = 0;         // per row, in regime lanes
  int lane_classes = 0;  // of a lane
  int stage_slots = 0;   // vectors of each tensor that a thread has room for, in regime staged
  bool alike = false;    // as in Shape
  int64_t wave = 0;      // rows per wave, in regime split
  int parts = 1;         // of a row: blocks of a cluster, in regime cluster
  int part_vectors = 0;  // vectors of a part
  int stages = 0;        // rows that a cluster has room for
};

// Registers hold the exponentials of so many classes per thread.
constexpr int kFewRowsClasses = 8, kManyRowsClasses = 16;  // in regime lanes
constexpr int kept_classes(int kept, int vector) { return (kept > 2 ? 24 : 32) - (vector == 4 ? 8 : 0); }
template <int kKept, int kVector>
constexpr int kKeptClasses = kept_classes(kKept, kVector);

// Less for tensors of several types, and where the compiler needs more registers for itself: in vectors of 8.
constexpr int cluster_classes(int kept, int less) { return (kept > 2 ? 32 : 48) - 8 * less; }
template <int kKept, int kLess>
constexpr int kClusterClasses = cluster_classes(kKept, kLess);

// Threads that a kernel is compiled for, and how many warps of them a multiprocessor's registers hold.
constexpr int kFewThreads = 256, kBlockThreads = 192, kLongThreads = 384, kStagedThreads = 768, kWideThreads = 192;
constexpr int kPartThreads = 192, kStridedThreads = 128, kScaleThreads = 256, kCountThreads = 256;
constexpr int kClusterThreads = 384;
constexpr int kBlockWarps = 12;
constexpr int kMostClusterBlocks = 16;

constexpr int64_t kLongClasses = 8192;  // rows from which several blocks are worth a second launch
constexpr int kMostParts = 64;
constexpr int64_t kSmallestWave = int64_t(8) << 20;  // bytes; below, launches would cost more than missing the cache
constexpr int64_t kTargetsPerThread = 32;  // that every block counts for itself; more take a launch of their own
constexpr int64_t kMostCountBlocks = 128, kMostScaleBlocks = 2048;
constexpr int64_t kRowOverhead = 4 << 10;       // bytes of shared memory beside the staged rows
constexpr int64_t kClusterOverhead = 10 << 10;  // the same of a block of a cluster
constexpr int64_t kClusterSkewedClasses =
    4096;  // rows that lie otherwise and are shorter are read twice, from the cache
constexpr int kMostStages = 3;

// One line per choice, first match counts. A GPU's row of the table differs only by what Device says.
struct Rule {
  Regime regime;
  const char* when;
};
constexpr Rule kTable[] = {
    {Regime::strided, "classes are not adjacent"},
    {Regime::lanes, "alike, classes <= 64, 128, 256: 8, 16, 32 lanes per row; many rows: <= 128, 256: 8, 16 lanes"},
    {Regime::block, "alike, classes <= 192 threads x 32 (24 where 3 exponentials are kept, 8 less in float32)"},
    {Regime::split, "backward: slices of every row"},
    {Regime::cluster,
     "clusters, alike or classes > 4096: the smallest cluster that holds two rows, else one of 16 that "
     "holds one; larger ones while multiprocessors would have no row"},
    {Regime::staged, "alike, the row pair fits into a block's shared memory"},
    {Regime::split,
     "classes > 8192, and rows < multiprocessors or their pairs exceed 0.45 of the L2 cache (staged rows: "
     "rows < half the multiprocessors)"},
    {Regime::sweeps, "everything else"},
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows whose pairs the L2 cache keeps between the two reads, beside the gradient that streams through it. All of them
// where nothing is read twice, or where the cache is so small that launches cost more than they save.
inline int64_t cached_rows(const Shape& x, const Device& d) {
  const int64_t cached = d.l2 * 45 / 100, row = x.classes * x.pair_bytes;
  return x.writes && cached >= kSmallestWave ? std::max<int64_t>(1, cached / row) : x.rows;
}

inline Plan split_plan(const Shape& x, const Device& d) {
  Plan out = {Regime::split, x.wide ? kWideThreads : kPartThreads, 0};
  const int64_t vectors = std::max<int64_t>(1, x.classes / x.vector);
  int64_t wave = x.rows, parts;
  if (x.pass == Pass::backward) {
    out.threads = static_cast<int>(std::min<int64_t>(out.threads, ceil_div(vectors, 32) * 32));
    parts = ceil_div(vectors, 8 * out.threads);
  } else {
    wave = ceil_div(x.rows, ceil_div(x.rows, cached_rows(x, d)));
    // Twice what is resident at a time, rounded down: a block more would be a third round.
    parts = std::min<int64_t>(4 * d.multiprocessors / wave, ceil_div(vectors, 2 * out.threads));
    parts = std::min<int64_t>(parts, kMostParts);
  }
  parts = std::max<int64_t>(1, parts);
  // A grid has at most 2^31 - 1 blocks.
  wave = std::min(wave, (int64_t(1) << 31) / parts - 1);
  out.part_vectors = static_cast<int>(ceil_div(vectors, parts));
  out.parts = static_cast<int>(ceil_div(vectors, out.part_vectors));
  out.wave = std::max<int64_t>(wave, 1);
  out.blocks = out.wave * out.parts;
  return out;
}

// Room for as much of the next row as the shared memory beside this one has, of one block or of two.
inline Plan staged_plan(const Shape& x, const Device& d) {
  const int tensors = x.pair_bytes * x.vector / 16;
  const auto slots = [&](int threads, int64_t shared) {
    return static_cast<int>(std::max<int64_t>(0, shared - kRowOverhead) / (16 * tensors * threads));
  };
  const int64_t vectors = x.classes / x.vector;
  Plan out = {Regime::staged, kStagedThreads / 2, 0};
  int per_multiprocessor = 2;
  const int64_t half = std::min(d.shared_per_block, d.shared_per_multiprocessor / 2 - 1024);
  out.stage_slots = slots(out.threads, half);
  if (int64_t(out.stage_slots) * out.threads < vectors) {
    per_multiprocessor = 1;
    out.threads = kStagedThreads;
    out.stage_slots = slots(out.threads, d.shared_per_block);
  }
  if (int64_t(out.stage_slots) * out.threads < vectors) out.stage_slots = 0;  // does not fit
  out.stage_slots = static_cast<int>(std::min<int64_t>(out.stage_slots, 2 * ceil_div(vectors, out.threads)));
  out.blocks = std::max<int64_t>(1, std::min<int64_t>(x.rows, int64_t(d.multiprocessors) * per_multiprocessor));
  return out;
}

// How many rows a block of a cluster has room for, if it has so many vectors of each.
inline int cluster_stages(const Shape& x, int part_vectors, int64_t shared) {
  const int64_t stage = (int64_t(part_vectors) * x.vector + 2 * x.vector) * x.pair_bytes + 128;
  return static_cast<int>(std::min<int64_t>(kMostStages, std::max<int64_t>(0, shared - kClusterOverhead) / stage));
}

// The smallest cluster that holds a row and the next one, because its blocks wait for each other once per row; of two
// such blocks on a multiprocessor, one computes while the other waits. Without stages: there is no such cluster.
inline Plan cluster_plan(const Shape& x, const Device& d) {
  const int64_t vectors = std::max<int64_t>(1, x.classes / x.vector);
  const int64_t half = std::min(d.shared_per_block, d.shared_per_multiprocessor / 2 - 1024);
  Plan out = {Regime::cluster, kClusterThreads, 0};
  int per_multiprocessor = 1, size = 0;
  const auto fits = [&](int log_size, int64_t shared, int stages) {
    if (d.clusters[log_size] == 0) return false;
    size = log_size;
    out.parts = 1 << log_size;
    out.part_vectors = static_cast<int>(ceil_div(vectors, out.parts));
    out.stages = cluster_stages(x, out.part_vectors, shared);
    return out.stages >= stages;
  };
  const auto any_fits = [&] {
    for (int i = 0; i < kClusterSizes; ++i) {
      per_multiprocessor = 2;
      if (fits(i, half, 2)) return true;
      per_multiprocessor = 1;
      if (fits(i, d.shared_per_block, 2)) return true;
    }
    for (int i = 0; i < kClusterSizes; ++i)
      if (fits(i, d.shared_per_block, 1)) return true;
    return false;
  };
  if (!any_fits()) return {Regime::cluster, 0, 0};
  // Few rows: more blocks each, as long as all clusters find a place and blocks have a vector for every thread.
  while (size + 1 < kClusterSizes && d.clusters[size + 1] >= x.rows && out.part_vectors >= 2 * kClusterThreads) {
    per_multiprocessor = 1;
    fits(size + 1, d.shared_per_block, 1);
  }
  if (per_multiprocessor == 2) out.threads /= 2;
  const int64_t wanted = ceil_div(out.part_vectors, 32) * 32;
  out.threads = static_cast<int>(std::min<int64_t>(out.threads, wanted));
  out.blocks = std::min<int64_t>(x.rows, int64_t(d.clusters[size]) * per_multiprocessor) * out.parts;
  return out;
}

inline Plan plan(const Shape& x, const Device& d) {
  // Persistent blocks, as many as are resident at a time: what each of them does once is then done seldom.
  const auto grid = [&](int64_t blocks, int per_multiprocessor) {
    return std::max<int64_t>(1, std::min<int64_t>(blocks, int64_t(d.multiprocessors) * per_multiprocessor));
  };
  if (x.strided) return {Regime::strided, kStridedThreads, grid(ceil_div(x.rows, kStridedThreads), x.wide ? 2 : 4)};
  const int64_t vectors = x.classes / x.vector;
  if (x.alike) {
    // Many rows: fewer lanes each, because finishing a row costs as much as its classes.
    const bool many = x.kept < 3 && x.rows >= int64_t(128) * d.multiprocessors;
    const int classes = many ? kManyRowsClasses : kFewRowsClasses;
    for (int lanes : {8, 16, many ? 16 : 32}) {
      if (vectors * x.vector > lanes * classes) continue;
      Plan out = {Regime::lanes, kFewThreads, grid(ceil_div(x.rows, kFewThreads / lanes), 2)};
      out.lanes = lanes;
      out.lane_classes = classes;
      return out;
    }
    const int per_thread = kept_classes(x.kept, x.vector);
    const int64_t threads = std::max<int64_t>(1, ceil_div(vectors, 32 * per_thread / x.vector)) * 32;
    if (threads <= kBlockThreads)
      return {Regime::block, static_cast<int>(threads), grid(x.rows, kBlockWarps * 32 / static_cast<int>(threads))};
  }
  if (x.pass == Pass::backward) return split_plan(x, d);
  const bool is_long = x.classes > kLongClasses;
  if (x.vector > 2 && (x.alike || x.classes > kClusterSkewedClasses)) {
    const Plan cluster = cluster_plan(x, d);
    if (cluster.stages) {
      Plan out = cluster;
      out.alike = x.alike;
      return out;
    }
  }
  if (is_long && 2 * x.rows < d.multiprocessors) return split_plan(x, d);
  if (x.alike) {
    const Plan staged = staged_plan(x, d);
    if (staged.stage_slots) return staged;
  }
  if (is_long && (x.rows < d.multiprocessors || cached_rows(x, d) < std::min<int64_t>(x.rows, d.multiprocessors)))
    return split_plan(x, d);
  // As many threads as have two vectors each, and as many blocks as a multiprocessor's threads make.
  const int64_t most = x.wide ? kWideThreads : kLongThreads, wanted = ceil_div(std::max<int64_t>(vectors, 1), 64) * 32;
  const int threads = static_cast<int>(std::min(most, wanted));
  const int64_t resident = std::min<int64_t>(32, most / threads);
  Plan out = {Regime::sweeps, threads, grid(std::min(x.rows, cached_rows(x, d)), static_cast<int>(resident))};
  out.alike = x.alike;
  return out;
}

}  // namespace gpu
}  // namespace kd
