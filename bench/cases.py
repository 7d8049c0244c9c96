"""What is measured: the losses, what each must move and compute, shapes, and which cases fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

import kdkernels
from bench import eager, plain

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student, teacher, target -> mean over the rows

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DIRECTIONS = ("forward", "backward", "both")
CHUNK = 1 << 22  # logits of the truth, in float64, at a time
# From dense tensors to views (rows, classes) of them, by their shape.
LAYOUTS: dict[str, Callable[[Callable[..., Tensor], int, int], Tensor]] = {
    "dense": lambda make, rows, classes: make(rows, classes),
    # The gradient, which is dense, does not lie as the logits do.
    "sliced": lambda make, rows, classes: make(rows, classes + 1)[:, :-1],
    "classes-first": lambda make, rows, classes: make(classes, rows).t(),  # as in images
}
IGNORED = -100  # the target of a row that does not count
TEACHER_TEMPERATURE = 2.0  # of KD with two
TEMPERATURE = 4.0  # of KD, DKD and AEKT, as in `eager`; NKD runs at its own default of 1


# ------------------------------------------------------------------------------------------- losses
@dataclass(frozen=True)
class Spec:
    """A loss, and the least that it costs."""

    title: str
    eager: Loss
    # kdkernels' function with the parameters of `eager`: (student, teacher, target, **options).
    fused: Callable[..., Tensor]
    plain: Loss | None = None  # the fastest plain formula; None: that is `eager`
    tensors: int = 2  # of logits that it reads: the teacher's or not
    exponentials: int = 2  # of a pair of logits; a logarithm counts as one
    target: bool = True  # needs one; without, the target only says which rows count
    coupled: bool = False  # rows weigh by the mean confidence of all rows


def _no_teacher(function: Callable[..., Tensor], student, teacher, target, **options) -> Tensor:
    return function(student, target, **options)


_KD = partial(kdkernels.kd_loss, temperature=TEMPERATURE)
LOSSES: dict[str, Spec] = {
    "kd": Spec("KD", eager.kd, _KD, plain.kd, target=False),
    "kd_ce": Spec("KD + CE", eager.kd_ce, partial(_KD, ce_weight=1.0), plain.kd_ce, exponentials=3),
    "kd_two_t": Spec(
        "KD, two T",
        partial(eager.kd, teacher_temperature=TEACHER_TEMPERATURE),
        partial(_KD, teacher_temperature=TEACHER_TEMPERATURE),
        partial(plain.kd, teacher_temperature=TEACHER_TEMPERATURE),
        target=False,
    ),
    "dkd": Spec("DKD", eager.dkd, partial(kdkernels.dkd_loss, temperature=TEMPERATURE), plain.dkd),
    "nkd": Spec("NKD", eager.nkd, kdkernels.nkd_loss, plain.nkd),
    "aekt": Spec(
        "AEKT", eager.aekt, partial(kdkernels.aekt_loss, temperature=TEMPERATURE), plain.aekt
    ),
    "tf_nkd": Spec(
        "tf-NKD",
        eager.tf_nkd,
        partial(_no_teacher, kdkernels.tf_nkd_loss),
        tensors=1,
        exponentials=1,
        coupled=True,
    ),
    # The floor that all losses share, and what trainers of language models use, at T = 1.
    "ce": Spec(
        "CE",
        eager.cross_entropy,
        partial(_no_teacher, kdkernels.cross_entropy_loss),
        tensors=1,
        exponentials=1,
    ),
    "reverse_kl": Spec(
        "reverse KL", eager.reverse_kl, kdkernels.reverse_kl_loss, plain.reverse_kl, target=False
    ),
    "mixed_kl": Spec(
        "mixed KL", eager.mixed_kl, kdkernels.mixed_kl_loss, plain.mixed_kl, target=False
    ),
    "tvd": Spec("TVD", eager.tvd, kdkernels.tvd_loss, target=False),
    "skew_kl": Spec(
        "skew KL",
        eager.skew_kl,
        kdkernels.skew_kl_loss,
        plain.skew_kl,
        exponentials=3,
        target=False,
    ),
    "skew_reverse_kl": Spec(
        "skew reverse KL",
        eager.skew_reverse_kl,
        kdkernels.skew_reverse_kl_loss,
        plain.skew_reverse_kl,
        exponentials=3,
        target=False,
    ),
    "jsd": Spec("JSD", eager.jsd, kdkernels.jsd_loss, plain.jsd, exponentials=3, target=False),
    "ab": Spec("AB", eager.ab, kdkernels.ab_loss, plain.ab, exponentials=6, target=False),
}


# -------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """A loss on logits (rows, classes) of a dtype and layout, in one direction.

    `both` is the mean over the rows and its gradient, `forward` the mean without a graph,
    `backward` the gradient from a finished forward.
    """

    loss: str
    rows: int
    classes: int
    dtype: str = "float32"
    layout: str = "dense"
    direction: str = "both"
    ignored: int = 0  # percent of the rows
    providers: tuple[str, ...] | None = None  # only these of those that are asked for

    @property
    def spec(self) -> Spec:
        return LOSSES[self.loss]

    @property
    def shape(self) -> str:
        layout = "" if self.layout == "dense" else f":{self.layout}"
        return f"{self.rows}x{self.classes}{layout}"

    def __str__(self) -> str:
        direction = "" if self.direction == "both" else f" {self.direction}"
        ignored = f", {self.ignored} % ignored" if self.ignored else ""
        return f"{self.spec.title} {self.shape} {self.dtype}{direction}{ignored}"

    @property
    def inputs(self) -> tuple[int, int, str, str, int]:
        """What the inputs depend on."""
        return self.rows, self.classes, self.dtype, self.layout, self.ignored

    @property
    def counted(self) -> int:
        """Rows that are not ignored."""
        return self.rows - self.rows * self.ignored // 100

    @property
    def tensor_bytes(self) -> int:
        return self.rows * self.classes * DTYPES[self.dtype].itemsize

    @property
    def passes(self) -> int:
        """Reads and writes of all of a tensor's logits, in the unit NV, at the least."""
        return self.spec.tensors + (self.direction != "forward")

    @property
    def logit_bytes(self) -> int:
        """Bytes of logits in and gradient out; of ignored rows only the gradient, zeros."""
        ignored = (self.rows - self.counted) * self.classes * DTYPES[self.dtype].itemsize
        return self.passes * self.tensor_bytes - self.spec.tensors * ignored

    @property
    def bytes(self) -> int:
        """Bytes that must cross memory: those of the logits, and one target per row."""
        return self.logit_bytes + (8 * self.rows if self.takes_target else 0)

    @property
    def takes_target(self) -> bool:
        return self.spec.target or self.ignored > 0

    @property
    def exponentials(self) -> int:
        """Exponentials and logarithms of classes that are computed, each once."""
        return self.spec.exponentials * self.counted * self.classes

    def memory(self, sets: int, *, fused: bool) -> int:
        """Bytes that measuring it may take: inputs, the copy's result, a call, and the truth.

        Of what is not fused, eager NKD holds most: 9.25 tensors of float32 at a time, measured with
        bfloat16 logits. The truth is computed in chunks of float64, of the rows that count.
        """
        wide = max(4, DTYPES[self.dtype].itemsize)
        call = self.tensor_bytes if fused else 10 * wide * self.rows * self.classes
        truth = 10 * 8 * max(CHUNK, self.classes) + (2 * self.tensor_bytes if self.ignored else 0)
        return (2 * sets + 1) * self.tensor_bytes + max(call, truth)


