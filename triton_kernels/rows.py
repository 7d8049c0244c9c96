"""What the kernels know of a row beside its logits: sums as tuples, its target, weight and upstream
gradient, statistics and results in memory. One number per row is `(ROWS, 1)`, or a scalar.
"""

import triton
import triton.language as tl

from .stats import INF

WIDTH = tl.constexpr(10)  # of a row of statistics, kdkernels.ops.STATS_WIDTH
REFINED = tl.constexpr(2)  # sums of a second round, the last in such a row


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
def _open(
    row, rows, classes, target, row_weight, ignore_index, numbers, DTYPE: tl.constexpr
):  # fmt: skip
    """Whether rows exist and are read, their target (-1: none), weight (NaN: bad target), and how
    many classes are read and written. For this launch the rows of another one do not exist."""
    exists = row < rows
    if numbers is not None:
        exists = _are_taken(numbers, row, rows)
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
def _number(numbers, i: tl.constexpr, row, rows, read):
    """The i-th number of each row; 1 where a row is not read, whose number may be anything."""
    return tl.load(numbers + i * rows + row, mask=read, other=1.0)


@triton.jit
def _are_taken(numbers, row, rows):
    """Whether rows are this launch's: a temperature of 0 says that they are another one's."""
    return tl.load(numbers + row, mask=row < rows, other=0.0) != 0.0


@triton.jit
def _none_is_taken(numbers, row, rows, ROWS: tl.constexpr):
    taken = _are_taken(numbers, row, rows)
    if ROWS == 1:
        return taken == 0
    else:
        return tl.max(taken.to(tl.int32)) == 0


@triton.jit
def _params(
    numbers, row, rows, read, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE: tl.constexpr
):  # fmt: skip
    """Those of the call, or of each row."""
    if numbers is not None:
        params = ()
        for i in tl.static_range(10):
            params = params + (_number(numbers, i, row, rows, read).to(DTYPE),)
        return params
    else:
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
def _scale_of(numbers, row, rows, read, p0, p5, VARIANT: tl.constexpr, DTYPE: tl.constexpr):
    """log2(e) / T; with a temperature of the teacher's own, p5, that one's, too, and their ratio.
    In float64, because a temperature rounded first would be another one."""
    if numbers is not None:
        p0 = _number(numbers, 0, row, rows, read)
        k = (1.4426950408889634 / p0).to(DTYPE)
        if VARIANT >= 4:
            p5 = _number(numbers, 5, row, rows, read)
            return k, (1.4426950408889634 / p5).to(DTYPE), (p0 / p5).to(DTYPE)
        else:
            return k
    else:
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
def _store_stats(stats, row, exists, ps, pt, sums, REFINE: tl.constexpr):
    """Two pivots, the sums, and zeros between them and those of a second round, which are last:
    there every variant of a loss finds what another one has left."""
    LATE: tl.constexpr = 0 if REFINE is None else REFINED
    FIRST: tl.constexpr = len(sums) - LATE
    if stats is not None:
        to = stats + row * WIDTH
        tl.store(to, ps, mask=exists)
        tl.store(to + 1, pt, mask=exists)
        for i in tl.static_range(WIDTH - 2):
            if i < FIRST:
                tl.store(to + 2 + i, sums[i], mask=exists)
            elif i < WIDTH - 2 - LATE:
                tl.store(to + 2 + i, 0.0, mask=exists)
            else:
                tl.store(to + 2 + i, sums[FIRST + i - (WIDTH - 2 - LATE)], mask=exists)


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
    REFINE: tl.constexpr, FINISH: tl.constexpr, VARIANT: tl.constexpr, OUTPUTS: tl.constexpr,
    DTYPE: tl.constexpr,
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
    _store_stats(stats, row, stored, ps, pt, sums, REFINE)
    return _only(read, coef), at_target
