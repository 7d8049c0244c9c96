// The generic row loops: the same for every loss. A loss comes in as its Sums (losses that sum alike share their
// loops), the compute type as S.
//
// lanes_are_classes: a row is walked in tiles. Per tile: load (convert, find the maxima), then the exponentials
// relative to the tile's own maxima, kept in a scratch row, and the statistics, merged into the row's. When the row is
// finished the gradient is a linear combination of the kept exponentials, with coefficients rebased to each tile's
// pivots. Student and teacher are read from memory once, the gradient is written once.
//
// batches: several short rows at a time, as many as there are lanes or as keep their exponentials in the first-level
// cache. Still swept row by row, but finished together, one per lane.
//
// lanes_are_rows: a row per lane, and the sweep too has a row in every lane; the logits are transposed on the way, or
// already lie that way (class dimension in the middle). Rows of many classes are walked in tiles here, too, and read
// twice: as many rows as there are lanes would keep too many exponentials.
//
// Sums with a second round (stats.h) take it between these two: over what was kept, or, where a row per lane is walked
// in tiles, in a read of its own.
//
// The target and the padding are loaded as -inf: their exponentials are 0 and nothing below needs to ask for them. The
// target's gradient is written afterwards.
#pragma once

#include "cpu.h"
#include "logits.h"
#include "simd.h"
// The losses come after the lanes.
#include "../losses/list.h"

KD_NAMESPACE_BEGIN

// ---- one tile, lanes are classes ----------------------------------------------------------------------------------

struct Prefetch {  // what the sweep asks the memory for meanwhile: the logits that come next, and where a gradient goes
  const char *s, *t;
  char* g;
  int64_t s_step, t_step, g_step;  // bytes per kLine vectors
};
constexpr int kLine = 64 / kVectorBytes;  // vectors of the widest numbers in a line of a cache

template <class Sums, class S, bool kKeep>
typename Sums::template Stats<Vec<S>> sweep(const typename Sums::template Scales<S>& given, const S* s, const S* t,
                                            int64_t n, const Pivots<Vec<S>>& pivots, S* kept, int64_t kept_stride,
                                            Prefetch ahead) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  const auto scales = given;  // a copy, of which the compiler knows that nothing stored below changes it
  const V ms = usable(pivots.s), mt = usable(pivots.t);
  typename Sums::template Stats<V> stats;
  for (V& sum : stats.v) sum = lit<V>(0);  // by vectors: a memset of so few starts slower than it runs
  const auto vector = [&](int64_t i) {
    const auto x = Sums::template exps<V>(scales, load<S>(s + i) - ms, load<S>(t + i) - mt);
    Sums::add(stats, x);
    if constexpr (kKeep)
      for (int k = 0; k < Sums::kept; ++k) store<S>(kept + k * kept_stride + i, x.e[k]);
  };
  int64_t i = 0;
  for (; i + kLine * L <= n; i += kLine * L) {
    for (int64_t j = i; j < i + kLine * L; j += L) vector(j);
    __builtin_prefetch(ahead.s);
    ahead.s += ahead.s_step;
    if constexpr (Sums::teacher) {
      __builtin_prefetch(ahead.t);
      ahead.t += ahead.t_step;
    }
    if constexpr (kKeep) {  // what is kept is for a gradient
      __builtin_prefetch(ahead.g, 1);
      ahead.g += ahead.g_step;
    }
  }
  for (; i < n; i += L) vector(i);
  return stats;
}

// The second round over what was kept, in place; its sums. The last vector may reach beyond n: there the kept are 0, as
// of a class at -inf.
template <class Sums, class S>
Refined<Sums, Vec<S>> refine(const typename Sums::template Scales<S>& given, int64_t n, S* kept, int64_t kept_stride,
                             const Opening<Sums, Vec<S>>& opening) {
  using V = Vec<S>;
  const auto scales = given;
  const auto c = opening;
  Refined<Sums, V> sums;
  for (V& sum : sums.v) sum = lit<V>(0);
  for (int64_t i = 0; i < n; i += kLanes<S>) {
    V e[Sums::kept];
    for (int k = 0; k < Sums::kept; ++k) e[k] = load<S>(kept + k * kept_stride + i);
    Sums::refine(scales, e, c, sums.v);
    for (int k = 0; k < Sums::kept; ++k) store<S>(kept + k * kept_stride + i, e[k]);
  }
  return sums;
}

