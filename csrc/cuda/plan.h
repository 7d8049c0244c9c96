// Which kernel takes a call on a GPU, and how it is launched: a pure function of the shape, the types and the device.
//
// clang-format off
//   lanes    a few lanes of a warp per row, several rows per warp; everything in registers
//   block    a block per row, its exponentials in registers: read once, written once
//   staged   a block per row, the row pair in shared memory; while one row's gradient is written, the next row arrives
//   cluster  several blocks per row, the row pair in the shared memory of all of them (compute capability 9 and up)
//   sweeps   a block per row, read twice: once for the statistics, then in reverse for the gradient
//   split    several blocks per row and two launches (three with a second round), for rows that are few or long; in
//            waves of rows whose second read finds the L2 cache
//   strided  a thread per row, for classes that are apart in memory
// clang-format on
//
// The thresholds are designed from the byte and register counts of the kernels; they wait for measurements.
#pragma once

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

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
  int kept;        // features that are kept per class, as registers count them: Sums::held
  bool alike;      // student, teacher and gradient are of one type and begin at the same place in their granules
  bool strided;    // classes are apart
  bool wide;       // computed in double, or of mixed types: fewer threads for more registers
  bool writes;     // a gradient
  Pass pass;
};

struct Plan {
  Regime regime;
  int threads;                 // per block
  int64_t blocks;              // per launch; with split, of the largest wave
  int lanes = 0;               // per row, in regime lanes
  int lane_classes = 0;        // of a lane
  int stage_slots = 0;         // vectors of each tensor that a thread has room for, in regime staged
  bool alike = false;          // as in Shape
  int64_t wave = 0;            // rows per wave, in regime split
  int parts = 1;               // of a row: blocks of a cluster, in regime cluster
  int part_vectors = 0;        // vectors of a part
  int stages = 0;              // rows that a cluster has room for
  int per_multiprocessor = 0;  // blocks that are resident at a time, in regimes cluster, staged and sweeps
};

// What is asked for in place of the planner's choices, for a call that is no backward pass: long rows have one regime
// per device by the table below, and only measuring the others tells whether it is the right one. 0: as the planner
// chooses.
struct Override {
  std::optional<Regime> regime;
  int parts = 0, stages = 0, threads = 0, per_multiprocessor = 0;
};
struct Wish {
  const char* name;
  int Override::* asked;
  int Plan::* made;
};
constexpr Wish kWishes[] = {{"parts", &Override::parts, &Plan::parts},
                            {"stages", &Override::stages, &Plan::stages},
                            {"threads", &Override::threads, &Plan::threads},
                            {"per_multiprocessor", &Override::per_multiprocessor, &Plan::per_multiprocessor}};
constexpr Regime kOnRequest[] = {Regime::cluster, Regime::staged, Regime::sweeps, Regime::split};
constexpr const char* kOverrideVariable = "KDKERNELS_PLAN";

// Registers hold the features of so many classes per thread.
constexpr int kFewRowsClasses = 8, kManyRowsClasses = 16;          // in regime lanes
constexpr int lanes_blocks(int kept) { return kept > 4 ? 1 : 2; }  // of regime lanes on a multiprocessor
constexpr int kept_classes(int kept, int vector) {
  return kept > 5 ? 8 : (kept > 3 ? 16 : kept > 2 ? 24 : 32) - (vector == 4 ? 8 : 0);
}
template <int kKept, int kVector>
constexpr int kKeptClasses = kept_classes(kKept, kVector);

// Less for tensors of several types, and where the compiler needs more registers for itself: in vectors of 8.
constexpr int cluster_classes(int kept, int less) {
  const int classes = (kept > 3 ? 24 : kept > 2 ? 32 : 48) - 8 * less;
  return classes < 8 ? 8 : classes;
}
template <int kKept, int kLess>
constexpr int kClusterClasses = cluster_classes(kKept, kLess);

// Threads that a kernel is compiled for, and how many warps of them a multiprocessor's registers hold.
constexpr int kLanesThreads = 256, kBlockThreads = 192, kLongThreads = 384, kWideThreads = 192;
constexpr int staged_threads(int kept) { return kept > 3 ? 640 : 768; }
constexpr int kPartThreads = 192, kStridedThreads = 128, kScaleThreads = 256, kCountThreads = 256;
constexpr int kClusterThreads = 384;
constexpr int kBlockWarps = 12;
constexpr int kMostClusterBlocks = 16;

