// The generic row loops: the same for every loss. A loss comes in as its struct, the compute type as S.
//
// lanes_are_classes: a row is walked in tiles. Per tile: load (convert, find the maxima), then the exponentials relative
// to the tile's own maxima, kept in a scratch row, and the statistics, merged into the row's. When the row is finished
// the gradient is a linear combination of the kept exponentials, with coefficients rebased to each tile's pivots.
// Student and teacher are read from memory once, the gradient is written once.
//
// lanes_are_rows: as many rows as there are lanes, transposed into the scratch memory, then the same steps with every
// row in its own lane. No horizontal reductions, one finish for all of them.
//
// The target and the padding are loaded as -inf: their exponentials are 0 and nothing below needs to ask for them. The
// target's gradient is written afterwards.
#pragma once

#include "problem.h"
#include "simd.h"

KD_NAMESPACE_BEGIN

// ---- access to logits by their stored type ------------------------------------------------------------------------

// Applies f to a pointer of the stored type.
template <class F>
KD_FN auto with_type(DType dtype, void* data, F f) {
  switch (dtype) {
    case DType::f64:
      return f(static_cast<double*>(data));
    case DType::f16:
      return f(static_cast<F16*>(data));
    case DType::bf16:
      return f(static_cast<BF16*>(data));
    default:
      return f(static_cast<float*>(data));
  }
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline char* row_start(const Logits& x, int64_t outer, int64_t inner) {
  return static_cast<char*>(x.data) + (outer * x.outer_stride + inner * x.inner_stride) * bytes_of(x.dtype);
}

template <class S>
inline S get(const Logits& x, char* row, int64_t c) {
  return with_type(x.dtype, row, [&](auto* p) { return static_cast<S>(to_float(p[c * x.class_stride])); });
}
template <class S>
inline void put(const Logits& x, char* row, int64_t c, S value) {
  with_type(x.dtype, row, [&](auto* p) { from_float(p[c * x.class_stride], value); });
}

template <class S>
KD_FN Vec<S> max_lanewise(const S* x, int64_t n) {  // n: a multiple of the lanes
  constexpr int L = kLanes<S>;
  Vec<S> m[4];
  for (auto& v : m) v = -infinity<Vec<S>>();
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int j = 0; j < 4; ++j) m[j] = max_of(m[j], load<S>(x + i + j * L));
  for (; i < n; i += L) m[0] = max_of(m[0], load<S>(x + i));
  return max_of(max_of(m[0], m[1]), max_of(m[2], m[3]));
}
template <class S>
KD_FN S max_over(const S* x, int64_t n) {
  return max_lanes<S>(max_lanewise(x, n));
}

constexpr int kTile = 1024;  // classes; a pair of tiles stays in the first-level cache
static_assert(kTile % kLanes<float> == 0, "a tile is made of whole vectors");

template <class S>
struct Tile {
  const S* data;
  S max;
};

// Classes first .. first + n of a row (class stride 1) as S. hole: the target's position in the tile, or outside it.
template <class S, class T>
Tile<S> load_tile(const T* row, int n, int64_t hole, S* buffer) {
  constexpr int L = kLanes<S>;
  const bool has_hole = hole >= 0 && hole < n;
  if constexpr (sizeof(T) == sizeof(S)) {
    if (!has_hole && n % L == 0) return {row, max_over(row, n)};
  }
  Vec<S> m = -infinity<Vec<S>>();
  int i = 0;
  for (; i + L <= n; i += L) {
    const Vec<S> v = load<S>(row + i);
    m = max_of(m, v);
    store<S>(buffer + i, v);
  }
  if (i < n) {
    store<S>(buffer + i, -infinity<Vec<S>>());
    for (int j = i; j < n; ++j) buffer[j] = static_cast<S>(to_float(row[j]));
    m = max_of(m, load<S>(buffer + i));
  }
  S max = max_lanes<S>(m);
  if (has_hole) {
    const S target = buffer[hole];
    buffer[hole] = -infinity<S>();
    if (!(target < max)) max = max_over(buffer, (n + L - 1) / L * L);
  }
  return {buffer, max};
}

