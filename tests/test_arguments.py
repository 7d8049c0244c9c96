"""What the losses accept, what they refuse and in which words, and how rows become one number."""

import gc
import math
import re
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    CPU,
    IGNORED,
    INF,
    MAIN_CASES,
    SCALAR_CASES,
    evaluate,
    make_inputs,
    needs_cpu,
)
from contracts import SHARE_OF

import kdkernels
from kdkernels import arguments, backend, ops, reference

NAN = math.nan
ROWS, CLASSES = 6, 5
LOGIT_DTYPES = "must be one of float16, bfloat16, float32, float64"
TARGET_DTYPES = "must be one of int64, int32, int16, int8, uint8"
TENSOR = ", or a"  # 0-d tensor, or a tensor
TEMPERATURE = f"must be a number from 1e-4 to 1e4{TENSOR}"
WEIGHT = f"must be 0 or a number from 1e-30 to 1e30{TENSOR}"
POSITIVE = "must be a number from 1e-30 to 1e30 or a 0-d tensor"
BACKENDS = ("cpu", "reference") if CPU.available else ("reference",)

INPUTS = student, teacher, target = make_inputs("normal", ROWS, CLASSES)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SPARSE_ROWS = teacher.to_sparse_csr()
    NESTED = torch.nested.nested_tensor([student[:2], student[:3]], layout=torch.jagged)


def out_of_range(value: int) -> torch.Tensor:
    return target.index_fill(0, torch.tensor([2]), value)


