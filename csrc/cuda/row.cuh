// What every kernel does with a row: open it, sum it up over a team of threads, finish it, write its gradient.
#pragma once

#include "logits.cuh"
// The losses come after arch.cuh.
#include "../losses/list.h"

KD_NAMESPACE_BEGIN

namespace cuda {

// A call as the kernels see it. S is the compute type.
template <class S>
struct Args {
  Logits student, teacher, grad;
  int64_t inner = 0, rows = 0;
  int classes = 0;
  bool backward = false, mean = false;
  const int64_t* target = nullptr;
  int64_t ignore_index = 0;
  Chosen<S> loss;
  S margin = 0;  // how far a logit may rise above a running pivot
  // Numbers in memory that are no logits: by load_number and store_number. narrow: they are float, whatever S is.
  bool narrow = false;
  const void* row_weight = nullptr;
  const void* upstream = nullptr;  // (outputs, rows), backward
  S scale = 1;
  const void* normalizer = nullptr;
  const void* stats_in = nullptr;  // (rows, kStatsWidth), backward
  void* stats_out = nullptr;       // the same, forward
  void* losses = nullptr;          // (outputs, rows), forward
  void* parts_out = nullptr;       // (2, rows): distillation and cross-entropy
  // A reduction: every block's part of the sum, or every row's where parts of rows are blocks, and the total.
  double* sums = nullptr;
  int64_t sum_count = 0;
  void* total = nullptr;
  uint32_t* counter = nullptr;  // null in launches that are not the last one
  // Rows that are not ignored, by blocks of the launch before; null: every block counts.
  const double* counts = nullptr;
  int count_blocks = 0;
  // Rows in several parts: this launch's rows begin at first_row.
  int64_t first_row = 0;
  int parts = 1, part_vectors = 0;
  int stage_slots = 0;           // granules of each tensor that a thread has room for
  int clusters = 0, stages = 0;  // how many there are; rows that one has room for
  S* split_stats = nullptr;      // (rows of a wave, parts, kStatsWidth)
  S* split_refined = nullptr;    // (rows of a wave, parts, kMostRefined): their second round's sums
};

template <class S>
KD_DEVICE S load_number(const Args<S>& a, const void* from, int64_t i) {
  if constexpr (sizeof(S) == 8)
    if (a.narrow) return arch::load(static_cast<const float*>(from) + i);
  return arch::load(static_cast<const S*>(from) + i);
}
template <class S>
KD_DEVICE void store_number(const Args<S>& a, void* to, int64_t i, S x) {
  if constexpr (sizeof(S) == 8) {
    // By instructions that say that this is global memory: ptxas forgets it, for sm_100, of pointers that are chosen.
    if (a.narrow) return arch::store_streaming(static_cast<float*>(to) + i, static_cast<float>(x));
    arch::store_streaming(static_cast<S*>(to) + i, x);
  } else {
    arch::store(static_cast<S*>(to) + i, x);
  }
}

template <class Sums, class S>
KD_DEVICE const typename Sums::template Scales<S>& scales_of(const Args<S>& a) {
  return a.loss.template scales<Sums>();
}

template <class S>
KD_DEVICE S lowest() {
  return -infinity<S>();
}

// ---- sums over threads ----------------------------------------------------------------------------------------------

template <int kLanes, class V>
KD_DEVICE V lanes_max(V x) {
  KD_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) x = max_of(x, arch::shfl_xor(x, step));
  return x;
}
template <int kLanes, class V>
KD_DEVICE V lanes_sum(V x) {
  KD_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) x += arch::shfl_xor(x, step);
  return x;
}
template <int kLanes, class V>
KD_DEVICE Pivots<V> lanes_max(const Pivots<V>& p, bool teacher) {
  const V s = lanes_max<kLanes>(p.s);
  return {s, teacher ? lanes_max<kLanes>(p.t) : s};
}
// From each lane's statistics, relative to its own pivots, to those of all lanes.
template <int kLanes, class Sums, class S>
KD_DEVICE void lanes_merge(const typename Sums::template Scales<S>& scales, Summary<Sums, S>& part) {
  const Pivots<S> all = lanes_max<kLanes>(part.pivots, Sums::teacher);
  part.stats = Sums::template moved_to<S>(scales, part.stats, part.pivots, all);
  part.pivots = all;
  KD_UNROLL
  for (int k = 0; k < Sums::count; ++k) part.stats.v[k] = lanes_sum<kLanes>(part.stats.v[k]);
}

