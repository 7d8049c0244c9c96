"""Tiles `(ROWS, BLOCK)` of logits: the only loads and stores of logits, and sweeps over a row.

Alignment. A row of 50,257 bfloat16 logits begins at any 2-byte address, where a vector load is not
allowed. With ALIGNED, the tile's index 0 is the last multiple of VEC elements before the row's
first logit, `shift` elements away: whole 16-byte granules are loaded, and what lies beyond the row
is masked afterwards. VEC is the granule of the smaller elements; what lies before the row is inside
the tensor's storage, whose start is aligned. ALIGNED == 2 stores the granules inside the row as
vectors, too, and the elements before and after them one by one (`_store_edges`); it needs a
gradient whose rows lie as those of the student. ALIGNED == 0 (another class stride, a teacher that
lies otherwise) gives every access its own mask, and `shift` is 0.
"""

import triton
import triton.language as tl

from .rows import _add, _features, _load_stats, _no_refined, _no_sums, _totals
from .stats import INF, moved, usable


@triton.jit
def _shift(start, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """How many elements of a row's first granule lie before the row."""
    if ALIGNED:
        return (start % VEC).to(tl.int32)
    else:
        return (start * 0).to(tl.int32)


@triton.jit
def _shares(shift, classes, BLOCK: tl.constexpr, CTAS: tl.constexpr):
    """The indices of a cluster's tile, and which of them it holds. CTAs have BLOCK / CTAS lanes
    each, and take equal shares of the row, whole granules."""
    OWN: tl.constexpr = BLOCK // CTAS
    lane = tl.arange(0, BLOCK)[None, :]
    share = tl.cdiv(shift + classes, CTAS * 64) * 64
    return lane // OWN * share + lane % OWN, lane % OWN < share


@triton.jit
def _load_tile(
    x, start, step, index, shift, readable, y,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, held=None,
):  # fmt: skip
    """Logits of a tile; -inf at the target and outside the row, which is how both drop out."""
    column = index - shift
    inside = (column >= 0) & (column < readable)
    if held is not None:
        inside = inside & held
    if ALIGNED:
        # Of this tensor's own granules: where the other one's elements are smaller, VEC is larger.
        OWN: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
        end = tl.where(readable > 0, (shift + readable + (OWN - 1)) // OWN, 0) * OWN
        mask = index < end
        if held is not None:
            mask = mask & held
        x = tl.load(x + start // VEC * VEC + index, mask=mask, other=0.0)
    else:
        x = tl.load(x + start + column.to(tl.int64) * step, mask=inside, other=0.0)
    return tl.where(inside & (column != y), x.to(DTYPE), -INF)


@triton.jit
def _stored(value, to):
    """As the type that `to` points at; from float64 to 16 bits there is a way by float32 only."""
    if to.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(to.dtype.element_ty)


@triton.jit
def _store_tile(
    grad, start, step, index, shift, writable, y, at_target, value,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, held=None,
):  # fmt: skip
    """The gradient of a tile; where the stores are aligned, of the granules inside the row."""
    column = index - shift
    value = _stored(tl.where(column == y, at_target, value), grad)
    if ALIGNED == 2:
        first = (shift + (VEC - 1)) // VEC * VEC
        end = tl.where(writable > 0, (shift + writable) // VEC, 0) * VEC
        mask = (index >= first) & (index < end)
        if held is not None:
            mask = mask & held
        tl.store(grad + start // VEC * VEC + index, value, mask=mask)
    else:
        mask = (column >= 0) & (column < writable)
        if held is not None:
            mask = mask & held
        tl.store(grad + start + column.to(tl.int64) * step, value, mask=mask)


@triton.jit
def _store_edges(
    student, s_start, teacher, t_start, grad, g_start, shift, readable, writable, y,
    ps, pt, k, opening, params, coef, at_target,
    STATS: tl.constexpr, REFINE: tl.constexpr, GRAD: tl.constexpr, VARIANT: tl.constexpr,
    VEC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient of the elements before the first and after the last granule inside a row."""
    lane = tl.arange(0, 2 * VEC)[None, :]
    first = (shift + (VEC - 1)) // VEC * VEC
    end = (shift + writable) // VEC * VEC
    index = tl.where(lane < VEC, lane, end + lane - VEC)
    column = index - shift
    # Without a granule inside the row, its first granule is its last: it is written once.
    mine = (column >= 0) & (column < writable) & ((lane < VEC) == (index < VEC))
    mine = mine & ((index < first) | (index >= end))
    loaded = mine & (column < readable) & (column != y)
    s = tl.load(student + s_start + column, mask=loaded, other=-INF).to(DTYPE)
    t = s
    if teacher is not None:
        t = tl.load(teacher + t_start + column, mask=loaded, other=-INF).to(DTYPE)
    exps = _features(s - usable(ps), t - usable(pt), k, opening, params, STATS, REFINE, VARIANT)
    value = _stored(tl.where(column == y, at_target, GRAD(exps, coef, VARIANT)), grad)
    tl.store(grad + g_start + column, value, mask=mine)


@triton.jit
def _has_edges(shift, classes, VEC: tl.constexpr, ROWS: tl.constexpr):
    """Whether any row has elements outside whole granules."""
    outside = (shift % VEC) | ((shift + classes) % VEC)
    if ROWS == 1:
        return outside != 0
    else:
        return tl.max(outside) != 0


@triton.jit
def _sweep(
    student, s_start, s_class, teacher, t_start, t_class, first, chunks, shift, readable, y, k,
    STATS: tl.constexpr, MERGE: tl.constexpr, VARIANT: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Pivots and sums of one row's tile indices from `first` on, `chunks` blocks of them."""
    ps = tl.full((), -INF, DTYPE)
    pt = tl.full((), -INF, DTYPE)
    sums = _no_sums(k, STATS, VARIANT, DTYPE)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        index = first + chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        s = _load_tile(student, s_start, s_class, index, shift, readable, y,
                       VEC, ALIGNED, DTYPE)  # fmt: skip
        part_s = tl.max(s)
        t = s
        part_t = part_s
        if teacher is not None:
            t = _load_tile(teacher, t_start, t_class, index, shift, readable, y,
                           VEC, ALIGNED, DTYPE)  # fmt: skip
            part_t = tl.max(t)
        part = _totals(STATS(s - usable(part_s), t - usable(part_t), k, VARIANT)[0], 1)
        new_s = tl.maximum(ps, part_s)
        new_t = tl.maximum(pt, part_t)
        sums = _add(
            MERGE(sums, moved(ps, new_s), moved(pt, new_t), k, VARIANT),
            MERGE(part, moved(part_s, new_s), moved(part_t, new_t), k, VARIANT),
        )
        ps = new_s
        pt = new_t
    return ps, pt, sums


@triton.jit
def _refine(
    student, s_start, s_class, teacher, t_start, t_class, first, chunks, shift, readable, y,
    ps, pt, k, opening, params, sums,
    STATS: tl.constexpr, REFINE: tl.constexpr, VARIANT: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`sums` and those of the second round over `chunks` blocks from `first` on, last block first:
    the cache holds what the first round has read last."""
    ms = usable(ps)
    mt = usable(pt)
    more = _no_refined(opening, params, k, STATS, REFINE, VARIANT, DTYPE)
    for back in tl.range(0, chunks, num_stages=STAGES):
        index = first + (chunks - 1 - back) * BLOCK + tl.arange(0, BLOCK)[None, :]
        s = _load_tile(student, s_start, s_class, index, shift, readable, y,
                       VEC, ALIGNED, DTYPE)  # fmt: skip
        t = _load_tile(teacher, t_start, t_class, index, shift, readable, y,
                       VEC, ALIGNED, DTYPE)  # fmt: skip
        exps = STATS(s - ms, t - mt, k, VARIANT)[1]
        more = _add(more, _totals(REFINE(exps, opening, params, VARIANT)[0], 1))
    return sums + more


@triton.jit
def _merged(
    stats, row, parts, exists, k, like,
    MERGE: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Pivots and sums of rows from those of their slices, in index order."""
    ps, pt, sums = _load_stats(stats, row * parts, exists, like)
    for part in range(1, parts):
        qs, qt, more = _load_stats(stats, row * parts + part, exists, like)
        new_s = tl.maximum(ps, qs)
        new_t = tl.maximum(pt, qt)
        sums = _add(
            MERGE(sums, moved(ps, new_s), moved(pt, new_t), k, VARIANT),
            MERGE(more, moved(qs, new_s), moved(qt, new_t), k, VARIANT),
        )
        ps = new_s
        pt = new_t
    return ps, pt, sums
