"""The generic kernels, the same for every loss. tiles.py has the loads and stores of logits.

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

p0 to p9 are the numbers of a call. Instead of them `numbers` may hold those of each row, (10, rows)
in float64: rows whose temperature is 0 there are another launch's, and neither read nor written.

A loss of two rounds has REFINE and OPEN (stats.py), None otherwise. Its second round takes resident
programs no load, sweeps one more sweep. Its sums are the last of a row of statistics, which is all
that a backward pass needs to know.
"""

import triton
import triton.language as tl

from .rows import (
    REFINED,
    WIDTH,
    _add,
    _features,
    _finish,
    _largest,
    _largest_two,
    _load_sums,
    _no_refined,
    _no_sums,
    _none_is_taken,
    _open,
    _opened,
    _params,
    _rows_of,
    _scale_of,
    _start,
    _store_stats,
    _totals,
    _totals_joined,
)
from .stats import usable
from .tiles import (
    _has_edges,
    _load_tile,
    _merged,
    _refine,
    _shares,
    _shift,
    _store_edges,
    _store_tile,
    _sweep,
)


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


@_kernel
def resident(
    student, s_base: "i64", s_outer: "i64", s_inner: "i64", s_class: "i64",
    teacher, t_base: "i64", t_outer: "i64", t_inner: "i64", t_class: "i64",
    grad, g_base: "i64", g_outer: "i64", g_inner: "i64", g_class: "i64",
    target, row_weight, upstream, losses, row_parts, stats, normalizer, counted,
    rows: "i64", inner: "i64", classes: "i32", ignore_index: "i64", scale: "fp64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", p4: "fp64",
    p5: "fp64", p6: "fp64", p7: "fp64", p8: "fp64", p9: "fp64", numbers,
    STATS: tl.constexpr, MERGE: tl.constexpr, OPEN: tl.constexpr, REFINE: tl.constexpr,
    FINISH: tl.constexpr, GRAD: tl.constexpr,
    VARIANT: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CTAS: tl.constexpr,
):  # fmt: skip
    tl.static_assert(ROWS == 1 or CTAS == 1)
    row = _rows_of(tl.program_id(0), ROWS)
    if numbers is not None:
        if _none_is_taken(numbers, row, rows, ROWS):
            return
    exists, read, y, weight, readable, writable = _open(
        row, rows, classes, target, row_weight, ignore_index, numbers, DTYPE
    )
    k = _scale_of(numbers, row, rows, read, p0, p5, VARIANT, DTYPE)
    params = _params(
        numbers, row, rows, read, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE
    )  # fmt: skip
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
        REFINE, FINISH, VARIANT, OUTPUTS, DTYPE,
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
    p5: "fp64", p6: "fp64", p7: "fp64", p8: "fp64", p9: "fp64", numbers,
    STATS: tl.constexpr, MERGE: tl.constexpr, OPEN: tl.constexpr, REFINE: tl.constexpr,
    FINISH: tl.constexpr, GRAD: tl.constexpr,
    VARIANT: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tl.static_assert(ROWS == 1)
    if numbers is None:
        k = _scale_of(None, None, rows, None, p0, p5, VARIANT, DTYPE)
        params = _params(
            None, None, rows, None, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE
        )  # fmt: skip
    for at in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full((), at, tl.int64)
        exists, read, y, weight, readable, writable = _open(
            row, rows, classes, target, row_weight, ignore_index, numbers, DTYPE
        )
        s_start = _start(row, inner, s_base, s_outer, s_inner)
        t_start = _start(row, inner, t_base, t_outer, t_inner)
        shift = _shift(s_start, VEC, ALIGNED)
        chunks = tl.cdiv(shift + classes, BLOCK)
        if numbers is not None:
            k = _scale_of(numbers, row, rows, read, p0, p5, VARIANT, DTYPE)
            params = _params(
                numbers, row, rows, read, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE
            )  # fmt: skip
            chunks = tl.where(exists, chunks, 0)
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
            REFINE, FINISH, VARIANT, OUTPUTS, DTYPE,
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
    rows: "i64", inner: "i64", classes: "i32", ignore_index: "i64",
    p0: "fp64", p5: "fp64", numbers, parts: "i32", part_chunks: "i32",
    STATS: tl.constexpr, MERGE: tl.constexpr, VARIANT: tl.constexpr, DTYPE: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (row, part): statistics of one slice of a row, to stats (rows, parts, width)."""
    row = _rows_of(tl.program_id(0), 1)
    part = tl.program_id(1)
    if numbers is not None:
        if _none_is_taken(numbers, row, rows, 1):
            return
    exists, read, y, _, readable, _ = _open(
        row, rows, classes, target, row_weight, ignore_index, numbers, DTYPE
    )
    s_start = _start(row, inner, s_base, s_outer, s_inner)
    t_start = _start(row, inner, t_base, t_outer, t_inner)
    reading = tl.where(read, part_chunks, 0)
    ps, pt, sums = _sweep(
        student, s_start, s_class, teacher, t_start, t_class, part * part_chunks * BLOCK, reading,
        _shift(s_start, VEC, ALIGNED), readable, y,
        _scale_of(numbers, row, rows, read, p0, p5, VARIANT, DTYPE),
        STATS, MERGE, VARIANT, VEC, ALIGNED, DTYPE, BLOCK, STAGES,
    )  # fmt: skip
    _store_stats(stats, row * parts + part, exists, ps, pt, sums, None)


@_kernel
def refined(
    student, s_base: "i64", s_outer: "i64", s_inner: "i64", s_class: "i64",
    teacher, t_base: "i64", t_outer: "i64", t_inner: "i64", t_class: "i64",
    target, row_weight,
    rows: "i64", inner: "i64", classes: "i32", ignore_index: "i64",
    p0: "fp64", p1: "fp64", p2: "fp64", p3: "fp64", p4: "fp64",
    p5: "fp64", p6: "fp64", p7: "fp64", p8: "fp64", p9: "fp64", numbers,
    split_stats, parts: "i32", part_chunks: "i32",
    STATS: tl.constexpr, MERGE: tl.constexpr, OPEN: tl.constexpr, REFINE: tl.constexpr,
    VARIANT: tl.constexpr, DTYPE: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (row, part): the second round of one slice of a row, behind the sums of the first,
    where no other program reads."""
    row = _rows_of(tl.program_id(0), 1)
    part = tl.program_id(1)
    if numbers is not None:
        if _none_is_taken(numbers, row, rows, 1):
            return
    exists, read, y, _, readable, _ = _open(
        row, rows, classes, target, row_weight, ignore_index, numbers, DTYPE
    )
    k = _scale_of(numbers, row, rows, read, p0, p5, VARIANT, DTYPE)
    params = _params(
        numbers, row, rows, read, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE
    )  # fmt: skip
    s_start = _start(row, inner, s_base, s_outer, s_inner)
    t_start = _start(row, inner, t_base, t_outer, t_inner)
    like = _no_sums(k, STATS, VARIANT, DTYPE)
    ps, pt, sums = _merged(split_stats, row, parts, exists, k, like, MERGE, VARIANT)
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
    to = split_stats + (row * parts + part) * WIDTH + (WIDTH - REFINED)
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
    p5: "fp64", p6: "fp64", p7: "fp64", p8: "fp64", p9: "fp64", numbers,
    split_stats, parts: "i32", part_chunks: "i32",
    STATS: tl.constexpr, MERGE: tl.constexpr, OPEN: tl.constexpr, REFINE: tl.constexpr,
    FINISH: tl.constexpr, GRAD: tl.constexpr,
    VARIANT: tl.constexpr, OUTPUTS: tl.constexpr, DTYPE: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (rows, slice): `parts` statistics of each row become the gradient of a slice."""
    row = _rows_of(tl.program_id(0), ROWS)
    place = tl.program_id(1)
    if numbers is not None:
        if _none_is_taken(numbers, row, rows, ROWS):
            return
    exists, read, y, weight, readable, writable = _open(
        row, rows, classes, target, row_weight, ignore_index, numbers, DTYPE
    )
    k = _scale_of(numbers, row, rows, read, p0, p5, VARIANT, DTYPE)
    params = _params(
        numbers, row, rows, read, p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, DTYPE
    )  # fmt: skip
    s_start = _start(row, inner, s_base, s_outer, s_inner)
    t_start = _start(row, inner, t_base, t_outer, t_inner)
    shift = _shift(s_start, VEC, ALIGNED)
    like = _no_sums(k, STATS, VARIANT, DTYPE)
    ps, pt, sums = _merged(split_stats, row, parts, exists, k, like, MERGE, VARIANT)
    opening = ()
    if REFINE is not None:
        opening = _opened(
            student, s_start, s_class, teacher, t_start, t_class, y, read, sums, ps, pt, params,
            OPEN, DTYPE,
        )  # fmt: skip
        at = split_stats + (WIDTH - REFINED)
        more = _no_refined(opening, params, k, STATS, REFINE, VARIANT, DTYPE)
        for part in range(parts):
            more = _add(more, _load_sums(at, row * parts + part, exists, more))
        sums = sums + more
    coef, at_target = _finish(
        student, s_start, s_class, teacher, t_start, t_class,
        row, rows, y, exists & (place == 0), read, weight, sums, ps, pt,
        target, upstream, losses, row_parts, stats, scale, normalizer, counted, params,
        REFINE, FINISH, VARIANT, OUTPUTS, DTYPE,
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