// The shared memory of a block beside staged rows.
template <class Sums, class S>
struct Scratch {
  static constexpr int kFields = 2 + Sums::count, kResults = 3 + Sums::coefs + (Sums::refined ? Sums::openings : 0);
  static_assert(Sums::refined <= kFields, "the second round's sums per warp take the place of the first one's");
  arch::Shared<S> warps;    // statistics per warp
  arch::Shared<S> results;  // coefficients and pivots of the row
  arch::Shared<double> doubles;

  KD_FN explicit Scratch(arch::Carver& carver)
      : warps(carver.template take<S>(32 * kFields)),
        results(carver.template take<S>(kResults)),
        doubles(carver.template take<double>(33)) {}
  static size_t bytes() {
    arch::Carver carver = arch::Carver::counting();
    const Scratch counted(carver);
    return carver.bytes();
  }
};

// The sum of read(i) over a block's threads, i < n, each thread's own part: several reads are on their way at a time.
template <class T, class Read>
KD_DEVICE T thread_sum(int64_t n, Read read) {
  constexpr int kUnroll = 8;
  T sum = 0;
  for (int64_t from = arch::thread(); from < n; from += kUnroll * arch::threads()) {
    T x[kUnroll];
    KD_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      const int64_t i = from + k * arch::threads();
      x[k] = i < n ? read(i) : T(0);
    }
    KD_UNROLL
    for (int k = 0; k < kUnroll; ++k) sum += x[k];
  }
  return sum;
}

// The sum over a block, in thread 0, in an order that depends on nothing but the number of threads.
KD_DEVICE double block_sum(const arch::Shared<double>& doubles, double x) {
  x = lanes_sum<32>(x);
  if (arch::lane() == 0) doubles.st(arch::thread() / 32, x);
  arch::sync_block();
  x = 0;
  if (arch::thread() == 0)
    for (int w = 0; w < arch::threads() / 32; ++w) x += doubles.ld(w);
  arch::sync_block();
  return x;
}

// What multiplies the rows of a reduction: scale, over normalizer, over the number of rows that are not ignored. 1
// where rows are not reduced.
template <class S>
KD_DEVICE S reduction_factor(const Args<S>& a, const arch::Shared<double>& doubles) {
  if (!a.total) return S(1);
  S factor = a.scale;
  if (a.normalizer) factor /= load_number(a, a.normalizer, 0);
  if (!a.mean) return factor;
  double counted;
  if (a.counts)
    counted = thread_sum<double>(a.count_blocks, [&](int64_t i) { return arch::load(a.counts + i); });
  else
    counted = thread_sum<int>(a.rows, [&](int64_t i) { return arch::load(a.target + i) != a.ignore_index; });
  counted = block_sum(doubles, counted);
  if (arch::thread() == 0) doubles.st(32, counted);
  arch::sync_block();
  const S n = static_cast<S>(doubles.ld(32));
  return factor / (n > 1 ? n : S(1));
}

// Ends a block: adds up the sums once all of them are there.
template <class S>
KD_DEVICE void total(const Args<S>& a, const arch::Shared<double>& doubles) {
  if (!a.counter) return;
  arch::sync_block();
  if (arch::thread() == 0) doubles.st(32, arch::last_block(a.counter) ? 1 : 0);
  arch::sync_block();
  if (doubles.ld(32) == 0) return;
  double sum = thread_sum<double>(a.sum_count, [&](int64_t i) { return arch::load_written(a.sums + i); });
  sum = block_sum(doubles, sum);
  if (arch::thread() == 0) store_number(a, a.total, 0, static_cast<S>(sum));
}
// The same, with the block's own sum, which thread 0 has.
template <class S>
KD_DEVICE void total_with(const Args<S>& a, const arch::Shared<double>& doubles, double sum) {
  if (!a.total) return;
  if (arch::thread() == 0) arch::store(a.sums + arch::block(), sum);
  total(a, doubles);
}