# Argument, what is passed, the exception, what its message says after the argument's name.
REFUSED = [
    ("student", None, TypeError, "got NoneType; must be a tensor"),
    ("student", [[1.0, 2.0]], TypeError, "got list; must be a tensor"),
    ("student", student.long(), TypeError, f"got dtype torch.int64; {LOGIT_DTYPES}"),
    (
        "student",
        student.to(torch.complex64),
        TypeError,
        f"got dtype torch.complex64; {LOGIT_DTYPES}",
    ),
    ("teacher", None, TypeError, "got NoneType; must be a tensor"),
    ("teacher", teacher > 0, TypeError, f"got dtype torch.bool; {LOGIT_DTYPES}"),
    ("teacher", teacher[:, 1:], ValueError, "got shape (6, 4); must be (6, 5)"),
    ("teacher", teacher[:1], ValueError, "got shape (1, 5); must be (6, 5)"),
    ("teacher", teacher.to("meta"), ValueError, "got device meta; must be cpu"),
    ("target", None, TypeError, "got NoneType; must be a tensor"),
    ("target", 3, TypeError, "got int; must be a tensor of class ids (options go by name: temp"),
    ("target", target.float(), TypeError, f"got dtype torch.float32; {TARGET_DTYPES}"),
    ("target", target > 0, TypeError, f"got dtype torch.bool; {TARGET_DTYPES}"),
    ("target", target[1:], ValueError, "got shape (5,); must be (6,)"),
    ("target", target[:, None], ValueError, "got shape (6, 1); must be (6,)"),
    ("target", target.to("meta"), ValueError, "got device meta; must be cpu"),
    (
        "target",
        out_of_range(5),
        ValueError,
        "got class 5; must be from 0 to 4 or ignore_index -100",
    ),
    ("target", out_of_range(-1), ValueError, "got class -1; must be from 0 to 4 or ignore_index"),
    ("target", out_of_range(2**40), ValueError, "got class 1099511627776; must be from 0 to 4"),
    ("row_weight", 1.0, TypeError, "got float; must be a tensor"),
    ("row_weight", student[:, 0].to(torch.complex64), TypeError, "got dtype torch.complex64; must"),
    ("student", student.to_sparse(), ValueError, "got layout torch.sparse_coo; must be dense"),
    ("teacher", teacher.to_sparse(), ValueError, "got layout torch.sparse_coo; must be dense"),
    ("teacher", SPARSE_ROWS, ValueError, "got layout torch.sparse_csr; must be dense"),
    ("teacher", teacher.to_mkldnn(), ValueError, "got layout torch._mkldnn; must be dense"),
    ("student", NESTED, ValueError, "got a nested tensor; must be dense"),
    ("teacher", NESTED, ValueError, "got a nested tensor; must be dense"),
    ("target", target.to_sparse(), ValueError, "got layout torch.sparse_coo; must be dense"),
    ("row_weight", target.to_sparse(), ValueError, "got layout torch.sparse_coo; must be dense"),
    ("normalizer", torch.tensor(1.0).to_sparse(), ValueError, "got layout torch.sparse_coo; must"),
    ("row_weight", student, ValueError, "got shape (6, 5); must be (6,)"),
    ("row_weight", torch.ones(()), ValueError, "got shape (); must be (6,)"),
    ("row_weight", torch.ones(ROWS, device="meta"), ValueError, "got device meta; must be cpu"),
    ("normalizer", torch.ones(1), ValueError, "got shape (1,); a tensor must be 0-d"),
    ("normalizer", 0, ValueError, f"got 0; {POSITIVE}"),
    ("normalizer", -2.0, ValueError, f"got -2.0; {POSITIVE}"),
    ("normalizer", INF, ValueError, f"got inf; {POSITIVE}"),
    ("normalizer", NAN, ValueError, f"got nan; {POSITIVE}"),
    ("normalizer", "4", TypeError, f"got str; {POSITIVE}"),
    ("reduction", "avg", ValueError, "got 'avg'; must be one of mean, sum, batchmean, none"),
    ("reduction", None, TypeError, "got NoneType; must be one of mean, sum, batchmean, none"),
    ("reduction", ["mean"], TypeError, "got list; must be one of mean"),
    ("reduction", np.zeros(2), TypeError, "got ndarray; must be one of mean"),
    ("backend", ["cpu"], TypeError, "got list; must be None or one of cuda"),
    ("backend", np.zeros(2), TypeError, "got ndarray; must be None or one of cuda"),
    ("temperature", np.ones(2), TypeError, f"got ndarray; {TEMPERATURE}"),
    ("temperature", 2j, TypeError, f"got complex; {TEMPERATURE}"),
    ("temperature", 5e-324, ValueError, f"got 5e-324; {TEMPERATURE}"),
    ("temperature", 1e300, ValueError, f"got 1e+300; {TEMPERATURE}"),
    ("temperature", 10**5000, ValueError, f"got a value of type int; {TEMPERATURE}"),
    ("temperature", torch.ones(2), ValueError, "got shape (2,); a tensor must be 0-d, or hold one"),
    ("kd_weight", torch.ones(6), ValueError, "got shape (6,); a tensor must be 0-d"),
    ("temperature", torch.tensor(0.0), ValueError, "got 0.0; must be a number from 1e-4 to 1e4"),
    ("temperature", torch.tensor(4.0, device="meta"), ValueError, "got device meta; must be cpu"),
    ("kd_weight", torch.tensor(1.0, device="meta"), ValueError, "got device meta; must be cpu"),
    ("temperature", torch.tensor(2j), TypeError, "got dtype torch.complex64; must be one of"),
    ("alpha", 1e300, ValueError, f"got 1e+300; {WEIGHT}"),
    ("alpha", 5e-324, ValueError, f"got 5e-324; {WEIGHT}"),
    ("alpha", np.float16(np.inf), ValueError, "got "),
    ("alpha", torch.tensor(1e-40), ValueError, "got 9.99"),
    ("alpha", torch.nn.Parameter(torch.tensor(-1.0)), ValueError, "got -1.0; must be 0 or a num"),
    ("kd_weight", -1, ValueError, f"got -1; {WEIGHT}"),
    ("label_smoothing", 1.5, ValueError, "got 1.5; must be a number from 0 to 1, or a 0-d tensor"),
    ("ignore_index", 2**63, ValueError, f"got {2**63}; must be an integer of 64 bits"),
    ("ignore_index", 10**5000, ValueError, "got a value of type int; must be an integer of 64"),
    ("dim", 10**30, ValueError, f"got {10**30}; must be an integer of 64 bits"),
    ("causal", 1, TypeError, "got int; must be True or False"),
    ("causal", True, ValueError, "got student of 2 dimensions with dim=-1; must be (batch, length"),
    ("return_parts", None, TypeError, "got NoneType; must be True or False"),
    ("dim", 2, ValueError, "got 2; student has 2 dimensions"),
    ("dim", -3, ValueError, "got -3; student has 2 dimensions"),
    ("dim", 1.0, TypeError, "got float; must be an integer"),
    ("ignore_index", 0.5, TypeError, "got float; must be an integer"),
    ("ignore_index", None, TypeError, "got NoneType; must be an integer"),
    (
        "backend",
        "gpu",
        ValueError,
        "got 'gpu'; must be None or one of cuda, triton, cpu, reference",
    ),
]


