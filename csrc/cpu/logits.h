// The only loads and stores of logits: one by one, a tile of one row, one class of many rows, a short row.
#pragma once

#include "cpu.h"
#include "simd.h"

KD_NAMESPACE_BEGIN

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

static_assert(kTile % kLanes<float> == 0, "a tile is made of whole vectors");

template <class S>
struct Tile {
  const S* data;
  S max;
};

// Classes first .. first + n of a row (class stride 1) as S. target_at: the target's position in the tile, or outside
// it.
template <class S, class T>
Tile<S> load_tile(const T* row, int n, int64_t target_at, S* buffer) {
  constexpr int L = kLanes<S>;
  const bool has_target = target_at >= 0 && target_at < n;
  if constexpr (sizeof(T) == sizeof(S)) {
    if (!has_target && n % L == 0) return {row, max_over(row, n)};
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
  if (has_target) {
    const S target = buffer[target_at];
    buffer[target_at] = -infinity<S>();
    if (!(target < max)) max = max_over(buffer, (n + L - 1) / L * L);
  }
  return {buffer, max};
}

template <class S>
Tile<S> load_tile(DType dtype, char* row, int64_t first, int n, int64_t target_at, S* buffer) {
  return with_type(dtype, row, [&](auto* p) {
    if constexpr (sizeof(*p) > sizeof(S))
      return Tile<S>{buffer, S()};  // float64 is never computed in float
    else
      return load_tile<S>(p + first, n, target_at - first, buffer);
  });
}

// ---- a block of rows, lanes are rows -------------------------------------------------------------------------------

template <class S>
struct Block {  // up to L rows, one per lane
  static constexpr int L = kLanes<S>;
  int lanes;
  bool full;  // every lane has a row, and reads it
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
  const T *rows[L], *end = nullptr;  // of the last row: before it all memory is the tensor's
  bool full = true, adjacent = x.inner_stride == 1;
  for (int lane = 0; lane < L; ++lane) {
    rows[lane] =
        block.active[lane] ? data + block.outer[lane] * x.outer_stride + block.inner[lane] * x.inner_stride : nullptr;
    full = full && block.active[lane];
    adjacent = adjacent && full && rows[lane] == rows[0] + lane;
    if (rows[lane] && (!end || end < rows[lane] + classes)) end = rows[lane] + classes;
  }
  const V nothing = -infinity<V>();
  if (x.class_stride == 1 && full && classes >= L) {
    for (int64_t c = 0; c < classes; c += L) {
      const int64_t from = window(c, classes, L);
      V m[L];
      for (int lane = 0; lane < L; ++lane) m[lane] = load<S>(rows[lane] + from);
      transpose(m);
      for (int j = 0; j < L; ++j) store<S>(to + (from + j) * L, m[j]);
    }
  } else if (x.class_stride == 1) {
    for (int64_t c = 0; c < classes; c += L) {
      const int64_t from = window(c, classes, L);
      V m[L];
      for (int lane = 0; lane < L; ++lane) {
        if (!rows[lane]) {
          m[lane] = nothing;
        } else if (classes >= L || end - rows[lane] >= L) {  // beyond a short row lies what is not used
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
        to[c * L + lane] = rows[lane] ? static_cast<S>(to_float(rows[lane][c * x.class_stride])) : -infinity<S>();
  }
}

// value(c): class c of all rows, a row in each lane.
template <class S, class T, class Value>
[[gnu::noinline]] void store_block_of(T* data, const Logits& x, const Block<S>& block, int64_t classes, Value value) {
  using V = Vec<S>;
  constexpr int L = kLanes<S>;
  T* rows[L];
  bool adjacent = x.inner_stride == 1 && block.lanes == L, dense = true;
  for (int lane = 0; lane < block.lanes; ++lane) {
    rows[lane] = data + block.outer[lane] * x.outer_stride + block.inner[lane] * x.inner_stride;
    adjacent = adjacent && rows[lane] == rows[0] + lane;
    dense = dense && rows[lane] == rows[0] + lane * classes;
  }
  const int64_t room = dense ? block.lanes * classes : 0;  // from the first row on
  if (x.class_stride == 1) {
    for (int64_t c = 0; c < classes; c += L) {
      const int64_t at = window(c, classes, L);
      V m[L];
      for (int j = 0; j < L; ++j) m[j] = value(at + j < classes ? at + j : 0);
      transpose(m);
      for (int lane = 0; lane < block.lanes; ++lane) {
        if (classes >= L || room - lane * classes >= L) {  // beyond a short row lie those that come next
          store<S>(rows[lane] + at, m[lane]);
        } else {
          T padded[L];
          store<S>(padded, m[lane]);
          memcpy(rows[lane], padded, sizeof(T) * classes);
        }
      }
    }
  } else if (adjacent) {
    for (int64_t c = 0; c < classes; ++c) store<S>(rows[0] + c * x.class_stride, value(c));
  } else {
    for (int64_t c = 0; c < classes; ++c) {
      const V of_class = value(c);
      for (int lane = 0; lane < block.lanes; ++lane) from_float(rows[lane][c * x.class_stride], of_class[lane]);
    }
  }
}

template <class S>
void load_block(const Logits& x, const Block<S>& block, int64_t classes, S* to) {
  with_type(x.dtype, x.data, [&](auto* data) {
    if constexpr (sizeof(*data) <= sizeof(S)) load_block_of(data, x, block, classes, to);  // float64 never in float
  });
}
template <class S, class Value>
void store_block(const Logits& x, const Block<S>& block, int64_t classes, Value value) {
  with_type(x.dtype, x.data, [&](auto* data) {
    if constexpr (sizeof(*data) <= sizeof(S)) store_block_of(data, x, block, classes, value);  // float64 never in float
  });
}

// ---- a short row, padded -------------------------------------------------------------------------------------------

// kLanes <= classes: the last vector of a row overlaps the one before rather than run past the end. Lanes that repeat a
// class are loaded as -inf; the gradient's last vector is stored first, so that the vectors before it have the last
// word.
template <class S>
struct Padding {
  static constexpr int L = kLanes<S>;
  int64_t classes, vectors, repeated;
  explicit Padding(int64_t n) : classes(n), vectors((n + L - 1) / L), repeated((n + L - 1) / L * L - n) {}
  int64_t first_class(int64_t vector) const { return vector + 1 == vectors ? classes - L : vector * L; }
  int64_t slot(int64_t c) const { return c < (vectors - 1) * L ? c : c + repeated; }
};

template <class S>
struct ShortRow {
  S max;
  double at_target;  // -inf without one
};

template <class S, class T>
ShortRow<S> load_short(const T* row, const Padding<S>& padding, int64_t target, S* to) {
  constexpr int L = kLanes<S>;
  using Mask = decltype(Vec<S>() < Vec<S>());
  Mask lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  const Vec<S> nothing = -infinity<Vec<S>>();
  const int64_t last = padding.vectors - 1, target_at = target < 0 ? -1 : padding.slot(target);
  Vec<S> max = nothing;
  const auto whole = [&](int64_t from, int64_t end) {
    for (int64_t v = from; v < end; ++v) {
      const Vec<S> x = load<S>(row + v * L);
      store<S>(to + v * L, x);
      max = max_of(max, x);
    }
  };
  const auto masked = [&](int64_t v) {
    Vec<S> x = load<S>(row + padding.first_class(v));
    x = select(lane == static_cast<int>(target_at - v * L), nothing, x);
    if (v == last) x = select(lane < static_cast<int>(padding.repeated), nothing, x);
    store<S>(to + v * L, x);
    max = max_of(max, x);
  };
  const int64_t split = target_at < 0 ? last : target_at / L;
  whole(0, split);
  if (split < last) {
    masked(split);
    whole(split + 1, last);
  }
  masked(last);
  return {max_lanes<S>(max), target < 0 ? -infinity<double>() : static_cast<double>(to_float(row[target]))};
}

template <class S>
ShortRow<S> load_short(DType dtype, char* row, const Padding<S>& padding, int64_t target, S* to) {
  return with_type(dtype, row, [&](auto* p) {
    if constexpr (sizeof(*p) > sizeof(S))
      return ShortRow<S>();  // float64 is never computed in float
    else
      return load_short<S>(p, padding, target, to);
  });
}

KD_NAMESPACE_END