// ---- one row ------------------------------------------------------------------------------------------------------

template <class S>
struct RowInputs {
  bool read;
  int target;  // -1: none, or not allowed
  S weight;    // NaN where the target is not allowed
};

template <class S>
KD_DEVICE RowInputs<S> open(const Args<S>& a, int64_t row) {
  RowInputs<S> out = {row < a.rows, -1, S(1)};
  if (!out.read) return out;
  if (a.row_weight) out.weight = load_number(a, a.row_weight, row);
  out.read = out.weight != 0;
  if (a.target) {
    const int64_t y = arch::load(a.target + row);
    out.read = out.read && y != a.ignore_index;
    if (y >= 0 && y < a.classes)
      out.target = static_cast<int>(y);
    else
      out.weight = static_cast<S>(__builtin_nanf(""));
  }
  return out;
}

template <class S>
KD_DEVICE void row_indices(const Args<S>& a, int64_t row, int64_t& outer, int64_t& inner) {
  outer = a.rows == a.inner ? 0 : row / a.inner;
  inner = row - outer * a.inner;
}

template <class Sums, class F, class S>
KD_DEVICE Row<F> view(const Args<S>& a, const F& fs, const F& ft, int64_t row, int target) {
  int64_t outer, inner;
  row_indices(a, row, outer, inner);
  return Row<F>(fs, ft, a.student, a.teacher, a.grad, Sums::teacher, outer, inner, a.classes, target);
}

// The logits of one vector, the target at -inf. Losses without a teacher see the student twice.
template <class Sums, class F, class S>
KD_DEVICE void values_of(const F& fs, const F& ft, const Row<F>& row, int vector, typename F::Vector& raw_s,
                         typename F::Vector& raw_t, S (&s)[F::kVector], S (&t)[F::kVector]) {
  fs.values(raw_s, s);
  if (Sums::teacher) ft.values(raw_t, t);
  if (vector == row.hot_vector) {
    row.at_target(s, lowest<S>());
    row.at_target(t, lowest<S>());
  }
  KD_UNROLL
  for (int e = 0; e < F::kVector; ++e) t[e] = Sums::teacher ? t[e] : s[e];
}

// Statistics: of a row, for the backward pass, and of a part of a row.
template <class Sums, class S, class T>
KD_DEVICE void load_stats(const T* from, Summary<Sums, S>& part) {
  part.pivots = {arch::load(from), arch::load(from + 1)};
  KD_UNROLL
  for (int k = 0; k < kSums<Sums>; ++k) part.stats.v[k] = arch::load(from + stored_at<Sums>(k));
}
template <class Sums, class S, class T>
KD_DEVICE void store_stats(T* to, const Summary<Sums, S>& part) {
  arch::store(to, static_cast<T>(part.pivots.s));
  arch::store(to + 1, static_cast<T>(part.pivots.t));
  KD_UNROLL
  for (int i = 2; i < kStatsWidth; ++i) {
    const int k = sum_stored_at<Sums>(i);
    arch::store(to + i, k < 0 ? T(0) : static_cast<T>(part.stats.v[k < 0 ? 0 : k]));
  }
}
template <class Sums, class S>
KD_DEVICE void load_row_stats(const Args<S>& a, int64_t row, Summary<Sums, S>& known) {
  if constexpr (sizeof(S) == 8)
    if (a.narrow) return load_stats(static_cast<const float*>(a.stats_in) + row * kStatsWidth, known);
  load_stats(static_cast<const S*>(a.stats_in) + row * kStatsWidth, known);
}
template <class Sums, class S>
KD_DEVICE void store_row_stats(const Args<S>& a, int64_t row, const Summary<Sums, S>& all) {
  if constexpr (sizeof(S) == 8)
    if (a.narrow) return store_stats(static_cast<float*>(a.stats_out) + row * kStatsWidth, all);
  store_stats(static_cast<S*>(a.stats_out) + row * kStatsWidth, all);
}

