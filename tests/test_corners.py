"""Corners of the arguments: masks, weights, shifted sequences, parts, divisors of 0, DTensors."""

import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from cases import (
    BF16,
    CPU,
    F16,
    F32,
    F64,
    IGNORED,
    INF,
    MAIN_SCALARS,
    SOME,
    USUAL,
    assert_same,
    evaluate,
    make_inputs,
    needs_cpu,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import kdkernels
from kdkernels import backend

NAN = float("nan")
ROWS, CLASSES = 6, 5
BACKENDS = ("cpu", "reference") if CPU.available else ("reference",)
REDUCTIONS = ("mean", "sum", "batchmean", "none")
every_backend = pytest.mark.parametrize("name", BACKENDS)
every_loss = pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
every_weighted_loss = pytest.mark.parametrize(
    "case", [case for case in MAIN_SCALARS if case.facts.weights], ids=str
)


def close(ours, theirs, **options) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, **options)


# ---- rows that do not count -----------------------------------------------------------------


@every_backend
@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mask_makes_ignored_rows(case, reduction, name):
    student, teacher, target = make_inputs("normal", ROWS, CLASSES)
    mask = torch.tensor([True, False, True, True, False, True])
    options = {"reduction": reduction, "backend": name}
    hidden = torch.where(mask[:, None], student, NAN)
    ours = evaluate(case, hidden, teacher, target, row_weight=mask, **options)
    theirs = evaluate(case, student, teacher, target.where(mask, IGNORED), **options)
    close(ours, theirs)
    assert not ours[1][1].any()


@every_backend
def test_a_mask_without_a_target(name):
    student, teacher, _ = make_inputs("normal", ROWS, CLASSES)
    mask = torch.tensor([True, False, True, True, False, True])
    for ignore_index in (IGNORED, 0, -1):
        options = {"row_weight": mask, "ignore_index": ignore_index, "backend": name}
        loss, gradient = evaluate(USUAL["kd"], student, teacher, None, **options)
        rows = kdkernels.kd_loss(student, teacher, reduction="none", backend=name)
        torch.testing.assert_close(loss, rows[mask].mean())
        assert not gradient[~mask].any() and gradient[mask].any()


@every_backend
@every_loss
def test_whole_numbers_are_weights(case, name):
    case = case.apart
    inputs = make_inputs("normal", ROWS, CLASSES)
    weight = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = evaluate(case, *inputs, row_weight=weight.float(), backend=name)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        close(evaluate(case, *inputs, row_weight=weight.to(dtype), backend=name), expected)


@every_backend
@every_loss
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_an_ignored_row_is_weighed_by_does_not_matter(case, learned, reduction, name):
    student, teacher, target = make_inputs("normal", ROWS, CLASSES)
    target[1:4] = IGNORED
    weight = torch.linspace(0.5, 1, ROWS)
    odd = weight.clone()
    odd[1:4] = torch.tensor([INF, NAN, -INF])
    options = {"reduction": reduction, "backend": name}
    found = []
    for x in (odd, weight):
        x = x.clone().requires_grad_(learned)
        value, gradient = evaluate(case, student, teacher, target, row_weight=x, **options)
        found.append((value, gradient))
        if learned:
            case(student, teacher, target, row_weight=x, **options).sum().backward()
            assert not x.grad[1:4].any() and x.grad[0] != 0
    close(*found)


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("nothing", ["ignored", "unweighted", "no rows"])
def test_nothing_divided_by_nothing_is_nothing(dtype, nothing, name):
    student, teacher, target = make_inputs("normal", ROWS, CLASSES, dtype)
    options: dict = {"backend": name}
    if nothing == "ignored":
        target.fill_(IGNORED)
    elif nothing == "no rows":
        student, teacher, target = student[:0], teacher[:0], target[:0]
    else:
        options["row_weight"] = torch.zeros(ROWS)
    for case in MAIN_SCALARS:
        for normalizer in (torch.tensor(0), torch.tensor(0.0), torch.tensor(0.0).requires_grad_()):
            value, gradient = evaluate(
                case, student, teacher, target, normalizer=normalizer, **options
            )
            assert value == 0 and not gradient.any()
    weight = torch.ones(target.shape, requires_grad=True)
    options["row_weight"] = weight if nothing != "unweighted" else weight * 0
    loss = kdkernels.dkd_loss(student, teacher, target, normalizer=torch.tensor(0), **options)
    assert loss == 0
    loss.backward()
    assert weight.grad.isfinite().all()


# ---- sequences ------------------------------------------------------------------------------