// Loops of their own, called once a tile or row: inlined among the rest they run out of registers.
template <class Sums, class S, class T, int kCoefs>
[[gnu::noinline]] void gradient_tile(T* out, int n, const S* kept, int64_t kept_stride, const double (&coef)[kCoefs]) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  V c[kCoefs], e[Sums::kept];
  for (int k = 0; k < kCoefs; ++k) c[k] = Ops<V>::splat(static_cast<S>(coef[k]));
  int i = 0;
  for (; i + L <= n; i += L) {
    for (int k = 0; k < Sums::kept; ++k) e[k] = load<S>(kept + k * kept_stride + i);
    store<S>(out + i, Sums::gradient(e, c));
  }
  if (i < n) {
    for (int k = 0; k < Sums::kept; ++k) e[k] = load<S>(kept + k * kept_stride + i);
    const V g = Sums::gradient(e, c);
    for (int j = i; j < n; ++j) from_float(out[j], g[j - i]);
  }
}

template <class Sums, class S, class T, int kCoefs>
[[gnu::noinline]] void gradient_short(T* out, Padding<S> padding, const S* kept, int64_t kept_stride,
                                      const S (&coef)[kCoefs]) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  V c[kCoefs], e[Sums::kept];
  for (int k = 0; k < kCoefs; ++k) c[k] = Ops<V>::splat(coef[k]);
  const auto vector = [&](int64_t v) {
    for (int k = 0; k < Sums::kept; ++k) e[k] = load<S>(kept + k * kept_stride + v * L);
    store<S>(out + padding.first_class(v), Sums::gradient(e, c));
  };
  vector(padding.vectors - 1);
  for (int64_t v = 0; v < padding.vectors - 1; ++v) vector(v);
}

// ---- rows ---------------------------------------------------------------------------------------------------------

template <class Sums, class S>
struct Rows {
  using Scales = typename Sums::template Scales<S>;
  using V = Vec<S>;
  using CoefD = typename Sums::template Coef<double>;
  static constexpr int L = kLanes<S>;
  static_assert(kSums<Sums> + 2 <= kStatsWidth, "statistics and pivots fit one row of stats");

  static void put_number(const Problem& p, void* to, int64_t i, double x) {
    if (p.in_double())
      static_cast<double*>(to)[i] = x;
    else
      static_cast<float*>(to)[i] = static_cast<float>(x);
  }

  static double weight_of(const Problem& p, int64_t row) { return p.row_weight ? p.number(p.row_weight, row) : 1.; }

  // The gradient that finish multiplies its coefficients with.
  static void upstream(const Problem& p, int outputs, int64_t row, double* g) {
    const double weight = weight_of(p, row);
    for (int k = 0; k < outputs; ++k)
      g[k] = p.pass == Pass::backward ? weight * p.number(p.grad_rows, k * p.rows_total() + row) : weight * p.scale;
  }

  // loss: what finish gave; parts are behind the one output of their losses.
  static void write_rows(const Problem& p, int outputs, int64_t row, const double* loss, const double* g) {
    if (p.scaled_rows) p.scaled_rows[row] = loss ? loss[0] * g[0] : 0.;
    for (int k = 0; p.rows && k < outputs; ++k)
      put_number(p, p.rows, k * p.rows_total() + row, loss ? loss[k] * g[k] : 0.);
    if constexpr (Sums::has_parts)
      for (int k = 0; p.parts && k < 2; ++k) put_part(p, k, row, loss ? loss + 1 : nullptr);
  }
  // parts: of a row that is read, or null. Without a target there is no cross-entropy.
  static void put_part(const Problem& p, int k, int64_t row, const double* parts) {
    const bool there = parts && (k == 0 || p.target);
    put_number(p, p.parts, k * p.rows_total() + row, there ? parts[k] * weight_of(p, row) : 0.);
  }

  static bool run(const Problem& p, Plan plan, int64_t begin, int64_t end) {
    const bool ok = plan.regime == Regime::lanes_are_rows ? lanes_are_rows(p, begin, end)
                    : plan.regime == Regime::batches      ? batches(p, begin, end)
                                                          : lanes_are_classes(p, begin, end);
    done_with_scratch();
    return ok;
  }

