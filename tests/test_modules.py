"""Modules compute what the functions compute, with the same arguments and defaults."""

import inspect
import math

import pytest
import torch
from cases import LOSSES, SCALAR_CASES, USUAL, assert_same, evaluate, make_inputs
from torch import nn

import kdkernels

MODULES = {
    getattr(kdkernels, loss.module): USUAL[name].function
    for name, loss in LOSSES.items()
    if loss.module
}
MODULE_OF = {function: module for module, function in MODULES.items()}
COMMON = {
    "kd_weight": 1.0,
    "ce_weight": 0.0,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "row_weight": None,
    "normalizer": None,
    "reduction": "mean",
    "dim": -1,
    "classes": None,
    "causal": False,
    "return_parts": False,
    "backend": None,
}
# Of a call of the module, because they belong to a batch.
OF_THE_CALL = ("row_weight", "normalizer", "mean_confidence")
WITHOUT_WEIGHTS = {
    k: v
    for k, v in COMMON.items()
    if k not in ("kd_weight", "ce_weight", "label_smoothing", "return_parts")
}
WEIGHED = {USUAL[name].function: loss.weights for name, loss in LOSSES.items()}
PAPERS = {USUAL[name].function: loss.defaults for name, loss in LOSSES.items()}


def keywords(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {x.name: x.default for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY}


def positional(function) -> list[tuple[str, object]]:
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    return [(x.name, x.default) for x in parameters if x.kind in kinds and x.name != "self"]


@pytest.mark.parametrize(("module", "function"), MODULES.items())
def test_signatures(module, function):
    common = COMMON if WEIGHED[function] else WITHOUT_WEIGHTS
    assert keywords(function) == {**PAPERS[function], **common}
    loss = module()
    own = {k: v for k, v in keywords(function).items() if k not in OF_THE_CALL}
    assert {name: getattr(loss, name) for name in own} == own
    of_the_call = {k: v for k, v in keywords(function).items() if k in OF_THE_CALL}
    assert keywords(module.forward) == of_the_call
    assert positional(module.forward) == positional(function)


@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_equal_to_the_function(case, reduction):
    inputs = make_inputs("normal", (2, 3), 7, ignored=0.2)
    options = {"reduction": reduction, "dim": 0, "ignore_index": int(inputs[2][0, 0])}
    inputs = (*(x.movedim(-1, 0) for x in inputs[:2]), inputs[2].clamp(min=0))
    given = {"row_weight": torch.rand(2, 3)} | ({"normalizer": 5} if reduction == "mean" else {})
    own = {k: v for k, v in case.options.items() if k not in OF_THE_CALL}
    module = MODULE_OF[case.function](**own, **options)

    def call(student, teacher, target):
        logits = (student, teacher) if case.teacher else (student,)
        rest = {k: v for k, v in case.options.items() if k in OF_THE_CALL}
        return module(*logits, target, **given, **rest)

    ours, theirs = evaluate(call, *inputs), evaluate(case, *inputs, **options, **given)
    for x, y in zip(ours, theirs, strict=True):
        assert_same(x, y)


def test_target_is_optional_for_kd_only():
    student, teacher, _ = make_inputs("normal", 3, 7)
    assert_same(kdkernels.KDLoss()(student, teacher), kdkernels.kd_loss(student, teacher))
    with pytest.raises(TypeError, match="target"):
        kdkernels.DKDLoss()(student, teacher)


def test_repr_shows_own_arguments_and_what_is_not_a_default():
    assert repr(kdkernels.KDLoss()) == "KDLoss(temperature=4.0)"
    assert repr(kdkernels.TFNKDLoss()) == "TFNKDLoss()"
    loss = kdkernels.DKDLoss(temperature=2, ce_weight=1.0, reduction="sum")
    expected = "DKDLoss(temperature=2, alpha=1.0, beta=8.0, ce_weight=1.0, reduction='sum')"
    assert repr(loss) == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature: got 0; must be a number from 1e-4"),
        ({"ce_weight": math.nan}, ValueError, "ce_weight: got nan; must be 0 or a number from"),
        ({"reduction": "avg"}, ValueError, "reduction: got 'avg'; must be one of mean, sum,"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'; must be None or one of cuda,"),
        ({"dim": None}, TypeError, "dim: got NoneType; must be an integer"),
        (
            {"temp": 1},
            TypeError,
            "KDLoss: got argument 'temp'; allowed are temperature, t_squared,",
        ),
        (
            {"row_weight": None},
            TypeError,
            "KDLoss: got argument 'row_weight', which belongs to the call; allowed are",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_options_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kdkernels.KDLoss(**options)


def test_an_attribute_changed_later_is_used_and_checked():
    student, teacher, _ = make_inputs("normal", 3, 7)
    loss = kdkernels.KDLoss()
    loss.temperature = 2.0
    assert_same(loss(student, teacher), kdkernels.kd_loss(student, teacher, temperature=2.0))
    loss.temperature = -1.0
    with pytest.raises(ValueError, match=r"temperature: got -1\.0"):
        loss(student, teacher)


def test_a_loss_has_nothing_to_learn_or_store():
    for module in MODULES:
        assert not list(module().parameters()) and not module().state_dict()


def test_a_temperature_that_is_learned_belongs_to_the_module():
    student, teacher, target = make_inputs("normal", 6, 5)
    loss = kdkernels.DKDLoss(temperature=nn.Parameter(torch.tensor(2.0)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss(student, teacher, target).backward()
    assert loss.temperature.grad.abs() > 1e-3


# ---- task serialisation ---------------------------------------------------------------------


def test_task_serialization_starts_as_the_identity():
    logits = torch.randn(2, 3, 5)
    torch.testing.assert_close(kdkernels.TaskSerialization(5)(logits), logits)


def test_task_serialization_is_a_linear_layer_that_learns():
    student, teacher, target = make_inputs("normal", 6, 5)
    layer = kdkernels.TaskSerialization(5)
    assert sum(x.numel() for x in layer.parameters()) == 5 * 5 + 5
    logits = student.requires_grad_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    before = kdkernels.aekt_loss(layer(logits), teacher, target)
    before.backward()
    assert logits.grad.abs().sum() > 0
    assert all(x.grad.abs().sum() > 0 for x in layer.parameters())
    optimizer.step()
    assert kdkernels.aekt_loss(layer(logits), teacher, target) < before
    expected = nn.functional.linear(logits, layer.linear.weight, layer.linear.bias)
    torch.testing.assert_close(layer(logits), expected)
    layer.reset_parameters()
    torch.testing.assert_close(layer(logits), logits)


def test_task_serialization_is_saved_with_the_model():
    layer, other = kdkernels.TaskSerialization(5), kdkernels.TaskSerialization(5)
    nn.init.normal_(layer.linear.weight)
    assert set(layer.state_dict()) == {"linear.weight", "linear.bias"}
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5)
    assert_same(other(x), layer(x))
    assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_task_serialization_made_on_no_device(dtype):
    """As FSDP does: parameters on "meta", then memory, then reset_parameters of every module."""
    layer = kdkernels.TaskSerialization(5, device="meta", dtype=dtype).to_empty(device="cpu")
    for module in layer.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    logits = torch.randn(3, 5).to(dtype)
    assert layer.linear.weight.dtype == dtype
    assert_same(layer(logits), logits)


def test_task_serialization_warns_of_its_size():
    with pytest.warns(
        RuntimeWarning, match=r"TaskSerialization\(5000\) holds 25,005,000 parameters"
    ):
        kdkernels.TaskSerialization(5000, device="meta")


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (0, ValueError, "classes: got 0; must be at least 1"),
        (2.0, TypeError, "classes: got float; must be an integer"),
        (True, TypeError, "classes: got bool; must be an integer"),
    ],
)
def test_bad_number_of_classes(classes, error, message):
    with pytest.raises(error, match=message):
        kdkernels.TaskSerialization(classes)