@every_backend
@every_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_causal_is_the_slice(case, reduction, name):
    inputs = make_inputs("normal", (3, 7), CLASSES, ignored=0.2)
    student, teacher, target = inputs
    weight = torch.rand(3, 7)
    options = {"reduction": reduction, "backend": name}
    if case.facts.weights:
        case = case.having(ce_weight=0.5)
    ours = evaluate(case, *inputs, causal=True, row_weight=weight, **options)

    def sliced(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        value = case(
            *(student[:, :-1], teacher[:, :-1], target[:, 1:]), row_weight=weight[:, 1:], **options
        )
        return F.pad(value, (0, 1)) if reduction == "none" else value

    close(ours, evaluate(sliced, student, teacher, target))
    assert torch.equal(ours[1].any(-1)[:, :-1], target[:, 1:] != IGNORED)
    assert not ours[1][:, -1].any()


@every_backend
def test_causal_without_a_target_and_with_a_mask(name):
    student, teacher, _ = make_inputs("normal", (3, 7), CLASSES)
    mask = torch.rand(3, 7) < 0.6
    rows = kdkernels.kd_loss(student, teacher, reduction="none", backend=name)
    causal = kdkernels.kd_loss(student, teacher, causal=True, backend=name)
    torch.testing.assert_close(causal, rows[:, :-1].mean())
    batchmean = kdkernels.kd_loss(
        student, teacher, causal=True, reduction="batchmean", backend=name
    )
    torch.testing.assert_close(batchmean, rows[:, :-1].sum() / 3)
    masked = kdkernels.kd_loss(student, teacher, causal=True, row_weight=mask, backend=name)
    torch.testing.assert_close(masked, rows[:, :-1][mask[:, 1:]].mean())
    for length in (1, 0):
        value, gradient = evaluate(
            kdkernels.kd_loss, student[:, :length], teacher[:, :length], None, causal=True
        )
        assert value == 0 and not gradient.any()


# ---- weights and parts ----------------------------------------------------------------------


@every_backend
@every_weighted_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_parts(case, reduction, name):
    case = case.having(kd_weight=0.7, ce_weight=0.3, label_smoothing=0.1)
    student, teacher, target = make_inputs("normal", (2, 4), CLASSES, ignored=0.2)
    options = {"reduction": reduction, "row_weight": torch.rand(2, 4), "backend": name}
    parts = case(student.requires_grad_(), teacher, target, return_parts=True, **options)
    assert isinstance(parts, kdkernels.Parts)
    assert parts.loss.requires_grad
    assert not parts.distillation.requires_grad and not parts.cross_entropy.requires_grad
    loss = case(student, teacher, target, **options).detach()
    close(parts[:1], (loss,))
    close(
        torch.autograd.grad(parts.loss.sum(), student),
        evaluate(lambda *x: case(*x, **options).sum(), student, teacher, target)[1:],
    )
    alone = case.having(kd_weight=1.0, ce_weight=0.0)
    close(parts[1:2], (alone(student, teacher, target, **options).detach(),))
    alone = case.having(kd_weight=0.0, ce_weight=1.0)
    close(parts[2:], (alone(student, teacher, target, **options).detach(),))
    torch.testing.assert_close(loss, 0.7 * parts.distillation + 0.3 * parts.cross_entropy)
    smoothed = (
        F.cross_entropy(
            student.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=0.1
        ).view(2, 4)
        * options["row_weight"]
    )
    divisor = {"mean": (target != IGNORED).sum(), "batchmean": 2}.get(reduction, 1)
    smoothed = smoothed if reduction == "none" else smoothed.sum() / divisor
    torch.testing.assert_close(parts.cross_entropy, smoothed.detach())


@every_backend
def test_parts_without_weights_and_without_a_target(name):
    student, teacher, target = make_inputs("normal", ROWS, CLASSES)
    parts = kdkernels.kd_loss(student, teacher, target, return_parts=True, backend=name)
    torch.testing.assert_close(parts.cross_entropy, F.cross_entropy(student, target))
    torch.testing.assert_close(parts.loss, parts.distillation)
    parts = kdkernels.kd_loss(student, teacher, return_parts=True, backend=name)
    assert parts.cross_entropy == 0 and parts.distillation > 0
    mask = torch.ones(ROWS, dtype=torch.bool)
    for options in ({"row_weight": mask}, {"causal": True}):
        x = (student[None], teacher[None]) if "causal" in options else (student, teacher)
        parts = kdkernels.kd_loss(*x, return_parts=True, backend=name, **options)
        assert parts.cross_entropy == 0 and parts.distillation > 0
    parts = kdkernels.kd_loss(student, teacher, target, kd_weight=0.0, return_parts=True)
    assert parts.loss == 0 and parts.distillation > 0


@every_backend
def test_terms_of_weight_0_are_not_there(name):
    """Where the student lacks the target, whose own term is infinite."""
    student = torch.tensor([[1.0, 2.0, -INF, 0.5]])
    options = {"kd_weight": 0.0, "reduction": "none", "backend": name}
    target, x = torch.tensor([2]), student[0, [0, 1, 3]]
    expected = (x.logsumexp(0) - x.mean()) * 0.5
    for one in (1.0, torch.tensor(1.0)):
        smooth = {"ce_weight": 0.5, "label_smoothing": one, **options}
        for loss in (
            kdkernels.kd_loss(student, student * 0.9, target, **smooth),
            kdkernels.tf_nkd_loss(student, target, **smooth),
        ):
            torch.testing.assert_close(loss[0], expected)
    assert kdkernels.tf_nkd_loss(student, target, **options) == 0


@every_backend
def test_tf_nkd_s_mean_is_the_same_for_learned_weights(name):
    student, _, target = make_inputs("normal", ROWS, CLASSES)
    weight = torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0, 0.5])
    plain = kdkernels.tf_nkd_loss(student, target, row_weight=weight, backend=name)
    learned = weight.requires_grad_()
    torch.testing.assert_close(
        kdkernels.tf_nkd_loss(student, target, row_weight=learned, backend=name).detach(), plain
    )


