// The CPU kernels as the binding and the tests' module see them: one build per instruction set.
#pragma once

#include "../problem.h"

namespace kd {

// How the rows are walked.
enum class Regime : int32_t {
  lanes_are_classes,  // a row at a time, in tiles that stay in cache
  batches,            // longer ones: as many as there are lanes, swept one by one and finished together
  lanes_are_rows,     // short or class-strided rows: one per lane
};

constexpr int64_t kCache = 32 << 10;  // bytes of exponentials that a batch may keep: the first-level cache
constexpr int kTile = 1024;          // classes that are swept at a time: a pair of tiles stays in the first-level cache
constexpr int64_t kBlockTile = 256;  // the same with a row per lane
constexpr int64_t kWholeRows = 4096;              // classes of which a row per lane keeps all exponentials
constexpr size_t kKeptScratch = size_t(8) << 20;  // bytes that a thread keeps between calls

struct Plan {
  Regime regime;
  int unit;  // rows that one step handles: threads should get multiples of it
};

// One instruction set's build of the kernels.
struct Kernels {
  const char* name;
  int vector_bytes;
  const LossFacts* losses;
  int loss_count;
  // False if there was no memory for the scratch rows.
  bool (*run)(const Problem&, Plan, int64_t row_begin, int64_t row_end);
  // Lane functions over arrays, for the tests that hold their error bounds. n: a multiple of 16.
  void (*exp2_f32)(const float* x, float* y, int64_t n);
  void (*exp2_f64)(const double* x, double* y, int64_t n);
  void (*log_f64)(const double* x, double* y, int64_t n);
  void (*log1p_f64)(const double* x, double* y, int64_t n);
};

const Kernels* kernels(const char* name);  // null if not built in or not supported by this processor
const Kernels* best_kernels();
const char* supported_names();  // comma separated, best last
Plan plan(const Kernels&, const Problem&);
void advise_huge_pages(void* fresh, size_t bytes);
// Memory of this thread, aligned for any vector; null if there is none. It stays for the thread's next call, unless it
// is more than kKeptScratch when the call is done with it.
void* scratch(size_t bytes);
void done_with_scratch();

}  // namespace kd