template <class S>
Tile<S> load_tile(DType dtype, char* row, int64_t first, int n, int64_t hole, S* buffer) {
  return with_type(dtype, row, [&](auto* p) {
    if constexpr (sizeof(*p) > sizeof(S))
      return Tile<S>{buffer, S()};  // float64 is never computed in float
    else
      return load_tile<S>(p + first, n, hole - first, buffer);
  });
}

// ---- one tile, lanes are classes ----------------------------------------------------------------------------------

struct Ahead {  // what the sweep asks the memory for meanwhile: the next tile
  const char *s, *t;
  int64_t s_step, t_step;  // bytes per vector
};

template <class Sums, class S, bool kKeep>
typename Sums::template Stats<double> sweep_tile(const Scales<S>& scales, const S* s, const S* t, int n,
                                                       Pivots<S> pivots, S* kept, int64_t kept_stride, Ahead ahead) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  const V ms = Ops<V>::splat(usable(pivots.s)), mt = Ops<V>::splat(usable(pivots.t));
  typename Sums::template Stats<V> stats = {};
  for (int i = 0; i < n; i += L) {
    const auto x = Sums::template exps<V>(scales, load<S>(s + i) - ms, load<S>(t + i) - mt);
    Sums::add(stats, x);
    if constexpr (kKeep)
      for (int k = 0; k < Sums::kept; ++k) store<S>(kept + k * kept_stride + i, x.e[k]);
    __builtin_prefetch(ahead.s);
    ahead.s += ahead.s_step;
    if constexpr (Sums::teacher) {
      __builtin_prefetch(ahead.t);
      ahead.t += ahead.t_step;
    }
  }
  typename Sums::template Stats<double> total;
  for (int k = 0; k < Sums::count; ++k) total.v[k] = sum_lanes<S>(stats.v[k]);
  return total;
}

template <class S, class T, int kKept>
void gradient_tile(T* out, int n, const S* kept, int64_t kept_stride, const double (&coef)[kKept]) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  V c[kKept], e[kKept];
  for (int k = 0; k < kKept; ++k) c[k] = Ops<V>::splat(static_cast<S>(coef[k]));
  int i = 0;
  for (; i + L <= n; i += L) {
    for (int k = 0; k < kKept; ++k) e[k] = load<S>(kept + k * kept_stride + i);
    store<S>(out + i, gradient(e, c));
  }
  if (i < n) {
    for (int k = 0; k < kKept; ++k) e[k] = load<S>(kept + k * kept_stride + i);
    const V g = gradient(e, c);
    for (int j = i; j < n; ++j) from_float(out[j], g[j - i]);
  }
}

// ---- a block of rows, lanes are rows ------------------------------------------------------------------------------

template <class S>
struct Block {  // up to L rows, one per lane
  static constexpr int L = kLanes<S>;
  int lanes;
  bool active[L];
  int64_t outer[L], inner[L], target[L];
};

// The first of the L classes that start at c; the last ones of a row overlap those before rather than run past it.
inline int64_t window(int64_t c, int64_t classes, int lanes) {
  return classes - c < lanes && classes >= lanes ? classes - lanes : c;
}

// to[c * L + lane] = logit c of the row in lane; -inf in lanes without a row to read.
template <class T, class S>
void load_block_of(const T* data, const Logits& x, const Block<S>& block, int64_t classes, S* to) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  const T* rows[L];
  bool full = true, adjacent = x.inner_stride == 1;
  for (int lane = 0; lane < L; ++lane) {
    rows[lane] = block.active[lane]
                     ? data + block.outer[lane] * x.outer_stride + block.inner[lane] * x.inner_stride
                     : nullptr;
    full = full && block.active[lane];
    adjacent = adjacent && full && rows[lane] == rows[0] + lane;
  }
  const V nothing = -infinity<V>();
  if (x.class_stride == 1) {
    for (int64_t c = 0; c < classes; c += L) {
      const int64_t from = window(c, classes, L);
      V m[L];
      for (int lane = 0; lane < L; ++lane) {
        if (!rows[lane]) {
          m[lane] = nothing;
        } else if (classes >= L) {
          m[lane] = load<S>(rows[lane] + from);
        } else {
          T padded[L] = {};
          memcpy(padded, rows[lane], sizeof(T) * classes);
          m[lane] = load<S>(padded);
        }
      }
      transpose(m);
      for (int j = 0; j < L && from + j < classes; ++j) store<S>(to + (from + j) * L, m[j]);
    }
  } else if (adjacent) {
    for (int64_t c = 0; c < classes; ++c) store<S>(to + c * L, load<S>(rows[0] + c * x.class_stride));
  } else {
    for (int64_t c = 0; c < classes; ++c)
      for (int lane = 0; lane < L; ++lane)
        to[c * L + lane] =
            rows[lane] ? static_cast<S>(to_float(rows[lane][c * x.class_stride])) : -infinity<S>();
  }
}