constexpr int64_t kLongClasses = 8192;  // rows from which several blocks are worth a second launch
constexpr int kMostParts = 64;
constexpr int64_t kSmallestWave = int64_t(8) << 20;  // bytes; below, launches would cost more than missing the cache
constexpr int64_t kTargetsPerThread = 32;  // that every block counts for itself; more take a launch of their own
constexpr int64_t kMostCountBlocks = 128, kMostScaleBlocks = 2048;
constexpr int64_t kRowOverhead = 4 << 10;        // bytes of shared memory beside the staged rows
constexpr int64_t kClusterOverhead = 10 << 10;   // the same of a block of a cluster
constexpr int64_t kClusterSkewedClasses = 4096;  // rows that lie otherwise: shorter ones are read twice, from the cache
constexpr int kMostStages = 3;

// The words of an override, and the bounds that kernels set; a call or a device may set closer ones.
inline std::string override_allowed() {
  std::ostringstream out;
  out << "words such as regime=cluster parts=4 stages=2 threads=192 per_multiprocessor=1, each at most once. regime:";
  const char* before = " ";
  for (const Regime regime : kOnRequest) {
    out << before << kRegimes[static_cast<int>(regime)];
    before = ", ";
  }
  out << ". parts: of a cluster";
  for (int i = 0; i < kClusterSizes; ++i) out << (i ? ", " : " ") << (1 << i);
  out << "; with split 1 to " << kMostParts << ". stages: of a cluster 1 to " << kMostStages
      << ", as shared memory has room. threads: multiples of 32, times per_multiprocessor (cluster and staged: 1 or 2) "
      << "at most " << staged_threads(0) << " with staged, " << kClusterThreads << " with cluster, " << kLongThreads
      << " with sweeps, " << kPartThreads << " with split, and " << kWideThreads
      << " with sweeps and split of mixed types or float64";
  return out.str();
}

// Of the words of `text`, which may be empty.
inline Override parse_override(const std::string& text) {
  Override out;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    const size_t equals = std::min(word.find('='), word.size());
    const std::string name = word.substr(0, equals), value = word.substr(std::min(equals + 1, word.size()));
    bool known = false;
    for (const Regime regime : kOnRequest)
      if (name == "regime" && !out.regime && value == kRegimes[static_cast<int>(regime)]) {
        out.regime = regime;
        known = true;
        break;
      }
    const bool number = !value.empty() && value.size() <= 4 && value[0] != '0' &&
                        value.find_first_not_of("0123456789") == std::string::npos;
    for (const Wish& wish : kWishes)
      if (name == wish.name && number && !(out.*wish.asked)) {
        out.*wish.asked = std::stoi(value);
        known = true;
      }
    if (!known)
      throw std::invalid_argument(std::string(kOverrideVariable) + ": got '" + word +
                                  "'; allowed: " + override_allowed());
  }
  return out;
}