def refused(error: type[Exception], argument: str, message: str):
    return pytest.raises(error, match=f"^{argument}: {re.escape(message)}")


def short(value: object) -> str | None:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    if type(value) is int:
        return f"{value:.3g}" if abs(value) < 2**70 else "huge"
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(("argument", "value", "error", "message"), REFUSED, ids=short)
def test_bad_arguments_are_named(argument, value, error, message):
    given = {"student": student, "teacher": teacher, "target": target, argument: value}
    with refused(error, argument, message):
        kdkernels.dkd_loss(**given)


# Losses differ in their numbers; each of them has its rule.
NUMBERS = [
    (case, name, value)
    for case in MAIN_CASES
    for name in ("temperature", "alpha", "beta", "gamma", "ce_weight", "ratio")
    if name in case.all_options
    for value in (-1.0, NAN, INF, -INF, *([0] if name == "temperature" else []))
]
SHARE = f"must be a number from 0 to 1{TENSOR}"
SHARE_OF_A_MIXTURE = f"must be 0 or a number from 1e-30 to 1{TENSOR}"


@pytest.mark.parametrize(("case", "name", "value"), NUMBERS, ids=lambda x: str(x)[:20])
def test_bad_numbers(case, name, value):
    allowed = {"temperature": TEMPERATURE, "ratio": SHARE}.get(name, WEIGHT)
    if SHARE_OF.get(case.loss) == name:
        allowed = SHARE_OF_A_MIXTURE
    if case.loss == "ab" and name in ("alpha", "beta"):
        allowed = SHARE
    logits = (student, teacher) if case.teacher else (student,)
    with refused(ValueError, name, f"got {value}; {allowed}"):
        case.function(*logits, target, **{name: value})


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_exponents_beyond_1(name):
    for value in (1.5, torch.tensor(1.5)):
        with pytest.raises(
            ValueError, match=rf"^{name}: got .*1\.5.*; must be a number from 0 to 1"
        ):
            kdkernels.ab_loss(student, teacher, **{name: value})
        with pytest.raises(ValueError, match=f"^{name}: got "):
            kdkernels.ABLoss(**{name: value})


@pytest.mark.parametrize("value", [True, "4", None, np.bool_(1)], ids=lambda x: type(x).__name__)
def test_numbers_of_a_wrong_type(value):
    with refused(TypeError, "temperature", f"got {type(value).__name__}; {TEMPERATURE}"):
        kdkernels.kd_loss(student, teacher, temperature=value)


@pytest.mark.parametrize("name", BACKENDS)
def test_numbers_of_any_kind(name, recwarn):
    expected = kdkernels.kd_loss(student, teacher, temperature=4.0, backend=name)
    kinds = (4, Fraction(4), np.float16(4), np.float32(4), np.float64(4), np.int8(4), np.uint16(4))
    tensors = (torch.tensor(4.0), torch.tensor(4), torch.tensor(4.0, dtype=torch.float16))
    for value in (*kinds, *tensors):
        found = kdkernels.kd_loss(student, teacher, temperature=value, backend=name)
        torch.testing.assert_close(found, expected, msg=repr(value))
    assert not recwarn.list


