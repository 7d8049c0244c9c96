"""Other libraries' losses in one line: every row of docs/conventions.md and README, as it stands.

The other side is written here from its source, in float64 and in the probabilities that it works
with. Rows of the tables and formulas here must be the same set.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import needs_cpu
from torch import Tensor

import kdkernels

ROOT = Path(__file__).resolve().parents[1]
T = 2.5


# ---- the other side -------------------------------------------------------------------------


def counted(rows: Tensor, y: Tensor) -> Tensor:
    return rows[y != -100].sum() / (y != -100).sum()


def kl(of: Tensor, to: Tensor) -> Tensor:
    return (of * (of.log() - to.log())).sum(-1)


def mixture(p: Tensor, q: Tensor, of_q: float) -> Tensor:
    return of_q * q + (1 - of_q) * p


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        return kl(p, q) if beta else kl(q, p)
    m = mixture(p, q, beta)
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def trl(beta: float, temperature: float = 1.0) -> Callable[..., Tensor]:
    """Masked, summed over classes, divided by the number of tokens that count."""
    return lambda s, t, y: counted(
        jsd((s / temperature).softmax(-1), (t / temperature).softmax(-1), beta), y
    )


def of_probabilities(rows: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda s, t, y: counted(rows(s.softmax(-1), t.softmax(-1)), y)


def each_row(rows: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda s, t, y: rows(s.softmax(-1), t.softmax(-1))


def without_entropy(p: Tensor, q: Tensor) -> Tensor:
    return -(q * p.log()).sum(-1)


def decoupled(s: Tensor, t: Tensor, y: Tensor, alpha: float, beta: float) -> Tensor:
    """mdistiller's DKD, the target masked by its logit minus 1000."""
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    hot = F.one_hot(y, s.shape[1])
    both = [torch.stack(((x * hot).sum(1), (x * (1 - hot)).sum(1)), 1) for x in (p, q)]
    others = [x / T - 1000.0 * hot for x in (s, t)]
    log_p, q = others[0].log_softmax(1), others[1].softmax(1)
    rest = F.kl_div(log_p, q, reduction="none").sum(1)
    return ((alpha * kl(both[1], both[0]) + beta * rest) * T**2).mean()


def normalised(s: Tensor, t: Tensor, y: Tensor, gamma: float) -> Tensor:
    """cls_KD's NKD: non-target probabilities by deleting the target."""
    log_p, q = s.log_softmax(1), t.softmax(1)
    c, b = (x.gather(1, y[:, None])[:, 0] for x in (log_p, q))
    keep = F.one_hot(y, s.shape[1]) == 0
    s_rest, t_rest = (x[keep].view(len(y), -1) / T for x in (s, t))
    soft = (t_rest.softmax(1) * s_rest.log_softmax(1)).sum(1).mean()
    return (-b * c).mean() - gamma * T**2 * soft


def teacher_free(s: Tensor, y: Tensor) -> Tensor:
    c = s.softmax(1).gather(1, y[:, None])[:, 0]
    value = c.detach()
    return -((value + 1 - value.mean()) * c.log()).mean()


def tempered(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="batchmean")


