"""From tensors to launches: what is refused, the arguments of the kernels, the operators."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.reference import LARGE_TEMPERATURE

from . import kernels
from .losses import LOSSES, serving, servings
from .planner import Plan, backward_plan, device_of, plan
from .stats import PLAIN, pair_grad, student_grad

assert kernels.WIDTH.value == ops.STATS_WIDTH
_MOST_PARAMS = 10  # p0 to p9 of the kernels; the first is a temperature
assert all(len(x.params) + (not x.temperature) <= _MOST_PARAMS for x in ops.LOSSES.values())
INTERPRETED = not isinstance(kernels.resident, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET was set at import: the kernels then run in NumPy, on CPU tensors."""


# ---- arguments ------------------------------------------------------------------------------


def _place(x: Tensor | None) -> tuple[Any, ...]:
    """An aligned pointer, the elements from it to the first logit, outer, inner and class stride.

    None, for a tensor that is not there, goes with strides that nothing uses.
    """
    if x is None:
        return None, 0, 0, 0, 1
    strides = (0,) * (3 - x.dim()) + x.stride()
    base = x.data_ptr() % 16 // x.itemsize
    if base and x.storage_offset() >= base and x.data_ptr() % x.itemsize == 0:
        x = x.as_strided((1,), (1,), x.storage_offset() - base)
    else:
        base = 0
    return x, base, *strides


def _lie_alike(a: tuple[Any, ...], b: tuple[Any, ...], shape: Sequence[int], vec: int) -> bool:
    """Whether every row of two places has the same shift. A missing one lies as any other."""
    if b[0] is None:
        return True
    moves = [a[1] - b[1], *(a[i + 2] - b[i + 2] for i in range(2) if shape[i] > 1)]
    return b[4] == 1 and not any(move % vec for move in moves)