template <class T, class S>
void store_block_of(T* data, const Logits& x, const Block<S>& block, int64_t classes, const S* from) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  T* rows[L];
  bool adjacent = x.inner_stride == 1 && block.lanes == L;
  for (int lane = 0; lane < block.lanes; ++lane) {
    rows[lane] = data + block.outer[lane] * x.outer_stride + block.inner[lane] * x.inner_stride;
    adjacent = adjacent && rows[lane] == rows[0] + lane;
  }
  if (x.class_stride == 1) {
    for (int64_t c = 0; c < classes; c += L) {
      const int64_t at = window(c, classes, L);
      V m[L];
      for (int j = 0; j < L; ++j) m[j] = load<S>(from + (at + j < classes ? at + j : 0) * L);
      transpose(m);
      for (int lane = 0; lane < block.lanes; ++lane) {
        if (classes >= L) {
          store<S>(rows[lane] + at, m[lane]);
        } else {
          T padded[L];
          store<S>(padded, m[lane]);
          memcpy(rows[lane], padded, sizeof(T) * classes);
        }
      }
    }
  } else if (adjacent) {
    for (int64_t c = 0; c < classes; ++c) store<S>(rows[0] + c * x.class_stride, load<S>(from + c * L));
  } else {
    for (int64_t c = 0; c < classes; ++c)
      for (int lane = 0; lane < block.lanes; ++lane)
        from_float(rows[lane][c * x.class_stride], from[c * L + lane]);
  }
}

template <class S>
void load_block(const Logits& x, const Block<S>& block, int64_t classes, S* to) {
  with_type(x.dtype, x.data, [&](auto* data) {
    if constexpr (sizeof(*data) <= sizeof(S)) load_block_of(data, x, block, classes, to);  // float64 never in float
  });
}
template <class S>
void store_block(const Logits& x, const Block<S>& block, int64_t classes, const S* from) {
  with_type(x.dtype, x.data, [&](auto* data) {
    if constexpr (sizeof(*data) <= sizeof(S)) store_block_of(data, x, block, classes, from);
  });
}

// ---- rows ---------------------------------------------------------------------------------------------------------

template <class Loss, class S>
struct Rows {
  using Sums = typename Loss::Sums;
  using V = Vec<S>;
  using StatsD = typename Sums::template Stats<double>;
  using CoefD = typename Sums::template Coef<double>;
  using Params = typename Loss::template Params<double>;
  static constexpr int L = kLanes<S>;
  static_assert(Sums::count + 2 <= kStatsWidth, "statistics and pivots fit one row of stats");

  static bool skipped(const Problem& p, int64_t row) {
    return (p.target && p.target[row] == p.ignore_index) ||
           (p.row_weight && static_cast<const S*>(p.row_weight)[row] == 0);
  }

  // The gradient that finish multiplies its coefficients with.
  static void upstream(const Problem& p, int64_t row, double* g) {
    const double weight = p.row_weight ? static_cast<const S*>(p.row_weight)[row] : 1.;
    for (int k = 0; k < Loss::outputs; ++k)
      g[k] = p.pass == Pass::backward ? weight * static_cast<const S*>(p.grad_rows)[k * p.rows_total() + row]
                                      : weight * p.scale;
  }

  static void write_rows(const Problem& p, int64_t row, const double* loss, const double* g) {
    if (p.scaled_rows) p.scaled_rows[row] = loss ? loss[0] * g[0] : 0.;
    if (p.rows)
      for (int k = 0; k < Loss::outputs; ++k)
        static_cast<S*>(p.rows)[k * p.rows_total() + row] = static_cast<S>(loss ? loss[k] * g[k] : 0.);
  }

