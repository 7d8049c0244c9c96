// The generic row kernels, the same for every loss; plan.h says which one takes a call. A loss comes in as its Sums
// (losses that sum alike share their kernels) and the logits' type as a Format.
#pragma once

#include "plan.h"
#include "row.cuh"

KD_NAMESPACE_BEGIN

namespace cuda {

using namespace gpu;

// ---- rows in registers --------------------------------------------------------------------------------------------

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
KD_KERNEL(kFewThreads, few_blocks(Sums::held))
few(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int E = F::kVector, kVectors = kClasses / E, kEdgeCount = (2 * E + kLanes - 1) / kLanes;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F f(a.student);
  const S factor = a.total ? reduction_factor(a, scratch.doubles) : S(1);
  const int rank = arch::lane() % kLanes, group = arch::lane() / kLanes;
  const int64_t warp = arch::block() * (arch::threads() / 32) + arch::thread() / 32;
  const int64_t step = arch::blocks() * (arch::threads() / 32) * (32 / kLanes);
  double sum = 0;
  for (int64_t base = warp * (32 / kLanes); base < a.rows; base += step) {
    const int64_t row = base + group;
    const bool exists = row < a.rows;
    const Open<S> opened = open(a, row);
    const Row<F> at = view<Sums>(a, f, f, exists ? row : base, opened.target);
    const TargetLogits<S> y = target_logits<Sums>(f, f, at.s, at.t, 1, 1, opened);
    Tile<Sums, F, kVectors, kEdgeCount> tile;
    tile.load(f, at, opened.read, opened.target, rank, kLanes);
    Pivots<S> pivots = {lowest<S>(), lowest<S>()};
    typename Sums::template Stats<S> known = {};
    if (a.backward) {
      if (exists) load_row_stats<Sums>(a, row, pivots, known);
    } else {
      pivots = lanes_max<kLanes>(tile.top(), Sums::teacher);
    }
    auto stats = tile.sweep(scales_of<Sums>(a), pivots);
    KD_UNROLL
    for (int k = 0; k < Sums::count; ++k) stats.v[k] = a.backward ? known.v[k] : lanes_sum<kLanes>(stats.v[k]);
    if constexpr (Sums::refined > 0) {  // before groups leave: lanes exchange
      Opening<Sums, S> opening;
      Sums::template open<S>(scales_of<Sums>(a), stats, pivots, y.s, y.t, opening);
      S sums[Sums::refined] = {};
      tile.refine(scales_of<Sums>(a), opening, sums);
      KD_UNROLL
      for (int k = 0; k < Sums::refined; ++k)
        stats.v[Sums::count + k] = a.backward ? known.v[Sums::count + k] : lanes_sum<kLanes>(sums[k]);
    }
    if (!exists) continue;
    if (!opened.read) {
      if (rank == 0) write_nothing(a, row);
      if (at.g) write_zero_row(f, at, rank, kLanes);
      continue;
    }
    typename Sums::template Coef<S> coef;
    const double loss = finish_row<Sums>(a, y, row, opened.weight * factor, pivots, stats, rank == 0, coef);
    if (rank == 0) sum += loss;
    if (at.g) tile.write(f, at, opened.target, rank, kLanes, coef);
  }
  if (!a.total) return;
  sum = block_sum(scratch.doubles, sum);
  if (arch::thread() == 0) arch::store(a.sums + arch::block(), sum);
  total(a, scratch.doubles);
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
  const S factor = a.total ? reduction_factor(a, scratch.doubles) : S(1);
  double sum = 0;
  for (int64_t row = arch::block(); row < a.rows; row += arch::blocks()) {
    const Open<S> opened = open(a, row);
    const Row<F> at = view<Sums>(a, f, f, row, opened.target);
    if (!opened.read) {
      if (arch::thread() == 0) write_nothing(a, row);
      if (at.g) write_zero_row(f, at, arch::thread(), arch::threads());
      continue;
    }
    const TargetLogits<S> y = target_logits<Sums>(f, f, at.s, at.t, 1, 1, opened);
    Tile<Sums, F, kVectors, 1> tile;
    tile.load(f, at, true, opened.target, arch::thread(), arch::threads());
    Pivots<S> pivots;
    typename Sums::template Stats<S> stats;
    if (a.backward) {
      load_row_stats<Sums>(a, row, pivots, stats);
      tile.sweep(scales_of<Sums>(a), pivots);
      if (arch::thread() >= 32) stats = {};
    } else {
      pivots = lanes_max<32>(tile.top(), Sums::teacher);
      stats = tile.sweep(scales_of<Sums>(a), pivots);
      KD_UNROLL
      for (int k = 0; k < Sums::count; ++k) stats.v[k] = lanes_sum<32>(stats.v[k]);
    }
    Slope<Sums, S> slope;
    const auto refine = [&](auto& row_slope, auto& sums) {
      rebase_slope(scales_of<Sums>(a), row_slope, pivots);
      tile.refine(scales_of<Sums>(a), row_slope.opening, sums);
    };
    if (!Sums::refined || a.backward) {
      sum += finish_in_block(a, scratch, y, row, opened.weight * factor, pivots, stats, slope);
    } else if constexpr (Sums::refined > 0) {
      sum += refine_in_block(a, scratch, y, row, opened.weight * factor, pivots, stats, slope, refine);
    }
    if (!at.g) continue;
    if constexpr (Sums::refined > 0) {
      S unused[Sums::refined] = {};
      if (a.backward) refine(slope, unused);
    } else {
      rebase_slope(scales_of<Sums>(a), slope, pivots);
    }
    tile.write(f, at, opened.target, arch::thread(), arch::threads(), slope);
  }
  if (!a.total) return;
  if (arch::thread() == 0) arch::store(a.sums + arch::block(), sum);
  total(a, scratch.doubles);
}

// ---- rows in two sweeps -------------------------------------------------------------------------------------------

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
                            const S (&t)[F::kVector], const Slope<Sums, S>& slope) {
  S out[F::kVector];
  KD_UNROLL
  for (int e = 0; e < F::kVector; ++e) out[e] = slope_at<Sums>(scales_of<Sums>(a), slope, s[e], t[e]);
  if (vector == row.hot_vector) row.at_target(out, slope.y);
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
  KD_DEVICE void refine(const Args<S>& a, const Slope<Sums, S>& slope, S (&sums)[kCount]) const {
    const S s1[1] = {s}, t1[1] = {t};
    if (c >= 0) refine_sums<Sums>(scales_of<Sums>(a), slope, s1, t1, sums);
  }
  KD_DEVICE void write(const Args<S>& a, const F& f, const Row<F>& row, int target, const Slope<Sums, S>& slope) const {
    if (c >= 0) f.put(row.g, c, c == target ? slope.y : slope_at<Sums>(scales_of<Sums>(a), slope, s, t));
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
  const S factor = a.total ? reduction_factor(a, scratch.doubles) : S(1);
  const int rank = arch::thread(), size = arch::threads();
  double sum = 0;
  for (int64_t row = arch::block(); row < a.rows; row += arch::blocks()) {
    const Open<S> opened = open(a, row);
    const Row<F> at = view<Sums>(a, fs, ft, row, opened.target);
    if (!opened.read) {
      if (rank == 0) write_nothing(a, row);
      if (at.g) write_zero_row(fs, at, rank, size);
      continue;
    }
    Running<Sums, S> running;
    const TargetLogits<S> y = target_logits<Sums>(fs, ft, at.s, at.t, 1, 1, opened);
    Edge<Sums, F>(fs, ft, at, opened.target, rank).add(a, running);
    for (int i = rank; i < at.count; i += U * size) {
      Stride<Sums, F, U, kSkewed, false> stride;
      stride.fetch(fs, ft, at, i, size, at.count);
      stride.each(fs, ft, at, i, size, at.count,
                  [&](int, const S(&s)[F::kVector], const S(&t)[F::kVector]) { running.add(a, s, t); });
    }
    lanes_merge<Sums, 32>(scales_of<Sums>(a), running.stats, running.pivots);
    Slope<Sums, S> slope;
    const int strides = (at.count + U * size - 1) / (U * size);
    if constexpr (Sums::refined > 0) {
      const auto refine = [&](const Slope<Sums, S>& row_slope, S(&sums)[Sums::refined]) {
        for (int n = strides - 1; n >= 0; --n) {
          const int i = n * U * size + rank;
          Stride<Sums, F, U, kSkewed, false> stride;
          stride.fetch(fs, ft, at, i, size, at.count);
          stride.each(fs, ft, at, i, size, at.count, [&](int, const S(&s)[F::kVector], const S(&t)[F::kVector]) {
            refine_sums<Sums>(scales_of<Sums>(a), row_slope, s, t, sums);
          });
        }
        Edge<Sums, F>(fs, ft, at, opened.target, rank).refine(a, row_slope, sums);
      };
      sum += refine_in_block(a, scratch, y, row, opened.weight * factor, running.pivots, running.stats, slope, refine);
    } else {
      sum += finish_in_block(a, scratch, y, row, opened.weight * factor, running.pivots, running.stats, slope);
    }
    if (!at.g) continue;
    for (int n = strides - 1; n >= 0; --n) {
      const int i = (Sums::refined ? strides - 1 - n : n) * U * size + rank;
      Stride<Sums, F, U, kSkewed, true> stride;
      stride.fetch(fs, ft, at, i, size, at.count);
      stride.each(fs, ft, at, i, size, at.count, [&](int vector, const S(&s)[F::kVector], const S(&t)[F::kVector]) {
        write_vector<Sums>(a, fs, at, vector, s, t, slope);
      });
    }
    Edge<Sums, F>(fs, ft, at, opened.target, rank).write(a, fs, at, opened.target, slope);
  }
  if (!a.total) return;
  if (rank == 0) arch::store(a.sums + arch::block(), sum);
  total(a, scratch.doubles);
}

// ---- rows in shared memory ----------------------------------------------------------------------------------------

// As sweeps, but both sweeps read shared memory. A thread's slots are a ring that it alone copies to, waits for and
// reads: no barrier, and the next row arrives as slots are free, the first ones beside the current row, the others as
// its granules are used for the last time.
template <class Sums, class F>
KD_KERNEL(staged_threads(Sums::held), 1)
staged(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int E = F::kVector;
  const int rank = arch::thread(), size = arch::threads(), slots = a.stage_slots;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const arch::Shared<Granule> s_ring = carver.template take<Granule>(slots * size);
  const arch::Shared<Granule> t_ring = carver.template take<Granule>(Sums::teacher ? slots * size : 0);
  const F f(a.student);

  int64_t row = arch::block();
  Open<S> opened = open(a, row);
  Row<F> at = view<Sums>(a, f, f, row < a.rows ? row : 0, opened.target);
  int begin = 0;                                              // the slot of this row's first granule
  const auto mine = [&](const Open<S>& o, const Row<F>& r) {  // how many granules of a row this thread has
    return o.read && r.count > rank ? (r.count - rank + size - 1) / size : 0;
  };
  const auto slot = [&](int n) { return (n < slots ? n : n - slots) * size + rank; };
  const auto copy = [&](const Row<F>& r, int n, int to) {
    arch::copy_async(s_ring, to, granules(r.s_place.base) + r.first + rank + n * size);
    if (Sums::teacher) arch::copy_async(t_ring, to, granules(r.t_place.base) + r.first + rank + n * size);
  };
  const auto values = [&](int n, S(&s)[E], S(&t)[E]) {
    typename F::Vector raw_s, raw_t;
    raw_s.skew = raw_t.skew = 0;
    raw_s.g[0] = s_ring.ld(slot(begin + n));
    if (Sums::teacher) raw_t.g[0] = t_ring.ld(slot(begin + n));
    values_of<Sums>(f, f, at, at.first + rank + n * size, raw_s, raw_t, s, t);
  };

  for (int n = 0; n < mine(opened, at); ++n) copy(at, n, slot(n));
  const S factor = a.total ? reduction_factor(a, scratch.doubles) : S(1);
  double sum = 0;
  for (; row < a.rows; row += arch::blocks()) {
    arch::copy_commit();
    const int64_t next_row = row + arch::blocks();
    const Open<S> next_opened = open(a, next_row);
    const Row<F> next = view<Sums>(a, f, f, next_row < a.rows ? next_row : row, next_opened.target);
    const int here = mine(opened, at), coming = mine(next_opened, next);
    int begun = 0;  // copies of the next row
    for (; begun < coming && here + begun < slots; ++begun) copy(next, begun, slot(begin + here + begun));
    arch::copy_commit();
    arch::copy_wait<1>();  // this row is here

    if (opened.read) {
      Running<Sums, S> running;
      const TargetLogits<S> y = target_logits<Sums>(f, f, at.s, at.t, 1, 1, opened);
      Edge<Sums, F>(f, f, at, opened.target, rank).add(a, running);
      for (int n = 0; n < here; ++n) {
        S s[E], t[E];
        values(n, s, t);
        running.add(a, s, t);
      }
      lanes_merge<Sums, 32>(scales_of<Sums>(a), running.stats, running.pivots);
      Slope<Sums, S> slope;
      if constexpr (Sums::refined > 0) {
        const auto refine = [&](const Slope<Sums, S>& row_slope, S(&sums)[Sums::refined]) {
          for (int n = 0; n < here; ++n) {
            S s[E], t[E];
            values(n, s, t);
            refine_sums<Sums>(scales_of<Sums>(a), row_slope, s, t, sums);
          }
          Edge<Sums, F>(f, f, at, opened.target, rank).refine(a, row_slope, sums);
        };
        sum +=
            refine_in_block(a, scratch, y, row, opened.weight * factor, running.pivots, running.stats, slope, refine);
      } else {
        sum += finish_in_block(a, scratch, y, row, opened.weight * factor, running.pivots, running.stats, slope);
      }
      if (at.g) {
        for (int n = 0; n < here; ++n) {
          S s[E], t[E];
          values(n, s, t);
          write_vector<Sums>(a, f, at, at.first + rank + n * size, s, t, slope);
          if (begun < coming) {
            copy(next, begun, slot(begin + n));
            ++begun;
          }
        }
        Edge<Sums, F>(f, f, at, opened.target, rank).write(a, f, at, opened.target, slope);
      }
    } else {
      if (rank == 0) write_nothing(a, row);
      if (at.g) write_zero_row(f, at, rank, size);
    }
    // What is left of the next row goes where this row was: behind it, around the ring.
    begin = begin + here < slots ? begin + here : begin + here - slots;
    for (; begun < coming; ++begun) copy(next, begun, slot(begin + begun));
    opened = next_opened;
    at = next;
  }
  if (!a.total) return;
  if (rank == 0) arch::store(a.sums + arch::block(), sum);
  total(a, scratch.doubles);
}

// ---- rows in parts ------------------------------------------------------------------------------------------------

template <class F>
constexpr int kPartUnroll = F::wide ? 2 : 4;

// The statistics of one part of a row. The edges belong to the first part.
template <class Sums, class F>
KD_KERNEL((F::wide ? kWideThreads : kPartThreads), (F::wide ? 1 : 2))
part_stats(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int U = kPartUnroll<F>;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
  const int rank = arch::thread(), size = arch::threads();
  const int64_t in_wave = arch::block() / a.parts, row = a.first_row + in_wave;
  const int part = static_cast<int>(arch::block() - in_wave * a.parts);
  const Open<S> opened = open(a, row);
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
  lanes_merge<Sums, 32>(scales_of<Sums>(a), running.stats, running.pivots);
  warps_merge<Sums>(a, scratch, running.stats, running.pivots);
  if (rank == 0) store_stats<Sums>(a.part_stats + arch::block() * kStatsWidth, running.pivots, running.stats);
}

// The row's statistics from those of its parts, by the first warp.
template <class Sums, class S, class Stats>
KD_DEVICE void parts_merge(const Args<S>& a, int64_t in_wave, Stats& stats, Pivots<S>& pivots) {
  for (int n = arch::thread(); n < a.parts; n += 32) {
    Pivots<S> part_pivots;
    typename Sums::template Stats<S> part_sums;
    load_stats<Sums>(a.part_stats + (in_wave * a.parts + n) * kStatsWidth, part_pivots, part_sums);
    merge<Sums>(scales_of<Sums>(a), stats, pivots, part_sums, part_pivots);
  }
  lanes_merge<Sums, 32>(scales_of<Sums>(a), stats, pivots);
}

// The second round of one part of a row, between the other two launches.
template <class Sums, class F>
KD_KERNEL((F::wide ? kWideThreads : kPartThreads), (F::wide ? 1 : 2))
part_refined(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int U = kPartUnroll<F> / 2;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
  const int rank = arch::thread(), size = arch::threads();
  // From the end, as part_gradient.
  const int64_t from_end = arch::blocks() - 1 - arch::block(), in_wave = from_end / a.parts,
                row = a.first_row + in_wave;
  const int part = static_cast<int>(from_end - in_wave * a.parts);
  const Open<S> opened = open(a, row);
  if (!opened.read) return;
  const Row<F> at = view<Sums>(a, fs, ft, row, opened.target);
  const TargetLogits<S> y = target_logits<Sums>(fs, ft, at.s, at.t, 1, 1, opened);
  const int begin = part * a.part_vectors, end = begin + a.part_vectors < at.count ? begin + a.part_vectors : at.count;
  if (rank < 32) {
    Pivots<S> pivots = {lowest<S>(), lowest<S>()};
    typename Sums::template Stats<S> stats = {};
    parts_merge<Sums>(a, in_wave, stats, pivots);
    put_opening<Sums>(a, scratch, y, pivots, stats);
    if (rank == 0) {
      scratch.results.st(Sums::coefs + 1, usable(pivots.s));
      scratch.results.st(Sums::coefs + 2, usable(pivots.t));
    }
  }
  arch::sync_block();
  Slope<Sums, S> slope;
  get_opening(scratch, slope);
  slope.pivots = {scratch.results.ld(Sums::coefs + 1), scratch.results.ld(Sums::coefs + 2)};
  S sums[Sums::refined] = {};
  for (int i = begin + rank; i < end; i += U * size) {
    Stride<Sums, F, U, true, false> stride;
    stride.fetch(fs, ft, at, i, size, end);
    stride.each(fs, ft, at, i, size, end, [&](int, const S(&s)[F::kVector], const S(&t)[F::kVector]) {
      refine_sums<Sums>(scales_of<Sums>(a), slope, s, t, sums);
    });
  }
  if (part == 0) Edge<Sums, F>(fs, ft, at, opened.target, rank).refine(a, slope, sums);
  warps_sum<Sums>(scratch, sums);
  KD_UNROLL
  for (int k = 0; k < Sums::refined && rank == 0; ++k)
    arch::store(a.part_refined + from_end * kMostRefined + k, sums[k]);
}

// Finishes a row from the statistics of its parts, or from those of a forward pass, and writes the gradient of a part.
// The block of the first part writes the loss. The last parts come first: they are what the cache still has.
template <class Sums, class F>
KD_KERNEL((F::wide ? kWideThreads : kPartThreads), (F::wide ? 1 : 2))
part_gradient(KD_ARGUMENT(Args<typename F::S>) a) {
  using S = typename F::S;
  constexpr int U = kPartUnroll<F>;
  arch::Carver carver = arch::shared();
  const Scratch<Sums, S> scratch(carver);
  const F fs(a.student), ft(Sums::teacher ? a.teacher : a.student);
  const S factor = a.total ? reduction_factor(a, scratch.doubles) : S(1);
  const int rank = arch::thread(), size = arch::threads(), parts = a.grad.data ? a.parts : 1;
  const int64_t from_end = arch::blocks() - 1 - arch::block(), in_wave = from_end / parts, row = a.first_row + in_wave;
  const int part = static_cast<int>(from_end - in_wave * parts);
  const Open<S> opened = open(a, row);
  const Row<F> at = view<Sums>(a, fs, ft, row, opened.target);
  const int begin = part * a.part_vectors, end = begin + a.part_vectors < at.count ? begin + a.part_vectors : at.count;
  double sum = 0;
  if (opened.read) {
    const TargetLogits<S> y = target_logits<Sums>(fs, ft, at.s, at.t, 1, 1, opened);
    // The last stride, which comes first, is on its way while the row is finished.
    const int strides = end > begin ? (end - begin + U * size - 1) / (U * size) : 0;
    int i = begin + (strides - 1) * U * size + rank;
    Stride<Sums, F, U, true, true> stride;
    if (at.g && strides) stride.fetch(fs, ft, at, i, size, end);
    Pivots<S> pivots = {lowest<S>(), lowest<S>()};
    typename Sums::template Stats<S> stats = {};
    if (rank < 32 && a.backward) {
      load_row_stats<Sums>(a, row, pivots, stats);
    } else if (rank < 32) {
      parts_merge<Sums>(a, in_wave, stats, pivots);
      KD_UNROLL
      for (int k = 0; k < Sums::refined; ++k) {
        S sum_of_lane = 0;
        KD_ROLL
        for (int n = rank; n < a.parts; n += 32)
          sum_of_lane += arch::load(a.part_refined + (in_wave * a.parts + n) * kMostRefined + k);
        stats.v[Sums::count + k] = lanes_sum<32>(sum_of_lane);
      }
    }
    Slope<Sums, S> slope;
    sum = finish_in_block(a, scratch, y, row, opened.weight * factor, pivots, stats, slope, part == 0);
    for (int n = strides - 1; at.g && n >= 0; --n) {
      stride.each(fs, ft, at, i, size, end, [&](int vector, const S(&s)[F::kVector], const S(&t)[F::kVector]) {
        write_vector<Sums>(a, fs, at, vector, s, t, slope);
      });
      i -= U * size;
      if (n > 0) stride.fetch(fs, ft, at, i, size, end);
    }
    if (at.g && part == 0) Edge<Sums, F>(fs, ft, at, opened.target, rank).write(a, fs, at, opened.target, slope);
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

// ---- classes that are apart ---------------------------------------------------------------------------------------

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
  const S factor = a.total ? reduction_factor(a, scratch.doubles) : S(1);
  const int64_t s_step = a.student.class_stride, t_step = a.teacher.class_stride, g_step = a.grad.class_stride;
  double sum = 0;
  for (int64_t row = arch::block() * arch::threads() + arch::thread(); row < a.rows;
       row += arch::blocks() * arch::threads()) {
    const Open<S> opened = open(a, row);
    int64_t outer, inner;
    split_row(a, row, outer, inner);
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
    const TargetLogits<S> y = target_logits<Sums>(fs, ft, s_row, t_row, s_step, t_step, opened);
    Pivots<S> pivots = {lowest<S>(), lowest<S>()};
    typename Sums::template Stats<S> stats = {};
    if (a.backward) {
      load_row_stats<Sums>(a, row, pivots, stats);
    } else {
      Running<Sums, S> running;
      for (int64_t from = 0; from < a.classes; from += kChunk) {
        running.stats = {};
        for (int64_t c = from; c < from + kChunk && c < a.classes; c += U) {
          S s[U], t[U];
          fetch(c, s, t);
          running.add(a, s, t);
        }
        merge<Sums>(scales_of<Sums>(a), stats, pivots, running.stats, running.pivots);
      }
    }
    Slope<Sums, S> slope;
    slope.pivots = {usable(pivots.s), usable(pivots.t)};
    if constexpr (Sums::refined > 0) {
      Sums::template open<S>(scales_of<Sums>(a), stats, pivots, y.s, y.t, slope.opening);
      for (int64_t from = 0; from < a.classes && !a.backward; from += kChunk) {
        S sums[Sums::refined] = {};
        for (int64_t c = from; c < from + kChunk && c < a.classes; c += U) {
          S s[U], t[U];
          fetch(c, s, t);
          refine_sums<Sums>(scales_of<Sums>(a), slope, s, t, sums);
        }
        KD_UNROLL
        for (int k = 0; k < Sums::refined; ++k) stats.v[Sums::count + k] += sums[k];
      }
    }
    typename Sums::template Coef<S> coef;
    sum += finish_row<Sums>(a, y, row, opened.weight * factor, pivots, stats, true, coef);
    if (!g_row) continue;
    KD_UNROLL
    for (int k = 0; k < Sums::coefs; ++k) slope.c[k] = coef.c[k];
    for (int64_t c = 0; c < a.classes; c += U) {
      S s[U], t[U];
      fetch(c, s, t);
      KD_UNROLL
      for (int k = 0; k < U; ++k)
        if (c + k < a.classes)
          fs.put(g_row, (c + k) * g_step,
                 c + k == opened.target ? coef.y : slope_at<Sums>(scales_of<Sums>(a), slope, s[k], t[k]));
    }
  }
  if (!a.total) return;
  sum = block_sum(scratch.doubles, sum);
  if (arch::thread() == 0) arch::store(a.sums + arch::block(), sum);
  total(a, scratch.doubles);
}

// ---- beside the losses --------------------------------------------------------------------------------------------

// How many rows are not ignored, one number per block.
struct CountArgs {
  const int64_t* target;
  int64_t rows, ignore_index;
  double* counts;
};
inline size_t count_bytes() {
  arch::Carver carver = arch::Carver::counting();
  carver.take<double>(33);
  return carver.bytes();
}

template <int kThreads>
KD_KERNEL(kThreads, 1)
count(KD_ARGUMENT(CountArgs) a) {
  arch::Carver carver = arch::shared();
  const arch::Shared<double> doubles = carver.take<double>(33);
  const int64_t each = (a.rows + arch::blocks() - 1) / arch::blocks(), begin = arch::block() * each;
  const int64_t here = begin + each < a.rows ? each : a.rows > begin ? a.rows - begin : 0;
  double counted = thread_sum<int>(here, [&](int64_t i) { return arch::load(a.target + begin + i) != a.ignore_index; });
  counted = block_sum(doubles, counted);
  if (arch::thread() == 0) arch::store(a.counts + arch::block(), counted);
}

// A gradient of `size` adjacent elements times a number on the device. Writes nothing where that is 1, the ordinary
// case of loss.backward(). The compute type is that of the losses.
template <class S>
struct ScaleArgs {
  void* data;
  int64_t size;
  const S* factor;
};

template <class T, class S>
KD_KERNEL(kScaleThreads, 1)
scale(KD_ARGUMENT(ScaleArgs<S>) a) {
  constexpr int E = 16 / sizeof(T);
  const S factor = arch::load(a.factor);
  if (factor == 1) return;
  T* const data = static_cast<T*>(a.data);
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
  const int64_t first = shift ? 1 : 0, end = (shift + a.size) / E, step = arch::blocks() * arch::threads();
  const int64_t rank = arch::block() * arch::threads() + arch::thread();
  Granule* const vectors = reinterpret_cast<Granule*>(data - shift);
  for (int64_t i = first + rank; i < end; i += step) {
    // Not by the path of constant data: it is written here.
    Granule g = arch::load_written(vectors + i);
    if constexpr (sizeof(T) == 8) {
      double x[2];
      memcpy(x, &g, 16);
      x[0] *= factor, x[1] *= factor;
      memcpy(&g, x, 16);
    } else {
      float x[8];
      unpack<T>(g, x);
      KD_UNROLL
      for (int e = 0; e < E; ++e) x[e] = static_cast<float>(x[e] * factor);
      g = pack<T>(x);
    }
    arch::store(vectors + i, g);
  }
  // Before the first vector and behind the last one.
  int64_t head = first * E - shift, tail = end * E - shift;
  head = head < a.size ? head : a.size;
  tail = tail > head ? tail : head;
  for (int64_t i = rank; i < head + a.size - tail; i += step) {
    T* const at = data + (i < head ? i : tail + i - head);
    T value;
    from_float(value, static_cast<S>(to_float(arch::load_written(at))) * factor);
    arch::store(at, value);
  }
}

}  // namespace cuda

KD_NAMESPACE_END