def _is_aligned(*tensors: Tensor | None) -> bool:
    return all(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_rows(
    name: str, x: Tensor, student: Tensor, dtype: torch.dtype, count: int | None = None
) -> None:
    """A contiguous tensor of `count` elements, else one per row."""
    count = math.prod(student.shape[:-1]) if count is None else count
    _check(
        x.device == student.device
        and x.is_contiguous()
        and x.dtype == dtype
        and x.numel() == count,
        f"{name}: must be a contiguous {dtype} tensor of {count} elements on {student.device}",
    )


def _check_operands(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Tensor,
    classes: int,
) -> None:
    """What memory safety needs; the functions have checked what users can get wrong."""
    _check(loss in LOSSES, f"loss: unknown name {loss!r}")
    entry = ops.LOSSES[loss]
    _check(1 <= student.dim() <= 3, f"student: must have 1 to 3 dimensions, got {student.dim()}")
    _check(student.shape[-1] > 0 and classes >= 0, "student: needs at least one class")
    _check((teacher is not None) == entry.teacher, f"teacher: wrong for {loss!r}")
    for name, x in (("student", student), ("teacher", teacher)):
        if x is not None:
            _check(x.dtype.is_floating_point and x.itemsize > 1, f"{name}: dtype {x.dtype}")
            same = x.shape[:-1] == student.shape[:-1]
            enough = x.shape[-1] >= classes if classes else x.shape[-1] == student.shape[-1]
            _check(same and enough, f"{name}: must have the student's shape, or `classes`")
            _check(x.device == student.device, f"{name}: must be on {student.device}")
    _check(target is not None or not entry.target, f"target: {loss!r} needs one")
    if target is not None:
        _check_rows("target", target, student, torch.int64)
    if row_weight is not None:
        _check_rows("row_weight", row_weight, student, ops.loss_dtype(student, teacher))
    count, rows = len(entry.params), math.prod(student.shape[:-1])
    of_call = params.shape == (count,) and params.device.type == "cpu"
    of_rows = params.shape == (rows, count) and params.device == student.device
    _check(
        params.dtype == torch.float64 and (of_call or of_rows),
        f"params: must be {count} float64 numbers for {loss!r}, on the CPU, or so many of each of"
        f" {rows} rows on {student.device}; got shape {tuple(params.shape)} on {params.device}",
    )


# ---- numbers of each row --------------------------------------------------------------------


def _unknown(loss: str, target: Tensor | None) -> list[float]:
    """What the host knows of numbers that lie on the device, in the place of their values: NaN,
    which is equal to none, so that a loss takes the variant that serves them all.
    """
    # Without a target there is no cross-entropy.
    known = ("ce_weight", "label_smoothing") if target is None else ()
    return [0.0 if name in known else math.nan for name in ops.LOSSES[loss].params]


def _columns(loss: str, params: Tensor) -> list[Tensor]:
    """Of (rows, numbers): a tensor of each number. Temperatures that are none are NaN."""
    names = ops.LOSSES[loss].params
    return [
        torch.where(x > 0.0, x, math.nan) if name.endswith("temperature") else x
        for name, x in zip(names, params.unbind(-1), strict=True)
    ]


def _as_numbers(columns: Sequence[float | Tensor], like: Tensor, taken: Any) -> Tensor:
    """(numbers, rows) as the kernels take them, with a temperature of 0 in rows that are not taken.
    like: a tensor of one number for each row.
    """
    own = [x if isinstance(x, Tensor) else torch.full_like(like, x) for x in columns]
    if taken is not True:
        own[0] = torch.where(taken, own[0], 0.0)
    return torch.stack([*own, *own[:1] * (_MOST_PARAMS - len(own))])


# ---- calls ----------------------------------------------------------------------------------


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class Call:
    """One call of a loss: everything about it that is the same for every kernel."""

    loss: ModuleType
    logits: tuple[Any, ...]  # student and teacher as _place
    grad: Tensor | None
    shape: tuple[int, int, int]  # outer, inner, classes
    target: Tensor | None
    row_weight: Tensor | None
    ignore_index: int
    params: tuple[float, ...]
    columns: tuple[float | Tensor, ...] | None  # numbers of each row; params are then unknown
    large: bool  # the temperature
    outputs: int
    dtype: torch.dtype  # of the loss
    itemsize: int  # the larger of the logits' two
    vec: int
    aligned: int
    device: torch.device
    parts: Tensor  # (2, *rows); empty where they are not asked for
    with_parts: bool
    numbers: Tensor | None = None  # of each row as the kernels take them

    @classmethod
    def of(
        cls,
        loss: str,
        student: Tensor,
        teacher: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        params: Tensor,
        ignore_index: int,
        grad: Tensor | None,
        with_parts: bool = False,
        classes: int = 0,
    ) -> Call:
        _check_operands(loss, student, teacher, target, row_weight, params, classes)
        if classes:
            if grad is not None:
                grad[..., classes:].zero_()
            student, teacher, grad = (
                None if x is None else x[..., :classes] for x in (student, teacher, grad)
            )
        _check(
            ops.LOSSES[loss].parts or not with_parts,
            f"with_parts: {loss!r} has no weights, and so no parts",
        )
        shape = (1,) * (3 - student.dim()) + tuple(student.shape)
        dtype = ops.loss_dtype(student, teacher)
        of_rows = params.dim() == 2
        numbers = _unknown(loss, target) if of_rows else params.tolist()
        columns = _columns(loss, params) if of_rows else None
        if not ops.LOSSES[loss].temperature:
            # The kernels' first parameter is always one.
            for x in (numbers, columns):
                if x is not None:
                    x.insert(0, 1.0)
        module, large = LOSSES[loss], teacher is not None and numbers[0] > LARGE_TEMPERATURE
        if not of_rows:
            module, numbers = serving(module, numbers)
        s, t, g = _place(student), _place(teacher), _place(grad)
        vec = max(16 // x.itemsize for x in (student, teacher, grad) if x is not None)
        loads = s[4] == 1 and _lie_alike(s, t, shape, vec) and _is_aligned(s[0], t[0])
        stores = loads and _lie_alike(s, g, shape, vec) and _is_aligned(g[0])
        return cls(
            module,
            s + t,
            grad,
            shape,
            target,
            row_weight,
            ignore_index,
            tuple(numbers),
            None if columns is None else tuple(columns),
            large,
            ops.LOSSES[loss].outputs,
            dtype,
            max(x.itemsize for x in (student, teacher) if x is not None),
            vec,
            loads + stores,
            student.device,
            ops.empty_parts(student, dtype, with_parts),
            with_parts,
        )

    def served(self) -> Iterator[Call]:
        """The calls that this one is run as. Numbers of each row are on the device, where they stay
        without anyone waiting for them: so there is one for each loss and each precision that they
        may ask for, and its launches leave the rows of the others alone.
        """
        if self.columns is None:
            yield self
            return
        like = next(x for x in self.columns if isinstance(x, Tensor))
        for taken, loss, columns in servings(self.loss, list(self.columns)):
            temperature = columns[0]
            if self.wide or self.logits[5] is None:
                yield replace(self, loss=loss, numbers=_as_numbers(columns, like, taken))
                continue
            large = temperature > LARGE_TEMPERATURE
            for own, which in ((False, ~large), (True, large)):
                numbers = _as_numbers(columns, like, which & taken)
                yield replace(self, loss=loss, numbers=numbers, large=own)

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def variant(self) -> int:
        return int(self.loss.variant(self.with_parts, *self.params))

    @property
    def small(self) -> bool:
        # Moments and logarithms need the registers that would hold a larger tile.
        light = self.loss.grad in (pair_grad, student_grad)
        return self.itemsize == 2 and self.variant == PLAIN and light

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64; numbers of rows stay in the dtype of the loss."""
        return self.dtype == torch.float64 or self.large

    @property
    def heavy(self) -> bool:
        """Whether a class takes more registers than threads of 16 warps have for a tile."""
        return getattr(self.loss, "HEAVY", False)

    @property
    def window(self) -> int:
        """Tile indices of a row, its shift included."""
        return self.shape[2] + (self.vec - 1 if self.aligned and self._shifted else 0)

    @property
    def _shifted(self) -> bool:
        _, base, outer, inner, _ = self.logits[:5]
        outer = outer if self.shape[0] > 1 else 0
        inner = inner if self.shape[1] > 1 else 0
        return bool(base % self.vec or outer % self.vec or inner % self.vec)

    def arguments(self, plan: Plan, **more: Any) -> dict[str, Any]:
        """The kernels' arguments by name; each kernel takes those it has."""
        outer, inner, classes = self.shape
        names = [f"{x}_{y}" for x in "stg" for y in ("base", "outer", "inner", "class")]
        student, teacher, grad = self.logits[:5], self.logits[5:], _place(self.grad)
        places = (*student[1:], *teacher[1:], *grad[1:])
        params = (*self.params, *(1.0,) * (_MOST_PARAMS - len(self.params)))
        return {
            "student": student[0],
            "teacher": teacher[0],
            "grad": grad[0],
            **dict(zip(names, places, strict=True)),
            "target": self.target,
            "row_weight": self.row_weight,
            "rows": outer * inner,
            "inner": inner,
            "classes": classes,
            "ignore_index": self.ignore_index,
            **{f"p{i}": x for i, x in enumerate(params)},
            "numbers": self.numbers,
            "STATS": self.loss.stats,
            "MERGE": self.loss.merge,
            "OPEN": getattr(self.loss, "opening", None),
            "REFINE": getattr(self.loss, "refine", None),
            "FINISH": self.loss.finish,
            "GRAD": self.loss.grad,
            "VARIANT": self.variant,
            "OUTPUTS": self.outputs,
            "DTYPE": tl.float64 if self.wide else tl.float32,
            "VEC": self.vec,
            "ALIGNED": self.aligned,
            "ROWS": plan.rows,
            "BLOCK": plan.block,
            "CTAS": plan.ctas,
            "STAGES": plan.stages,
            "parts": plan.parts,
            "part_chunks": plan.part_chunks,
            "row_parts": self.parts if self.with_parts else None,
            **dict.fromkeys(("upstream", "losses", "stats", "normalizer", "counted")),
            "scale": 1.0,
            **more,
        }


def options(warps: int, ctas: int = 1, amd: bool = torch.version.hip is not None) -> dict[str, Any]:
    """How a kernel is compiled, beside its constants."""
    # Fusion explicitly, because Triton 3.10 changes what is the default.
    chosen = {"num_warps": warps, "enable_fp_fusion": True}
    if ctas > 1:
        chosen["num_ctas"] = ctas
    if (warps == 16 or ctas > 1) and not amd:
        # All that 512 threads can have: ptxas would spill to make room for a second program, which
        # shared memory and the rows in flight do not want. And what two CTAs of 256 can have, where
        # ptxas would take more.
        chosen["maxnreg"] = 128
    return chosen


def launch(
    kernel: Any, grid: tuple[int, ...], warps: int, arguments: dict[str, Any], ctas: int = 1
) -> None:
    """Runs a kernel with those of the arguments that it has."""
    own = {name: arguments[name] for name in kernel.arg_names}
    if INTERPRETED:
        kernel[grid](**own)
    else:
        kernel[grid](**own, **options(warps, ctas))


def _run(call: Call, losses: Tensor, stats: Tensor | None, **reduction: Any) -> None:
    """Losses, and the gradient if the call has one."""
    for own in call.served() if call.rows else ():
        _run_served(own, losses, stats, **reduction)


def _run_served(call: Call, losses: Tensor, stats: Tensor | None, **reduction: Any) -> None:
    """In the plan's regime."""
    device = device_of(call.device)
    chosen = plan(
        call.rows, call.window, device, small=call.small, wide=call.wide, heavy=call.heavy
    )
    arguments = call.arguments(chosen, losses=losses, stats=stats, **reduction)
    if chosen.regime == "resident":
        launch(kernels.resident, (chosen.programs,), chosen.warps, arguments, chosen.ctas)
    elif chosen.regime == "sweeps":
        launch(kernels.sweeps, (chosen.programs,), chosen.warps, arguments)
    else:
        dtype = torch.float64 if call.wide else call.dtype
        scratch = losses.new_empty((call.rows, chosen.parts, ops.STATS_WIDTH), dtype=dtype)
        grid = (chosen.programs, chosen.parts)  # in this order: only the first may exceed 65535
        launch(kernels.partial, grid, chosen.warps, {**arguments, "stats": scratch})
        arguments["split_stats"] = scratch
        if arguments["REFINE"] is not None:
            launch(kernels.refined, grid, chosen.warps, arguments)
        grid = grid if call.grad is not None else (chosen.programs, 1)
        launch(kernels.gradient, grid, chosen.warps, arguments)


# ---- the operators --------------------------------------------------------------------------


def forward(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Tensor,
    ignore_index: int,
    with_parts: bool = False,
    classes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (student, teacher, target, row_weight)
    call = Call.of(loss, *inputs, params, ignore_index, None, with_parts, classes)
    leading = () if call.outputs == 1 else (call.outputs,)
    rows = student.new_empty(leading + student.shape[:-1], dtype=call.dtype)
    stats = student.new_empty((call.rows, ops.STATS_WIDTH), dtype=call.dtype)
    with _on(student.device):
        _run(call, rows, stats)
    return rows, stats, call.parts


def backward(
    loss: str,
    grad_rows: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    stats: Tensor,
    params: Tensor,
    ignore_index: int,
    classes: int = 0,
) -> Tensor:
    grad = torch.empty_like(student)
    inputs = (student, teacher, target, row_weight)
    call = Call.of(loss, *inputs, params, ignore_index, grad, classes=classes)
    if call.rows == 0:
        return grad
    grad_rows = grad_rows.contiguous()
    _check_rows("grad_rows", grad_rows, student, call.dtype, call.outputs * call.rows)
    _check_rows("stats", stats, student, call.dtype, ops.STATS_WIDTH * call.rows)
    with _on(student.device):
        for own in call.served():
            chosen = backward_plan(own.rows, own.window, wide=own.wide)
            arguments = own.arguments(chosen, upstream=grad_rows, split_stats=stats, parts=1)
            launch(kernels.gradient, (chosen.programs, chosen.parts), chosen.warps, arguments)
    return grad


def reduced(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    mean: bool,
    params: Tensor,
    ignore_index: int,
    with_grad: bool,
    with_parts: bool = False,
    classes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(student) if with_grad else None
    inputs = (student, teacher, target, row_weight)
    call = Call.of(loss, *inputs, params, ignore_index, grad, with_parts, classes)
    _check(call.outputs == 1, f"loss: {loss!r} has several outputs, none to reduce")
    scale = 1.0
    if normalizer is not None:
        _check(
            normalizer.numel() == 1 and normalizer.is_floating_point(),
            "normalizer: must be one floating point number",
        )
        # In the interpreter one in the dtype of the loss stands for one on the device.
        stands_for_device = student.device.type == "cpu" and normalizer.dtype == call.dtype
        if normalizer.device.type == "cpu" and not stands_for_device:
            number = normalizer.item()
            scale, normalizer = 1.0 / number if number else math.inf, None
        else:
            _check_rows("normalizer", normalizer, student, call.dtype, 1)
    counted = None
    if mean and target is not None:
        counted = (target != ignore_index).sum()
    elif mean:
        scale /= max(call.rows, 1)
    rows = student.new_empty((call.rows,), dtype=call.dtype)
    with _on(student.device):
        _run(call, rows, None, scale=scale, normalizer=normalizer, counted=counted)
    # A sum of few numbers, in float64 because that costs nothing.
    total = rows.sum(dtype=torch.float64).to(call.dtype)
    return total, student.new_empty((0,)) if grad is None else grad, call.parts


def scale_(grad: Tensor, factor: Tensor) -> None:
    size = 1 + sum((n - 1) * stride for n, stride in zip(grad.shape, grad.stride(), strict=True))
    if grad.numel() and size != grad.numel():  # not dense; no gradient of ours is like that
        grad.mul_(factor)
    elif grad.numel():
        block = 4096
        arguments = {"grad": grad, "factor": factor, "size": grad.numel(), "BLOCK": block}
        with _on(grad.device):
            launch(kernels.scale_in_place, (triton.cdiv(grad.numel(), block),), 8, arguments)


for _device_type in ("cuda", *(("cpu",) if INTERPRETED else ())):
    ops.TRITON.implement(
        _device_type, forward=forward, backward=backward, reduced=reduced, scale_=scale_
    )