  static bool run(const Problem& p, Plan plan, int64_t begin, int64_t end) {
    return plan.regime == Regime::lanes_are_rows ? lanes_are_rows(p, begin, end) : lanes_are_classes(p, begin, end);
  }

  static bool lanes_are_classes(const Problem& p, int64_t begin, int64_t end) {
    const int64_t classes = p.classes, tiles = (classes + kTile - 1) / kTile, padded = (classes + L - 1) / L * L;
    const bool keep = p.grad.data && p.pass == Pass::forward_grad, back = p.pass == Pass::backward;
    const int64_t kept_stride = keep ? padded : back ? kTile : 0;
    S* memory = static_cast<S*>(scratch(sizeof(S) * (2 * kTile + Sums::kept * kept_stride + 2 * tiles)));
    if (!memory) return false;
    S *s_buffer = memory, *t_buffer = s_buffer + kTile, *kept = t_buffer + kTile;
    auto* tile_pivots = reinterpret_cast<Pivots<S>*>(kept + Sums::kept * kept_stride);

    const Params params(p.params);
    const Scales<S> scales(params.temperature);
    const int64_t s_bytes = bytes_of(p.student.dtype), t_bytes = Sums::teacher ? bytes_of(p.teacher.dtype) : 0;

    for (int64_t row = begin; row < end; ++row) {
      const int64_t outer = row / p.inner, inner = row % p.inner;
      char* grad = p.grad.data ? row_start(p.grad, outer, inner) : nullptr;
      if (skipped(p, row)) {
        write_rows(p, row, nullptr, nullptr);
        if (p.stats) memset(p.stats + row * kStatsWidth, 0, sizeof(double) * kStatsWidth);
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
      const double s_y = target < 0 ? -infinity<double>() : get<double>(p.student, s, target);
      const double t_y = target < 0 || !Sums::teacher ? -infinity<double>() : get<double>(p.teacher, t, target);

      double g[Loss::outputs], loss[Loss::outputs];
      upstream(p, row, g);
      StatsD stats = {};
      Pivots<double> pivots = {-infinity<double>(), -infinity<double>()};
      CoefD coef = {};
      if (back) {
        load_stats(p.stats + row * kStatsWidth, pivots, stats);
        Loss::finish(params, stats, pivots, s_y, t_y, g, loss, coef);
      }
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = i * kTile;
        const int n = static_cast<int>(classes - first < kTile ? classes - first : kTile);
        const Tile<S> s_tile = load_tile<S>(p.student.dtype, s, first, n, target, s_buffer);
        const Tile<S> t_tile =
            Sums::teacher ? load_tile<S>(p.teacher.dtype, t, first, n, target, t_buffer) : Tile<S>{s_tile.data, 0};
        const bool last = i + 1 == tiles;
        const Ahead ahead = {last ? next_s : s + (first + kTile) * s_bytes,
                             last ? next_t : t + (first + kTile) * t_bytes, L * s_bytes, L * t_bytes};
        if (back) {
          const Pivots<S> at = {static_cast<S>(pivots.s), static_cast<S>(pivots.t)};
          sweep_tile<Sums, S, true>(scales, s_tile.data, t_tile.data, n, at, kept, kTile, ahead);
          with_type(p.grad.dtype, grad, [&](auto* out) {
            gradient_tile<S>(out + first, n, kept, kTile, coef.c);
          });
          continue;
        }
        const Pivots<S> at = {s_tile.max, t_tile.max};
        const StatsD part =
            keep ? sweep_tile<Sums, S, true>(scales, s_tile.data, t_tile.data, n, at, kept + first, padded, ahead)
                 : sweep_tile<Sums, S, false>(scales, s_tile.data, t_tile.data, n, at, nullptr, 0, ahead);
        tile_pivots[i] = at;
        Sums::merge(Scales<double>(params), stats, pivots, part, Pivots<double>{at.s, at.t});
      }
      if (!back) {
        Loss::finish(params, stats, pivots, s_y, t_y, g, loss, coef);
        write_rows(p, row, loss, g);
        if (p.stats) store_stats(p.stats + row * kStatsWidth, pivots, stats);
      }
      if (keep) {
        with_type(p.grad.dtype, grad, [&](auto* out) {
          for (int64_t i = 0; i < tiles; ++i) {
            const int64_t first = i * kTile;
            const int n = static_cast<int>(classes - first < kTile ? classes - first : kTile);
            CoefD c = coef;
            Sums::rebase(Scales<double>(params), c, pivots, Pivots<double>{tile_pivots[i].s, tile_pivots[i].t});
            gradient_tile<S>(out + first, n, kept + first, padded, c.c);
          }
        });
      }
      if (grad && target >= 0) put<double>(p.grad, grad, target, coef.y);
    }
    return true;
  }

