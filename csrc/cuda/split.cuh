// Rows that several blocks share, in two launches or, with a second round, three.
#pragma once

#include "sweeps.cuh"

KD_NAMESPACE_BEGIN

namespace cuda {

using namespace gpu;

template <class F>
constexpr int kPartUnroll = F::wide ? 2 : 4;

// The statistics of one part of a row. The edges belong to the first part.
template <class Sums, class F>
KD_KERNEL((F::wide ? kWideThreads : kPartThreads), (F::wide ? 1 : 2))
split_stats(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int U = kPartUnroll<F>;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
  const int rank = arch::thread(), size = arch::threads();
  const int64_t in_wave = arch::block() / a.parts, row = a.first_row + in_wave;
  const int part = static_cast<int>(arch::block() - in_wave * a.parts);
  const RowInputs<S> opened = open(a, row);
  if (!opened.read) return;
  const Row<F> at = view<Sums>(a, fs, ft, row, opened.target);
  const int begin = part * a.part_vectors, end = begin + a.part_vectors < at.count ? begin + a.part_vectors : at.count;
  Running<Sums, S> running;
  if (part == 0) Edge<Sums, F>(fs, ft, at, opened.target, rank).add(a, running);
  for (int i = begin + rank; i < end; i += U * size) {
    Stride<Sums, F, U, true, false> stride;
    stride.fetch(fs, ft, at, i, size, end);
    stride.each(fs, ft, at, i, size, end,
                [&](int, const S(&s)[F::kVector], const S(&t)[F::kVector]) { running.add(a, s, t); });
  }
  lanes_merge<32, Sums>(scales_of<Sums>(a), running);
  warps_merge<Sums>(a, scratch, running);
  if (rank == 0) store_stats<Sums>(a.split_stats + arch::block() * kStatsWidth, running);
}

// The row's statistics from those of its parts, by the first warp.
template <class Sums, class S>
KD_DEVICE void parts_merge(const Args<S>& a, int64_t in_wave, Summary<Sums, S>& all) {
  for (int n = arch::thread(); n < a.parts; n += 32) {
    Summary<Sums, S> part;
    load_stats(a.split_stats + (in_wave * a.parts + n) * kStatsWidth, part);
    merge(scales_of<Sums>(a), all, part);
  }
  lanes_merge<32>(scales_of<Sums>(a), all);
}

// The second round of one part of a row, between the other two launches.
template <class Sums, class F>
KD_KERNEL((F::wide ? kWideThreads : kPartThreads), (F::wide ? 1 : 2))
split_refined(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int U = kPartUnroll<F> / 2;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
  const int rank = arch::thread(), size = arch::threads();
  // From the end, as split_gradient.
  const int64_t from_end = arch::blocks() - 1 - arch::block(), in_wave = from_end / a.parts,
                row = a.first_row + in_wave;
  const int part = static_cast<int>(from_end - in_wave * a.parts);
  const RowInputs<S> opened = open(a, row);
  if (!opened.read) return;
  const Row<F> at = view<Sums>(a, fs, ft, row, opened.target);
  Summary<Sums, S> all;
  load_target(all, fs, ft, at, opened);
  const int begin = part * a.part_vectors, end = begin + a.part_vectors < at.count ? begin + a.part_vectors : at.count;
  if (rank < 32) {
    parts_merge(a, in_wave, all);
    put_opening(a, scratch, all);
  }
  arch::sync_block();
  RowGradient<Sums, S> gradient;
  get_opening(scratch, gradient);
  S sums[Sums::refined] = {};
  for (int i = begin + rank; i < end; i += U * size) {
    Stride<Sums, F, U, true, false> stride;
    stride.fetch(fs, ft, at, i, size, end);
    stride.each(fs, ft, at, i, size, end, [&](int, const S(&s)[F::kVector], const S(&t)[F::kVector]) {
      refine_sums<Sums>(scales_of<Sums>(a), gradient, s, t, sums);
    });
  }
  if (part == 0) Edge<Sums, F>(fs, ft, at, opened.target, rank).refine(a, gradient, sums);
  warps_sum<Sums>(scratch, sums);
  static_assert(Sums::refined <= kMostRefined, "scratch has room for them");
  KD_UNROLL
  for (int k = 0; k < Sums::refined && rank == 0; ++k)
    arch::store(a.split_refined + from_end * kMostRefined + k, sums[k]);
}

// Finishes a row from the statistics of its parts, or from those of a forward pass, and writes the gradient of a part.
// The block of the first part writes the loss. The last parts come first: they are what the cache still has.
template <class Sums, class F>
KD_KERNEL((F::wide ? kWideThreads : kPartThreads), (F::wide ? 1 : 2))
split_gradient(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int U = kPartUnroll<F>;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
  const S factor = reduction_factor(a, scratch.doubles);
  const int rank = arch::thread(), size = arch::threads(), parts = a.grad.data ? a.parts : 1;
  const int64_t from_end = arch::blocks() - 1 - arch::block(), in_wave = from_end / parts, row = a.first_row + in_wave;
  const int part = static_cast<int>(from_end - in_wave * parts);
  const RowInputs<S> opened = open(a, row);
  const Row<F> at = view<Sums>(a, fs, ft, row, opened.target);
  const int begin = part * a.part_vectors, end = begin + a.part_vectors < at.count ? begin + a.part_vectors : at.count;
  double sum = 0;
  if (opened.read) {
    Summary<Sums, S> all;
    load_target(all, fs, ft, at, opened);
    // The last stride, which comes first, is on its way while the row is finished.
    const int strides = end > begin ? (end - begin + U * size - 1) / (U * size) : 0;
    int i = begin + (strides - 1) * U * size + rank;
    Stride<Sums, F, U, true, true> stride;
    if (at.g && strides) stride.fetch(fs, ft, at, i, size, end);
    if (rank < 32 && a.backward) {
      load_row_stats(a, row, all);
    } else if (rank < 32) {
      parts_merge(a, in_wave, all);
      KD_UNROLL
      for (int k = 0; k < Sums::refined; ++k) {
        S sum_of_lane = 0;
        KD_ROLL
        for (int n = rank; n < a.parts; n += 32)
          sum_of_lane += arch::load(a.split_refined + (in_wave * a.parts + n) * kMostRefined + k);
        all.stats.v[Sums::count + k] = lanes_sum<32>(sum_of_lane);
      }
    }
    RowGradient<Sums, S> gradient;
    sum = finish_known(a, scratch, all, row, opened.weight * factor, gradient, part == 0);
    for (int n = strides - 1; at.g && n >= 0; --n) {
      stride.each(fs, ft, at, i, size, end, [&](int vector, const S(&s)[F::kVector], const S(&t)[F::kVector]) {
        write_vector<Sums>(a, fs, at, vector, s, t, gradient);
      });
      i -= U * size;
      if (n > 0) stride.fetch(fs, ft, at, i, size, end);
    }
    if (at.g && part == 0) Edge<Sums, F>(fs, ft, at, opened.target, rank).write(a, fs, at, opened.target, gradient);
  } else {
    if (rank == 0 && part == 0) write_nothing(a, row);
    if (at.g) {
      write_zeros(fs, at, begin + rank, end, size);
      if (part == 0) write_zero_edges(fs, at, rank, size);
    }
  }
  if (!a.total) return;
  if (rank == 0 && part == 0) arch::store(a.sums + row, sum);
  total(a, scratch.doubles);
}

}  // namespace cuda

KD_NAMESPACE_END