// Nothing learned from a row that is not read.
template <class S>
KD_DEVICE void write_nothing(const Args<S>& a, int64_t row) {
  for (int k = 0; k < a.loss.outputs; ++k)
    if (a.losses) store_number(a, a.losses, k * a.rows + row, S(0));
  for (int k = 0; k < 2; ++k)
    if (a.parts_out) store_number(a, a.parts_out, k * a.rows + row, S(0));
  for (int k = 0; k < kStatsWidth; ++k)
    if (a.stats_out) store_number(a, a.stats_out, row * kStatsWidth + k, S(0));
}

// The logits of the target. Asked for before the row is summed up, so that nobody waits for them.
template <class Sums, class F, class S>
KD_DEVICE void load_target(Summary<Sums, S>& all, const F& fs, const F& ft, const char* s, const char* t,
                           int64_t s_step, int64_t t_step, const RowInputs<S>& open) {
  if (!open.read || open.target < 0) return;
  all.s_y = fs.get(s, open.target * s_step);
  if (Sums::teacher) all.t_y = ft.get(t, open.target * t_step);
}
template <class Sums, class F, class S>
KD_DEVICE void load_target(Summary<Sums, S>& all, const F& fs, const F& ft, const Row<F>& row,
                           const RowInputs<S>& open) {
  load_target(all, fs, ft, row.s, row.t, 1, 1, open);
}

// The row's loss times its weight, as part of a sum, and its coefficients. writes: in one thread of the team.
template <class Sums, class S, class Coef>
KD_DEVICE double finish_row(const Args<S>& a, const Summary<Sums, S>& all, int64_t row, S weight, bool writes,
                            Coef& coef) {
  S g[kMostValues], loss[kMostValues] = {};
  KD_UNROLL
  for (int k = 0; k < kMostValues; ++k) {
    g[k] = weight;
    if (a.upstream && k < a.loss.outputs) g[k] *= load_number(a, a.upstream, k * a.rows + row);
  }
  a.loss.finish(all, g, loss, coef);
  if (!writes || a.backward) return 0;
  const S nan = nan_of(all);
  KD_UNROLL
  for (int k = 0; k < kMostValues; ++k) loss[k] += nan;
  KD_UNROLL
  for (int k = 0; k < kMostValues; ++k)
    if (a.losses && k < a.loss.outputs) store_number(a, a.losses, k * a.rows + row, loss[k] * g[k]);
  if (a.stats_out) store_row_stats(a, row, all);
  if (Sums::has_parts && a.parts_out) {
    const S own = open(a, row).weight;  // without what multiplies the rows of a reduction
    store_number(a, a.parts_out, row, loss[1] * own);
    store_number(a, a.parts_out, a.rows + row, a.target ? loss[2] * own : S(0));
  }
  return static_cast<double>(loss[0] * g[0]);
}

// ---- the gradient of a row ----------------------------------------------------------------------------------------

// What is needed to write gradients: coefficients of exponentials relative to `pivots`; of Sums with a second round
// what opens it, relative to them, and coefficients that are relative to nothing.
template <class Sums, class S>
struct RowGradient {
  S c[Sums::coefs], y;
  Pivots<S> pivots;
  Opening<Sums, S> opening;
};

// Makes a gradient fit exponentials relative to other pivots.
template <class Sums, class S>
KD_DEVICE void rebase_gradient(const typename Sums::template Scales<S>& scales, RowGradient<Sums, S>& gradient,
                               const Pivots<S>& to) {
  if constexpr (Sums::refined > 0)
    Sums::rebase(scales, gradient.opening, gradient.pivots, to);
  else
    Sums::rebase(scales, gradient, gradient.pivots, to);
}