// One line per choice, the first that applies counts. GPUs differ only by what Device says.
struct Rule {
  Regime regime;
  const char* when;
};
constexpr Rule kTable[] = {
    {Regime::strided, "classes are not adjacent"},
    {Regime::lanes, "alike, classes <= 64, 128, 256: 8, 16, 32 lanes per row; many rows: <= 128, 256: 8, 16 lanes"},
    {Regime::block,
     "alike, classes <= 192 threads x 32 (24, 16 and 8 where 3, 4 and 6 features are kept, 8 less in float32 but at "
     "least 8)"},
    {Regime::split, "backward: slices of every row"},
    {Regime::cluster,
     "clusters, alike or classes > 4096, not float64: the smallest cluster that holds two rows, else the smallest that "
     "holds one; larger ones while multiprocessors would have no row"},
    {Regime::split, "classes > 8192, rows < half the multiprocessors"},
    {Regime::staged, "alike, the row pair fits into a block's shared memory"},
    {Regime::split,
     "classes > 8192, and rows < multiprocessors or, with a gradient, the pairs of so many rows exceed 0.45 of an L2 "
     "cache of 18 MiB or more"},
    {Regime::sweeps, "everything else"},
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows whose pairs the L2 cache keeps between the two reads, beside the gradient that streams through it. All of them
// where nothing is read twice, or where the cache is so small that launches cost more than they save.
inline int64_t cached_rows(const Shape& x, const Device& d) {
  const int64_t cached = d.l2 * 45 / 100, row = x.classes * x.pair_bytes;
  return x.writes && cached >= kSmallestWave ? std::max<int64_t>(1, cached / row) : x.rows;
}

// The threads that are asked for, if a kernel that is compiled for `most` of them can have them.
inline int threads_of(const Override& o, int64_t most, int64_t otherwise) {
  return static_cast<int>(o.threads && o.threads % 32 == 0 && o.threads <= most ? o.threads : otherwise);
}

// Shared memory of each of so many blocks on a multiprocessor.
inline int64_t shared_of(const Device& d, int per_multiprocessor) {
  return per_multiprocessor == 1 ? d.shared_per_block
                                 : std::min(d.shared_per_block, d.shared_per_multiprocessor / 2 - 1024);
}

inline Plan split_plan(const Shape& x, const Device& d, const Override& o) {
  const int most = x.wide ? kWideThreads : kPartThreads;
  Plan out = {Regime::split, threads_of(o, most, most), 0};
  const int64_t vectors = std::max<int64_t>(1, x.classes / x.vector);
  int64_t wave = x.rows, parts;
  if (x.pass == Pass::backward) {
    out.threads = static_cast<int>(std::min<int64_t>(out.threads, ceil_div(vectors, 32) * 32));
    parts = ceil_div(vectors, 8 * out.threads);
  } else {
    wave = ceil_div(x.rows, ceil_div(x.rows, cached_rows(x, d)));
    // Twice what is resident at a time, rounded down: a block more would be a third round.
    parts = std::min<int64_t>(4 * d.multiprocessors / wave, ceil_div(vectors, 2 * out.threads));
    parts = std::min<int64_t>(o.parts ? o.parts : parts, kMostParts);
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
inline Plan staged_plan(const Shape& x, const Device& d, const Override& o) {
  const int tensors = x.pair_bytes * x.vector / 16;
  const int64_t vectors = x.classes / x.vector;
  Plan out = {Regime::staged, 0, 0};
  for (const int per_multiprocessor : {2, 1}) {
    if (o.per_multiprocessor && o.per_multiprocessor != per_multiprocessor) continue;
    out.per_multiprocessor = per_multiprocessor;
    const int most = staged_threads(x.kept) / per_multiprocessor;
    out.threads = threads_of(o, most, most);
    const int64_t shared = shared_of(d, per_multiprocessor);
    out.stage_slots = static_cast<int>(std::max<int64_t>(0, shared - kRowOverhead) / (16 * tensors * out.threads));
    if (int64_t(out.stage_slots) * out.threads >= vectors) break;
    out.stage_slots = 0;  // does not fit
  }
  if (!out.stage_slots) return out;
  out.stage_slots = static_cast<int>(std::min<int64_t>(out.stage_slots, 2 * ceil_div(vectors, out.threads)));
  out.blocks = std::max<int64_t>(1, std::min<int64_t>(x.rows, int64_t(d.multiprocessors) * out.per_multiprocessor));
  return out;
}

// How many rows a block of a cluster has room for, if it has so many vectors of each.
inline int cluster_stages(const Shape& x, int part_vectors, int64_t shared) {
  const int64_t stage = (int64_t(part_vectors) * x.vector + 2 * x.vector) * x.pair_bytes + 128;
  return static_cast<int>(std::min<int64_t>(kMostStages, std::max<int64_t>(0, shared - kClusterOverhead) / stage));
}

// The smallest cluster that holds a row and the next one, because its blocks wait for each other once per row; of two
// such blocks on a multiprocessor, one computes while the other waits. Without stages: there is no such cluster.
inline Plan cluster_plan(const Shape& x, const Device& d, const Override& o) {
  const int64_t vectors = std::max<int64_t>(1, x.classes / x.vector);
  Plan out = {Regime::cluster, 0, 0};
  int size = 0;
  const auto fits = [&](int log_size, int per_multiprocessor, int stages) {
    const int parts = 1 << log_size, part_vectors = static_cast<int>(ceil_div(vectors, parts));
    const int room = cluster_stages(x, part_vectors, shared_of(d, per_multiprocessor));
    if (d.clusters[log_size] == 0 || room < std::max(stages, o.stages)) return false;
    if (o.parts && o.parts != parts) return false;
    if (o.per_multiprocessor && o.per_multiprocessor != per_multiprocessor) return false;
    if (o.threads * per_multiprocessor > kClusterThreads) return false;
    size = log_size;
    out.parts = parts;
    out.part_vectors = part_vectors;
    out.stages = o.stages ? o.stages : room;
    out.per_multiprocessor = per_multiprocessor;
    return true;
  };
  const auto any_fits = [&] {
    for (int i = 0; i < kClusterSizes; ++i)
      if (fits(i, 2, 2) || fits(i, 1, 2)) return true;
    for (int i = 0; i < kClusterSizes; ++i)
      if (fits(i, 1, 1) || fits(i, 2, 1)) return true;  // two blocks with a row each, if they are asked for
    return false;
  };
  if (!any_fits()) return {Regime::cluster, 0, 0};
  // Few rows: more blocks each, as long as all clusters find a place and blocks have a vector for every thread.
  while (size + 1 < kClusterSizes && d.clusters[size + 1] >= x.rows && out.part_vectors >= 2 * kClusterThreads &&
         fits(size + 1, 1, 1)) {
  }
  const int most = kClusterThreads / out.per_multiprocessor;
  out.threads = threads_of(o, most, std::min<int64_t>(most, ceil_div(out.part_vectors, 32) * 32));
  out.blocks = std::min<int64_t>(x.rows, int64_t(d.clusters[size]) * out.per_multiprocessor) * out.parts;
  return out;
}

// By kTable; or, where a regime is asked for, that one, and another where it cannot take the call.
inline Plan choose(const Shape& x, const Device& d, const Override& o) {
  const auto asked = [&](Regime regime) { return o.regime == regime; };
  // Persistent blocks, as many as are resident at a time: what each of them does once is then done seldom.
  const auto grid = [&](int64_t blocks, int per_multiprocessor) {
    return std::max<int64_t>(1, std::min<int64_t>(blocks, int64_t(d.multiprocessors) * per_multiprocessor));
  };
  if (x.strided) return {Regime::strided, kStridedThreads, grid(ceil_div(x.rows, kStridedThreads), x.wide ? 2 : 4)};
  const int64_t vectors = x.classes / x.vector;
  if (x.alike && !o.regime) {
    // Many rows: fewer lanes each, because finishing a row costs as much as its classes.
    const bool many = x.kept < 3 && x.rows >= int64_t(128) * d.multiprocessors;
    const int classes = many ? kManyRowsClasses : kFewRowsClasses;
    for (int lanes : {8, 16, many ? 16 : 32}) {
      if (vectors * x.vector > lanes * classes) continue;
      Plan out = {Regime::lanes, kLanesThreads, grid(ceil_div(x.rows, kLanesThreads / lanes), lanes_blocks(x.kept))};
      out.lanes = lanes;
      out.lane_classes = classes;
      return out;
    }
    const int per_thread = kept_classes(x.kept, x.vector);
    const int64_t threads = std::max<int64_t>(1, ceil_div(vectors, 32 * per_thread / x.vector)) * 32;
    if (threads <= kBlockThreads)
      return {Regime::block, static_cast<int>(threads), grid(x.rows, kBlockWarps * 32 / static_cast<int>(threads))};
  }
  if (x.pass == Pass::backward) return split_plan(x, d, o);
  const bool is_long = x.classes > kLongClasses;
  const bool clusters = o.regime ? asked(Regime::cluster) : x.alike || x.classes > kClusterSkewedClasses;
  if (x.vector > 2 && clusters) {
    Plan cluster = cluster_plan(x, d, o);
    cluster.alike = x.alike;
    if (cluster.stages) return cluster;
  }
  if (asked(Regime::split) || (!o.regime && is_long && 2 * x.rows < d.multiprocessors)) return split_plan(x, d, o);
  if (x.alike && (!o.regime || asked(Regime::staged))) {
    const Plan staged = staged_plan(x, d, o);
    if (staged.stage_slots) return staged;
  }
  const int64_t cached = cached_rows(x, d);
  if (!o.regime && is_long && (x.rows < d.multiprocessors || cached < std::min<int64_t>(x.rows, d.multiprocessors)))
    return split_plan(x, d, o);
  // As many threads as have two vectors each, and as many blocks as a multiprocessor's threads make.
  const int64_t most = x.wide ? kWideThreads : kLongThreads, wanted = ceil_div(std::max<int64_t>(vectors, 1), 64) * 32;
  const int threads = threads_of(o, most, std::min(most, wanted));
  const int resident = static_cast<int>(std::min<int64_t>(32, most / threads));
  Plan out = {Regime::sweeps, threads, 0};
  out.alike = x.alike;
  out.per_multiprocessor = o.per_multiprocessor ? std::min(o.per_multiprocessor, resident) : resident;
  out.blocks = grid(std::min(x.rows, cached), out.per_multiprocessor);
  return out;
}

// Numbers alone are asked of the regime that the planner picks. What the call, the kernel or the device cannot have is
// refused.
inline Plan plan(const Shape& x, const Device& d, const Override& o = {}) {
  const Plan own = choose(x, d, {});
  if (x.pass == Pass::backward) return own;
  Override wanted = o;
  if (!o.regime) wanted.regime = own.regime;
  std::string words = o.regime ? std::string(" regime=") + kRegimes[static_cast<int>(*o.regime)] : "";
  for (const Wish& wish : kWishes)
    if (o.*wish.asked) words += std::string(" ") + wish.name + "=" + std::to_string(o.*wish.asked);
  if (words.empty()) return own;
  const Plan out = choose(x, d, wanted);
  bool met = out.regime == *wanted.regime;
  for (const Wish& wish : kWishes) met = met && (!(o.*wish.asked) || o.*wish.asked == out.*wish.made);
  if (!met)
    throw std::invalid_argument(std::string(kOverrideVariable) + ":" + words + " is not possible for " +
                                std::to_string(x.rows) + " rows of " + std::to_string(x.classes) +
                                " classes on this device; allowed: " + override_allowed());
  return out;
}

}  // namespace gpu
}  // namespace kd
