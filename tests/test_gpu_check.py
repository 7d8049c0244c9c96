"""gpu_check.py without a GPU: its limits of time, the groups it makes, what it says of failures."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from gpu_check import OUT_OF_TIME, Budget
from live_report import Group, group

import kdkernels

posix = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")


@pytest.fixture
def from_now_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "START", time.monotonic())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, and the CUDA backend."""
    states = {
        "cuda": SimpleNamespace(available=True, reason="yes"),
        "triton": SimpleNamespace(available=False, reason="no Triton"),
    }
    monkeypatch.setattr(kdkernels, "backends", lambda: states)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


# ---- limits ---------------------------------------------------------------------------------


@posix
def test_a_tree_of_processes_is_killed_in_time():
    """The pipe ends when the last process that holds it does."""
    ours, theirs = os.pipe()
    start = time.monotonic()
    shell = "trap '' INT; (trap '' INT; sleep 300) & sleep 300"
    status = gpu_check.run_limited(["sh", "-c", shell], 1.0, pass_fds=[theirs])
    os.close(theirs)
    ready, _, _ = select.select([ours], [], [], 5)
    assert status == OUT_OF_TIME and time.monotonic() - start < 5
    assert ready and os.read(ours, 1) == b""
    os.close(ours)


@posix
def test_what_runs_out_of_time_may_report_first(tmp_path):
    text = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(open(sys.argv[1], 'w').close()))\n"
        "time.sleep(300)"
    )
    command = [sys.executable, "-c", text, str(tmp_path / "asked")]
    assert gpu_check.run_limited(command, 3.0) == OUT_OF_TIME
    assert (tmp_path / "asked").exists()