def grid(
    losses: Iterable[str],
    shapes: Iterable[tuple[int, int, str]],
    dtypes: Iterable[str],
    directions: Iterable[str] = ("both",),
    providers: tuple[str, ...] | None = None,
    ignored: Iterable[int] = (0,),
) -> list[Case]:
    """All combinations, ordered so that cases of the same inputs follow one another."""
    return [
        Case(loss, *shape[:2], dtype, shape[2], direction, percent, providers)
        for shape, dtype, percent, loss, direction in product(
            shapes, dtypes, ignored, losses, directions
        )
    ]


def dense(*shapes: tuple[int, int]) -> list[tuple[int, int, str]]:
    return [(*shape, "dense") for shape in shapes]


OURS = ("kd", "dkd", "nkd", "aekt", "kd_ce", "tf_nkd")
DIVERGENCES = (
    "kd_two_t", "reverse_kl", "mixed_kl", "tvd", "skew_kl", "skew_reverse_kl", "jsd", "ab",
)  # fmt: skip
# What each kernel of the CUDA backend is for, in bfloat16 on an H200: csrc/cuda/plan.h.
REGIMES = [
    *dense((65536, 10)),  # lanes: 8
    *dense((4096, 100)),  # 16
    *dense((16384, 200)),  # 32
    *dense((1024, 1000)),  # block
    *dense((4096, 4000)),
    (4096, 4000, "sliced"),  # sweeps
    *dense((4096, 10007)),  # cluster of 1, two per multiprocessor
    *dense((4096, 32000)),  # of 2
    *dense((4096, 50257)),  # of 2, parts longer than registers hold
    (4096, 50257, "sliced"),
    *dense((4096, 128256)),  # of 8
    *dense((4096, 151936)),
    *dense((4096, 151669)),
    *dense((4096, 262144)),  # of 16
    *dense((8, 128256)),  # of 16, few rows
    (65536, 150, "classes-first"),  # strided
    (524288, 19, "classes-first"),  # the pixels of an image
]
# A batch of 8192 tokens at the vocabularies of language models, and one of more than 2^31 logits.
BATCHES = dense(
    (8192, 32000), (8192, 50257), (8192, 128256), (8192, 151936), (8192, 262144), (32768, 151936)
)
FEW_ROWS = dense((1, 151936), (64, 151936), (512, 151936))
FLOOR = dense((32768, 32768), (16384, 131072), (8192, 262144))  # where quack shows its figures