def test_unknown_options_and_options_without_their_name():
    with pytest.raises(TypeError, match="kd_loss: got argument 'temprature'; allowed are temper"):
        kdkernels.kd_loss(student, teacher, temprature=4.0)
    with pytest.raises(TypeError, match=r"^target: got float; .* by name: temperature=4\.0\)"):
        kdkernels.kd_loss(student, teacher, 4.0)
    with pytest.raises(TypeError, match=r"^DKDLoss: takes keyword arguments only: DKDLoss\(temper"):
        kdkernels.DKDLoss(4.0)


@pytest.mark.parametrize("argument", ["target", "reduction", "teacher", "temperature"])
def test_a_refused_call_keeps_no_tensors_alive(argument):
    bad = {"target": out_of_range(5), "reduction": "avg", "teacher": teacher[:1], "temperature": 0}
    for name in BACKENDS:
        mine = student.clone()
        alive = weakref.ref(mine)
        given = {"teacher": teacher, "target": target, argument: bad[argument]}
        gc.disable()  # what only the collector frees is kept
        try:
            with pytest.raises(ValueError):
                kdkernels.dkd_loss(mine, **given, backend=name)
            del mine
            assert alive() is None, name
        finally:
            gc.enable()


@pytest.mark.parametrize("value", [-0.1, 80.5, NAN, INF])
def test_bad_log_ratio_max(value):
    with refused(ValueError, "log_ratio_max", f"got {value}; must be a number from 0 to 80"):
        kdkernels.aekt_loss(student, teacher, target, log_ratio_max=value)


def test_bad_variant():
    with refused(ValueError, "variant", "got 'A'; must be one of ratio_weighted_tckd, "):
        kdkernels.aekt_loss(student, teacher, target, variant="A")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.5, ValueError, "got 1.5; must be a number from 0 to 1 or a 0-d tensor"),
        (NAN, ValueError, "got nan; must be a number from 0 to 1 or a 0-d tensor"),
        ("x", TypeError, "got str; must be a number from 0 to 1 or a 0-d tensor"),
        (torch.ones(2), ValueError, "got shape (2,); a tensor must be 0-d"),
    ],
)
def test_bad_mean_confidence(value, error, message):
    with refused(error, "mean_confidence", message):
        kdkernels.tf_nkd_loss(student, target, mean_confidence=value)


def test_cross_entropy_needs_a_target():
    with refused(ValueError, "target", "got None; ce_weight=0.5 needs a tensor of class ids"):
        kdkernels.kd_loss(student, teacher, ce_weight=0.5)


def test_a_normalizer_has_nothing_to_do_without_reduction():
    with refused(
        ValueError, "normalizer", "got one with reduction 'none', which divides by nothing"
    ):
        kdkernels.kd_loss(student, teacher, reduction="none", normalizer=3)


def test_logits_without_classes():
    with refused(ValueError, "student", "got 0 classes; must be at least 1"):
        kdkernels.kd_loss(student[:, :0], teacher[:, :0])


def test_logits_without_a_dimension():
    with refused(ValueError, "dim", "got -1; student has 0 dimensions"):
        kdkernels.kd_loss(torch.tensor(1.0), torch.tensor(1.0))


def test_target_split_speaks_of_logits():
    with refused(TypeError, "logits", "got list; must be a tensor"):
        kdkernels.target_split([1.0], target)


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_every_loss_checks_its_inputs(case):
    with refused(TypeError, case.facts.student, "got dtype torch.int64"):
        case(student.long(), teacher, target)
    with refused(ValueError, "target", "got class 5"):
        case(student, teacher, out_of_range(5))
    with refused(ValueError, "backend", "got 'gpu'"):
        case(student, teacher, target, backend="gpu")


def test_nothing_is_computed_before_the_checks(monkeypatch):
    def compute(*_):
        raise AssertionError("an operator ran")

    monkeypatch.setattr(ops.Operators, "apply", compute)
    for name, loss in reference.LOSSES.items():
        monkeypatch.setitem(reference.LOSSES, name, replace(loss, reference=compute))
    for change in ({"target": out_of_range(5)}, {"normalizer": 0}, {"reduction": "avg"}):
        for name in BACKENDS:
            if name == "cpu" and "target" in change:
                continue  # its operators refuse it before they compute anything
            given = {"student": student, "teacher": teacher, "target": target, **change}
            with pytest.raises(ValueError):
                kdkernels.dkd_loss(**given, backend=name)


