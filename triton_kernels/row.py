"""The generic kernels, the same for every loss, and the only loads and stores of the package.

A program has a tile of rows: `(ROWS, BLOCK)` logits, and one number per row as `(ROWS, 1)`. With
ROWS == 1 that is a scalar: a block of one is computed again for every element of a vector.

resident   all classes of its rows in one tile: read once, gradient written from the exponentials
           that are still in registers. Several rows per program when classes are few; a cluster of
           CTAs per row when they are too many for the registers of one.
sweeps     one row at a time in chunks: a sweep for the statistics, a second one in reverse order
           for the gradient, which finds in the L2 cache what the first one read last. Programs are
           persistent, so that the launch bounds the rows in flight; the next chunks of a row
           are on their way to shared memory while one is computed (STAGES).
partial    the statistics of one slice of a row, for rows that are fewer than multiprocessors.
refined    between these two, for losses of two rounds: merges the statistics of its row's slices
           and adds up the second round of one slice.
gradient   merges the statistics of its rows' slices in index order, finishes, and writes the
           gradient of one slice. With the statistics of a forward pass it is the backward pass.

A loss of two rounds has REFINE and OPEN (stats.py), None otherwise. Its second round takes resident
programs no load, sweeps one more sweep. Its sums are stored behind those of the first round, which
is all that a backward pass needs to know.

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

from .stats import INF, moved, usable

WIDTH = tl.constexpr(10)  # of a row of statistics, kdkernels.ops.STATS_WIDTH


def _kernel(function):
    """A kernel that no number and no per-row tensor compiles again: only logits are vectors."""
    types = function.__annotations__
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[x for x in types if types[x] in ("i32", "i64", "fp64")],
        do_not_specialize_on_alignment=[
            x for x in names if x not in types and x not in ("student", "teacher", "grad")
        ],
    )


# ---- tuples of sums -------------------------------------------------------------------------


@triton.jit
def _add(a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def _largest(x, ROWS: tl.constexpr):
    if ROWS == 1:
        return tl.max(x)
    else:
        return tl.max(x, 1, keep_dims=True)


@triton.jit
def _largest_two(a, b):
    """Of a tile of one row each, in one reduction."""
    return tl.split(tl.reshape(tl.max(tl.join(a, b), 1), (2,)))


@triton.jit
def _total(x, ROWS: tl.constexpr):
    if ROWS == 1:
        return tl.sum(x)
    else:
        return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _totals(a, ROWS: tl.constexpr):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (_total(a[i], ROWS),)
    return out


@triton.jit
def _totals_joined(a):
    """Of a tile of one row, up to four in one reduction."""
    if len(a) == 1:
        return _totals(a, 1)
    elif len(a) == 2:
        x, y = tl.split(tl.reshape(tl.sum(tl.join(a[0], a[1]), 1), (2,)))
        return x, y
    else:
        d = tl.zeros_like(a[0])
        if len(a) > 3:
            d = a[3]
        pairs = tl.sum(tl.join(tl.join(a[0], a[1]), tl.join(a[2], d)), 1)
        x, y = tl.split(tl.reshape(pairs, (2, 2)))
        x0, x1 = tl.split(x)
        y0, y1 = tl.split(y)
        out = (x0, x1, y0)
        if len(a) > 3:
            out = out + (y1,)
            for i in tl.static_range(4, len(a)):
                out = out + (tl.sum(a[i]),)
        return out


# ---- rows -----------------------------------------------------------------------------------


@triton.jit
def _rows_of(program, ROWS: tl.constexpr):
    first = program.to(tl.int64) * ROWS
    if ROWS == 1:
        return first
    else:
        return first + tl.arange(0, ROWS).to(tl.int64)[:, None]


@triton.jit
def _start(row, inner, base, outer_stride, inner_stride):
    """Where a row's first logit lies, in elements."""
    return base + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _open(row, rows, classes, target, row_weight, ignore_index, DTYPE: tl.constexpr):
    """Whether rows exist and are read, their target (-1: none), weight (NaN: bad target), and how
    many classes are read and written."""
    exists = row < rows
    weight = tl.where(exists, 1.0, 0.0).to(DTYPE)
    if row_weight is not None:
        weight = tl.load(row_weight + row, mask=exists, other=0.0).to(DTYPE)
    read = exists & (weight != 0.0)
    y = tl.full(row.shape, -1, tl.int32)
    if target is not None:
        given = tl.load(target + row, mask=exists, other=0)
        read = read & (given != ignore_index)
        good = (given >= 0) & (given < classes)
        y = tl.where(read & good, given, -1).to(tl.int32)
        weight = tl.where(good, weight, float("nan"))
    # Numbers of classes, because a mask of a block and a flag of its row take one more operation.
    readable = tl.where(read, classes, 0)
    writable = tl.where(exists, classes, 0)
    return exists, read, y, tl.where(read, weight, 0.0), readable, writable