def test_what_ends_in_time_leaves_its_status_and_nothing_else():
    assert gpu_check.run_limited([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    assert gpu_check.run_limited(["no such program"], -1.0) == OUT_OF_TIME
    assert not gpu_check.RUNNING


@pytest.mark.parametrize(
    ("cores", "free", "expected"), [(16, 139, 8), (4, 139, 2), (64, 22, 2), (64, 3, 1), (1, 80, 1)]
)
def test_processes_that_share_the_device(monkeypatch, device, cores, free, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free << 30, 192 << 30))
    assert gpu_check.jobs() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.jobs() == 1


# ---- pytest ---------------------------------------------------------------------------------

PARALLEL = [1, pytest.param(2, id="xdist")]


@pytest.fixture
def run(tmp_path, from_now_on, monkeypatch):
    """Writes a file of tests and runs it."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    for name in [x for x in os.environ if x.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    # The second call must not run out of time where the first one does.
    monkeypatch.setattr(gpu_check, "CALLS", {"not alone": 0.5, "alone": 100.0})
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  alone:\n  gpu:\n  slow:\n")

    def call(text: str, budget: float, processes: int, chosen: str = "", *rest: str):
        if processes > 1:
            pytest.importorskip("xdist")
        (tmp_path / "test_it.py").write_text(text)
        arguments = [str(tmp_path / "test_it.py"), "-p", "no:cacheprovider", *rest]
        return gpu_check.run_all_tests(chosen, arguments, Budget(budget), processes)

    return call


HANGS = """
import time

def test_passes(record_property):
    record_property("backend", "cuda")

def test_skips():
    import pytest
    pytest.skip("a reason")

def test_hangs():
    open(__file__ + ".hangs", "w").close()
    while True:  # as in a kernel that never ends: no interrupt gets it out
        try:
            time.sleep(100)
        except KeyboardInterrupt:
            pass
"""


@pytest.mark.slow
@posix
@pytest.mark.parametrize("processes", PARALLEL)
def test_what_ended_counts_when_a_test_hangs(run, processes, capfd, tmp_path, monkeypatch):
    class Popen(subprocess.Popen):
        """Its time does not begin before the test hangs, however long Python takes to start."""

        def wait(self, timeout=None):
            while self.poll() is None and not (tmp_path / "test_it.py.hangs").exists():
                time.sleep(0.02)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    statuses, groups = run(HANGS, 4.0, processes)
    assert statuses == [OUT_OF_TIME]
    assert groups["cuda", "passes"].passed == 1
    assert groups["-", "skips"].remarks == Counter({"skipped (a reason)": 1})
    hangs = groups["-", "hangs"]
    assert (hangs.passed, hangs.failed, hangs.remarks) == (0, 1, Counter({"out of time": 1}))
    assert groups["-", "pytest, not alone"].failed == 1
    assert "1 out of time: 2 of 3 tests had ended" in gpu_check.table(groups)
    assert "out of time: test_it.py::test_hangs" in capfd.readouterr().out


CRASHES = """
import os, pytest

@pytest.mark.parametrize("backend", ["triton"])
def test_crashes(backend):
    os._exit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", PARALLEL)
def test_a_crash_is_a_failure_of_the_test_that_ran(run, processes):
    statuses, groups = run(CRASHES, 300.0, processes)
    assert len(statuses) == 1 and statuses[0] != 0
    assert groups.keys() == {("triton", "crashes")}
    assert groups["triton", "crashes"].failed == 1


SHARED = """
import os, pathlib, pytest
here = pathlib.Path(__file__).parent
worker = os.environ.get("PYTEST_XDIST_WORKER")

@pytest.mark.gpu
def test_alone_too():  # by its name only
    assert worker
    (here / worker).touch()

@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("i", range(3))
def test_by_itself(i):
    assert not worker and (here / "gw0").exists() | (here / "gw1").exists()

@pytest.mark.gpu
@pytest.mark.slow
def test_slow():
    assert 0

def test_not_marked():
    assert 0

@pytest.mark.gpu
def test_left_out():
    assert 0
"""


@pytest.mark.slow
def test_tests_marked_alone_run_after_the_others_in_one_process(run, monkeypatch):
    seen: list[dict] = []
    monkeypatch.setattr(gpu_check, "group", lambda x, *rest: seen.extend(x) or group(x, *rest))
    expression = "gpu and not slow or nothing"  # binds less than the marker that is added
    options, rest = gpu_check.parse(["-m", expression, "-k", "not left_out", "-x", "-n", "2"])
    statuses, groups = run(SHARED, 300.0, 2, options.m, *rest)
    assert statuses == [0, 0]
    assert {key: (x.passed, x.failed) for key, x in groups.items()} == {
        ("-", "alone too"): (1, 0),
        ("-", "by itself"): (3, 0),
    }
    assert [x["outcome"] for x in seen if "test" in x].count("ended") == 4, "one writer"


def fake_calls(monkeypatch, *statuses: int) -> list[list[str]]:
    """Calls of pytest that end so; their arguments."""
    calls: list[list[str]] = []

    def run_tests(arguments, seconds, **options):
        calls.append(list(arguments))
        return statuses[len(calls) - 1], []

    monkeypatch.setattr(gpu_check, "run_tests", run_tests)
    return calls


@pytest.mark.parametrize(
    ("statuses", "expected"), [((0, 5), [0]), ((5, 1), [1]), ((5, 5), [5]), ((0, 2), [0, 2])]
)
def test_one_call_may_have_nothing_to_run(monkeypatch, statuses, expected):
    fake_calls(monkeypatch, *statuses)
    assert gpu_check.run_all_tests("gpu", [], Budget(300), 1) == (expected, {})


def test_arguments_of_the_two_calls(monkeypatch):
    given = ["-m", "cpu", "-x", "-k", "a or b", "-m", "gpu or slow", "--tools", "none", "tests"]
    options, rest = gpu_check.parse([*given, "--budget", "60"])
    assert (options.m, options.tools, options.budget, options.jobs) == ("gpu or slow", [], 60, None)
    assert rest == ["-x", "-k", "a or b", "tests"]
    calls = fake_calls(monkeypatch, 0, 0)
    gpu_check.run_all_tests(options.m, rest, Budget(60), 1)
    assert calls == [["-m", f"(gpu or slow) and {x}", *rest] for x in ("not alone", "alone")]
    calls = fake_calls(monkeypatch, 0, 0)
    gpu_check.run_all_tests("", ["-n3"], Budget(60), 1)
    assert calls == [["-m", "not alone", "-n3"], ["-m", "alone", "-n3", "-n0"]]
    assert gpu_check.parse([])[0].m == "gpu"


@pytest.mark.parametrize("arguments", [["--tools", "x"], ["--budget", "0"], ["--jobs", "0"]])
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        gpu_check.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


# ---- compute-sanitizer ----------------------------------------------------------------------

# Called as compute-sanitizer --tool TOOL ... python -m pytest ... --live-report=FILE ...
SANITIZER = """#!/bin/sh
for x; do case "$x" in --live-report=*) file=${x#*=} ;; esac; done
echo '{"test": "t.py::test_a[cuda]", "outcome": "started"}' >> "$file"
echo "words of $2"
case $2 in
    initcheck) trap '' INT; sleep 300 ;;
    synccheck) exit 3 ;;
esac
echo '{"test": "t.py::test_a[cuda]", "outcome": "passed", "seconds": 1, "reason": "",' \\
    '"backend": "cuda"}' >> "$file"
echo '{"test": "t.py::test_a[cuda]", "outcome": "ended"}' >> "$file"
test $2 = memcheck || exit 86
"""


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


@posix
def test_the_sanitizers_runs(sanitizer, device, from_now_on, capfd):
    groups = gpu_check.sanitize(list(gpu_check.TOOLS), Budget(3.0), 4)
    assert time.monotonic() - gpu_check.START < 6
    ours = {tool: entry for (backend, tool), entry in groups.items() if backend == "cuda"}
    assert {x: (y.passed, y.failed, dict(y.remarks)) for x, y in ours.items()} == {
        "memcheck": (1, 0, {}),
        "racecheck": (1, 1, {"found by compute-sanitizer": 1}),
        "initcheck": (0, 1, {"out of time": 1}),
        "synccheck": (0, 1, {"did not end": 1}),
    }
    for tool in gpu_check.TOOLS:
        assert groups["triton", tool].remarks == Counter({"skipped (no Triton)": 1})
    out = capfd.readouterr().out
    assert "words of memcheck" not in out
    for tool in ("racecheck", "initcheck", "synccheck"):
        assert f"compute-sanitizer {tool}, cuda: status" in out and f"words of {tool}\n" in out


@posix
def test_the_sanitizers_runs_share_the_time(sanitizer, device, from_now_on):
    """One after another: the one that hangs leaves the others theirs."""
    groups = gpu_check.sanitize(["initcheck", "memcheck"], Budget(3.0), 1)
    assert groups["cuda", "initcheck"].remarks == Counter({"out of time": 1})
    assert groups["cuda", "memcheck"].passed == 1 and not groups["cuda", "memcheck"].failed
    assert time.monotonic() - gpu_check.START < 5


def test_no_time_is_left_for_the_sanitizer(sanitizer, device, monkeypatch):
    monkeypatch.setattr(gpu_check, "START", time.monotonic() - 100)
    groups = gpu_check.sanitize(["memcheck"], Budget(10.0), 1)
    entry = groups["cuda", "memcheck"]
    assert (entry.failed, entry.remarks) == (1, Counter({"out of time": 1}))


def test_no_sanitizer_is_not_a_failure(device, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    groups = gpu_check.sanitize(["memcheck"], Budget(10.0), 1)
    assert groups == {
        ("-", "memcheck"): Group(remarks=Counter({"skipped (compute-sanitizer is not on PATH)": 1}))
    }


# ---- results --------------------------------------------------------------------------------


def lines(test: str, *outcomes: str, backend: str = "cuda") -> list[dict]:
    facts = {"test": test, "seconds": 0.5, "backend": backend, "reason": "why"}
    return [{"test": test, "outcome": "started"}, *({**facts, "outcome": x} for x in outcomes)]


def test_groups_and_table(capsys):
    end = {"outcome": "ended"}
    all_lines = [{"collected": 5}]
    for test, *outcomes in (
        ("a.py::test_some_thing[cuda-x::y]", "passed", "passed", "passed"),
        ("a.py::test_some_thing[cuda-2]", "passed", "failed", "passed"),
        ("a.py::test_some_thing[cuda-3]", "skipped", "passed"),
        ("a.py::test_some_thing[cuda-4]", "passed", "passed", "failed"),
    ):
        all_lines += [*lines(test, *outcomes), {"test": test, **end}]
    all_lines += lines("a.py::C::test_that_hangs[triton-1]", "passed")
    groups = group(all_lines, "out of time")
    assert gpu_check.table(groups).splitlines() == [
        "backend  tests       passed  failed  seconds  remarks",
        "cuda     some thing       1       2      5.5  1 skipped (why)",
        "triton   that hangs       0       1      0.5  1 out of time",
    ]
    assert capsys.readouterr().out == "out of time: a.py::C::test_that_hangs[triton-1]\n"


@pytest.mark.parametrize(
    ("statuses", "entry", "expected", "words"),
    [
        ([0, 0], Group(passed=3), 0, "3 passed on a GPU"),
        ([0, 0], Group(), 1, "0 passed on a GPU"),
        ([0, 0], Group(passed=3, failed=1), 1, "FAILED: 1 failures"),
        ([OUT_OF_TIME, 0], Group(passed=3), 1, "ended with out of time and status 0"),
        ([0, 2], Group(passed=3), 1, "ended with status 0 and status 2"),
    ],
)
def test_verdict(monkeypatch, device, tmp_path, statuses, entry, expected, words):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu_check, "describe", lambda: "facts")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    tests = {("cuda", "x"): entry}
    monkeypatch.setattr(gpu_check, "run_all_tests", lambda *_: (statuses, dict(tests)))
    monkeypatch.setattr(gpu_check, "sanitize", lambda *_: {})
    assert gpu_check.main(["--budget", "77", "--jobs", "3"]) == expected
    text = (tmp_path / "check.txt").read_text()
    assert text.startswith("facts\n") and gpu_check.table(tests) in text and words in text
    assert " s of 77 s, 3 at a time" in text
