// Rows that a block, or lanes of a warp, hold in registers: read once, the gradient from the exponentials kept.
#pragma once

#include "plan.h"
#include "row.cuh"

KD_NAMESPACE_BEGIN

namespace cuda {

using namespace gpu;

// One class in the sums, and its exponentials in x.
template <class Sums, class S, class Stats>
KD_DEVICE void add_and_keep(const typename Sums::template Scales<S>& scales, S ds, S dt, Stats& stats,
                            S (&x)[Sums::kept]) {
  const auto exps = Sums::template exps<S>(scales, ds, dt);
  Sums::add(stats, exps);
  KD_UNROLL
  for (int n = 0; n < Sums::kept; ++n) x[n] = exps.e[n];
}

// The exponentials of kVectors vectors of a row, per thread: of begin, begin + size, .., as far as they are below
// `end`.
template <class Sums, class F, int kVectors>
struct Exponentials {
  using S = typename F::S;
  static constexpr int E = F::kVector;
  S x[kVectors][E][Sums::kept];

  // The second round, in place. opening: relative to the pivots that the exponentials are relative to.
  template <int kCount>
  KD_DEVICE void refine(const typename Sums::template Scales<S>& scales, const Opening<Sums, S>& opening,
                        S (&sums)[kCount]) {
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      KD_UNROLL
      for (int e = 0; e < E; ++e) Sums::template refine<S>(scales, x[k][e], opening, sums);
    }
  }

  // The gradient. coef: relative to the pivots that the exponentials are relative to.
  template <class Coef>
  KD_DEVICE void write(const F& f, const Row<F>& row, int begin, int size, int end, const Coef& coef) const {
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int i = begin + k * size;
      if (i >= end) continue;
      S out[E];
      KD_UNROLL
      for (int e = 0; e < E; ++e) out[e] = Sums::gradient(x[k][e], coef.c);
      if (row.first + i == row.hot_vector) row.at_target(out, coef.y);
      f.put_vector(row.g_base, row.first + i, out);
    }
  }
};

// kVectors vectors and kEdges edge logits of a row, per thread: first logits, then their exponentials.
template <class Sums, class F, int kVectors, int kEdgeCount>
struct Tile {
  using S = typename F::S;
  static constexpr int E = F::kVector;
  S s[kVectors][E], t[kVectors][E];
  S edge_s[kEdgeCount], edge_t[kEdgeCount], edge_x[kEdgeCount][Sums::kept];
  Exponentials<Sums, F, kVectors> kept;

  KD_DEVICE void load(const F& f, const Row<F>& row, bool read, int target, int rank, int size) {
    typename F::Vector raw_s[kVectors], raw_t[kVectors];
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int i = rank + k * size;
      if (!read || i >= row.count) continue;
      raw_s[k] = f.template fetch<false, false>(row.s_place, row.first + i);
      if (Sums::teacher) raw_t[k] = f.template fetch<false, false>(row.t_place, row.first + i);
    }
    KD_UNROLL
    for (int j = 0; j < kEdgeCount; ++j) {
      const int c = rank + j * size < 2 * E ? row.edge(edge_of(rank + j * size)) : -1;
      const bool there = read && c >= 0 && c != target;
      edge_s[j] = there ? f.get(row.s, c) : lowest<S>();
      edge_t[j] = Sums::teacher && there ? f.get(row.t, c) : edge_s[j];
    }
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      const int i = rank + k * size;
      if (!read || i >= row.count) {
        KD_UNROLL
        for (int e = 0; e < E; ++e) s[k][e] = t[k][e] = lowest<S>();
        continue;
      }
      values_of<Sums>(f, f, row, row.first + i, raw_s[k], raw_t[k], s[k], t[k]);
    }
  }

  // Tensors that lie alike have fewer edges than a vector at either end.
  static KD_DEVICE int edge_of(int j) { return j < E ? j : Row<F>::kEdges / 2 + j - E; }

  KD_DEVICE Pivots<S> top() const {
    Pivots<S> out = {lowest<S>(), lowest<S>()};
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      KD_UNROLL
      for (int e = 0; e < E; ++e) out = {max_of(out.s, s[k][e]), max_of(out.t, t[k][e])};
    }
    KD_UNROLL
    for (int j = 0; j < kEdgeCount; ++j) out = {max_of(out.s, edge_s[j]), max_of(out.t, edge_t[j])};
    return out;
  }

  KD_DEVICE typename Sums::template Stats<S> sweep(const typename Sums::template Scales<S>& scales,
                                                   const Pivots<S>& pivots) {
    typename Sums::template Stats<S> stats = {};
    const S from_s = usable(pivots.s), from_t = usable(pivots.t);
    KD_UNROLL
    for (int k = 0; k < kVectors; ++k) {
      KD_UNROLL
      for (int e = 0; e < E; ++e) add_and_keep<Sums>(scales, s[k][e] - from_s, t[k][e] - from_t, stats, kept.x[k][e]);
    }
    KD_UNROLL
    for (int j = 0; j < kEdgeCount; ++j)
      add_and_keep<Sums>(scales, edge_s[j] - from_s, edge_t[j] - from_t, stats, edge_x[j]);
    return stats;
  }

  // opening: relative to the pivots of the sweep.
  template <int kCount>
  KD_DEVICE void refine(const typename Sums::template Scales<S>& scales, const Opening<Sums, S>& opening,
                        S (&sums)[kCount]) {
    kept.refine(scales, opening, sums);
    KD_UNROLL
    for (int j = 0; j < kEdgeCount; ++j) Sums::template refine<S>(scales, edge_x[j], opening, sums);
  }

  // coef: relative to the pivots of the sweep.
  template <class Coef>
  KD_DEVICE void write(const F& f, const Row<F>& row, int target, int rank, int size, const Coef& coef) const {
    kept.write(f, row, rank, size, row.count, coef);
    KD_UNROLL
    for (int j = 0; j < kEdgeCount; ++j) {
      const int c = rank + j * size < 2 * E ? row.edge(edge_of(rank + j * size)) : -1;
      if (c >= 0) f.put(row.g, c, c == target ? coef.y : Sums::gradient(edge_x[j], coef.c));
    }
  }
};