# ---- one-hot and mixed labels ----------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dim", [-1, 1])
def test_nkd_takes_the_largest_of_soft_labels(dim, name):
    student, teacher, target = make_inputs("normal", (2, 3), CLASSES)
    other = (target + 1) % CLASSES
    mixed = 0.7 * F.one_hot(target, CLASSES) + 0.3 * F.one_hot(other, CLASSES)
    expected = kdkernels.nkd_loss(student, teacher, target, backend=name)
    for labels in (F.one_hot(target, CLASSES).float(), mixed, mixed.half()):
        x = [x.movedim(-1, dim) for x in (student, teacher, labels)]
        assert_same(kdkernels.nkd_loss(*x, dim=dim, backend=name), expected)
    with pytest.raises(ValueError, match="target: got probabilities of classes, of which"):
        kdkernels.nkd_loss(student, teacher, mixed, ce_weight=1.0)
    with pytest.raises(TypeError, match=r"target: got dtype torch.float32; must be one of int64"):
        kdkernels.dkd_loss(student, teacher, mixed)


# ---- teachers -------------------------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teachers_of_inference_mode(reduction, dtype, name):
    student, teacher, target = make_inputs("normal", ROWS, CLASSES, dtype)
    weight = torch.rand(ROWS)
    common = {"reduction": reduction, "backend": name}
    for case in MAIN_SCALARS:
        expected = evaluate(case, student, teacher, target, row_weight=weight, **common)
        with torch.inference_mode():
            made = [x.clone() for x in (teacher, target, weight)]
        assert made[0].is_inference()
        found = evaluate(case, student, *made[:2], row_weight=made[2], **common)
        close(found, expected, rtol=0, atol=0)


@needs_cpu
def test_a_teacher_of_inference_mode_is_not_there_for_a_second_derivative():
    student, teacher, target = make_inputs("normal", ROWS, CLASSES)
    with torch.inference_mode():
        teacher = teacher.clone()
    loss = kdkernels.dkd_loss(student.requires_grad_(), teacher, target)
    torch.autograd.grad(loss, student, retain_graph=True)
    for more in ({}, {"create_graph": True}):
        with pytest.raises(RuntimeError, match=r"teacher: was made under torch\.inference_mode"):
            torch.autograd.grad(loss, student, retain_graph=True, **more)


@needs_cpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_that_is_not_frozen_leaves_the_student_s_gradient_to_the_kernels(
    reduction, monkeypatch
):
    monkeypatch.setattr(backend, "_warned", set())
    student, teacher, target = make_inputs("normal", ROWS, CLASSES)
    expected = evaluate(SOME, student, teacher, target, torch.ones(ROWS), reduction="none")[1]
    leaves = student.requires_grad_(), teacher.requires_grad_()
    ran = []
    monkeypatch.setattr(
        "kdkernels.autograd.Gradient.forward",
        staticmethod(lambda *x, run=kdkernels.autograd.Gradient.forward: ran.append(1) or run(*x)),
    )
    with pytest.warns(RuntimeWarning, match="teacher requires a gradient, which the refer") as seen:
        for _ in range(2):
            loss = SOME(*leaves, target, reduction=reduction, backend="cpu").sum()
            ours, of_teacher = torch.autograd.grad(loss, leaves)
    assert len(seen) == 1 and len(ran) == 2
    torch.testing.assert_close(ours, expected / (ROWS if reduction == "mean" else 1))
    theirs = torch.autograd.grad(
        SOME(*leaves, target, reduction=reduction, backend="reference").sum(), teacher
    )
    close((of_teacher,), theirs)