// A class in the second round, from what is kept of it.
template <class Sums, class S>
KD_DEVICE void refine_kept(const typename Sums::template Scales<S>& scales, const RowGradient<Sums, S>& gradient,
                           S (&e)[Sums::kept], S (&sums)[Sums::refined]) {
  Sums::template refine<S>(scales, e, gradient.opening, sums);
}
// And from its logits.
template <class Sums, class S>
KD_DEVICE void refine_at(const typename Sums::template Scales<S>& scales, const RowGradient<Sums, S>& gradient, S s,
                         S t, S (&e)[Sums::kept], S (&sums)[Sums::refined]) {
  const auto x = Sums::template exps<S>(scales, s - gradient.pivots.s, t - gradient.pivots.t);
  KD_UNROLL
  for (int k = 0; k < Sums::kept; ++k) e[k] = x.e[k];
  refine_kept<Sums>(scales, gradient, e, sums);
}
// Several classes, for their sums alone.
template <class Sums, int kCount, class S>
KD_DEVICE void refine_sums(const typename Sums::template Scales<S>& scales, const RowGradient<Sums, S>& gradient,
                           const S (&s)[kCount], const S (&t)[kCount], S (&sums)[Sums::refined]) {
  KD_UNROLL
  for (int i = 0; i < kCount; ++i) {
    S e[Sums::kept];
    refine_at<Sums>(scales, gradient, s[i], t[i], e, sums);
  }
}

template <class Sums, class S>
KD_DEVICE S gradient_at(const typename Sums::template Scales<S>& scales, const RowGradient<Sums, S>& gradient, S s,
                        S t) {
  S e[Sums::kept];
  if constexpr (Sums::refined > 0) {
    S unused[Sums::refined] = {};
    refine_at<Sums>(scales, gradient, s, t, e, unused);
  } else {
    const auto x = Sums::template exps<S>(scales, s - gradient.pivots.s, t - gradient.pivots.t);
    KD_UNROLL
    for (int k = 0; k < Sums::kept; ++k) e[k] = x.e[k];
  }
  return Sums::gradient(e, gradient.c);
}

template <class F>
KD_DEVICE void write_zeros(const F& f, const Row<F>& row, int begin, int end, int step) {
  typename F::S zeros[F::kVector];
  KD_UNROLL
  for (int e = 0; e < F::kVector; ++e) zeros[e] = 0;
  for (int i = begin; i < end; i += step) f.put_vector(row.g_base, row.first + i, zeros);
}
template <class F>
KD_DEVICE void write_zero_edges(const F& f, const Row<F>& row, int rank, int size) {
  for (int j = rank; j < Row<F>::kEdges; j += size)
    if (row.edge(j) >= 0) f.put(row.g, row.edge(j), 0);
}
template <class F>
KD_DEVICE void write_zero_row(const F& f, const Row<F>& row, int rank, int size) {
  write_zeros(f, row, rank, row.count, size);
  write_zero_edges(f, row, rank, size);
}

// Nothing learned from a row that is not read, and its gradient, by a team of threads.
template <class F, class S>
KD_DEVICE void write_nothing(const Args<S>& a, const F& f, const Row<F>& at, int64_t row, int rank, int size) {
  if (rank == 0) write_nothing(a, row);
  if (at.g) write_zero_row(f, at, rank, size);
}

// The rows that a block takes in turn: next() goes to the next one that is read, and gives those that are not a loss
// and a gradient of 0.
template <class Sums, class F>
struct BlockRows {
  using S = typename F::S;
  const Args<S>& a;
  const F &fs, &ft;
  int64_t row;
  RowInputs<S> opened;
  Row<F> at;

  KD_DEVICE BlockRows(const Args<S>& args, const F& s, const F& t)
      : a(args), fs(s), ft(t), row(arch::block() - arch::blocks()), opened{}, at{} {}
  KD_DEVICE bool next() {
    for (row += arch::blocks(); row < a.rows; row += arch::blocks()) {
      opened = open(a, row);
      at = view<Sums>(a, fs, ft, row, opened.target);
      if (opened.read) return true;
      write_nothing(a, fs, at, row, arch::thread(), arch::threads());
    }
    return false;
  }
};

// ---- a row in warps -----------------------------------------------------------------------------------------------

