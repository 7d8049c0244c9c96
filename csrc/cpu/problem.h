// One call of the CPU kernels: plain data, shared by all instruction sets, by the binding and by the tests' module.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kd {

enum class DType : int32_t { f32, f64, f16, bf16 };

// Logits as (outer, inner, classes) with any strides, in elements. A row is one (outer, inner).
struct Logits {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t outer_stride = 0, inner_stride = 0, class_stride = 0;
};

enum class Pass : int32_t {
  forward,       // row losses and statistics
  backward,      // gradient, from the statistics and an upstream gradient per row
  forward_grad,  // row losses times weights and scale, and their gradient, in one go
};

constexpr int kMaxParams = 8;
constexpr int kStatsWidth = 8;  // two pivots and up to six sums

struct Problem {
  int loss = 0;  // index in losses/list.h
  Pass pass = Pass::forward;
  int64_t outer = 0, inner = 0, classes = 0;
  Logits student, teacher, grad;    // teacher is absent for losses on one tensor, grad in a forward pass
  const int64_t* target = nullptr;  // (rows), contiguous; or null: no class is set apart
  int64_t ignore_index = 0;
  double params[kMaxParams] = {};
  // In the compute type: float, or double where student or teacher is double.
  const void* row_weight = nullptr;  // (rows), or null: all 1. A row of weight 0 is not read.
  const void* grad_rows = nullptr;   // (outputs, rows), backward
  void* rows = nullptr;              // (outputs, rows), forward
  double scale = 1;                  // forward_grad
  double* scaled_rows = nullptr;     // (rows), forward_grad
  double* stats = nullptr;           // (rows, kStatsWidth), written by forward, read by backward

  // By the dtypes alone: tensors of no rows have no data.
  bool in_double() const { return student.dtype == DType::f64 || teacher.dtype == DType::f64; }
  int64_t rows_total() const { return outer * inner; }
};

// How the rows are walked.
enum class Regime : int32_t {
  lanes_are_classes,  // a row at a time, in tiles that stay in cache
  batches,            // short rows: as many as there are lanes, swept one by one and finished together
  lanes_are_rows,     // very short or class-strided rows: one per lane
};

constexpr int64_t kCache = 32 << 10;  // bytes of exponentials that a batch may keep: the first-level cache
constexpr int kTile = 1024;  // classes that are swept at a time: a pair of tiles stays in the first-level cache

struct Plan {
  Regime regime;
  int unit;  // rows that one step handles: threads should get multiples of it
};

struct LossFacts {
  const char* name;
  int outputs;
  bool teacher, two_temperatures;
};

// One instruction set's build of the kernels.
struct Kernels {
  const char* name;
  int vector_bytes;
  const LossFacts* losses;
  int loss_count;
  // False if there was no memory for the scratch rows: O(classes) per thread, kept for the thread's next call.
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
void* scratch(size_t bytes);  // of this thread, aligned for any vector; null if there is no memory

}  // namespace kd