# By how a row begins, of the only table that has it so.
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "TRL `GKDTrainer.generalized_jsd_loss": trl(0.1, T),
    "TRL, beta=0": trl(0.0),
    "TRL, beta=1": trl(1.0),
    "TRL without labels": lambda s, t, y: (
        jsd(s.softmax(-1), t.softmax(-1), 0.1).sum() / 2  # of a batch of 2
    ),
    "Liger `liger_jsd": of_probabilities(lambda p, q: jsd(p, q, 0.1)),
    "Liger `liger_kl_div": lambda s, t, y: F.kl_div(
        s.log_softmax(1), t.softmax(1), reduction="batchmean"
    ),
    "Liger `LigerTVDLoss": lambda s, t, y: (
        (0.5 * (s.softmax(1) - t.softmax(1)).abs()).sum() / len(s)
    ),
    "DistiLLM `forward_kl": of_probabilities(without_entropy),
    "DistiLLM `reverse_kl": of_probabilities(lambda p, q: kl(p, q)),
    "DistiLLM `symmetric_kl": of_probabilities(
        lambda p, q: (1 - 0.9) * without_entropy(p, q) + 0.9 * kl(p, q)
    ),
    "DistiLLM `js_distance": of_probabilities(
        lambda p, q: 0.9 * kl(p, mixture(q, p, 0.9)) + (1 - 0.9) * kl(q, mixture(q, p, 0.9))
    ),
    "DistiLLM `tv_distance": of_probabilities(lambda p, q: 0.5 * (q - p).abs().sum(-1)),
    "DistiLLM `skewed_forward_kl": of_probabilities(
        lambda p, q: without_entropy(mixture(p, q, 0.1), q)
    ),
    "DistiLLM `skewed_reverse_kl": of_probabilities(lambda p, q: kl(p, mixture(p, q, 1 - 0.1))),
    "DistiLLM-2, reverse": of_probabilities(lambda p, q: kl(p, mixture(p.detach(), q, 1 - 0.1))),
    "ABKD `ab_div": of_probabilities(
        lambda p, q: (
            -(q**0.2 * p**0.7 - 0.2 / 0.9 * q**0.9 - 0.7 / 0.9 * p**0.9).sum(-1) / (0.2 * 0.7)
        )
    ),
    "torchtune `ForwardKLLoss": of_probabilities(without_entropy),
    "torchtune `ReverseKLLoss": of_probabilities(
        lambda p, q: -((p * q.log()).sum(-1) - (p * p.log()).sum(-1))
    ),
    "torchtune `SymmetricKLLoss": of_probabilities(
        lambda p, q: 0.7 * without_entropy(p, q) + (1 - 0.7) * kl(p, q)
    ),
    'NeMo-RL, kl_type "forward"': of_probabilities(lambda p, q: kl(q, p)),
    'NeMo-RL, kl_type "reverse"': of_probabilities(kl),
    'NeMo-RL, kl_type "mixed"': of_probabilities(
        lambda p, q: 0.7 * kl(q, p) + (1 - 0.7) * kl(p, q)
    ),
    "speculators `fused_kl_div_loss": each_row(lambda p, q: kl(q, p)),
    "speculators `fused_reverse_kl_div_loss": each_row(kl),
    "speculators `fused_js_div_loss": each_row(lambda p, q: jsd(p, q, 0.5)),
    "speculators `fused_tv_loss": each_row(lambda p, q: 0.5 * (p - q).abs().sum(-1)),
    "speculators `fused_ce_loss": lambda s, t, y: F.cross_entropy(
        s, t.argmax(-1), reduction="none"
    ),
    "torchdistill `KDLoss": lambda s, t, y: (
        0.3 * F.cross_entropy(s, y)
        + 0.7 * T**2 * counted(kl((t / T).softmax(1), (s / T).softmax(1)), y)
    ),
    "mdistiller `kd_loss": lambda s, t, y: tempered(s, t) * T**2,
    "mdistiller `dkd_loss": lambda s, t, y: decoupled(s, t, y, alpha=0.7, beta=3.0),
    "cls_KD `NKDLoss": lambda s, t, y: normalised(s, t, y, gamma=1.2),
    "cls_KD's tf-NKD": lambda s, t, y: teacher_free(s, y),
    '`F.kl_div(F.log_softmax(s/T, 1), F.softmax(t/T, 1), reduction="batchmean") * T * T`': (
        lambda s, t, y: tempered(s, t) * T**2
    ),
    '`F.kl_div(F.log_softmax(s/T, 1), F.softmax(t/T, 1), reduction="batchmean")`,': (
        lambda s, t, y: tempered(s, t)
    ),
    "`a * F.cross_entropy(s, y)": lambda s, t, y: (
        0.7 * F.cross_entropy(s, y) + 3.0 * tempered(s, t) * T**2
    ),
}


# ---- the tables -----------------------------------------------------------------------------


def rows_of(page: str) -> list[tuple[str, str]]:
    """Both columns of its rows whose second one is a call of ours."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"\| (.*) \| `(kdkernels\.[^`]*)` \|", x) for x in lines]
    return [(x[1], x[2]) for x in found if x]


ROWS = [(page, *row) for page in ("README.md", "docs/conventions.md") for row in rows_of(page)]


def formula_of(text: str) -> str:
    (found,) = [x for x in FORMULAS if text.startswith(x)]
    return found


def test_every_formula_has_a_row() -> None:
    assert {formula_of(text) for _, text, _ in ROWS} == set(FORMULAS)


@needs_cpu
@pytest.mark.parametrize(("page", "text", "ours"), ROWS, ids=[f"{x[0]}-{x[1]}" for x in ROWS])
def test_a_row_of_the_tables(page: str, text: str, ours: str, generator: torch.Generator) -> None:
    """Value and gradient under a random upstream gradient; the constant of a † apart."""
    shape = (2, 4, 11) if "s3" in ours else (8, 11)
    s, t = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(11, shape[:-1], generator=generator)
    if "s, t, y" in ours and "ce_weight" not in ours and page.startswith("docs"):
        y[..., 2] = -100  # in the tables of language models rows are ignored
    s.requires_grad_()
    names = {"kdkernels": kdkernels, "s": s, "t": t, "s3": s, "t3": t, "y": y, "T": T}
    names |= {"a": 0.7, "b": 3.0, "alpha": 0.7, "beta": 3.0, "g": 1.2}
    value, expected = eval(ours, names), FORMULAS[formula_of(text)](s, t, y)
    assert value.shape == expected.shape
    upstream = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    gradient, truth = (
        torch.autograd.grad(x, s, upstream, retain_graph=True)[0] for x in (value, expected)
    )
    torch.testing.assert_close(gradient, truth, rtol=1e-8, atol=1e-10)
    if "†" in text:
        value, expected = value - value.detach(), expected - expected.detach()
        assert not torch.allclose(eval(ours, names), FORMULAS[formula_of(text)](s, t, y))
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)