# ---- backends -------------------------------------------------------------------------------


def set_available(monkeypatch, **available: bool) -> None:
    """Pretends that these backends are there, or are not because of "a reason"."""
    changed = {name: backend.Availability(yes, "a reason") for name, yes in available.items()}
    monkeypatch.setattr(backend, "_available", {**backend._available, **changed})
    monkeypatch.setattr(backend, "_DEVICE", {**backend._DEVICE, "triton": "cuda"})
    monkeypatch.setattr(backend, "_warned", set())


def test_backends_says_what_there_is():
    found = kdkernels.backends()
    assert list(found) == ["cuda", "triton", "cpu", "reference"]
    for entry in found.values():
        assert isinstance(entry.available, bool) and entry.reason
    assert found["reference"].available
    found.clear()
    assert kdkernels.backends()["reference"].available, "a caller's copy"


@needs_cpu
def test_backends_shows_what_the_build_recorded():
    build = kdkernels.backends()["cpu"].build
    assert build["outcome"] in ("cpu", "cuda") and "baseline" in build["isas"]
    assert build["compiler"] and build["torch"]


def test_a_missing_backend_is_refused_with_its_reason(monkeypatch):
    set_available(monkeypatch, cpu=False)
    message = "^backend 'cpu' is not available: a reason$"
    with pytest.raises(RuntimeError, match=message):
        kdkernels.kd_loss(student, teacher, backend="cpu")


def test_a_backend_of_another_device_is_refused(monkeypatch):
    set_available(monkeypatch, cuda=True)
    message = "^backend 'cuda' works on cuda tensors; the logits are on cpu$"
    with pytest.raises(ValueError, match=message):
        kdkernels.kd_loss(student, teacher, backend="cuda")


def test_the_fastest_available_backend_is_chosen(monkeypatch, recwarn):
    set_available(monkeypatch, cpu=True, cuda=True, triton=True)
    assert backend.choose(None, torch.device("cpu")) == "cpu"
    assert backend.choose(None, torch.device("cuda")) == "cuda"
    assert backend.choose("reference", torch.device("cuda")) == "reference"
    assert not recwarn.list
    set_available(monkeypatch, cuda=False)
    with pytest.warns(RuntimeWarning, match=r"'triton' for cuda tensors.* cuda \(a reason\)"):
        assert backend.choose(None, torch.device("cuda")) == "triton"


def test_one_warning_at_a_silent_downgrade(monkeypatch):
    set_available(monkeypatch, cpu=False)
    message = r"slower backend 'reference' for cpu tensors; not available: cpu \(a reason\)"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        for _ in range(2):
            kdkernels.kd_loss(student, teacher)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "it points at the caller"


def test_no_warning_when_the_reference_is_asked_for(monkeypatch, recwarn):
    set_available(monkeypatch, cpu=False)
    kdkernels.kd_loss(student, teacher, backend="reference")
    assert not recwarn.list