// Several rows per warp, kLanes lanes each, that keep kClasses classes each.
template <class Sums, class F, int kLanes, int kClasses>
KD_KERNEL(kLanesThreads, lanes_blocks(Sums::held))
lanes(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int E = F::kVector, kVectors = kClasses / E, kEdgeCount = (2 * E + kLanes - 1) / kLanes;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F f(a.student);
  const S factor = reduction_factor(a, scratch.doubles);
  const int rank = arch::lane() % kLanes, group = arch::lane() / kLanes;
  const int64_t warp = arch::block() * (arch::threads() / 32) + arch::thread() / 32;
  const int64_t step = arch::blocks() * (arch::threads() / 32) * (32 / kLanes);
  double sum = 0;
  for (int64_t base = warp * (32 / kLanes); base < a.rows; base += step) {
    const int64_t row = base + group;
    const bool exists = row < a.rows;
    const RowInputs<S> opened = open(a, row);
    const Row<F> at = view<Sums>(a, f, f, exists ? row : base, opened.target);
    Summary<Sums, S> all;
    load_target(all, f, f, at, opened);
    Tile<Sums, F, kVectors, kEdgeCount> tile;
    tile.load(f, at, opened.read, opened.target, rank, kLanes);
    if (a.backward) {
      if (exists) load_row_stats(a, row, all);
    } else {
      all.pivots = lanes_max<kLanes>(tile.top(), Sums::teacher);
    }
    const auto stats = tile.sweep(scales_of<Sums>(a), all.pivots);
    KD_UNROLL
    for (int k = 0; k < Sums::count; ++k) all.stats.v[k] = a.backward ? all.stats.v[k] : lanes_sum<kLanes>(stats.v[k]);
    if constexpr (Sums::refined > 0) {  // before groups leave: lanes exchange
      Opening<Sums, S> opening;
      Sums::template open<S>(scales_of<Sums>(a), all, opening);
      S sums[Sums::refined] = {};
      tile.refine(scales_of<Sums>(a), opening, sums);
      KD_UNROLL
      for (int k = 0; k < Sums::refined; ++k)
        all.stats.v[Sums::count + k] = a.backward ? all.stats.v[Sums::count + k] : lanes_sum<kLanes>(sums[k]);
    }
    if (!exists) continue;
    if (!opened.read) {
      write_nothing(a, f, at, row, rank, kLanes);
      continue;
    }
    typename Sums::template Coef<S> coef;
    const double loss = finish_row(a, all, row, opened.weight * factor, rank == 0, coef);
    if (rank == 0) sum += loss;
    if (at.g) tile.write(f, at, opened.target, rank, kLanes, coef);
  }
  if (a.total) total_with(a, scratch.doubles, block_sum(scratch.doubles, sum));
}

// A block per row.
template <class Sums, class F>
KD_KERNEL(kBlockThreads, 2)
block(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int E = F::kVector, kVectors = kKeptClasses<Sums::held, E> / E;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F f(a.student);
  const S factor = reduction_factor(a, scratch.doubles);
  double sum = 0;
  for (BlockRows<Sums, F> rows(a, f, f); rows.next();) {
    const int64_t row = rows.row;
    const RowInputs<S>& opened = rows.opened;
    const Row<F>& at = rows.at;
    Summary<Sums, S> part;
    load_target(part, f, f, at, opened);
    Tile<Sums, F, kVectors, 1> tile;
    tile.load(f, at, true, opened.target, arch::thread(), arch::threads());
    if (a.backward) {
      load_row_stats(a, row, part);
      tile.sweep(scales_of<Sums>(a), part.pivots);
      if (arch::thread() >= 32) part.stats = {};
    } else {
      part.pivots = lanes_max<32>(tile.top(), Sums::teacher);
      part.stats = tile.sweep(scales_of<Sums>(a), part.pivots);
      KD_UNROLL
      for (int k = 0; k < Sums::count; ++k) part.stats.v[k] = lanes_sum<32>(part.stats.v[k]);
    }
    const S weight = opened.weight * factor;
    RowGradient<Sums, S> gradient;
    const auto refine = [&](auto& of_row, auto& sums) {
      rebase_gradient(scales_of<Sums>(a), of_row, part.pivots);
      tile.refine(scales_of<Sums>(a), of_row.opening, sums);
    };
    // Of losses of one round the same code serves both passes; two copies of it would take more registers.
    sum += !Sums::refined || a.backward ? finish_known(a, scratch, part, row, weight, gradient)
                                        : finish_in_block(a, scratch, part, row, weight, gradient, refine);
    if (!at.g) continue;
    if constexpr (Sums::refined > 0) {
      S unused[Sums::refined] = {};
      if (a.backward) refine(gradient, unused);
    } else {
      rebase_gradient(scales_of<Sums>(a), gradient, part.pivots);
    }
    tile.write(f, at, opened.target, arch::thread(), arch::threads(), gradient);
  }
  total_with(a, scratch.doubles, sum);
}

}  // namespace cuda

KD_NAMESPACE_END