UNCOMPILED = ("cuda", "triton", "cpu", "eager", "plain", "liger", "flash_attn", "quack")


def _default(device: str) -> list[Case]:
    """The most telling cases first: a run may have no time for all."""
    uncompiled = UNCOMPILED
    if device == "cuda":
        large = dense((4096, 128256))
        # torch.compile takes seconds for every case, so that most of them are without it.
        cases = [
            *grid(("kd", "dkd", "nkd", "ce", *DIVERGENCES), large, ["bfloat16"]),
            *grid(("kd",), dense((4096, 32000), (1024, 1000), (4096, 100)), ["bfloat16"]),
            *grid(("kd",), REGIMES, ["bfloat16"], providers=uncompiled),
            *grid(("dkd", "nkd"), dense((1024, 1000), (4096, 100)), ["bfloat16"]),
            *grid(("kd",), large, ["bfloat16"], DIRECTIONS, uncompiled),
            *grid(("kd",), large, ["float32", "float16"], providers=uncompiled),
            *grid(("aekt", "kd_ce", "tf_nkd"), large, ["bfloat16"]),
            *grid(("kd",), BATCHES, ["bfloat16"], providers=uncompiled),
            *grid(("kd",), BATCHES[2:3], ["bfloat16"], providers=uncompiled, ignored=(50, 90)),
            *grid(("ce",), FLOOR, ["bfloat16"], providers=uncompiled),
            *grid(("nkd",), REGIMES, ["bfloat16"], providers=uncompiled),
            *grid(("kd",), FEW_ROWS, ["bfloat16"], providers=uncompiled),
        ]
    else:
        large, small = dense((512, 32000), (128, 128256)), dense((1024, 1000), (4096, 100))
        more = dense((65536, 10), (1024, 10007), (256, 50257), (64, 262144))
        cases = [
            *grid(OURS, large + small, ["float32", "bfloat16"]),
            *grid(("kd", "nkd"), more, ["float32"], providers=uncompiled),
            *grid(("kd",), large[1:] + small[:1], ["float32"], DIRECTIONS, uncompiled),
            *grid(("kd",), large[1:], ["float32"], providers=uncompiled, ignored=(50, 90)),
            *grid((*DIVERGENCES, "ce"), large + small[:1], ["float32"]),
            *grid(DIVERGENCES, large[:1], ["bfloat16"]),
        ]
    # A case that stands in two lists is measured once, where it comes first.
    seen: dict[Case, Case] = {}
    for case in cases:
        seen.setdefault(replace(case, providers=None), case)
    return list(seen.values())