# ---- what is kept for backward ---------------------------------------------------------------


@needs_cpu
@every_loss
def test_hooks_see_all_that_is_kept(case):
    """What is as large as the logits is a saved tensor: hooks may drop it or move it away."""
    inputs = make_inputs("normal", ROWS, CLASSES)
    for reduction in ("mean", "none"):
        plain = evaluate(case, *inputs, reduction=reduction)
        with save_on_cpu():
            close(evaluate(case, *inputs, reduction=reduction), plain, rtol=0, atol=0)
        leaf, box = inputs[0].clone().requires_grad_(), []

        def pack(x: Tensor, box: list = box) -> int:
            box.append(x)
            return len(box) - 1

        with saved_tensors_hooks(pack, lambda i, box=box: box[i]):
            loss = case(leaf, *inputs[1:], reduction=reduction)
        node = loss.grad_fn
        held = [x for x in getattr(node, "__dict__", {}).values() if isinstance(x, Tensor)]
        assert not held, "nothing beside the saved tensors"
        assert any(x.shape == leaf.shape for x in box)


@needs_cpu
def test_checkpointed_chunks_keep_no_logits():
    """A head in chunks: between forward and backward, nothing of rows x classes is alive."""
    hidden = torch.randn(8, 3, requires_grad=True)
    head = torch.randn(50, 3, requires_grad=True)
    teacher = torch.randn(8, 50)
    alive = []

    def chunk(h: Tensor, t: Tensor) -> Tensor:
        logits = h @ head.T
        alive.append(logits.untyped_storage()._weak_ref())
        return kdkernels.kd_loss(logits, t, reduction="sum")

    total = sum(
        checkpoint(chunk, hidden[i : i + 2], teacher[i : i + 2], use_reentrant=False)
        for i in range(0, 8, 2)
    )
    dead = [torch.UntypedStorage._expired(x) for x in alive]
    assert all(dead) and len(dead) == 4
    gradient, of_head = torch.autograd.grad(total, (hidden, head))
    whole = kdkernels.kd_loss(hidden @ head.T, teacher, reduction="sum")
    close((gradient, of_head), torch.autograd.grad(whole, (hidden, head)), rtol=1e-4, atol=1e-4)


# ---- one class ------------------------------------------------------------------------------


@every_backend
@every_loss
def test_one_class(case, name):
    """As the docstring says: all softmaxes are 1."""
    student, teacher, target = make_inputs("normal", ROWS, 1)
    value, gradient = evaluate(case, student, teacher, target, backend=name)
    assert value == 0 and not gradient.any()


# ---- DTensors -------------------------------------------------------------------------------

RANKS = """
import os, sys, torch, kdkernels
import torch.distributed as dist, torch.multiprocessing as mp

def run(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    s, t = (torch.randn(5, 4, 7, dtype=torch.float64) for _ in "st")
    y, w = torch.randint(7, (5, 4)), torch.rand(5, 4, dtype=torch.float64)
    y[0, 1] = -100
    losses = (
        (kdkernels.dkd_loss, {}), (kdkernels.dkd_loss, {"reduction": "none"}),
        (kdkernels.nkd_loss, {"reduction": "batchmean", "ce_weight": 0.5}),
        (kdkernels.tf_nkd_loss, {}), (kdkernels.aekt_loss, {"normalizer": torch.tensor(3)}),
        (kdkernels.kd_loss, {"row_weight": w, "return_parts": True, "reduction": "sum"}),
        (kdkernels.kd_loss, {"causal": True, "row_weight": w > 0.3}),
    )
    for placement in ([Shard(0)], [Shard(1)], [Replicate()]):
        for loss, options in losses:
            if options.get("causal") and placement == [Shard(1)]:
                continue
            given = {k: distribute_tensor(v, mesh, placement) if k == "row_weight" else v
                     for k, v in options.items()}
            leaf = distribute_tensor(s, mesh, placement).requires_grad_()
            whole = s.clone().requires_grad_()
            rest = [t, y] if loss is not kdkernels.tf_nkd_loss else [y]
            ours = loss(leaf, *(distribute_tensor(x, mesh, placement) for x in rest), **given)
            theirs = loss(whole, *rest, **options)
            if options.get("return_parts"):
                for a, b in zip(ours[1:], theirs[1:]):
                    torch.testing.assert_close(a.full_tensor(), b)
                ours, theirs = ours.loss, theirs.loss
            torch.testing.assert_close(ours.full_tensor(), theirs)
            u = torch.linspace(-1, 2, theirs.numel(), dtype=theirs.dtype).view(theirs.shape)
            (ours.full_tensor() * u).sum().backward()
            (theirs * u).sum().backward()
            assert list(leaf.grad.placements) == placement
            torch.testing.assert_close(leaf.grad.full_tensor(), whole.grad)
    split = kdkernels.target_split(*(distribute_tensor(x, mesh, [Shard(0)]) for x in (s, y)))
    torch.testing.assert_close(split[1].full_tensor(), kdkernels.target_split(s, y)[1])
    for dim, options, error in (
        (2, {}, "student: the classes are sharded over dimension 0 of the device mesh"),
        (0, {}, "teacher: got Tensor; must be a DTensor"),
        (1, {"causal": True}, "causal: got sequences that are split over ranks"),
    ):
        try:
            kdkernels.kd_loss(distribute_tensor(s, mesh, [Shard(dim)]), t, **options)
        except (ValueError, TypeError) as caught:
            assert str(caught).startswith(error), caught
        else:
            raise AssertionError(error)
    dist.destroy_process_group()
    # Without the interpreter's end, in which threads of gloo now and then abort.
    os._exit(0)

if __name__ == "__main__":
    mp.spawn(run, args=sys.argv[1:], nprocs=2)
"""


