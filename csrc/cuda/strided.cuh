// Rows whose classes are not adjacent.
#pragma once

#include "plan.h"
#include "row.cuh"

KD_NAMESPACE_BEGIN

namespace cuda {

using namespace gpu;

// A thread per row: neighbours in memory are rows then (images with the classes in the middle). Several classes are on
// their way at a time.
template <class Sums, class F>
KD_KERNEL(kStridedThreads, (sizeof(typename F::S) == 8 ? 2 : 4))
strided(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int U = F::wide ? 2 : 4;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
  const S factor = reduction_factor(a, scratch.doubles);
  const int64_t s_step = a.student.class_stride, t_step = a.teacher.class_stride, g_step = a.grad.class_stride;
  double sum = 0;
  for (int64_t row = arch::block() * arch::threads() + arch::thread(); row < a.rows;
       row += arch::blocks() * arch::threads()) {
    const RowInputs<S> opened = open(a, row);
    int64_t outer, inner;
    row_indices(a, row, outer, inner);
    const char* const s_row = row_of(a.student, fs.size(), outer, inner);
    const char* const t_row = Sums::teacher ? row_of(a.teacher, ft.size(), outer, inner) : s_row;
    char* const g_row = a.grad.data ? row_of(a.grad, fs.size(), outer, inner) : nullptr;
    if (!opened.read) {
      write_nothing(a, row);
      for (int64_t c = 0; g_row && c < a.classes; ++c) fs.put(g_row, c * g_step, 0);
      continue;
    }
    // Classes that are summed before the sum joins the others: rounding stays small. The second round makes differences
    // of what it divides by the sums.
    constexpr int kChunk = Sums::refined ? 16 : 64;
    // Classes c .. c + U, the target and what is behind the last one at -inf.
    const auto fetch = [&](int64_t c, S(&s)[U], S(&t)[U]) {
      KD_UNROLL
      for (int k = 0; k < U; ++k) {
        const bool there = c + k < a.classes && c + k != opened.target;
        s[k] = there ? fs.get(s_row, (c + k) * s_step) : lowest<S>();
        t[k] = Sums::teacher && there ? ft.get(t_row, (c + k) * t_step) : s[k];
      }
    };
    Summary<Sums, S> all;
    load_target(all, fs, ft, s_row, t_row, s_step, t_step, opened);
    if (a.backward) {
      load_row_stats(a, row, all);
    } else {
      Running<Sums, S> running;
      for (int64_t from = 0; from < a.classes; from += kChunk) {
        running.stats = {};
        for (int64_t c = from; c < from + kChunk && c < a.classes; c += U) {
          S s[U], t[U];
          fetch(c, s, t);
          running.add(a, s, t);
        }
        merge<Sums, S>(scales_of<Sums>(a), all, running);
      }
    }
    RowGradient<Sums, S> gradient;
    gradient.pivots = {usable(all.pivots.s), usable(all.pivots.t)};
    if constexpr (Sums::refined > 0) {
      Sums::template open<S>(scales_of<Sums>(a), all, gradient.opening);
      for (int64_t from = 0; from < a.classes && !a.backward; from += kChunk) {
        S sums[Sums::refined] = {};
        for (int64_t c = from; c < from + kChunk && c < a.classes; c += U) {
          S s[U], t[U];
          fetch(c, s, t);
          refine_sums<Sums>(scales_of<Sums>(a), gradient, s, t, sums);
        }
        KD_UNROLL
        for (int k = 0; k < Sums::refined; ++k) all.stats.v[Sums::count + k] += sums[k];
      }
    }
    typename Sums::template Coef<S> coef;
    sum += finish_row(a, all, row, opened.weight * factor, true, coef);
    if (!g_row) continue;
    KD_UNROLL
    for (int k = 0; k < Sums::coefs; ++k) gradient.c[k] = coef.c[k];
    for (int64_t c = 0; c < a.classes; c += U) {
      S s[U], t[U];
      fetch(c, s, t);
      KD_UNROLL
      for (int k = 0; k < U; ++k)
        if (c + k < a.classes)
          fs.put(g_row, (c + k) * g_step,
                 c + k == opened.target ? coef.y : gradient_at<Sums>(scales_of<Sums>(a), gradient, s[k], t[k]));
    }
  }
  if (a.total) total_with(a, scratch.doubles, block_sum(scratch.doubles, sum));
}

}  // namespace cuda

KD_NAMESPACE_END