def test_works_without_the_extension():
    """A process in which the compiled module is not there: pure Python, and one warning."""
    script = """
import sys, warnings
sys.modules["kdkernels._C"] = None
import torch, kdkernels
cpu = kdkernels.backends()["cpu"]
assert not cpu.available and cpu.reason.startswith("not built: "), cpu
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x = torch.randn(2, 3, requires_grad=True)
    for _ in range(2):
        kdkernels.KDLoss()(x, torch.randn(2, 3)).backward()
assert len(caught) == 1 and "slower backend" in str(caught[0].message), caught
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", ["ImportError", "OSError", "AttributeError"])
def test_a_broken_extension_says_why(tmp_path, monkeypatch, error):
    (tmp_path / "kd_broken_module.py").write_text(f"raise {error}('undefined symbol: xyz')")
    monkeypatch.delitem(sys.modules, "kd_broken_module", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    reason = backend._import_error("kd_broken_module", "absent")
    assert reason == "kd_broken_module does not load: undefined symbol: xyz"
    assert backend._import_error("kd_no_such_module", "absent") == "absent"


@needs_cpu
def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("KDKERNELS_CPU_ISA", "mmx")
    message = "KDKERNELS_CPU_ISA=mmx is not available here; allowed: baseline"
    with pytest.raises(RuntimeError, match=message):
        kdkernels.kd_loss(student, teacher)


def test_targets_are_read_on_the_host_only_where_that_is_free_or_asked_for(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for value, checked in ((None, False), ("", False), ("0", False), ("1", True)):
        if value is None:
            monkeypatch.delenv("KDKERNELS_CHECK", raising=False)
        else:
            monkeypatch.setenv("KDKERNELS_CHECK", value)
        assert backend.checks_targets(cpu)
        assert backend.checks_targets(cuda) is checked


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_an_unchecked_target_out_of_range_makes_its_row_nan(monkeypatch, case):
    # What a GPU does, in the reference; the CPU kernels refuse it.
    case = case.apart  # a NaN row must not reach others
    monkeypatch.setattr(arguments, "checks_targets", lambda _: False)
    good, bad = (
        evaluate(case.rows, student, teacher, y, backend="reference")
        for y in (target, out_of_range(5))
    )
    others = torch.arange(ROWS) != 2
    assert bad[0][..., 2].isnan().all() and bad[1][2].isnan().all()
    assert torch.equal(good[0][..., others], bad[0][..., others])
    assert torch.equal(good[1][others], bad[1][others])


# ---- what is accepted -----------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_reductions(case, name):
    inputs = make_inputs("normal", (3, 4), CLASSES, ignored=0.3)
    counted = int((inputs[2] != IGNORED).sum())
    rows = case.rows(*inputs, backend=name)
    assert rows.shape == (3, 4) and 0 < counted < 12
    for options, divisor in (
        ({}, counted),
        ({"reduction": "sum"}, 1),
        ({"reduction": "batchmean"}, 3),
        ({"normalizer": 7}, 7),
        ({"normalizer": torch.tensor(7)}, 7),
        ({"normalizer": 0.5, "reduction": "sum"}, 0.5),
    ):
        loss = case(*inputs, backend=name, **options)
        assert loss.shape == () and loss.dtype == torch.float32
        torch.testing.assert_close(loss, rows.sum() / divisor, msg=str(options))


def test_mean_without_a_target_counts_every_row():
    rows = kdkernels.kd_loss(student, teacher, reduction="none")
    torch.testing.assert_close(kdkernels.kd_loss(student, teacher), rows.mean())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_one_row_and_none(case, name):
    shape = (3,) if case.outputs == 3 else ()
    row = case.rows(*(x[0] for x in INPUTS), backend=name)
    whole = case.rows(*(x[:1] for x in INPUTS), backend=name)
    assert row.shape == shape
    torch.testing.assert_close(row, whole[..., 0])
    if case.outputs == 1:
        options = {"reduction": "batchmean", "backend": name}
        torch.testing.assert_close(case(*(x[0] for x in INPUTS), **options), row)
        value, gradient = evaluate(case, *(x[:0] for x in INPUTS), backend=name)
        assert value == 0 and gradient.shape == (0, CLASSES)
        value, gradient = evaluate(
            case, student, teacher, torch.full((ROWS,), IGNORED), backend=name
        )
        assert value == 0 and not gradient.any(), "all rows ignored"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows_of_mixed_dtypes(name, reduction):
    """No data to look at, but the loss is of the same dtype as with rows."""
    inputs = [x[:0] for x in (student, teacher.double(), target)]
    options = {"reduction": reduction, "backend": name}
    value, gradient = evaluate(kdkernels.dkd_loss, *inputs, **options)
    assert value.dtype == torch.float64 and gradient.dtype == torch.float32
    assert not value.any()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_classes_at_any_dimension(case, name, dim):
    inputs = make_inputs("normal", (2, 3), CLASSES)
    expected, gradient = evaluate(case.rows, *inputs, backend=name)
    moved = [x.movedim(-1, dim) for x in inputs[:2]]
    actual, moved_gradient = evaluate(case.rows, *moved, inputs[2], dim=dim, backend=name)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(moved_gradient.movedim(dim, -1), gradient)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_ignore_index_may_be_a_class(case, name):
    chosen = int(target[0])
    ignored = target == chosen
    rows, gradient = evaluate(
        case.rows, student, teacher, target, ignore_index=chosen, backend=name
    )
    other_rows, other_gradient = evaluate(
        case.rows, student, teacher, target.where(~ignored, IGNORED), backend=name
    )
    assert not rows[..., ignored].any() and rows[..., ~ignored].all() and not ignored.all()
    torch.testing.assert_close(rows, other_rows)
    torch.testing.assert_close(gradient, other_gradient)
    if case.outputs == 1:
        mean = case(student, teacher, target, ignore_index=chosen, backend=name)
        torch.testing.assert_close(mean, rows.sum() / (~ignored).sum())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_target_dtypes(dtype):
    expected = kdkernels.dkd_loss(student, teacher, target)
    assert torch.equal(kdkernels.dkd_loss(student, teacher, target.to(dtype)), expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_row_weight(case, name):
    case = case.apart  # a mean over rows leaves out those of weight 0
    weight = torch.linspace(0, 2, ROWS, dtype=torch.float64)
    expected = case.rows(student, teacher, target, backend=name) * weight
    hidden = student.clone()
    hidden[0] = NAN  # a row of weight 0 is not read
    value, gradient = evaluate(case, hidden, teacher, target, row_weight=weight, backend=name)
    torch.testing.assert_close(value, expected.sum().float() / ROWS)
    assert not gradient[0].any() and gradient.isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_mean_confidence(name):
    confidence = student.softmax(-1).gather(1, target[:, None])[:, 0]
    for mean in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)):
        rows = kdkernels.tf_nkd_loss(
            student, target, mean_confidence=mean, reduction="none", backend=name
        )
        torch.testing.assert_close(rows, -(confidence + 1 - 0.25) * confidence.log())
    by_itself = kdkernels.tf_nkd_loss(student, target, backend=name)
    given = kdkernels.tf_nkd_loss(student, target, mean_confidence=confidence.mean(), backend=name)
    torch.testing.assert_close(by_itself, given)


@pytest.mark.parametrize("name", BACKENDS)
def test_tf_nkd_of_two_ranks_is_that_of_their_union(name):
    inputs = make_inputs("normal", ROWS, CLASSES, ignored=0.2)
    halves = [slice(0, 2), slice(2, ROWS)]
    # What each rank sends, and all receive the sum of.
    count = (inputs[2] != IGNORED).sum()
    total = sum(
        kdkernels.target_split(inputs[0][half], inputs[2][half])
        .log_target.exp()[inputs[2][half] != IGNORED]
        .sum()
        for half in halves
    )
    whole, gradient = evaluate(tf_nkd, *inputs, backend=name)
    parts = [
        evaluate(
            tf_nkd,
            *(x[half] for x in inputs),
            mean_confidence=total / count,
            normalizer=count,
            backend=name,
        )
        for half in halves
    ]
    torch.testing.assert_close(sum(value for value, _ in parts), whole)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient)


def tf_nkd(student, _, target, **options):
    return kdkernels.tf_nkd_loss(student, target, **options)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inputs_are_not_modified(case, name):
    inputs = [*make_inputs("normal", ROWS, CLASSES, ignored=0.3), torch.rand(ROWS)]
    before = [x.clone() for x in inputs]
    versions = [x._version for x in inputs]
    options = {} if case.outputs > 1 else {"row_weight": inputs[3]}
    leaf = inputs[0].requires_grad_()
    for upstream in (None, 3.0):  # the second one scales a gradient in place
        value = case(leaf, *inputs[1:3], backend=name, **options)
        torch.autograd.grad(value.sum(), leaf, None if upstream is None else torch.tensor(upstream))
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert versions == [x._version for x in inputs]


def test_the_parameters_of_the_variants_are_in_order():
    for position, variant in enumerate(reference.AEKT_VARIANTS):
        assert arguments.check_option("variant", variant, "aekt") == position
