"""bench/sweep.py without a GPU: plans in the emulation, the file that it keeps, its child."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import SOME, assert_same, evaluate, make_inputs, needs_cpu

from bench import measure, sweep
from bench.cases import Case
from bench.measure import Cpu
from bench.providers import PLAN, planned

pytestmark = needs_cpu
BF16 = torch.bfloat16


# ---- plans ----------------------------------------------------------------------------------

# For the emulation: some of each kind, together every number that the sweep asks for.
PLANS = [x for i, x in enumerate(sweep.PLANS) if not x.startswith("regime=cluster") or i % 7 == 0]


def test_the_plans_are_all_there_are() -> None:
    assert len(set(sweep.PLANS)) == len(sweep.PLANS) == 4 + 5 * 3 * 2 * 2


def test_the_emulated_plans_have_every_number() -> None:
    words = {word for plan in PLANS for word in plan.split()}
    assert words == {word for plan in sweep.PLANS for word in plan.split()}


@pytest.mark.full  # the emulation is built for make test-full
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_gives_the_same_numbers(plan: str, generator: torch.Generator) -> None:
    """Of rows with room for all of them; the emulation would see an access out of its place."""
    from emulated import DEVICE, emulate

    device = {**DEVICE, "multiprocessors": 16, "clusters": [16, 8, 4, 2, 1]}
    case = SOME
    inputs = make_inputs("normal", 3, 2003, BF16, generator, ignored=0.3)
    truth = evaluate(case, *inputs, backend="cpu")
    refused = "threads=384 per_multiprocessor=2" in plan  # the registers
    with emulate(2, device=device) as done, planned(plan):
        if refused:
            with pytest.raises(ValueError, match=r"KDKERNELS_PLAN.*not possible"):
                evaluate(case, *inputs, backend="cuda")
            assert not done.runs
            return
        value, gradient = evaluate(case, *inputs, backend="cuda")
        run = done.runs[0]
    asked = dict(word.split("=") for word in plan.split())
    assert {x: str(run[x]) for x in asked} == asked
    torch.testing.assert_close(value, truth[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, truth[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("before", [None, "parts=4"])
def test_an_override_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    """In the environment, which the planner reads in every call; whatever ends it."""
    monkeypatch.delenv(PLAN, raising=False)
    if before:
        monkeypatch.setenv(PLAN, before)
    for plan in ("regime=staged", ""):
        with planned(plan):
            assert os.environ.get(PLAN, "") == plan
        assert os.environ.get(PLAN) == before
        with pytest.raises(KeyError), planned(plan):
            raise KeyError
        assert os.environ.get(PLAN) == before


@pytest.mark.full
def test_an_override_is_of_the_calls_in_it(generator: torch.Generator) -> None:
    """Neither of the one before nor of the one after, which get the planner's own plan."""
    from emulated import emulate

    inputs = make_inputs("normal", 3, 703, BF16, generator)
    results = []
    with emulate(0) as done:
        for plan in ("", "regime=staged threads=64", ""):
            with planned(plan):
                results.append(evaluate(SOME, *inputs, backend="cuda"))
        own, asked, after = [(x["regime"], x["threads"]) for x in done.runs]
    assert asked == ("staged", 64) and own == after != asked
    for x, y in zip(results[0], results[2], strict=True):
        assert_same(x, y)


# ---- a measurement --------------------------------------------------------------------------


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "WARM", 0.0)
    swept = sweep.Sweep(Cpu(), "cpu", seconds=1e-9)
    case = Case("kd", 5, 101, "bfloat16")
    line = swept.measure(case, "")
    assert line["outcome"] == "ok" and line["difference"] == 0 and line["ms"] > 0
    assert line["bytes"] == 3 * 2 * 5 * 101 and line["share_of_copy"] > 0
    assert 0 < line["grad_error"] < 1e-2
    own = swept._own
    swept._own = own * 1.1
    assert swept.measure(case, "regime=split")["outcome"] == "wrong", "unlike the planner's own"
    swept._own = own
    value, gradient, rows = swept._truth
    for bad in (gradient * 1.1, gradient * float("nan")):
        swept._truth = (value, bad, rows)
        assert swept.measure(case, "regime=split")["outcome"] == "wrong", "unlike the truth"
    swept._truth = (value * 1.1, gradient, rows)
    assert swept.measure(case, "regime=split")["outcome"] == "wrong"