def _quick(device: str) -> list[Case]:
    """Small shapes first, whose baselines take little time. Of what is compiled, which takes
    longest, only the fastest formula, and KD's.
    """
    if device == "cuda":
        shapes, dtype = dense((1024, 1000), (4096, 32000)), "bfloat16"
    else:
        shapes, dtype = dense((4096, 100), (1024, 1000), (512, 32000)), "float32"
    fewer = (*UNCOMPILED, "plain_compile")
    return [
        case
        for shape in shapes
        for case in (
            *grid(("kd",), [shape], [dtype], providers=None if shape == shapes[-1] else fewer),
            *grid(("dkd", "nkd"), [shape], [dtype], providers=UNCOMPILED),
        )
    ]


def choose(
    device: str,
    *,
    quick: bool = False,
    losses: Sequence[str] = (),
    shapes: Sequence[tuple[int, int, str]] = (),
    dtypes: Sequence[str] = (),
    directions: Sequence[str] = (),
    ignored: Sequence[int] = (),
) -> list[Case]:
    """The cases of a run.

    The device's default list, or the quick one, of which `losses` picks some. Where anything else
    is asked for: the product of that and, else, of the quick list.
    """
    if not (shapes or dtypes or directions or ignored):
        listed = _quick(device) if quick else _default(device)
        picked = [case for case in listed if case.loss in (losses or LOSSES)]
        if picked:
            return picked
    basis = _quick(device)
    return grid(
        losses or dict.fromkeys(case.loss for case in basis),
        shapes or dict.fromkeys((case.rows, case.classes, case.layout) for case in basis),
        dtypes or dict.fromkeys(case.dtype for case in basis),
        directions or ("both",),
        ignored=ignored or (0,),
    )


# -------------------------------------------------------------------------------------------- truth
CHECKED_IGNORED = 8


def checked_rows(rows: int, classes: int) -> list[int]:
    """Rows whose gradient is compared: all that a chunk holds, spread over all there are."""
    count = min(rows, max(1, CHUNK // classes))
    return [i * (rows - 1) // max(1, count - 1) for i in range(count)]


def truth(
    loss: str, student: Tensor, teacher: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    """In float64: the mean over the rows that count, the gradient of some rows, and those rows.

    kdkernels' reference, which its tests hold against the papers' formulas. Gradients are those of
    `checked_rows` and of ignored rows.
    """
    counted = (target != IGNORED).nonzero().flatten()
    if len(counted) < len(target):
        mean, gradient, some = truth(loss, student[counted], teacher[counted], target[counted])
        ignored = (target == IGNORED).nonzero().flatten()[:CHECKED_IGNORED]
        zeros = gradient.new_zeros(len(ignored), student.shape[1])
        return mean, torch.cat([gradient, zeros]), counted[some].tolist() + ignored.tolist()
    spec, rows = LOSSES[loss], len(target)
    step = max(1, CHUNK // student.shape[1])
    chunks = [slice(start, start + step) for start in range(0, rows, step)]
    function = partial(spec.fused, backend="reference")
    if spec.coupled:
        confidences = (
            student[part].double().softmax(1).gather(1, target[part, None]) for part in chunks
        )
        function = partial(function, mean_confidence=sum(x.sum() for x in confidences) / rows)
    with torch.no_grad():
        total = sum(
            function(student[part].double(), teacher[part].double(), target[part])
            * len(target[part])
            for part in chunks
        )
    some = checked_rows(rows, student.shape[1])
    wide = student[some].detach().double().requires_grad_()
    value = function(wide, teacher[some].double(), target[some])
    (gradient,) = torch.autograd.grad(value, wide)
    return total / rows, gradient * (len(some) / rows), some