@triton.jit
def _upstream(row, rows, read, weight, upstream, scale, normalizer, counted, OUTPUTS: tl.constexpr):
    """What the losses of a row and their gradients are multiplied with."""
    if upstream is not None:
        g = weight * tl.load(upstream + row, mask=read, other=0.0)
        if OUTPUTS == 3:
            g1 = weight * tl.load(upstream + rows + row, mask=read, other=0.0)
            g2 = weight * tl.load(upstream + 2 * rows + row, mask=read, other=0.0)
            return g, g1, g2
        else:
            return (g,)
    else:
        factor = tl.full((), scale, weight.dtype)
        if normalizer is not None:
            factor = factor / tl.load(normalizer)
        if counted is not None:
            factor = factor / tl.maximum(tl.load(counted), 1).to(weight.dtype)
        g = weight * factor
        if OUTPUTS == 3:
            return g, g, g
        else:
            return (g,)


@triton.jit
def _params(p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE: tl.constexpr):
    return (
        tl.full((), p0, DTYPE),
        tl.full((), p1, DTYPE),
        tl.full((), p2, DTYPE),
        tl.full((), p3, DTYPE),
        tl.full((), p4, DTYPE),
        tl.full((), p5, DTYPE),
        tl.full((), p6, DTYPE),
        tl.full((), p7, DTYPE),
        tl.full((), p8, DTYPE),
        tl.full((), p9, DTYPE),
    )