  static void store_stats(double* to, const Pivots<double>& pivots, const StatsD& stats) {
    to[0] = pivots.s;
    to[1] = pivots.t;
    for (int k = 2; k < kStatsWidth; ++k) to[k] = k - 2 < Sums::count ? stats.v[k - 2] : 0.;
  }
  static void load_stats(const double* from, Pivots<double>& pivots, StatsD& stats) {
    pivots = {from[0], from[1]};
    for (int k = 0; k < Sums::count; ++k) stats.v[k] = from[k + 2];
  }

  // ---- lanes are rows ---------------------------------------------------------------------------------------------

  static bool lanes_are_rows(const Problem& p, int64_t begin, int64_t end) {
    constexpr int kChunk = 64;  // classes summed in S before the sum goes to double
    const int64_t classes = p.classes, plane = classes * L;
    const bool back = p.pass == Pass::backward, keep = p.grad.data;
    constexpr int planes = Sums::kept > 2 ? Sums::kept : 2;
    S* memory = static_cast<S*>(scratch(sizeof(S) * planes * plane));
    if (!memory) return false;
    S* kept[planes];  // logits first, their exponentials afterwards
    for (int k = 0; k < planes; ++k) kept[k] = memory + k * plane;
    const Params params(p.params);
    const Scales<S> scales(params.temperature);

    for (int64_t first = begin; first < end; first += L) {
      Block<S> block;
      block.lanes = static_cast<int>(end - first < L ? end - first : L);
      alignas(kVectorBytes) double s_y[L], t_y[L], pivots[2][L], sums[Sums::count][L], g[Loss::outputs][L],
          loss[Loss::outputs][L];
      alignas(kVectorBytes) S coef[Sums::kept][L], coef_y[L], maxima[2][L];
      memset(sums, 0, sizeof(sums));
      memset(g, 0, sizeof(g));
      int64_t outer = first / p.inner, inner = first % p.inner;
      for (int lane = 0; lane < L; ++lane) {
        const int64_t row = first + lane;
        block.active[lane] = lane < block.lanes && !skipped(p, row);
        block.outer[lane] = outer;
        block.inner[lane] = inner;
        if (++inner == p.inner) inner = 0, ++outer;
        block.target[lane] = block.active[lane] && p.target ? p.target[row] : -1;
      }
      load_block<S>(p.student, block, classes, kept[0]);
      if constexpr (Sums::teacher) load_block<S>(p.teacher, block, classes, kept[1]);
      for (int lane = 0; lane < L; ++lane) {
        S* const at = kept[0] + block.target[lane] * L + lane;
        const bool has_target = block.target[lane] >= 0;
        s_y[lane] = has_target ? static_cast<double>(*at) : -infinity<double>();
        t_y[lane] = has_target && Sums::teacher ? static_cast<double>(at[plane]) : -infinity<double>();
        if (has_target) *at = -infinity<S>();
        if (has_target && Sums::teacher) at[plane] = -infinity<S>();
        if (!block.active[lane]) continue;
        double row_g[Loss::outputs];
        upstream(p, first + lane, row_g);
        for (int k = 0; k < Loss::outputs; ++k) g[k][lane] = row_g[k];
      }

      if (back) {
        for (int lane = 0; lane < L; ++lane) {
          Pivots<double> row_pivots = {-infinity<double>(), -infinity<double>()};
          StatsD row_stats = {};
          if (block.active[lane]) load_stats(p.stats + (first + lane) * kStatsWidth, row_pivots, row_stats);
          maxima[0][lane] = static_cast<S>(row_pivots.s);
          maxima[1][lane] = static_cast<S>(row_pivots.t);
          for (int k = 0; k < Sums::count; ++k) sums[k][lane] = row_stats.v[k];
        }
      } else {
        for (int tensor = 0; tensor < 2; ++tensor) {
          store<S>(maxima[tensor], max_lanewise(kept[tensor], tensor == 0 || Sums::teacher ? plane : 0));
        }
      }
      for (int tensor = 0; tensor < 2; ++tensor)
        for (int part = 0; part < kParts<S>; ++part)
          store_bits(pivots[tensor] + part * kLanes<double>, widen(maxima[tensor], part));

      const V ms = usable(load<S>(maxima[0])), mt = usable(load<S>(maxima[1]));
      for (int64_t from = 0; from < classes; from += kChunk) {
        typename Sums::template Stats<V> stats = {};
        const int64_t to = classes - from < kChunk ? classes : from + kChunk;
        for (int64_t c = from; c < to; ++c) {
          const auto x = Sums::template exps<V>(scales, load<S>(kept[0] + c * L) - ms, load<S>(kept[1] + c * L) - mt);
          Sums::add(stats, x);
          for (int k = 0; k < Sums::kept; ++k) store<S>(kept[k] + c * L, x.e[k]);
        }
        if (back) continue;
        for (int k = 0; k < Sums::count; ++k) {
          alignas(kVectorBytes) S part_sums[L];
          store<S>(part_sums, stats.v[k]);
          for (int lane = 0; lane < L; ++lane) sums[k][lane] += part_sums[lane];
        }
      }

      for (int part = 0; part < kParts<S>; ++part) {
        const int at = part * kLanes<double>;
        typename Sums::template Stats<VecD> stats;
        typename Sums::template Coef<VecD> c;
        VecD upstream_d[Loss::outputs], loss_d[Loss::outputs];
        for (int k = 0; k < Sums::count; ++k) stats.v[k] = load_bits<VecD>(sums[k] + at);
        for (int k = 0; k < Loss::outputs; ++k) upstream_d[k] = load_bits<VecD>(g[k] + at);
        Loss::finish(params, stats, Pivots<VecD>{load_bits<VecD>(pivots[0] + at), load_bits<VecD>(pivots[1] + at)},
                     load_bits<VecD>(s_y + at), load_bits<VecD>(t_y + at), upstream_d, loss_d, c);
        for (int k = 0; k < Loss::outputs; ++k) store_bits(loss[k] + at, loss_d[k]);
        for (int k = 0; k < Sums::kept; ++k) narrow(coef[k], part, c.c[k]);
        narrow(coef_y, part, c.y);
      }
      for (int lane = 0; lane < block.lanes; ++lane) {
        const int64_t row = first + lane;
        if (block.active[lane]) {
          double row_loss[Loss::outputs], row_g[Loss::outputs];
          for (int k = 0; k < Loss::outputs; ++k) row_loss[k] = loss[k][lane], row_g[k] = g[k][lane];
          if (!back) write_rows(p, row, row_loss, row_g);
        } else {
          write_rows(p, row, nullptr, nullptr);
        }
        if (p.stats && !back) {
          StatsD row_stats = {};
          for (int k = 0; k < Sums::count; ++k) row_stats.v[k] = sums[k][lane];
          store_stats(p.stats + row * kStatsWidth, {pivots[0][lane], pivots[1][lane]}, row_stats);
        }
      }
      if (!keep) continue;

      for (int lane = 0; lane < L; ++lane)  // exponentials are 0 there: so is the gradient
        if (!block.active[lane])
          for (int k = 0; k < Sums::kept; ++k) coef[k][lane] = 0;
      V c[Sums::kept];
      for (int k = 0; k < Sums::kept; ++k) c[k] = load<S>(coef[k]);
      for (int64_t i = 0; i < classes; ++i) {
        V e[Sums::kept];
        for (int k = 0; k < Sums::kept; ++k) e[k] = load<S>(kept[k] + i * L);
        store<S>(kept[0] + i * L, gradient(e, c));
      }
      store_block<S>(p.grad, block, classes, kept[0]);
      for (int lane = 0; lane < block.lanes; ++lane)
        if (block.target[lane] >= 0)
          put<S>(p.grad, row_start(p.grad, block.outer[lane], block.inner[lane]), block.target[lane], coef_y[lane]);
    }
    return true;
  }
};

KD_NAMESPACE_END
