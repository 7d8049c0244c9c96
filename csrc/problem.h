// One call of the kernels: plain data, shared by the CPU's and the GPU's kernels, the bindings and the tests' modules.
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

constexpr int kMaxParams = 10;
constexpr double kLargeTemperature = 32;  // kdkernels.reference.LARGE_TEMPERATURE
constexpr int kStatsWidth = 10;           // two pivots and up to eight sums
constexpr int kMostRefined = 2;           // of which a second round has up to so many

// What is summed beside what every call of a loss needs, each a build of its own: `at_one`, the sums at temperature 1;
// `smooth`, these, at any temperature, and those of the logits themselves, for label smoothing. It also gives the
// parts. `apart` and `apart_smooth` are plain and smooth with a temperature of the teacher's own.
enum class Variant : int32_t { plain, at_one, smooth, apart, apart_smooth };

// What is known of a loss without its code.
struct LossFacts {
  const char* name;
  int outputs, params;
  bool teacher;      // one is needed
  bool target;       // one is needed
  bool temperature;  // the first parameter is one
  bool parts;        // it has them: it is a distillation and a cross-entropy
};

struct Problem {
  int loss = 0;  // index in losses/list.h
  Pass pass = Pass::forward;
  int64_t outer = 0, inner = 0, classes = 0;
  Logits student, teacher, grad;    // teacher is absent for losses on one tensor, grad in a forward pass
  const int64_t* target = nullptr;  // (rows), contiguous; or null: no class is set apart
  int64_t ignore_index = 0;
  double params[kMaxParams] = {};  // by set_loss()
  double temperature = 1;          // of the student, the first of them where the loss has one
  // Numbers of a row, and of the call: in double where student or teacher is double, else in float.
  const void* row_weight = nullptr;  // (rows), or null: all 1. A row of weight 0 is not read.
  const void* grad_rows = nullptr;   // (outputs, rows), backward
  void* rows = nullptr;              // (outputs, rows), forward
  double scale = 1;                  // forward_grad
  double* scaled_rows = nullptr;     // (rows), forward_grad
  void* parts = nullptr;             // (2, rows), distillation and cross-entropy, or null: not asked for; no backward
  // (rows, kStatsWidth), written by forward, read by backward: double on a CPU, on a GPU as the others.
  void* stats = nullptr;

  // By the dtypes alone: tensors of no rows have no data.
  bool in_double() const { return student.dtype == DType::f64 || teacher.dtype == DType::f64; }
  // A number of a row.
  double number(const void* of, int64_t row) const {
    return in_double() ? static_cast<const double*>(of)[row] : static_cast<double>(static_cast<const float*>(of)[row]);
  }
  // Whether a row is left unread: loss and gradient are 0.
  bool skips(int64_t row) const {
    return (target && target[row] == ignore_index) || (row_weight && number(row_weight, row) == 0);
  }
  // T^2 times a difference of logarithms: of float, little is left of it at large T.
  bool computes_in_double() const { return in_double() || (teacher.data && temperature > kLargeTemperature); }
  int64_t rows_total() const { return outer * inner; }

  // The loss of this number and so many parameters as it has.
  void set_loss(int number, const LossFacts& facts, const double* numbers) {
    loss = number;
    for (int i = 0; i < facts.params; ++i) params[i] = numbers[i];
    temperature = facts.temperature ? params[0] : 1;
  }
};

}  // namespace kd
