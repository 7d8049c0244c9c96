// Rows that are read again for the gradient, and the strides in which they are read.
#pragma once

#include "plan.h"
#include "row.cuh"

KD_NAMESPACE_BEGIN

namespace cuda {

using namespace gpu;

// Vectors i, i + size, .. of a row, kUnroll of them: all are on their way before the first one is looked at.
template <class Sums, class F, int kUnroll, bool kSkewed, bool kLast>
struct Stride {
  using S = typename F::S;
  static constexpr int E = F::kVector;
  typename F::Vector raw_s[kUnroll], raw_t[kUnroll];

  KD_DEVICE void fetch(const F& fs, const F& ft, const Row<F>& row, int i, int size, int end) {
    KD_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      if (i + k * size >= end) continue;
      raw_s[k] = fs.template fetch<kLast, kSkewed>(row.s_place, row.first + i + k * size);
      if (Sums::teacher) raw_t[k] = ft.template fetch<kLast, kSkewed>(row.t_place, row.first + i + k * size);
    }
  }
  // use(vector, s, t) for each of them, the target at -inf.
  template <class Use>
  KD_DEVICE void each(const F& fs, const F& ft, const Row<F>& row, int i, int size, int end, Use use) {
    KD_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      if (i + k * size >= end) continue;
      const int vector = row.first + i + k * size;
      S s[E], t[E];
      values_of<Sums>(fs, ft, row, vector, raw_s[k], raw_t[k], s, t);
      use(vector, s, t);
    }
  }
};

template <class Sums, class F, class S>
KD_DEVICE void write_vector(const Args<S>& a, const F& f, const Row<F>& row, int vector, const S (&s)[F::kVector],
                            const S (&t)[F::kVector], const RowGradient<Sums, S>& gradient) {
  S out[F::kVector];
  KD_UNROLL
  for (int e = 0; e < F::kVector; ++e) out[e] = gradient_at<Sums>(scales_of<Sums>(a), gradient, s[e], t[e]);
  if (vector == row.hot_vector) row.at_target(out, gradient.y);
  f.put_vector(row.g_base, vector, out);
}

// The edges of a row, one per thread of the first warp.
template <class Sums, class F>
struct Edge {
  using S = typename F::S;
  int c;
  S s, t;
  KD_DEVICE Edge(const F& fs, const F& ft, const Row<F>& row, int target, int rank) : s(lowest<S>()), t(s) {
    c = rank < Row<F>::kEdges ? row.edge(rank) : -1;
    if (c < 0 || c == target) return;
    s = fs.get(row.s, c);
    t = Sums::teacher ? ft.get(row.t, c) : s;
  }
  KD_DEVICE void add(const Args<S>& a, Running<Sums, S>& running) const {
    const S s1[1] = {s}, t1[1] = {t};
    if (c >= 0) running.add(a, s1, t1);
  }
  template <int kCount>
  KD_DEVICE void refine(const Args<S>& a, const RowGradient<Sums, S>& gradient, S (&sums)[kCount]) const {
    const S s1[1] = {s}, t1[1] = {t};
    if (c >= 0) refine_sums<Sums>(scales_of<Sums>(a), gradient, s1, t1, sums);
  }
  KD_DEVICE void write(const Args<S>& a, const F& f, const Row<F>& row, int target,
                       const RowGradient<Sums, S>& gradient) const {
    if (c >= 0) f.put(row.g, c, c == target ? gradient.y : gradient_at<Sums>(scales_of<Sums>(a), gradient, s, t));
  }
};

// Read twice: for the statistics, then in reverse for the gradient, which finds in the cache what was read last. With a
// second round three times: it is the one that reads in reverse then.
template <class Sums, class F, bool kSkewed>
KD_KERNEL((F::wide ? kWideThreads : kLongThreads), (sizeof(typename F::S) == 8 ? 1
                                                    : F::wide                  ? 2
                                                                               : 1))
sweeps(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int U = F::wide ? 1 : kSkewed ? (Sums::refined ? 1 : 2) : Sums::refined ? 2 : 4;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
  const S factor = reduction_factor(a, scratch.doubles);
  const int rank = arch::thread(), size = arch::threads();
  double sum = 0;
  for (BlockRows<Sums, F> rows(a, fs, ft); rows.next();) {
    const int64_t row = rows.row;
    const RowInputs<S>& opened = rows.opened;
    const Row<F>& at = rows.at;
    Running<Sums, S> running;
    load_target<Sums>(running, fs, ft, at, opened);
    Edge<Sums, F>(fs, ft, at, opened.target, rank).add(a, running);
    for (int i = rank; i < at.count; i += U * size) {
      Stride<Sums, F, U, kSkewed, false> stride;
      stride.fetch(fs, ft, at, i, size, at.count);
      stride.each(fs, ft, at, i, size, at.count,
                  [&](int, const S(&s)[F::kVector], const S(&t)[F::kVector]) { running.add(a, s, t); });
    }
    lanes_merge<32, Sums>(scales_of<Sums>(a), running);
    RowGradient<Sums, S> gradient;
    const int strides = (at.count + U * size - 1) / (U * size);
    const auto refine = [&](const RowGradient<Sums, S>& of_row, auto& sums) {
      for (int n = strides - 1; n >= 0; --n) {
        const int i = n * U * size + rank;
        Stride<Sums, F, U, kSkewed, false> stride;
        stride.fetch(fs, ft, at, i, size, at.count);
        stride.each(fs, ft, at, i, size, at.count, [&](int, const S(&s)[F::kVector], const S(&t)[F::kVector]) {
          refine_sums<Sums>(scales_of<Sums>(a), of_row, s, t, sums);
        });
      }
      Edge<Sums, F>(fs, ft, at, opened.target, rank).refine(a, of_row, sums);
    };
    sum += finish_in_block<Sums>(a, scratch, running, row, opened.weight * factor, gradient, refine);
    if (!at.g) continue;
    for (int n = strides - 1; n >= 0; --n) {
      const int i = (Sums::refined ? strides - 1 - n : n) * U * size + rank;
      Stride<Sums, F, U, kSkewed, true> stride;
      stride.fetch(fs, ft, at, i, size, at.count);
      stride.each(fs, ft, at, i, size, at.count, [&](int vector, const S(&s)[F::kVector], const S(&t)[F::kVector]) {
        write_vector<Sums>(a, fs, at, vector, s, t, gradient);
      });
    }
    Edge<Sums, F>(fs, ft, at, opened.target, rank).write(a, fs, at, opened.target, gradient);
  }
  total_with(a, scratch.doubles, sum);
}

}  // namespace cuda

KD_NAMESPACE_END
