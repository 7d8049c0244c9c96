"""Gradients from memory that is kept: never one that a tensor sees, never more than was said."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from cases import BF16, F32, needs_cpu
from torch import Tensor

import kdkernels
from kdkernels import kd_loss

os.environ.pop("KDKERNELS_POOL", None)
pytestmark = [
    needs_cpu,
    pytest.mark.skipif(kdkernels.memory().limit == 0, reason="torch < 2.11 keeps none"),
]
MIB = 1 << 20
ROWS, CLASSES = 600, 1003  # 2.3 MiB of float32
BLOCK = 4 * MIB  # in whole huge pages


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("KDKERNELS_POOL", raising=False)
    gc.collect()
    kdkernels.release_memory()
    assert kdkernels.memory() == (1024 * MIB, 0, 0)
    yield
    gc.collect()
    assert kdkernels.memory().lent == 0, "all gradients are gone"
    kdkernels.release_memory()


def inputs(seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, CLASSES, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def gradient(student: Tensor, teacher: Tensor, **common: object) -> Tensor:
    return torch.autograd.grad(kd_loss(student, teacher, **common).sum(), student)[0]


def truth(student: Tensor, teacher: Tensor) -> Tensor:
    return gradient(student, teacher, backend="reference")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_is_used_again(reduction: str) -> None:
    first = gradient(*inputs(), reduction=reduction)
    where = first.data_ptr()
    assert kdkernels.memory() == (1024 * MIB, 0, BLOCK)
    del first
    assert kdkernels.memory() == (1024 * MIB, BLOCK, 0)
    again = gradient(*inputs(1), reduction=reduction)
    assert again.data_ptr() == where
    expected = gradient(*inputs(1), reduction=reduction, backend="reference")
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize("seen_by", [lambda x: x[5:6], lambda x: x.t(), lambda x: x.numpy()])
def test_not_while_something_sees_it(seen_by) -> None:
    student, teacher = inputs()
    whole = gradient(student, teacher)
    view, before = seen_by(whole), seen_by(whole.clone())
    where = whole.data_ptr()
    del whole
    others = [gradient(*inputs(seed)) for seed in (1, 2)]
    assert where not in [x.data_ptr() for x in others]
    assert torch.equal(torch.as_tensor(view), torch.as_tensor(before))


def test_a_graph_that_is_kept() -> None:
    student, teacher = inputs()
    loss = kd_loss(student, teacher)
    first, second, third = (
        torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(3)
    )
    assert len({x.data_ptr() for x in (first, second, third)}) == 3
    for x in (first, second, third):
        torch.testing.assert_close(x, truth(student, teacher))


def test_a_gradient_that_is_accumulated() -> None:
    student, teacher = inputs()
    for _ in range(3):
        kd_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, 3 * truth(student, teacher))


def test_an_exception_gives_it_back() -> None:
    student, teacher = inputs()

    def fail(x: Tensor) -> Tensor:
        raise KeyError("no room")

    with pytest.raises(KeyError), torch.autograd.graph.saved_tensors_hooks(fail, fail):
        kd_loss(student, teacher)
    gc.collect()
    assert kdkernels.memory().lent == 0
    torch.testing.assert_close(gradient(student, teacher), truth(student, teacher))


def test_threads() -> None:
    expected = {seed: truth(*inputs(seed)) for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        student, teacher = inputs(seed)
        for _ in range(20):
            x = gradient(student, teacher)
            if not torch.allclose(x, expected[seed], atol=1e-6):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_may_be_given_back_by_another_thread() -> None:
    held = [gradient(*inputs())]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert kdkernels.memory() == (1024 * MIB, BLOCK, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_has_its_own() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # those of OpenMP do not outlive a fork
    try:
        gradient(*inputs())
        held = gradient(*inputs(1))
        before = held.clone()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                held.fill_(7.0)
                same = [torch.equal(gradient(*inputs(2)), gradient(*inputs(2))) for _ in range(3)]
                code = 0 if all(same) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(held, before)
    finally:
        torch.set_num_threads(threads)


def test_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_POOL", "9")
    held = [gradient(*inputs(seed)) for seed in range(3)]
    assert kdkernels.memory() == (9 * MIB, 0, 3 * BLOCK)
    held.clear()
    assert kdkernels.memory() == (9 * MIB, 2 * BLOCK, 0)
    large = gradient(*inputs(rows=4 * ROWS))
    assert kdkernels.memory() == (9 * MIB, 2 * BLOCK, 0), "more than may be kept is not lent"
    torch.testing.assert_close(large, truth(*inputs(rows=4 * ROWS)))


def test_the_largest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_POOL", "13")
    held = [gradient(*inputs(rows=rows)) for rows in (ROWS, 2 * ROWS, 3 * ROWS)]
    held.pop()
    held.pop()
    assert kdkernels.memory().kept == 6 * MIB, "of 8 and 6"
    held.pop()
    assert kdkernels.memory().kept == 10 * MIB


def test_the_smallest_that_fits() -> None:
    held = [gradient(*inputs(rows=rows)) for rows in (ROWS, 2 * ROWS)]
    small, large = (x.data_ptr() for x in held)
    held.clear()
    assert gradient(*inputs()).data_ptr() == small
    assert gradient(*inputs(rows=2 * ROWS)).data_ptr() == large


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    gradient(*inputs())
    monkeypatch.setenv("KDKERNELS_POOL", "0")
    held = gradient(*inputs())
    assert kdkernels.memory() == (0, 0, 0), "and what was kept is gone"
    torch.testing.assert_close(held, truth(*inputs()))


@pytest.mark.parametrize("value", ["many", "-1", "1.5", "1 ", "99999999999999999999"])
def test_a_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("KDKERNELS_POOL", value)
    for ask in (kdkernels.memory, lambda: gradient(*inputs())):
        with pytest.raises(RuntimeError, match=f"KDKERNELS_POOL={value} is no number of MiB"):
            ask()
    monkeypatch.delenv("KDKERNELS_POOL")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strides_are_those_of_empty_like(dtype: torch.dtype) -> None:
    base = torch.randn(4, 901, 1003).to(dtype)
    layouts = [
        (base, -1),
        (base[:, :-1], -1),
        (base.transpose(0, 1), -1),
        (base[..., :-3], -1),
        (base, 1),
        (base[:, 1:], 1),
        (base.permute(2, 0, 1), 0),
        (base[:, ::2], -1),
        (base[:1].expand(4, -1, -1), -1),
    ]
    for x, dim in layouts:
        student = x.detach().requires_grad_()
        own = gradient(student, x.float(), dim=dim)
        by_dim = torch.empty_like(x.movedim(dim, -1)).movedim(-1, dim)
        assert own.stride() == by_dim.stride()
        expected = gradient(student, x.float(), dim=dim, backend="reference")
        torch.testing.assert_close(own, expected)


def test_what_lives_long_holds_little_more_than_it_needs() -> None:
    gradient(*inputs(rows=6 * ROWS))
    held = gradient(*inputs())
    assert kdkernels.memory().lent == BLOCK
    del held