@pytest.mark.parametrize("more", ["; allowed: words", "\nException raised from somewhere"])
def test_only_a_plan_that_is_not_possible_is_a_result(
    monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    """In one line; another error is raised."""
    monkeypatch.setattr(sweep, "WARM", 0.0)
    swept = sweep.Sweep(Cpu(), "cpu", seconds=1e-9)
    case = Case("kd", 5, 101, "bfloat16")
    swept.measure(case, "")
    loss = swept._calls["cpu"]
    seen: list[str | None] = []

    def run(_: Any) -> None:
        seen.append(os.environ.get(PLAN))
        raise RuntimeError(f"KDKERNELS_PLAN: parts=3 is not possible for 5 rows{more}")

    monkeypatch.setattr(loss, "run", run)
    assert swept.measure(case, "parts=3") == {
        "outcome": "not possible",
        "why": "KDKERNELS_PLAN: parts=3 is not possible for 5 rows",
    }
    assert seen == ["parts=3"] and PLAN not in os.environ
    monkeypatch.setattr(loss, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        swept.measure(case, "")


# ---- the file -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The device and the commit, which a line tells first; they may change."""
    facts = {"device": "a CPU", "commit": "abc"}
    monkeypatch.setattr(measure, "cpu_name", lambda: facts["device"])
    monkeypatch.setattr(measure, "commit", lambda: facts["commit"])
    return facts


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_lines_are_kept_as_they_come_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The child of the first run ends in the middle; a name that it had not begun has no line."""
    path = tmp_path / "sweep.csv"
    asked: list[list[str]] = []

    def work_through(names: list[str], command: list[str], **options: Any) -> Any:
        asked.append(list(names))
        for name in names[:3]:
            lines = {
                "": {"outcome": "ok", "ms": 1.5, "share_of_copy": 0.87, "seconds": 1},
                "parts=4": {"failed": "hang: silent for 60 s"},
                "parts=3": {"outcome": "not possible", "why": "why"},
            }
            count = len(read(path))
            yield {"name": name, **lines[name.partition("bfloat16 ")[2]]}
            assert len(read(path)) == count + 1, "before the next one begins"
        yield {"failed": "ended with status 1"}

    monkeypatch.setattr(sweep, "work_through", work_through)
    arguments = ["--shapes", "4x10", "4x20", "--plans", "", "parts=4", "parts=3"]
    arguments += ["--out", str(tmp_path), "--device", "cpu"]
    assert sweep.main(arguments) == 1
    shown = [(x["shape"], x["plan"], x["outcome"], x["ms"], x["why"]) for x in read(path)]
    assert shown == [
        ("4x10", "", "ok", "1.5", ""),
        ("4x10", "parts=4", "failed", "", "hang: silent for 60 s"),
        ("4x10", "parts=3", "not possible", "", "why"),
    ]
    printed = capsys.readouterr().out
    assert "4x10 bfloat16: ok, 1.50, 87 %\n" in printed and printed.endswith("3 are left\n")
    assert sweep.main(arguments) == 1
    assert asked[1] == ["4x20 bfloat16", "4x20 bfloat16 parts=4", "4x20 bfloat16 parts=3"]
    assert len(read(path)) == 6 and capsys.readouterr().out.endswith("all are there\n")


@pytest.mark.parametrize(
    ("outcome", "expected"), [("ok", 0), ("not possible", 0), ("wrong", 1), ("failed", 1)]
)
def test_a_later_call_has_the_status_of_what_it_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, expected: int
) -> None:
    """Also of lines that are there; not of others."""
    lines = [f"a CPU,abc,4x10,bfloat16,,{outcome}", "a CPU,abc,4x20,bfloat16,,wrong"]
    (tmp_path / "sweep.csv").write_text("\n".join([",".join(sweep.FIELDS), *lines, ""]))
    monkeypatch.setattr(sweep, "work_through", lambda *_, **__: iter(()))
    arguments = ["--plans", "", "--device", "cpu", "--out", str(tmp_path)]
    assert sweep.main([*arguments, "--shapes", "4x10"]) == expected
    assert sweep.main([*arguments, "--shapes", "4x10", "4x20"]) == 1


def test_another_device_or_commit_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: dict[str, str]
) -> None:
    asked: list[list[str]] = []

    def work_through(names: list[str], *_: Any, **__: Any) -> Any:
        asked.append(list(names))
        return [{"name": x, "outcome": "ok"} for x in names]

    monkeypatch.setattr(sweep, "work_through", work_through)
    arguments = ["--shapes", "4x10", "--plans", "", "--device", "cpu", "--out", str(tmp_path)]
    for device, commit in [("a CPU", "abc"), ("another", "abc"), ("another", "d"), ("a CPU", "d")]:
        here.update(device=device, commit=commit)
        for count in (1, 0):
            assert sweep.main(arguments) == 0
            assert len(asked.pop()) == count
        assert {k: read(tmp_path / "sweep.csv")[-1][k] for k in here} == here
    assert len(read(tmp_path / "sweep.csv")) == 4


@pytest.mark.parametrize("text", ["shape,dtype,plan\n4x10,bfloat16,\n", "words", "\xff\n", "\n"])
def test_a_file_with_other_columns_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """By its name and both headers, and stays as it is."""
    path = tmp_path / "sweep.csv"
    path.write_text(text, encoding="latin-1")
    monkeypatch.setattr(sweep, "work_through", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(SystemExit) as refused:
        sweep.main(["--device", "cpu", "--out", str(tmp_path)])
    words = str(refused.value.code)
    there = text.split("\n")[0].replace("\xff", "\ufffd")
    assert str(path) in words and f"there: {there}\n" in words
    assert ",".join(sweep.FIELDS) in words
    assert path.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("ending", ["\r\n", "\n"])  # git or an editor may have changed it
@pytest.mark.parametrize(
    "half",
    ["parts=4", "parts=4,ok", 'parts=4,failed,"a'],
)
def test_half_a_line_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: str, ending: str
) -> None:
    """The run that wrote it was killed; what comes after it is read as it was written."""
    path = tmp_path / "sweep.csv"
    text = (
        ",".join(sweep.FIELDS)
        + "\na CPU,abc,4x10,bfloat16,,ok,1.5\na CPU,abc,4x10,bfloat16,"
        + half
    )
    path.write_bytes(text.replace("\n", ending).encode())

    def work_through(names: list[str], *_: Any, **__: Any) -> Any:
        assert names == ["4x10 bfloat16 parts=4", "4x10 bfloat16 parts=3"]
        return [{"name": x, "outcome": "ok", "ms": 2.5} for x in names]

    monkeypatch.setattr(sweep, "work_through", work_through)
    arguments = ["--shapes", "4x10", "--plans", "", "parts=4", "parts=3", "--device", "cpu"]
    assert sweep.main([*arguments, "--out", str(tmp_path)]) == 0
    assert [(x["plan"], x["outcome"]) for x in read(path)] == [
        ("", "ok"), ("parts=4", "ok"), ("parts=3", "ok"),
    ]  # fmt: skip


def test_half_a_header_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.csv"
    path.write_text("device,comm")
    monkeypatch.setattr(sweep, "work_through", lambda *_, **__: iter(()))
    assert sweep.main(["--device", "cpu", "--out", str(tmp_path)]) == 0
    assert path.read_text().splitlines() == [",".join(sweep.FIELDS)]


def test_the_child_says_a_line_for_each_name(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(sweep, "say", lambda **line: said.append(line))
    measured: list[tuple[Case, str]] = []

    def measure(self: Any, case: Case, plan: str) -> dict[str, Any]:
        measured.append((case, plan))
        if plan == "parts=2":
            raise RuntimeError("out of memory\nmore")
        return {"outcome": "ok"}

    monkeypatch.setattr(sweep.Sweep, "measure", measure)
    cases = [Case("kd", 4, 10, "bfloat16"), Case("kd", 8, 20, "float32")]
    pairs = [(cases[0], ""), (cases[0], "parts=2"), (cases[1], "regime=split parts=2")]
    names = [sweep.name_of(*x) for x in pairs]
    assert sweep.main(["--device", "cpu", "--work", *names]) == 0
    assert measured == pairs
    assert said == [
        {"ready": True},
        {"name": names[0], "outcome": "ok"},
        {"name": names[1], "failed": "RuntimeError: out of memory"},
        {"name": names[2], "outcome": "ok"},
    ]


def test_a_sweep_of_the_cpu(tmp_path: Path) -> None:
    """Its plans change nothing there: the same numbers, from a child, in a file."""
    arguments = ["--shapes", "16x103", "--plans", "", "regime=split", "--seconds", "0.001"]
    assert sweep.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    lines = read(tmp_path / "sweep.csv")
    assert [(x["plan"], x["outcome"]) for x in lines] == [("", "ok"), ("regime=split", "ok")]
    assert all(float(x["ms"]) > 0 for x in lines)