// From each warp's statistics to those of the block, in the first warp. The others get nothing. The sums of a second
// round, which the first warp has of a row in a backward pass, stay what they are.
template <class Sums, class S>
KD_DEVICE void warps_merge(const Args<S>& a, const Scratch<Sums, S>& scratch, Summary<Sums, S>& part) {
  constexpr int kFields = Scratch<Sums, S>::kFields;
  const int warps = arch::threads() / 32, warp = arch::thread() / 32, lane = arch::lane();
  if (warps == 1) return;
  if (lane == 0) {
    scratch.warps.st(warp * kFields, part.pivots.s);
    scratch.warps.st(warp * kFields + 1, part.pivots.t);
    KD_UNROLL
    for (int k = 0; k < Sums::count; ++k) scratch.warps.st(warp * kFields + 2 + k, part.stats.v[k]);
  }
  arch::sync_block();
  if (warp > 0) return;
  part.pivots = {lowest<S>(), lowest<S>()};
  KD_UNROLL
  for (int k = 0; k < Sums::count; ++k) part.stats.v[k] = 0;
  if (lane < warps) {
    part.pivots = {scratch.warps.ld(lane * kFields), scratch.warps.ld(lane * kFields + 1)};
    KD_UNROLL
    for (int k = 0; k < Sums::count; ++k) part.stats.v[k] = scratch.warps.ld(lane * kFields + 2 + k);
  }
  const auto known = part.stats;  // moving the others loses the second round's
  lanes_merge<32>(scales_of<Sums>(a), part);
  KD_UNROLL
  for (int k = Sums::count; k < kSums<Sums>; ++k) part.stats.v[k] = known.v[k];
}

// What the first warp knows of a row, from its first lane to all threads: its pivots and what opens its second round,
// and its coefficients. Between put and get there is a barrier.
template <class Sums, class S>
KD_DEVICE void put_opening(const Args<S>& a, const Scratch<Sums, S>& scratch, const Summary<Sums, S>& all) {
  if constexpr (Sums::refined > 0) {
    Opening<Sums, S> opening;
    Sums::template open<S>(scales_of<Sums>(a), all, opening);
    KD_UNROLL
    for (int k = 0; k < Sums::openings && arch::lane() == 0; ++k) scratch.results.st(Sums::coefs + 3 + k, opening.c[k]);
  }
  if (arch::lane() > 0) return;
  scratch.results.st(Sums::coefs + 1, usable(all.pivots.s));
  scratch.results.st(Sums::coefs + 2, usable(all.pivots.t));
}
template <class Sums, class S>
KD_DEVICE void get_opening(const Scratch<Sums, S>& scratch, RowGradient<Sums, S>& gradient) {
  if constexpr (Sums::refined > 0) {
    KD_UNROLL
    for (int k = 0; k < Sums::openings; ++k) gradient.opening.c[k] = scratch.results.ld(Sums::coefs + 3 + k);
  }
  gradient.pivots = {scratch.results.ld(Sums::coefs + 1), scratch.results.ld(Sums::coefs + 2)};
}
template <class Sums, class S, class Coef>
KD_DEVICE void put_coefficients(const Scratch<Sums, S>& scratch, const Coef& coef) {
  if (arch::lane() > 0) return;
  KD_UNROLL
  for (int k = 0; k < Sums::coefs; ++k) scratch.results.st(k, coef.c[k]);
  scratch.results.st(Sums::coefs, coef.y);
}
template <class Sums, class S>
KD_DEVICE void get_coefficients(const Scratch<Sums, S>& scratch, RowGradient<Sums, S>& gradient) {
  KD_UNROLL
  for (int k = 0; k < Sums::coefs; ++k) gradient.c[k] = scratch.results.ld(k);
  gradient.y = scratch.results.ld(Sums::coefs);
  if (arch::threads() == 32) arch::sync_block();  // the next row's results may come before another barrier
}

// From each warp's sums of a second round to those of the block, in the first warp.
template <class Sums, class S>
KD_DEVICE void warps_sum(const Scratch<Sums, S>& scratch, S (&sums)[Sums::refined]) {
  const int warps = arch::threads() / 32, warp = arch::thread() / 32, lane = arch::lane();
  KD_UNROLL
  for (int k = 0; k < Sums::refined; ++k) {
    sums[k] = lanes_sum<32>(sums[k]);
    if (warps > 1 && lane == 0) scratch.warps.st(warp * Sums::refined + k, sums[k]);
  }
  if (warps == 1) return;
  arch::sync_block();
  KD_UNROLL
  for (int k = 0; k < Sums::refined && warp == 0; ++k)
    sums[k] = lanes_sum<32>(lane < warps ? scratch.warps.ld(lane * Sums::refined + k) : S(0));
}