@triton.jit
def _scale_of(p0, p5, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """log2(e) / T; with a temperature of the teacher's own, p5, that one's, too, and their ratio.
    In float64, because a temperature rounded first would be another one."""
    k = tl.full((), 1.4426950408889634 / p0, tl.float64).to(DTYPE)
    if VARIANT >= 4:
        k_t = tl.full((), 1.4426950408889634 / p5, tl.float64).to(DTYPE)
        return k, k_t, tl.full((), p0 / p5, tl.float64).to(DTYPE)
    else:
        return k


@triton.jit
def _logit(x, start, step, y, read, DTYPE: tl.constexpr):
    """The logit of the target; -inf without one."""
    return tl.load(x + start + y * step, mask=read & (y >= 0), other=-INF).to(DTYPE)


@triton.jit
def _only(read, coef):
    """Rows that are not read have no gradient, whatever their statistics say."""
    out = ()
    for i in tl.static_range(len(coef)):
        out = out + (tl.where(read, coef[i], 0.0),)
    return out


@triton.jit
def _store_rows(losses, row, rows, exists, read, values, nan, g, OUTPUTS: tl.constexpr):
    if losses is not None:
        tl.store(losses + row, tl.where(read, (values[0] + nan) * g[0], 0.0), mask=exists)
        if OUTPUTS == 3:
            to = losses + rows + row
            tl.store(to, tl.where(read, (values[1] + nan) * g[1], 0.0), mask=exists)
            to = losses + 2 * rows + row
            tl.store(to, tl.where(read, (values[2] + nan) * g[2], 0.0), mask=exists)


@triton.jit
def _store_parts(row_parts, row, rows, exists, read, values, nan, weight, target):
    """Distillation and cross-entropy of rows; without a target there is no cross-entropy."""
    if row_parts is not None:
        tl.store(row_parts + row, tl.where(read, values[1] * weight + nan, 0.0), mask=exists)
        ce = row_parts + rows + row
        if target is not None:
            tl.store(ce, tl.where(read, values[2] * weight + nan, 0.0), mask=exists)
        else:
            tl.store(ce, 0.0, mask=exists)


@triton.jit
def _store_stats(stats, row, exists, ps, pt, sums):
    """Two pivots, the sums, and zeros up to the width."""
    if stats is not None:
        to = stats + row * WIDTH
        tl.store(to, ps, mask=exists)
        tl.store(to + 1, pt, mask=exists)
        for i in tl.static_range(WIDTH - 2):
            if i < len(sums):
                tl.store(to + 2 + i, sums[i], mask=exists)
            else:
                tl.store(to + 2 + i, 0.0, mask=exists)


@triton.jit
def _stat(at, exists, like, other=0.0):
    return tl.load(at, mask=exists, other=other).to(like[0].dtype)


@triton.jit
def _load_stats(stats, row, exists, like):
    """`like`: sums of this loss, for their number and type."""
    at = stats + row * WIDTH
    ps = _stat(at, exists, like, -INF)
    pt = _stat(at + 1, exists, like, -INF)
    return ps, pt, _load_sums(stats + 2, row, exists, like)


@triton.jit
def _load_sums(stats, row, exists, like):
    sums = ()
    for i in tl.static_range(len(like)):
        sums = sums + (_stat(stats + row * WIDTH + i, exists, like),)
    return sums


@triton.jit
def _no_sums(k, STATS: tl.constexpr, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """The sums of a class without mass: zeros."""
    nothing = tl.full((), -INF, DTYPE)
    return STATS(nothing, nothing, k, VARIANT)[0]


@triton.jit
def _no_refined(
    opening, params, k,
    STATS: tl.constexpr, REFINE: tl.constexpr, VARIANT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Zeros for the sums of the second round, of their number and shape."""
    nothing = tl.full((), -INF, DTYPE)
    exps = STATS(nothing, nothing, k, VARIANT)[1]
    return _no_more(REFINE(exps, opening, params, VARIANT)[0])


@triton.jit
def _no_more(sums):
    out = ()
    for i in tl.static_range(len(sums)):
        out = out + (tl.zeros_like(sums[i]),)
    return out


@triton.jit
def _opened(
    student, s_start, s_class, teacher, t_start, t_class, y, read, sums, ps, pt, params,
    OPEN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What turns the features of a row into its probabilities; 0 where it is not read."""
    s_y = _logit(student, s_start, s_class, y, read, DTYPE)
    t_y = _logit(teacher, t_start, t_class, y, read, DTYPE)
    return _only(read, OPEN(sums, ps, pt, s_y, t_y, params))


@triton.jit
def _features(
    s, t, k, opening, params, STATS: tl.constexpr, REFINE: tl.constexpr, VARIANT: tl.constexpr
):
    """What the gradient is made of, from logits relative to the row's pivots."""
    exps = STATS(s, t, k, VARIANT)[1]
    if REFINE is not None:
        exps = REFINE(exps, opening, params, VARIANT)[1]
    return exps


@triton.jit
def _finish(
    student, s_start, s_class, teacher, t_start, t_class,
    row, rows, y, stored, read, weight, sums, ps, pt,
    target, upstream, losses, row_parts, stats, scale, normalizer, counted, params,
    FINISH: tl.constexpr, VARIANT: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """From sums to losses and statistics, stored where asked, and the gradient's coefficients."""
    s_y = _logit(student, s_start, s_class, y, read, DTYPE)
    t_y = s_y
    if teacher is not None:
        t_y = _logit(teacher, t_start, t_class, y, read, DTYPE)
    g = _upstream(row, rows, read, weight, upstream, scale, normalizer, counted, OUTPUTS)
    values, coef, at_target = FINISH(sums, ps, pt, s_y, t_y, g, params, VARIANT)
    # NaN if a logit of the row is, whatever an infinity or a weight of 0 hides.
    nan = s_y + sums[0]
    if teacher is not None:
        nan += t_y + sums[1]
    nan = tl.where(nan == nan, 0.0, nan)
    _store_rows(losses, row, rows, stored, read, values, nan, g, OUTPUTS)
    _store_parts(row_parts, row, rows, stored, read, values, nan, weight, target)
    _store_stats(stats, row, stored, ps, pt, sums)
    return _only(read, coef), at_target


# ---- tiles ----------------------------------------------------------------------------------


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


# ---- kernels --------------------------------------------------------------------------------


@_kernel
def resident(
    student, s_base: "i64", s_outer: "i64", s_inner: "i64", s_class: "i64",
    teacher, t_base: "i64", t_outer: "i64", t_inner: "i64", t_class: "i64",
    grad, g_base: "i64", g_outer: "i64", g_inner: "i64", g_class: "i64",
    target, row_weight, upstream, losses, row_parts, stats, normalizer, counted,
    rows: "i64", inner: "i64", classes: "i32", ignore_index: "i64", scale: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", p4: "fp64",
    p5: "fp64", p6: "fp64", p7: "fp64", p8: "fp64", p9: "fp64",
    STATS: tl.constexpr, MERGE: tl.constexpr, OPEN: tl.constexpr, REFINE: tl.constexpr,
    FINISH: tl.constexpr, GRAD: tl.constexpr,
    VARIANT: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CTAS: tl.constexpr,
):  # fmt: skip
    tl.static_assert(ROWS == 1 or CTAS == 1)
    row = _rows_of(tl.program_id(0), ROWS)
    exists, read, y, weight, readable, writable = _open(
        row, rows, classes, target, row_weight, ignore_index, DTYPE
    )
    k = _scale_of(p0, p5, VARIANT, DTYPE)
    params = _params(p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE)
    s_start = _start(row, inner, s_base, s_outer, s_inner)
    t_start = _start(row, inner, t_base, t_outer, t_inner)
    g_start = _start(row, inner, g_base, g_outer, g_inner)
    shift = _shift(s_start, VEC, ALIGNED)
    index = tl.arange(0, BLOCK)[None, :]
    held = None
    if CTAS > 1:
        index, held = _shares(shift, classes, BLOCK, CTAS)

    s = _load_tile(student, s_start, s_class, index, shift, readable, y, VEC, ALIGNED, DTYPE, held)
    if teacher is None:
        t = s
        ps = _largest(s, ROWS)
        pt = ps
    else:
        t = _load_tile(teacher, t_start, t_class, index, shift, readable, y, VEC, ALIGNED, DTYPE,
                       held)  # fmt: skip
        if CTAS > 1:
            ps, pt = _largest_two(s, t)
        else:
            ps = _largest(s, ROWS)
            pt = _largest(t, ROWS)
    added, exps = STATS(s - usable(ps), t - usable(pt), k, VARIANT)
    if CTAS > 1:
        sums = _totals_joined(added)
    else:
        sums = _totals(added, ROWS)
    opening = ()
    if REFINE is not None:
        opening = _opened(
            student, s_start, s_class, teacher, t_start, t_class, y, read, sums, ps, pt, params,
            OPEN, DTYPE,
        )  # fmt: skip
        added, exps = REFINE(exps, opening, params, VARIANT)
        if CTAS > 1:
            sums = sums + _totals_joined(added)
        else:
            sums = sums + _totals(added, ROWS)
    coef, at_target = _finish(
        student, s_start, s_class, teacher, t_start, t_class,
        row, rows, y, exists, read, weight, sums, ps, pt,
        target, upstream, losses, row_parts, stats, scale, normalizer, counted, params,
        FINISH, VARIANT, OUTPUTS, DTYPE,
    )  # fmt: skip
    if grad is not None:
        value = GRAD(exps, coef, VARIANT)
        _store_tile(grad, g_start, g_class, index, shift, writable, y, at_target, value,
                    VEC, ALIGNED, held)  # fmt: skip
        if ALIGNED == 2:
            if _has_edges(shift, classes, VEC, ROWS):
                _store_edges(
                    student, s_start, teacher, t_start, grad, g_start, shift, readable, writable,
                    y, ps, pt, k, opening, params, coef, at_target,
                    STATS, REFINE, GRAD, VARIANT, VEC, DTYPE,
                )  # fmt: skip


@triton.jit
def _write_gradient(
    student, s_start, s_class, teacher, t_start, t_class, grad, g_start, g_class,
    first, chunks, shift, readable, writable, y, ps, pt, k, opening, params, coef, at_target,
    STATS: tl.constexpr, REFINE: tl.constexpr, GRAD: tl.constexpr, VARIANT: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of the granules among `chunks` blocks from `first` on, in the order that meets
    what the sweep before it has read last: last block first, or after a second round first one."""
    ms = usable(ps)
    mt = usable(pt)
    for step in tl.range(0, chunks, num_stages=STAGES):
        if REFINE is None:
            chunk = chunks - 1 - step
        else:
            chunk = step
        index = first + chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        s = _load_tile(student, s_start, s_class, index, shift, readable, y,
                       VEC, ALIGNED, DTYPE)  # fmt: skip
        t = s
        if teacher is not None:
            t = _load_tile(teacher, t_start, t_class, index, shift, readable, y,
                           VEC, ALIGNED, DTYPE)  # fmt: skip
        exps = _features(s - ms, t - mt, k, opening, params, STATS, REFINE, VARIANT)
        value = GRAD(exps, coef, VARIANT)
        _store_tile(grad, g_start, g_class, index, shift, writable, y, at_target, value,
                    VEC, ALIGNED)  # fmt: skip


@_kernel
def sweeps(
    student, s_base: "i64", s_outer: "i64", s_inner: "i64", s_class: "i64",
    teacher, t_base: "i64", t_outer: "i64", t_inner: "i64", t_class: "i64",
    grad, g_base: "i64", g_outer: "i64", g_inner: "i64", g_class: "i64",
    target, row_weight, upstream, losses, row_parts, stats, normalizer, counted,
    rows: "i64", inner: "i64", classes: "i32", ignore_index: "i64", scale: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", p4: "fp64",
    p5: "fp64", p6: "fp64", p7: "fp64", p8: "fp64", p9: "fp64",
    STATS: tl.constexpr, MERGE: tl.constexpr, OPEN: tl.constexpr, REFINE: tl.constexpr,
    FINISH: tl.constexpr, GRAD: tl.constexpr,
    VARIANT: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(ROWS == 1)
    k = _scale_of(p0, p5, VARIANT, DTYPE)
    params = _params(p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE)
    for at in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full((), at, tl.int64)
        exists, read, y, weight, readable, writable = _open(
            row, rows, classes, target, row_weight, ignore_index, DTYPE
        )
        s_start = _start(row, inner, s_base, s_outer, s_inner)
        t_start = _start(row, inner, t_base, t_outer, t_inner)
        shift = _shift(s_start, VEC, ALIGNED)
        chunks = tl.cdiv(shift + classes, BLOCK)
        reading = tl.where(read, chunks, 0)
        ps, pt, sums = _sweep(
            student, s_start, s_class, teacher, t_start, t_class, 0, reading,
            shift, readable, y, k, STATS, MERGE, VARIANT, VEC, ALIGNED, DTYPE, BLOCK, STAGES,
        )  # fmt: skip
        opening = ()
        if REFINE is not None:
            opening = _opened(
                student, s_start, s_class, teacher, t_start, t_class, y, read, sums, ps, pt,
                params, OPEN, DTYPE,
            )  # fmt: skip
            sums = _refine(
                student, s_start, s_class, teacher, t_start, t_class, 0, reading, shift, readable,
                y, ps, pt, k, opening, params, sums,
                STATS, REFINE, VARIANT, VEC, ALIGNED, DTYPE, BLOCK, STAGES,
            )  # fmt: skip
        coef, at_target = _finish(
            student, s_start, s_class, teacher, t_start, t_class,
            row, rows, y, exists, read, weight, sums, ps, pt,
            target, upstream, losses, row_parts, stats, scale, normalizer, counted, params,
            FINISH, VARIANT, OUTPUTS, DTYPE,
        )  # fmt: skip
        if grad is not None:
            g_start = _start(row, inner, g_base, g_outer, g_inner)
            _write_gradient(
                student, s_start, s_class, teacher, t_start, t_class, grad, g_start, g_class,
                0, chunks, shift, readable, writable, y, ps, pt, k, opening, params, coef,
                at_target, STATS, REFINE, GRAD, VARIANT, VEC, ALIGNED, DTYPE, BLOCK, STAGES,
            )  # fmt: skip
            if ALIGNED == 2:
                if _has_edges(shift, classes, VEC, ROWS):
                    _store_edges(
                        student, s_start, teacher, t_start, grad, g_start, shift, readable,
                        writable, y, ps, pt, k, opening, params, coef, at_target,
                        STATS, REFINE, GRAD, VARIANT, VEC, DTYPE,
                    )  # fmt: skip


@_kernel
def partial(
    student, s_base: "i64", s_outer: "i64", s_inner: "i64", s_class: "i64",
    teacher, t_base: "i64", t_outer: "i64", t_inner: "i64", t_class: "i64",
    target, row_weight, stats,
    rows: "i64", inner: "i64", classes: "i32", ignore_index: "i64", p0: "fp64", p5: "fp64",
    parts: "i32", part_chunks: "i32",
    STATS: tl.constexpr, MERGE: tl.constexpr, VARIANT: tl.constexpr, DTYPE: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (row, part): statistics of one slice of a row, to stats (rows, parts, width)."""
    row = _rows_of(tl.program_id(0), 1)
    part = tl.program_id(1)
    exists, read, y, _, readable, _ = _open(
        row, rows, classes, target, row_weight, ignore_index, DTYPE
    )
    s_start = _start(row, inner, s_base, s_outer, s_inner)
    t_start = _start(row, inner, t_base, t_outer, t_inner)
    reading = tl.where(read, part_chunks, 0)
    ps, pt, sums = _sweep(
        student, s_start, s_class, teacher, t_start, t_class, part * part_chunks * BLOCK, reading,
        _shift(s_start, VEC, ALIGNED), readable, y, _scale_of(p0, p5, VARIANT, DTYPE),
        STATS, MERGE, VARIANT, VEC, ALIGNED, DTYPE, BLOCK, STAGES,
    )  # fmt: skip
    _store_stats(stats, row * parts + part, exists, ps, pt, sums)


@_kernel
def refined(
    student, s_base: "i64", s_outer: "i64", s_inner: "i64", s_class: "i64",
    teacher, t_base: "i64", t_outer: "i64", t_inner: "i64", t_class: "i64",
    target, row_weight,
    rows: "i64", inner: "i64", classes: "i32", ignore_index: "i64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", p4: "fp64",
    p5: "fp64", p6: "fp64", p7: "fp64", p8: "fp64", p9: "fp64",
    part_stats, parts: "i32", part_chunks: "i32",
    STATS: tl.constexpr, MERGE: tl.constexpr, OPEN: tl.constexpr, REFINE: tl.constexpr,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (row, part): the second round of one slice of a row, behind the sums of the first,
    where no other program reads."""
    row = _rows_of(tl.program_id(0), 1)
    part = tl.program_id(1)
    exists, read, y, _, readable, _ = _open(
        row, rows, classes, target, row_weight, ignore_index, DTYPE
    )
    k = _scale_of(p0, p5, VARIANT, DTYPE)
    params = _params(p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE)
    s_start = _start(row, inner, s_base, s_outer, s_inner)
    t_start = _start(row, inner, t_base, t_outer, t_inner)
    like = _no_sums(k, STATS, VARIANT, DTYPE)
    ps, pt, sums = _merged(part_stats, row, parts, exists, k, like, MERGE, VARIANT)
    opening = _opened(
        student, s_start, s_class, teacher, t_start, t_class, y, read, sums, ps, pt, params,
        OPEN, DTYPE,
    )  # fmt: skip
    more = _refine(
        student, s_start, s_class, teacher, t_start, t_class,
        part * part_chunks * BLOCK, tl.where(read, part_chunks, 0),
        _shift(s_start, VEC, ALIGNED), readable, y, ps, pt, k, opening, params, (),
        STATS, REFINE, VARIANT, VEC, ALIGNED, DTYPE, BLOCK, STAGES,
    )  # fmt: skip
    to = part_stats + (row * parts + part) * WIDTH + (2 + len(like))
    for i in tl.static_range(len(more)):
        tl.store(to + i, more[i], mask=exists)


@_kernel
def gradient(
    student, s_base: "i64", s_outer: "i64", s_inner: "i64", s_class: "i64",
    teacher, t_base: "i64", t_outer: "i64", t_inner: "i64", t_class: "i64",
    grad, g_base: "i64", g_outer: "i64", g_inner: "i64", g_class: "i64",
    target, row_weight, upstream, losses, row_parts, stats, normalizer, counted,
    rows: "i64", inner: "i64", classes: "i32", ignore_index: "i64", scale: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", p4: "fp64",
    p5: "fp64", p6: "fp64", p7: "fp64", p8: "fp64", p9: "fp64",
    part_stats, parts: "i32", part_chunks: "i32",
    STATS: tl.constexpr, MERGE: tl.constexpr, OPEN: tl.constexpr, REFINE: tl.constexpr,
    FINISH: tl.constexpr, GRAD: tl.constexpr,
    VARIANT: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (rows, slice): `parts` statistics of each row become the gradient of a slice."""
    row = _rows_of(tl.program_id(0), ROWS)
    place = tl.program_id(1)
    exists, read, y, weight, readable, writable = _open(
        row, rows, classes, target, row_weight, ignore_index, DTYPE
    )
    k = _scale_of(p0, p5, VARIANT, DTYPE)
    params = _params(p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE)
    s_start = _start(row, inner, s_base, s_outer, s_inner)
    t_start = _start(row, inner, t_base, t_outer, t_inner)
    shift = _shift(s_start, VEC, ALIGNED)
    like = _no_sums(k, STATS, VARIANT, DTYPE)
    ps, pt, sums = _merged(part_stats, row, parts, exists, k, like, MERGE, VARIANT)
    opening = ()
    if REFINE is not None:
        opening = _opened(
            student, s_start, s_class, teacher, t_start, t_class, y, read, sums, ps, pt, params,
            OPEN, DTYPE,
        )  # fmt: skip
        at = part_stats + (2 + len(like))
        more = _no_refined(opening, params, k, STATS, REFINE, VARIANT, DTYPE)
        for part in range(parts):
            more = _add(more, _load_sums(at, row * parts + part, exists, more))
        sums = sums + more
    coef, at_target = _finish(
        student, s_start, s_class, teacher, t_start, t_class,
        row, rows, y, exists & (place == 0), read, weight, sums, ps, pt,
        target, upstream, losses, row_parts, stats, scale, normalizer, counted, params,
        FINISH, VARIANT, OUTPUTS, DTYPE,
    )  # fmt: skip
    if grad is not None:
        g_start = _start(row, inner, g_base, g_outer, g_inner)
        _write_gradient(
            student, s_start, s_class, teacher, t_start, t_class, grad, g_start, g_class,
            place * part_chunks * BLOCK, part_chunks,
            shift, readable, writable, y, ps, pt, k, opening, params, coef, at_target,
            STATS, REFINE, GRAD, VARIANT, VEC, ALIGNED, DTYPE, BLOCK, STAGES,
        )  # fmt: skip
        if ALIGNED == 2:
            if place == 0:
                if _has_edges(shift, classes, VEC, ROWS):
                    _store_edges(
                        student, s_start, teacher, t_start, grad, g_start, shift, readable,
                        writable, y, ps, pt, k, opening, params, coef, at_target,
                        STATS, REFINE, GRAD, VARIANT, VEC, DTYPE,
                    )  # fmt: skip


@_kernel
def scale_in_place(grad, factor, size: "i64", BLOCK: tl.constexpr):
    """Multiplies dense memory by one number; touches nothing when that is 1."""
    by = tl.load(factor)
    if by != 1.0:
        whole = size // 16 * 16  # a mask that does not change within a vector
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(grad + at, mask=at < whole)
        tl.store(grad + at, (value * by).to(grad.dtype.element_ty), mask=at < whole)
        if tl.program_id(0) == 0:
            end = whole + tl.arange(0, 16)
            last = tl.load(grad + end, mask=end < size)
            tl.store(grad + end, (last * by).to(grad.dtype.element_ty), mask=end < size)