@needs_cpu
def test_dtensors(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path / "rendezvous"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# ---- what a call leaves behind ---------------------------------------------------------------


def _faked(loss, student, teacher):
    with FakeTensorMode() as mode:
        return loss(*(mode.from_tensor(x) for x in (student, teacher)))


def _functionalized(loss, student, teacher):
    with suppress(RuntimeError):  # torch has no rule for autograd functions
        torch.func.functionalize(loss)(student, teacher)


LOOKED_THROUGH = {
    "fake": _faked,
    "symbolic": lambda loss, s, t: make_fx(loss, tracing_mode="symbolic")(s, t)(s, t),
    "functionalized": _functionalized,
    "grad": lambda loss, s, t: torch.func.grad(loss)(s, t),
}


@needs_cpu
@pytest.mark.parametrize("how", LOOKED_THROUGH)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numbers_are_plain_after_something_looked_through_them(how: str, reduction: str) -> None:
    """What is remembered of a call's numbers is nothing of a mode or transform that was active."""
    temperature = 1 + len(how) / 64 + len(reduction) / 1024  # of no other test
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return kdkernels.kd_loss(
            student, teacher, temperature=temperature, reduction=reduction
        ).sum()

    LOOKED_THROUGH[how](loss, student, teacher)
    leaf = student.clone().requires_grad_()
    value = loss(leaf, teacher)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert type(value) is type(gradient) is Tensor
    torch.testing.assert_close(torch.func.grad(loss)(student, teacher), gradient)


@needs_cpu
def test_a_gradient_can_be_recorded() -> None:
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)

    def gradient(student: Tensor) -> Tensor:
        leaf = student.detach().requires_grad_()
        return torch.autograd.grad(kdkernels.kd_loss(leaf, teacher), leaf)[0]

    recorded = make_fx(gradient)(student)
    torch.testing.assert_close(recorded(2 * student), gradient(2 * student))


@needs_cpu
def test_an_error_of_others_is_theirs() -> None:
    """And nothing is computed a second time to look for words."""
    calls = []

    def pack(x: Tensor) -> Tensor:
        calls.append(x)
        raise RuntimeError("the disk is full")

    student = torch.randn(4, 10, requires_grad=True)
    with pytest.raises(RuntimeError, match="the disk is full"), saved_tensors_hooks(pack, pack):
        kdkernels.kd_loss(student, torch.randn(4, 10))
    assert len(calls) == 1


@needs_cpu
def test_parts_of_an_ignored_row_are_0_whatever_weighs_it() -> None:
    student, teacher = torch.randn(40, 10), torch.randn(40, 10)
    target, weight = torch.full((40,), 3), torch.ones(40)
    target[7], weight[7] = -100, float("nan")
    params = torch.tensor([2.0, 1.0, 0.5, 0.1, 1.0, 2.0], dtype=torch.float64)
    for classes in (10, 200, 1100):
        logits = (x.repeat(1, classes // 10) for x in (student, teacher))
        rows, _, parts = torch.ops.kdkernels.forward(
            "kd", *logits, target, weight, params, -100, True
        )
        assert rows[7] == 0 and not parts[:, 7].any() and parts.isfinite().all()