// What a row in several blocks does between them: the first warp calls it with its block's summary, and with the sums
// of the second round, to have those of the row.
struct Alone {
  template <class T>
  KD_DEVICE void operator()(T&) const {}
};

// Finishes a row whose sums, of both rounds, are known: all threads then have its coefficients, relative to its pivots.
// part: each warp's summary, or, in a backward pass, the row's in the first warp. writes: whether this block stores
// what there is one of per row.
template <class Sums, class S, class Meet = Alone>
KD_DEVICE double finish_known(const Args<S>& a, const Scratch<Sums, S>& scratch, Summary<Sums, S> part, int64_t row,
                              S weight, RowGradient<Sums, S>& gradient, bool writes = true, const Meet& meet = Meet()) {
  warps_merge(a, scratch, part);
  double loss = 0;
  if (arch::thread() < 32) {
    meet(part);
    typename Sums::template Coef<S> coef;
    loss = finish_row(a, part, row, weight, arch::lane() == 0 && writes, coef);
    put_opening(a, scratch, part);
    put_coefficients(scratch, coef);
  }
  arch::sync_block();
  get_opening(scratch, gradient);
  get_coefficients(scratch, gradient);
  return loss;
}

// The same from the first round's sums: the second round comes in between, where the loss has one. refine(gradient,
// sums) gives that of the thread's classes, from opening and pivots of the row.
template <class Sums, class S, class Refine, class Meet = Alone>
KD_DEVICE double finish_in_block(const Args<S>& a, const Scratch<Sums, S>& scratch, Summary<Sums, S> part, int64_t row,
                                 S weight, RowGradient<Sums, S>& gradient, const Refine& refine, bool writes = true,
                                 const Meet& meet = Meet()) {
  if constexpr (Sums::refined == 0) {
    return finish_known(a, scratch, part, row, weight, gradient, writes, meet);
  } else {
    warps_merge(a, scratch, part);
    if (arch::thread() < 32) {
      meet(part);
      put_opening(a, scratch, part);
    }
    arch::sync_block();  // from here on nobody reads the warps' statistics
    get_opening(scratch, gradient);
    S sums[Sums::refined] = {};
    refine(gradient, sums);
    warps_sum<Sums>(scratch, sums);
    double loss = 0;
    if (arch::thread() < 32) {
      meet(sums);
      KD_UNROLL
      for (int k = 0; k < Sums::refined; ++k) part.stats.v[Sums::count + k] = sums[k];
      typename Sums::template Coef<S> coef;
      loss = finish_row(a, part, row, weight, arch::lane() == 0 && writes, coef);
      put_coefficients(scratch, coef);
    }
    arch::sync_block();
    get_coefficients(scratch, gradient);
    return loss;
  }
}

// ---- running statistics -------------------------------------------------------------------------------------------

// One thread's statistics of logits that arrive in order. The pivots are what the first logits make them; they follow
// when a logit rises so far above them that sums would lose their scale, hardly ever after the first vector.
template <class Sums, class S>
struct Running : Summary<Sums, S> {
  using Summary<Sums, S>::pivots;
  using Summary<Sums, S>::stats;

  template <int kCount>
  KD_DEVICE void add(const Args<S>& a, const S (&s)[kCount], const S (&t)[kCount]) {
    Pivots<S> top = {s[0], t[0]};
    top = {max_of(lowest<S>(), top.s), max_of(lowest<S>(), top.t)};  // NaN is no pivot
    KD_UNROLL
    for (int e = 1; e < kCount; ++e) top = {max_of(top.s, s[e]), max_of(top.t, t[e])};
    if (top.s > pivots.s + a.margin || top.t > pivots.t + a.margin) {
      top = {max_of(pivots.s, top.s), max_of(pivots.t, top.t)};
      stats = Sums::template moved_to<S>(scales_of<Sums>(a), stats, pivots, top);
      pivots = top;
    }
    const S from_s = usable(pivots.s), from_t = usable(pivots.t);
    KD_UNROLL
    for (int e = 0; e < kCount; ++e)
      Sums::add(stats, Sums::template exps<S>(scales_of<Sums>(a), s[e] - from_s, t[e] - from_t));
  }
};

}  // namespace cuda

KD_NAMESPACE_END
