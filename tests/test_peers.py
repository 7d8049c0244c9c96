"""The adapters to other libraries, without those libraries; and with them where they are.

Formulas are written here in float64 and with other means than the adapters'.
"""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bench.peers import PEERS, liger_kd

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EACH = pytest.mark.parametrize("name", PEERS)


# ------------------------------------------------------------------------------- what can be called
@EACH
def test_says_what_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    peer = PEERS[name]
    assert peer.version is None
    for device in ("cpu", "cuda"):
        assert peer.missing(torch.device(device)) == f"{peer.package} is not installed"


@EACH
def test_says_what_an_installed_one_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    peer = PEERS[name]
    monkeypatch.setattr(importlib.metadata, "version", lambda package: f"{package} 1.2")
    monkeypatch.setitem(sys.modules, peer.module, None)  # cannot be imported
    assert peer.version == f"{peer.package} 1.2"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert peer.missing(cpu) == "needs a CUDA device"
    reason = peer.missing(cuda)
    assert reason and peer.module in reason and "\n" not in reason

    monkeypatch.setitem(sys.modules, peer.module, ModuleType(peer.module))
    assert peer.missing(cuda) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert peer.missing(cpu) == (None if name == "liger" else "needs a CUDA device")


# ------------------------------------------------------------------------------------------- values
def probabilities(logits: Tensor) -> Tensor:
    powers = (logits - logits.amax(1, keepdim=True)).exp()
    return powers / powers.sum(1, keepdim=True)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def truth(
    loss: str, student: Tensor, teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    s, t = student.detach().double().requires_grad_(), teacher.double()
    if loss == "kd":
        rows = divergence(probabilities(t / temperature), probabilities(s / temperature))
        rows = rows * temperature**2
    elif loss == "jsd":
        p, q = probabilities(s), probabilities(t)
        rows = (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2)) / 2
    else:
        rows = -probabilities(s)[torch.arange(len(s)), target].log()
    value = rows.sum() / len(s)
    return value.detach(), torch.autograd.grad(value, s)[0]


def inputs(
    rows: int, classes: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (
        (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype) for _ in range(2)
    )
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    return student.requires_grad_(), teacher, target


@pytest.fixture
def scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets liger-kernel's KL divergence run in Triton's interpreter.

    Its kernel converts a scalar argument, which is a tensor when compiled, but which the
    interpreter leaves a Python float.
    """
    if DEVICE.type == "cuda":
        return
    try:
        from liger_kernel.ops import kl_div
    except ImportError:
        return

    class Scalar(float):
        def to(self, dtype: object) -> Scalar:
            return self

    forward = kl_div.kldiv_forward_triton

    def wrapped(*args: object, eps: float, **options: object) -> Tensor:
        return forward(*args, eps=Scalar(eps), **options)

    monkeypatch.setattr(kl_div, "kldiv_forward_triton", wrapped)


# NumPy's, about -inf - -inf in the lanes beyond a row.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("scalars")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(5, 100), (3, 1003)])
@pytest.mark.parametrize(
    ("name", "loss", "temperature"),
    [(name, loss, 4.0) for name, peer in PEERS.items() for loss in peer.losses]
    + [("liger", "kd", 3.0)],
)
def test_installed(
    name: str,
    loss: str,
    temperature: float,
    rows: int,
    classes: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    peer = PEERS[name]
    if reason := peer.missing(DEVICE):
        pytest.skip(f"{peer.package}: {reason}")
    if name == "quack" and dtype.itemsize == 2 and classes % 2:
        pytest.skip("it copies 4 bytes or more at a time, and does not compile for this")
    student, teacher, target = inputs(rows, classes, dtype, generator, DEVICE)
    before = [x.detach().clone() for x in (student, teacher, target)]
    true_value, true_grad = truth(loss, student, teacher, target, temperature)
    if temperature == 4.0:
        value = peer.losses[loss](student, teacher, target)
    else:
        value = liger_kd(student, teacher, target, temperature)
    (grad,) = torch.autograd.grad(value, student)

    assert value.ndim == 0 and grad.dtype == dtype
    # Only liger-kernel's cross-entropy rounds the loss to the type of the logits.
    close = 1e-2 if dtype == torch.bfloat16 and value.dtype == dtype else 1e-5
    torch.testing.assert_close(value.double(), true_value, rtol=close, atol=1e-6)
    close = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert (grad.double() - true_grad).abs().max() <= close * true_grad.abs().max()
    for x, copy in zip((student, teacher, target), before, strict=True):
        assert torch.equal(x.detach(), copy)


# ------------------------------------------------------------------------------------------ fakes
def flash_attn_signature(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: object = None,
) -> tuple[Tensor, Tensor]:
    assert precomputed_lse is None and process_group is None and not inplace_backward
    losses = torch.nn.functional.cross_entropy(
        logits * logit_scale,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    z_losses = lse_square_scale * logits.logsumexp(1).square() + 100.0  # not to be taken for losses
    return losses, z_losses


def quack_signature(
    x: Tensor,
    target: Tensor,
    lse_partial: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace_backward: bool = False,
) -> Tensor:
    assert lse_partial is None and not inplace_backward
    return torch.nn.functional.cross_entropy(
        x, target, weight=weight, ignore_index=ignore_index, reduction=reduction
    )


@pytest.mark.parametrize(
    ("name", "function", "fake"),
    [
        ("flash_attn", "cross_entropy_loss", flash_attn_signature),
        ("quack", "cross_entropy", quack_signature),
    ],
)
def test_signature(
    name: str,
    function: str,
    fake: object,
    monkeypatch: pytest.MonkeyPatch,
    generator: torch.Generator,
) -> None:
    """The mean cross-entropy, of the student and not of the teacher, from what they return."""
    module = ModuleType(PEERS[name].module)
    setattr(module, function, fake)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    student, teacher, target = inputs(5, 100, torch.float32, generator, torch.device("cpu"))
    value = PEERS[name].losses["ce"](student, teacher, target)
    (grad,) = torch.autograd.grad(value, student)
    true_value, true_grad = truth("ce", student, teacher, target, 1.0)
    assert value.ndim == 0
    torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-7)