  static bool lanes_are_classes(const Problem& p, int64_t begin, int64_t end) {
    const int64_t classes = p.classes, tiles = (classes + kTile - 1) / kTile, padded = (classes + L - 1) / L * L;
    const bool back = p.pass == Pass::backward;
    const bool keep = Sums::refined ? !back : p.grad.data && p.pass == Pass::forward_grad;
    const int64_t kept_stride = keep ? padded : back ? kTile : 0;
    S* memory = static_cast<S*>(scratch(sizeof(S) * (2 * kTile + Sums::kept * kept_stride + 2 * tiles)));
    if (!memory) return false;
    S *s_buffer = memory, *t_buffer = s_buffer + kTile, *kept = t_buffer + kTile;
    auto* tile_pivots = reinterpret_cast<Pivots<S>*>(kept + Sums::kept * kept_stride);

    const Chosen<double> chosen(p);
    const Scales scales = Chosen<S>(p).template scales<Sums>();
    const int64_t s_bytes = bytes_of(p.student.dtype), t_bytes = Sums::teacher ? bytes_of(p.teacher.dtype) : 0,
                  g_bytes = bytes_of(p.grad.dtype);

    for (int64_t row = begin; row < end; ++row) {
      const int64_t outer = row / p.inner, inner = row % p.inner;
      char* grad = p.grad.data ? row_start(p.grad, outer, inner) : nullptr;
      if (p.skips(row)) {
        write_rows(p, chosen.outputs, row, nullptr, nullptr);
        if (p.stats) memset(stats_of(p, row), 0, sizeof(double) * kStatsWidth);
        if (grad) memset(grad, 0, classes * bytes_of(p.grad.dtype));
        continue;
      }
      char* s = row_start(p.student, outer, inner);
      char* t = Sums::teacher ? row_start(p.teacher, outer, inner) : s;
      const int64_t next_outer = row + 1 < end ? (row + 1) / p.inner : outer;
      const int64_t next_inner = row + 1 < end ? (row + 1) % p.inner : inner;
      const char* next_s = row_start(p.student, next_outer, next_inner);
      const char* next_t = Sums::teacher ? row_start(p.teacher, next_outer, next_inner) : next_s;
      const int64_t target = p.target ? p.target[row] : -1;
      Summary<Sums, double> all;
      if (target >= 0) all.s_y = get<double>(p.student, s, target);
      if (target >= 0 && Sums::teacher) all.t_y = get<double>(p.teacher, t, target);

      double g[kMostValues] = {}, loss[kMostValues] = {};
      upstream(p, chosen.outputs, row, g);
      CoefD coef = {};
      Opening<Sums, double> opening = {};
      if (back) {
        load_stats(stats_of(p, row), all);
        chosen.finish(all, g, loss, coef);
        if constexpr (Sums::refined > 0) Sums::open(chosen.template scales<Sums>(), all, opening);
      }
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = i * kTile;
        const int n = static_cast<int>(classes - first < kTile ? classes - first : kTile);
        const Tile<S> s_tile = load_tile<S>(p.student.dtype, s, first, n, target, s_buffer);
        const Tile<S> t_tile =
            Sums::teacher ? load_tile<S>(p.teacher.dtype, t, first, n, target, t_buffer) : Tile<S>{s_tile.data, 0};
        const bool last = i + 1 == tiles;
        const Prefetch ahead = {last ? next_s : s + (first + kTile) * s_bytes,
                                last ? next_t : t + (first + kTile) * t_bytes,
                                grad ? grad + first * g_bytes : s,
                                kLine * L * s_bytes,
                                kLine * L * t_bytes,
                                grad ? kLine * L * g_bytes : 0};
        if (back) {
          const Pivots<S> at = {static_cast<S>(all.pivots.s), static_cast<S>(all.pivots.t)};
          sweep<Sums, S, true>(scales, s_tile.data, t_tile.data, n, splat(at), kept, kTile, ahead);
          if constexpr (Sums::refined > 0) refine<Sums, S>(scales, n, kept, kTile, splat(opening));
          with_type(p.grad.dtype, grad,
                    [&](auto* out) { gradient_tile<Sums, S>(out + first, n, kept, kTile, coef.c); });
          continue;
        }
        const Pivots<S> at = {s_tile.max, t_tile.max};
        const auto lanes =
            keep ? sweep<Sums, S, true>(scales, s_tile.data, t_tile.data, n, splat(at), kept + first, padded, ahead)
                 : sweep<Sums, S, false>(scales, s_tile.data, t_tile.data, n, splat(at), nullptr, 0, ahead);
        Summary<Sums, double> part;
        part.pivots = {at.s, at.t};
        for (int k = 0; k < Sums::count; ++k) part.stats.v[k] = sum_lanes<S>(lanes.v[k]);
        tile_pivots[i] = at;
        merge(chosen.template scales<Sums>(), all, part);
      }
      if (!back) {
        if constexpr (Sums::refined > 0) {
          Sums::open(chosen.template scales<Sums>(), all, opening);
          for (int k = 0; k < Sums::refined; ++k) all.stats.v[Sums::count + k] = 0;
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t first = i * kTile, n = classes - first < kTile ? classes - first : kTile;
            Opening<Sums, double> c = opening;
            const Pivots<double> at = {tile_pivots[i].s, tile_pivots[i].t};
            Sums::rebase(chosen.template scales<Sums>(), c, all.pivots, at);
            const auto lanes = refine<Sums, S>(scales, n, kept + first, padded, splat(c));
            for (int k = 0; k < Sums::refined; ++k) all.stats.v[Sums::count + k] += sum_lanes<S>(lanes.v[k]);
          }
        }
        chosen.finish(all, g, loss, coef);
        for (double& x : loss) x += nan_of(all);
        write_rows(p, chosen.outputs, row, loss, g);
        if (p.stats) store_stats(stats_of(p, row), all);
      }
      if (keep && grad) {
        with_type(p.grad.dtype, grad, [&](auto* out) {
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t first = i * kTile;
            const int n = static_cast<int>(classes - first < kTile ? classes - first : kTile);
            CoefD c = coef;
            if constexpr (Sums::refined == 0)
              Sums::rebase(chosen.template scales<Sums>(), c, all.pivots,
                           Pivots<double>{tile_pivots[i].s, tile_pivots[i].t});
            gradient_tile<Sums, S>(out + first, n, kept + first, padded, c.c);
          }
        });
      }
      if (grad && target >= 0) put<double>(p.grad, grad, target, coef.y);
    }
    return true;
  }

  // The same in every lane.
  static Pivots<V> splat(const Pivots<S>& x) { return {Ops<V>::splat(x.s), Ops<V>::splat(x.t)}; }
  static Opening<Sums, V> splat(const Opening<Sums, double>& x) {
    Opening<Sums, V> out;
    for (int k = 0; k < Sums::openings; ++k) out.c[k] = Ops<V>::splat(static_cast<S>(x.c[k]));
    return out;
  }

  static double* stats_of(const Problem& p, int64_t row) { return static_cast<double*>(p.stats) + row * kStatsWidth; }
  static void store_stats(double* to, const Summary<Sums, double>& row) {
    to[0] = row.pivots.s;
    to[1] = row.pivots.t;
    for (int k = 2; k < kStatsWidth; ++k) to[k] = 0;
    for (int k = 0; k < kSums<Sums>; ++k) to[stored_at<Sums>(k)] = row.stats.v[k];
  }
  static void load_stats(const double* from, Summary<Sums, double>& row) {
    row.pivots = {from[0], from[1]};
    for (int k = 0; k < kSums<Sums>; ++k) row.stats.v[k] = from[stored_at<Sums>(k)];
  }

  // ---- several rows at a time ---------------------------------------------------------------------------------------

  struct Batch {  // up to L rows, one per lane, and all that is one number per row
    Block<S> block;
    alignas(kVectorBytes) double s_y[L], t_y[L], sums[kSums<Sums>][L], g[kMostValues][L], loss[kMostValues][L];
    alignas(kVectorBytes) S maxima[2][L], coef[Sums::coefs][L], coef_y[L], opening[Sums::openings][L];
  };

  // By vectors: a memset of so few starts slower than it runs.
  static void fill(double (&lanes)[L], double x) {
    for (int part = 0; part < kParts<S>; ++part) store_bits(lanes + part * kLanes<double>, lit<VecD>(x));
  }

  static void open(const Problem& p, const Chosen<double>& chosen, int64_t first, int64_t end, Batch& b) {
    const int lanes = b.block.lanes = static_cast<int>(end - first < L ? end - first : L);
    const bool back = p.pass == Pass::backward;
    for (auto& sums : b.sums) fill(sums, 0);
    for (int k = 0; k < kMostValues; ++k) fill(b.g[k], k < chosen.outputs ? p.scale : 0);
    for (auto& maxima : b.maxima) store<S>(maxima, -infinity<V>());
    fill(b.s_y, -infinity<double>());
    fill(b.t_y, -infinity<double>());
    int64_t outer = first / p.inner, inner = first % p.inner;
    for (int lane = 0; lane < L; ++lane) {
      b.block.active[lane] = lane < lanes;
      b.block.outer[lane] = outer;
      b.block.inner[lane] = inner;
      b.block.target[lane] = -1;
      if (++inner == p.inner) inner = 0, ++outer;
    }
    b.block.full = lanes == L;
    if (p.target || p.row_weight)
      for (int lane = 0; lane < lanes; ++lane) {
        const bool active = b.block.active[lane] = !p.skips(first + lane);
        b.block.full = b.block.full && active;
        if (p.target && active) b.block.target[lane] = p.target[first + lane];
      }
    if (back || p.row_weight)
      for (int lane = 0; lane < lanes; ++lane) {
        double g[kMostValues] = {};
        upstream(p, chosen.outputs, first + lane, g);
        for (int k = 0; k < chosen.outputs; ++k) b.g[k][lane] = g[k];
      }
    if (!back) return;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!b.block.active[lane]) continue;
      Summary<Sums, double> known;
      load_stats(stats_of(p, first + lane), known);
      b.maxima[0][lane] = static_cast<S>(known.pivots.s);
      b.maxima[1][lane] = static_cast<S>(known.pivots.t);
      for (int k = 0; k < kSums<Sums>; ++k) b.sums[k][lane] = known.stats.v[k];
    }
  }

  // 0 in the lanes whose rows are skipped.
  template <class X>
  static void clear_skipped(const Batch& b, X (&lanes)[L]) {
    if (b.block.full) return;
    for (int lane = 0; lane < L; ++lane)
      if (!b.block.active[lane]) lanes[lane] = 0;
  }

  // As many rows of a batch as doubles have lanes, by the first `sums` of their sums.
  static Summary<Sums, VecD> rows_of(const Batch& b, int part, int sums) {
    const int at = part * kLanes<double>;
    Summary<Sums, VecD> rows;
    rows.pivots = {widen(b.maxima[0], part), widen(b.maxima[1], part)};
    rows.s_y = load_bits<VecD>(b.s_y + at);
    rows.t_y = load_bits<VecD>(b.t_y + at);
    for (int k = 0; k < sums; ++k) rows.stats.v[k] = load_bits<VecD>(b.sums[k] + at);
    return rows;
  }

  // Between the rounds. What is kept of rows that are skipped becomes 0.
  static void open_second(const Chosen<double>& chosen, Batch& b) {
    for (int part = 0; part < kParts<S> && part * kLanes<double> < b.block.lanes; ++part) {
      Opening<Sums, VecD> opening;
      Sums::open(chosen.template scales<Sums>(), rows_of(b, part, Sums::count), opening);
      for (int k = 0; k < Sums::openings; ++k) narrow(b.opening[k], part, opening.c[k]);
    }
    for (auto& opening : b.opening) clear_skipped(b, opening);
  }

  // From maxima and sums to losses (written) and coefficients. Rows that are skipped get coefficients of 0.
  static void close(const Problem& p, const Chosen<double>& chosen, int64_t first, Batch& b) {
    for (int part = 0; part < kParts<S> && part * kLanes<double> < b.block.lanes; ++part) {
      const int at = part * kLanes<double>;
      const Summary<Sums, VecD> rows = rows_of(b, part, kSums<Sums>);
      typename Sums::template Coef<VecD> coef = {};
      VecD g[kMostValues], loss[kMostValues] = {};
      for (int k = 0; k < kMostValues; ++k) g[k] = load_bits<VecD>(b.g[k] + at);
      chosen.finish(rows, g, loss, coef);
      const VecD nan = nan_of(rows);
      // Parts are behind the outputs, and not multiplied by the gradient.
      for (int k = 0; k < kMostValues; ++k)
        store_bits(b.loss[k] + at, k < chosen.outputs ? (loss[k] + nan) * g[k] : loss[k] + nan);
      for (int k = 0; k < Sums::coefs; ++k) narrow(b.coef[k], part, coef.c[k]);
      narrow(b.coef_y, part, coef.y);
    }
    for (auto& coef : b.coef) clear_skipped(b, coef);
    if (p.pass == Pass::backward) return;
    for (auto& loss : b.loss) clear_skipped(b, loss);
    const int lanes = b.block.lanes;
    if (p.scaled_rows) memcpy(p.scaled_rows + first, b.loss[0], sizeof(double) * lanes);
    for (int k = 0; p.rows && k < chosen.outputs; ++k)
      for (int lane = 0; lane < lanes; ++lane)
        put_number(p, p.rows, k * p.rows_total() + first + lane, b.loss[k][lane]);
    if constexpr (Sums::has_parts)
      for (int k = 0; p.parts && k < 2; ++k)
        for (int lane = 0; lane < lanes; ++lane) {
          const double parts[] = {b.loss[1][lane], b.loss[2][lane]};
          put_part(p, k, first + lane, b.block.active[lane] ? parts : nullptr);
        }
    for (int lane = 0; p.stats && lane < lanes; ++lane) {
      Summary<Sums, double> row;
      row.pivots = {b.maxima[0][lane], b.maxima[1][lane]};
      for (int k = 0; k < kSums<Sums>; ++k) row.stats.v[k] = b.sums[k][lane];
      store_stats(stats_of(p, first + lane), row);
    }
  }

  static void put_targets(const Problem& p, const Batch& b) {
    for (int lane = 0; lane < b.block.lanes; ++lane)
      if (b.block.target[lane] >= 0)
        put<S>(p.grad, row_start(p.grad, b.block.outer[lane], b.block.inner[lane]), b.block.target[lane],
               b.coef_y[lane]);
  }

  static bool batches(const Problem& p, int64_t begin, int64_t end) {
    const Padding<S> padding(p.classes);
    constexpr int planes = Sums::kept > 2 ? Sums::kept : 2;
    const int64_t padded = padding.vectors * L, fitting = kCache / static_cast<int64_t>(sizeof(S)) / (planes * padded);
    const int size = static_cast<int>(fitting > L ? L : fitting < 1 ? 1 : fitting);  // rows in a batch
    const int64_t plane = padded * size;
    const bool back = p.pass == Pass::backward;
    S* kept = static_cast<S*>(scratch(sizeof(S) * planes * plane));  // logits first, their exponentials afterwards
    if (!kept) return false;
    const Chosen<double> chosen(p);
    const Scales scales = Chosen<S>(p).template scales<Sums>();
    const int64_t s_step = kLine * L * bytes_of(p.student.dtype),
                  t_step = Sums::teacher ? kLine * L * bytes_of(p.teacher.dtype) : 0,
                  g_step = p.grad.data ? kLine * L * bytes_of(p.grad.dtype) : 0;

    for (int64_t first = begin; first < end; first += size) {
      Batch b;
      open(p, chosen, first, end - first < size ? end : first + size, b);
      for (int lane = 0; lane < b.block.lanes; ++lane) {
        if (!b.block.active[lane]) continue;
        const int64_t outer = b.block.outer[lane], inner = b.block.inner[lane], target = b.block.target[lane];
        S *const s = kept + lane * padded, *const t = Sums::teacher ? s + plane : s;
        const auto s_row = load_short(p.student.dtype, row_start(p.student, outer, inner), padding, target, s);
        b.s_y[lane] = s_row.at_target;
        if (!back) b.maxima[0][lane] = s_row.max;
        if constexpr (Sums::teacher) {
          const auto t_row = load_short(p.teacher.dtype, row_start(p.teacher, outer, inner), padding, target, t);
          b.t_y[lane] = t_row.at_target;
          if (!back) b.maxima[1][lane] = t_row.max;
        }
        const int ahead_by = lane + 1 < b.block.lanes ? 1 : 0;
        const int64_t next_outer = b.block.outer[lane + ahead_by], next_inner = b.block.inner[lane + ahead_by];
        const Prefetch ahead = {row_start(p.student, next_outer, next_inner),
                                Sums::teacher ? row_start(p.teacher, next_outer, next_inner) : nullptr,
                                row_start(p.grad.data ? p.grad : p.student, outer, inner),
                                s_step,
                                t_step,
                                g_step};
        const Pivots<S> pivots = {b.maxima[0][lane], b.maxima[1][lane]};
        const auto lanes = sweep<Sums, S, true>(scales, s, t, padded, splat(pivots), s, plane, ahead);
        if (!back)
          for (int k = 0; k < Sums::count; ++k) b.sums[k][lane] = sum_lanes<S>(lanes.v[k]);
      }
      if constexpr (Sums::refined > 0) {
        open_second(chosen, b);
        for (int lane = 0; lane < b.block.lanes; ++lane) {
          if (!b.block.active[lane]) continue;
          Opening<Sums, V> opening;
          for (int k = 0; k < Sums::openings; ++k) opening.c[k] = Ops<V>::splat(b.opening[k][lane]);
          const auto more = refine<Sums, S>(scales, padded, kept + lane * padded, plane, opening);
          for (int k = 0; k < Sums::refined && !back; ++k) b.sums[Sums::count + k][lane] = sum_lanes<S>(more.v[k]);
        }
      }
      close(p, chosen, first, b);
      if (!p.grad.data) continue;
      for (int lane = 0; lane < b.block.lanes; ++lane) {
        char* const out = row_start(p.grad, b.block.outer[lane], b.block.inner[lane]);
        if (!b.block.active[lane]) {
          memset(out, 0, p.classes * bytes_of(p.grad.dtype));
          continue;
        }
        S coef[Sums::coefs];
        for (int k = 0; k < Sums::coefs; ++k) coef[k] = b.coef[k][lane];
        with_type(p.grad.dtype, out,
                  [&](auto* to) { gradient_short<Sums, S>(to, padding, kept + lane * padded, plane, coef); });
      }
      put_targets(p, b);
    }
    return true;
  }

  // The target's logits of a block's rows, where it is among the `n` classes from `from` on that are in `kept`: to
  // s_y and t_y, and -inf in their place.
  static void take_targets(Batch& b, int64_t from, int64_t n, S* kept, int64_t plane) {
    for (int lane = 0; lane < L; ++lane) {
      const int64_t c = b.block.target[lane] - from;
      if (b.block.target[lane] < 0 || c < 0 || c >= n) continue;
      S* const at = kept + c * L + lane;
      b.s_y[lane] = *at;
      *at = -infinity<S>();
      if constexpr (Sums::teacher) {
        b.t_y[lane] = at[plane];
        at[plane] = -infinity<S>();
      }
    }
  }

  static constexpr int kChunk = 64;  // classes summed in S before the sum goes to double

  // More of a sum.
  static void add_to(double* sum, V more) {
    for (int part = 0; part < kParts<S>; ++part) {
      double* const at = sum + part * kLanes<double>;
      store_bits(at, load_bits<VecD>(at) + widen_part(more, part));
    }
  }

  // From n classes' logits in `kept` to their exponentials, and, with `sums`, what these sum to.
  static void sweep_block(const Scales& scales, const Pivots<V>& pivots, int64_t n, S* kept, int64_t plane,
                          double (*sums)[L], Prefetch ahead) {
    for (int64_t from = 0; from < n; from += kChunk) {
      S* const at = kept + from * L;
      const int64_t lanes = (n - from < kChunk ? n - from : kChunk) * L;
      const auto more =
          sweep<Sums, S, true>(scales, at, Sums::teacher ? at + plane : at, lanes, pivots, at, plane, ahead);
      ahead.s += kChunk / kLine * ahead.s_step;
      ahead.t += kChunk / kLine * ahead.t_step;
      ahead.g += kChunk / kLine * ahead.g_step;
      for (int k = 0; k < Sums::count && sums; ++k) add_to(sums[k], more.v[k]);
    }
  }

  // The second round of n classes in `kept`, in place, and, with `sums`, what it sums to.
  static void refine_block(const Scales& scales, const Batch& b, int64_t n, S* kept, int64_t plane, double (*sums)[L]) {
    Opening<Sums, V> opening;
    for (int k = 0; k < Sums::openings; ++k) opening.c[k] = load<S>(b.opening[k]);
    for (int64_t from = 0; from < n; from += kChunk) {
      const int64_t lanes = (n - from < kChunk ? n - from : kChunk) * L;
      const auto more = refine<Sums, S>(scales, lanes, kept + from * L, plane, opening);
      for (int k = 0; k < Sums::refined && sums; ++k) add_to(sums[k], more.v[k]);
    }
  }

  // The gradient of n classes from what is kept of them.
  static void put_gradient(const Logits& grad, const Batch& b, int64_t n, const S* kept, int64_t plane) {
    V c[Sums::coefs];
    for (int k = 0; k < Sums::coefs; ++k) c[k] = load<S>(b.coef[k]);
    store_block<S>(grad, b.block, n, [=](int64_t i) {
      V e[Sums::kept], coef[Sums::coefs];
      for (int k = 0; k < Sums::kept; ++k) e[k] = load<S>(kept + k * plane + i * L);
      for (int k = 0; k < Sums::coefs; ++k) coef[k] = c[k];
      return Sums::gradient(e, coef);
    });
  }

  static Pivots<V> pivots_of(const Batch& b) { return {load<S>(b.maxima[0]), load<S>(b.maxima[1])}; }
  static void set_pivots(Batch& b, const Pivots<V>& pivots) {
    store<S>(b.maxima[0], pivots.s);
    store<S>(b.maxima[1], pivots.t);
  }

  // More classes of a block's rows, by their sums and pivots.
  static void merge_into(Batch& b, const typename Sums::template Scales<double>& scales, const Pivots<V>& pivots,
                         const double (&sums)[Sums::count][L]) {
    for (int part = 0; part < kParts<S>; ++part) {
      const int at = part * kLanes<double>;
      Summary<Sums, VecD> rows = rows_of(b, part, Sums::count), more;
      more.pivots = {widen_part(pivots.s, part), widen_part(pivots.t, part)};
      for (int k = 0; k < Sums::count; ++k) more.stats.v[k] = load_bits<VecD>(sums[k] + at);
      merge(scales, rows, more);
      for (int k = 0; k < Sums::count; ++k) store_bits(b.sums[k] + at, rows.stats.v[k]);
      narrow(b.maxima[0], part, rows.pivots.s);
      narrow(b.maxima[1], part, rows.pivots.t);
    }
  }

  static void get_targets(const Problem& p, Batch& b) {
    for (int lane = 0; lane < b.block.lanes; ++lane) {
      const int64_t outer = b.block.outer[lane], inner = b.block.inner[lane], target = b.block.target[lane];
      if (target < 0) continue;
      b.s_y[lane] = get<double>(p.student, row_start(p.student, outer, inner), target);
      if constexpr (Sums::teacher) b.t_y[lane] = get<double>(p.teacher, row_start(p.teacher, outer, inner), target);
    }
  }

  // Classes from `from` on.
  static Logits part_of(Logits x, int64_t from) {
    if (x.data) x.data = static_cast<char*>(x.data) + from * x.class_stride * bytes_of(x.dtype);
    return x;
  }

  static bool lanes_are_rows(const Problem& p, int64_t begin, int64_t end) {
    const bool back = p.pass == Pass::backward, whole = p.classes <= kWholeRows;
    const int64_t classes = p.classes, tile = whole ? classes : kBlockTile, plane = tile * L;
    constexpr int planes = Sums::kept > 2 ? Sums::kept : 2;
    S* const kept =
        static_cast<S*>(scratch(sizeof(S) * planes * plane));  // logits first, their exponentials afterwards
    if (!kept) return false;
    const Chosen<double> chosen(p);
    const Scales scales = Chosen<S>(p).template scales<Sums>();
    const auto load_logits = [&](Batch& b, int64_t from, int64_t n) {
      load_block<S>(part_of(p.student, from), b.block, n, kept);
      if constexpr (Sums::teacher) load_block<S>(part_of(p.teacher, from), b.block, n, kept + plane);
      take_targets(b, from, n, kept, plane);
    };
    const auto maxima = [&](int64_t n) {
      const V s = max_lanewise(kept, n * L);
      return Pivots<V>{s, Sums::teacher ? max_lanewise(kept + plane, n * L) : -infinity<V>()};
    };
    const auto each_tile = [&](auto&& use) {
      for (int64_t from = 0; from < classes; from += tile) use(from, classes - from < tile ? classes - from : tile);
    };
    const Prefetch nothing = {
        reinterpret_cast<char*>(kept), reinterpret_cast<char*>(kept), reinterpret_cast<char*>(kept), 0, 0, 0};

    for (int64_t first = begin; first < end; first += L) {
      Batch b;
      open(p, chosen, first, end, b);
      if (whole) {
        load_logits(b, 0, classes);
        if (!back) set_pivots(b, maxima(classes));
        sweep_block(scales, pivots_of(b), classes, kept, plane, back ? nullptr : b.sums, block_ahead(p, b));
        if constexpr (Sums::refined > 0) {
          open_second(chosen, b);
          refine_block(scales, b, classes, kept, plane, back ? nullptr : b.sums + Sums::count);
        }
        close(p, chosen, first, b);
        if (!p.grad.data) continue;
        put_gradient(p.grad, b, classes, kept, plane);
        put_targets(p, b);
        continue;
      }
      // Too many classes to keep their exponentials: a sweep for the sums of a round, and another one for the gradient.
      if (back)
        get_targets(p, b);
      else
        each_tile([&](int64_t from, int64_t n) {
          load_logits(b, from, n);
          alignas(kVectorBytes) double sums[Sums::count][L] = {};
          const Pivots<V> pivots = maxima(n);
          sweep_block(scales, pivots, n, kept, plane, sums, nothing);
          merge_into(b, chosen.template scales<Sums>(), pivots, sums);
        });
      if constexpr (Sums::refined > 0) {
        open_second(chosen, b);
        if (!back)
          each_tile([&](int64_t from, int64_t n) {
            load_logits(b, from, n);
            sweep_block(scales, pivots_of(b), n, kept, plane, nullptr, nothing);
            refine_block(scales, b, n, kept, plane, b.sums + Sums::count);
          });
      }
      close(p, chosen, first, b);
      if (!p.grad.data) continue;
      each_tile([&](int64_t from, int64_t n) {
        load_logits(b, from, n);
        sweep_block(scales, pivots_of(b), n, kept, plane, nullptr, nothing);
        if constexpr (Sums::refined > 0) refine_block(scales, b, n, kept, plane, nullptr);
        put_gradient(part_of(p.grad, from), b, n, kept, plane);
      });
      put_targets(p, b);
    }
    return true;
  }

  // Rows that lie one behind the other: the next ones are read where these end, and these are written from the first
  // on.
  static Prefetch block_ahead(const Problem& p, const Batch& b) {
    const int64_t outer = b.block.outer[0], inner = b.block.inner[0], s_step = kLine * L * bytes_of(p.student.dtype),
                  t_step = Sums::teacher ? kLine * L * bytes_of(p.teacher.dtype) : 0;
    char *const s = row_start(p.student, outer, inner), *const t =
                                                            Sums::teacher ? row_start(p.teacher, outer, inner) : s;
    return {s + p.classes * s_step / kLine,
            t + p.classes * t_step / kLine,
            p.grad.data ? row_start(p.grad, outer, inner) : s,
            s_step,
            t_step,
            p.grad.data ? kLine * L * bytes_of(p.grad.dtype) : 0};
  }
};

KD_NAMESPACE_END
