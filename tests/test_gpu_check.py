"""gpu_check.py and what it runs, without a GPU: stand-ins hang, crash, and lose the device."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import gpu_smoke
import live_report
import pytest
import torch
from cases import ISAS
from gpu_check import Results
from on_gpu import kernels_in, our_kernels

import kdkernels
from bench import __main__ as benchmark
from bench import children, counters

pytestmark = pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
FOREVER = 1e9
# Called as CHILD ... NAME NAME ..: says of each name what it asks for. Trapped: nothing but a kill
# ends a kernel that hangs.
CHILD = """#!/bin/sh
say() { echo "$1" >> "$KD_LINES"; }
name() { say "{\\"name\\": \\"$name\\", $1}"; }
case "$*" in *"not ready"*) exit 9 ;; esac
say '{"ready": true}'
for name; do
  case "$name" in
    hangs*) echo "words of $name"; touch "$0.hangs"; trap '' INT TERM; sleep 300; sleep 300 ;;
    crashes*) kill -SEGV $$ ;;
    lost*) name '"failed": "illegal access", "lost": true'; exit 0 ;;
    wrong*) name '"failed": "wrong: 3"' ;;
    ends*) exit 0 ;;
    -* | cpu | cuda | *.py) ;;
    *) name '"error": 0.5, "seconds": 2' ;;
  esac
done
"""


@pytest.fixture
def child(tmp_path: Path) -> str:
    program = tmp_path / "child"
    program.write_text(CHILD)
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the parent: it goes while a child says that it hangs, 5 s with every look at it.

    However long a child takes on a busy machine, nothing else is late.
    """
    now, flag, kill = [0.0], tmp_path / "child.hangs", children.kill

    def monotonic() -> float:
        now[0] += 5.0 * flag.exists()
        return now[0]

    def killed(process: subprocess.Popen) -> None:
        kill(process)
        flag.unlink(missing_ok=True)

    monkeypatch.setattr(children, "kill", killed)
    monkeypatch.setattr(children, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))


def through(command: list[str], *names: str, until: float = FOREVER, **options: Any) -> list[dict]:
    return list(children.work_through(names, command, limit=60.0, until=until, **options))


# ---- children -------------------------------------------------------------------------------


def test_what_hangs_crashes_or_loses_the_device_stops_nothing_else(child: str, clock: None) -> None:
    names = ["a", "hangs", "b", "crashes", "lost", "c", "wrong", "ends", "d", "hangs too"]
    said = through([child], *names)
    assert [x["name"] for x in said] == names
    assert [x.get("failed", "") for x in said] == [
        "", "hang: silent for 60.0 s", "", f"ended with status {-signal.SIGSEGV}",
        "illegal access", "", "wrong: 3", "ended with status 0", "", "hang: silent for 60.0 s",
    ]  # fmt: skip


def test_a_child_that_does_not_get_ready_is_not_tried_again(child: str) -> None:
    assert through([child], "a", "not ready", "b") == [{"failed": "not ready: ended with status 9"}]


def test_how_a_child_ends_is_said_too_where_it_takes_no_name_along(child: str) -> None:
    """Behind the last name, and behind the one with which the device was lost."""
    script = f'"{child}" "$@"; exit 86'
    said = through(["sh", "-c", script, "sh"], "a", "lost", "b")
    assert [x.get("name", x.get("failed")) for x in said] == [
        "a", "lost", "ended with status 86", "b", "ended with status 86",
    ]  # fmt: skip
    assert said[2] == said[4] == {"failed": "ended with status 86"}


def test_time_is_up(child: str, clock: None, tmp_path: Path) -> None:
    """What was under way is killed and has no line, as what was not begun; the rest is printed."""
    output = tmp_path / "printed"
    assert [x["name"] for x in through([child], "a", "hangs", "b", until=50.0, output=output)] == [
        "a"
    ]
    assert output.read_text() == "words of hangs\n"
    assert through([child], "a", until=-1.0) == []


def test_all_that_a_child_has_started_is_killed(child: str, clock: None) -> None:
    """The pipe ends when the last process that holds it does."""
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    script = f'("{child}" hangs) & "{child}" hangs'
    popen, children.subprocess.Popen = subprocess.Popen, keeping(subprocess.Popen)
    try:
        assert through(["sh", "-c", script], "x")[0]["failed"].startswith("hang")
    finally:
        children.subprocess.Popen = popen
    os.close(theirs)
    assert os.read(ours, 1) == b""
    os.close(ours)


def keeping(popen: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a, **k: popen(*a, close_fds=False, **k)


def test_all_of_it_can_be_stopped(child: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = SimpleNamespace(is_set=lambda: Path(f"{child}.hangs").exists())
    monkeypatch.setattr(children, "STOP", stop)
    assert [x["name"] for x in through([child], "a", "hangs", "b")] == ["a"]


SCRIPT = """
import sys
from bench import children

def main():
    words = 'echo {} >> "$KD_LINES"; echo ready; exec sleep 20'
    for line in children.watch(["sh", "-c", words], limit=1e9, until=1e18):
        print(line, flush=True)
        if line == {} and "raise" in sys.argv:
            raise KeyError
    return 0

sys.exit(children.stoppable(main))
"""
STOPPABLE = {
    "sweep": (["-m", "bench.sweep", "--device", "cpu", "--shapes", "4x10", "--plans", ""], "there"),
    "gpu_check": (["tests/gpu_check.py", "--backend", "cpu", "--stages", "smoke"], "at most"),
}


def start(arguments: list[str], **variables: str) -> subprocess.Popen:
    """A process whose output ends with the last of those that have it."""
    variables = {k: v for k, v in os.environ.items() if k != children.LINES} | variables
    command, root = [sys.executable, *arguments], gpu_check.ROOT
    return subprocess.Popen(command, env=variables, cwd=root, stdout=subprocess.PIPE, text=True)


def begin(arguments: list[str], word: str, **variables: str) -> subprocess.Popen:
    """It has printed the word."""
    process = start(arguments, **variables)
    assert process.stdout and any(word in line for line in process.stdout)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_what_was_started(number: signal.Signals) -> None:
    """The parent says what it knows, and its status tells of the signal."""
    process = begin(["-c", SCRIPT], "ready")
    process.send_signal(number)
    assert process.communicate()[0].splitlines()[-1] == "{'late': True}"
    assert process.returncode == 128 + number


def test_a_signal_that_is_ignored_stays_so() -> None:
    process = begin(["-c", f"import signal; signal.signal(1, signal.SIG_IGN){SCRIPT}"], "ready")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


def test_an_error_in_the_parent_ends_what_it_has_started() -> None:
    process = begin(["-c", SCRIPT, "raise"], "ready")
    assert process.communicate()[0] == "{}\n" and process.returncode == 1


@pytest.mark.skipif(not ISAS, reason="no CPU kernels")
@pytest.mark.parametrize("name", STOPPABLE)
def test_a_program_is_ended_by_a_dropped_connection(name: str, tmp_path: Path) -> None:
    arguments, word = STOPPABLE[name]
    more = ["--seconds", "20", "--out", str(tmp_path)] if name == "sweep" else []
    process = begin([*arguments, *more], word, OUT=str(tmp_path))
    process.send_signal(signal.SIGHUP)
    printed = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGHUP
    if name == "sweep":
        assert printed == "stopped: 1 are left\n"
    else:
        count = len(gpu_smoke.names("cpu")) + len(gpu_smoke.first("cpu"))
        assert f"STOPPED by a signal: {count} were not done, 0 passed, 0 failed\n" in printed
        assert f"{count} left out (stopped)" in (tmp_path / "check-cpu.txt").read_text()


def test_counters_are_ended_by_a_signal(tmp_path: Path) -> None:
    program, fifo = tmp_path / "ncu", tmp_path / "fifo"
    program.write_text(f'#!/bin/sh\necho begun > "{fifo}"\nexec sleep 20 > "{fifo}"\n')
    program.chmod(0o755)
    os.mkfifo(fifo)
    arguments = ["-m", "bench.counters", "--shapes", "5x10", "6x10", "--out", str(tmp_path)]
    process = start(arguments, PATH=f"{tmp_path}:{os.environ['PATH']}")
    with fifo.open() as file:
        assert file.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        file.read()  # ends with the program
    why = "left out, the run was stopped"
    assert process.communicate()[0] == "".join(f"KD {x}x10 bfloat16: {why}\n" for x in (5, 6))
    assert process.returncode == 128 + signal.SIGTERM


# ---- the smoke test -------------------------------------------------------------------------


@pytest.mark.skipif(not ISAS, reason="the planner is built with the CPU kernels")
def test_cases_are_of_the_regimes_that_they_name() -> None:
    """On an H200; together they are all there are, and every size of cluster."""
    from kdkernels import _host

    seen, clusters = set(), set()
    for name, calls in (gpu_smoke.CASES | gpu_smoke.FIRST).items():
        for call in calls:
            sizes = [getattr(torch, x).itemsize for x in (call.student, call.teacher) if x]
            wide = sizes[0] == 8 or len(set(sizes)) > 1
            plan = _host.gpu_plan(
                device="H200", rows=call.rows, classes=call.classes, itemsize=sizes[0], wide=wide,
                alike=not wide and call.layout != "skewed", override=call.plan,
                strided=call.layout in ("classes first", "every other class"),
            )  # fmt: skip
            assert plan["regime"] == call.regime, name
            seen.add(call.regime)
            clusters |= {plan["parts"]} if call.regime == "cluster" else set()
    assert seen == {"lanes", "block", "staged", "cluster", "sweeps", "split", "strided"}
    assert clusters == {1, 2, 4, 8, 16}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_smoke, "CASES", {"x": (gpu_smoke.Call("block", 3, 37),) * 2})


@pytest.mark.skipif(not ISAS, reason="no CPU kernels")
def test_a_case_is_compared_with_float64(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    line = gpu_smoke.attempt("x", "cpu", "cpu")
    assert line.keys() == {"error", "seconds"} and 0 < line["error"] < 1e-2

    real = kdkernels.dkd_loss
    off = {"cpu": 1.02, "reference": 1.0}
    monkeypatch.setattr(kdkernels, "dkd_loss", lambda *a, **k: off[k["backend"]] * real(*a, **k))
    assert gpu_smoke.attempt("x", "cpu", "cpu")["failed"].startswith("wrong: 3 x 37, error 2.")
    off["cpu"] = float("nan")
    assert gpu_smoke.attempt("x", "cpu", "cpu")["failed"] == "wrong: 3 x 37, error nan"


@pytest.mark.parametrize("lost", [False, True])
def test_a_child_says_what_it_has_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lost: bool
) -> None:
    """After a lost device it ends, whatever is left to do; to its parent no failure is a status."""
    ended: list[int] = []

    def attempt(name: str, *_: Any) -> dict[str, Any]:
        return {"failed": "why", "seconds": 0.1} | ({"lost": True} if lost else {})

    def end(status: int) -> None:
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(gpu_smoke, "attempt", attempt)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--backend", "cpu", "block", "8 lanes"])
    monkeypatch.setenv(children.LINES, str(tmp_path / "lines"))
    if lost:
        with pytest.raises(SystemExit):
            gpu_smoke.main()
        assert ended == [0]
    else:
        assert gpu_smoke.main() == 0
    said = [json.loads(x) for x in (tmp_path / "lines").read_text().splitlines()]
    assert said[0] == {"ready": True}
    assert [x["name"] for x in said[1:]] == ["block", "8 lanes"][: 1 if lost else 2]
    monkeypatch.delenv(children.LINES)
    if not lost:
        assert gpu_smoke.main() == 1, "by hand it is one"


@pytest.mark.parametrize(
    ("error", "lost", "sanitized", "expected"),
    [
        ("CUDA error: invalid cluster size", False, True, {"failed": "invalid cluster size"}),
        ("CUDA error: illegal memory access", True, True, {"failed": "illegal", "lost": True}),
        ("KDKERNELS_PLAN: not possible", False, False, {"failed": "KDKERNELS_PLAN"}),
        ("too many resources requested for launch", False, True, {"skipped": "too many resources"}),
        ("too many resources requested for launch", False, False, {"failed": "too many resources"}),
    ],
)
def test_errors_of_a_case(
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
    lost: bool,
    sanitized: bool,
    expected: dict[str, Any],
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError(error)

    def synchronize() -> None:
        if lost:
            fails()

    monkeypatch.setattr(gpu_smoke, "error_of", fails)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    line = gpu_smoke.attempt("x", "cuda", "cuda", sanitized)
    del line["seconds"]
    assert line.keys() == expected.keys()
    for key, value in expected.items():
        assert line[key] is True if value is True else value in line[key]


@pytest.mark.parametrize(("there", "word"), [(99, "skipped"), (163, "failed"), (None, "skipped")])
def test_a_plan_is_skipped_where_a_block_has_no_room_for_it(
    monkeypatch: pytest.MonkeyPatch, there: int | None, word: str
) -> None:
    """Where it has, the planner is wrong; where torch does not know, nobody does."""
    call = gpu_smoke.Call("staged", 3, 37, plan="regime=staged", shared=100 << 10)
    known = {} if there is None else {"shared_memory_per_block_optin": there << 10}
    monkeypatch.setattr(gpu_smoke, "CASES", {"x": (call,)})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**known))

    def fails(*_: Any) -> None:
        raise RuntimeError("KDKERNELS_PLAN: not possible")

    monkeypatch.setattr(gpu_smoke, "error_of", fails)
    assert word in gpu_smoke.attempt("x", "cuda", "cuda")


@pytest.mark.skipif(not ISAS, reason="the planner is built with the CPU kernels")
@pytest.mark.parametrize("device", ["A100", "L40S", "H100", "B200", "RTX 5090"])
def test_plans_that_are_asked_for_are_possible(device: str) -> None:
    """With and without clusters, wherever a block has the shared memory that a case says."""
    from kdkernels import _host

    there = {"A100": 163, "H100": 227, "B200": 227}.get(device, 99) << 10
    for call in [x for calls in gpu_smoke.CASES.values() for x in calls if x.plan]:
        room = contextlib.nullcontext() if call.shared <= there else pytest.raises(ValueError)
        with room:
            _host.gpu_plan(device=device, rows=call.rows, classes=call.classes, override=call.plan)


# ---- the stages -----------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "out", "cuda")


@pytest.fixture
def stand_in(child: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of gpu_smoke.py's processes."""
    monkeypatch.setattr(gpu_check.sys, "executable", child)
    monkeypatch.setattr(gpu_smoke, "FIRST", {"first": ()})


def shown(results: Results) -> dict[tuple[str, ...], tuple[int, int, dict[str, int]]]:
    groups = gpu_check.grouped(results.lines)
    return {key[::2]: (x.passed, x.failed, dict(x.remarks)) for key, x in groups.items()}


def test_the_smoke_stage(
    results: Results, stand_in: None, clock: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_smoke, "names", lambda _: ["a", "hangs", "lost", "wrong", "b"])
    gpu_check.smoke(results, time.monotonic() + FOREVER, gpu_check.parse([]))
    assert shown(results) == {
        ("smoke", "smoke"): (
            3, 3, {"hang: silent for 30.0 s": 1, "illegal access": 1, "wrong: 3": 1},
        )
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "smoke: a: ok, error 5.0e-01, 2.0 s\nsmoke: hangs: failed, hang" in printed
    # The files tell the same, line by line, and the table comes from them.
    assert results.path("check").read_text() == printed
    assert results.failures.read_text().startswith("== smoke: hangs\nhang: silent")
    assert "words of hangs" in results.path("smoke").read_text()
    lines = results.path("check", "jsonl")
    lines.write_text(lines.read_text() + '{"stage": "smo')  # killed
    assert gpu_check.main(["--table", str(lines)]) == 0
    note = f"{lines}: 1 lines could not be read, and are left out\n"
    assert capsys.readouterr().out == f"{gpu_check.table(results.lines)}\n{note}"


@pytest.mark.parametrize(
    "bad",
    [
        b"words", b"\xff\x00\x80", b"[]", b"3", b"{}", b"[" * 100000, b'{"stage": "smoke"}',
        b'{"stage": "smoke", "name": "a"}', b'{"stage": "other", "backend": "cpu", "name": "a"}',
        b'{"stage": [], "backend": "cpu", "name": "a"}', b'{"stage": "tests", "backend": "cpu"}',
        b'{"stage": "smoke", "backend": "cpu", "name": []}',
        b'{"stage": "smoke", "backend": "cpu", "name": "a", "seconds": "b"}',
        b'{"stage": "smoke", "backend": "cpu", "name": "a", "tool": 1}',
    ],
)  # fmt: skip
def test_a_table_is_of_the_lines_that_can_be_read(tmp_path: Path, bad: bytes, capsys: Any) -> None:
    path = tmp_path / "lines"
    good = [b'{"stage": "smoke", "backend": "cpu", "name": "%d"}' % i for i in range(3)]
    path.write_bytes(b"\n".join([good[0], bad, b"", good[1], bad, good[2]]))
    assert gpu_check.main(["--table", str(path)]) == 0
    row, note = capsys.readouterr().out.splitlines()[1:]
    assert row.split() == ["smoke", "cpu", "smoke", "3", "0", "0.0"]
    assert note == f"{path}: 2 lines could not be read, and are left out"
    path.write_bytes(bad)
    assert gpu_check.main(["--table", str(path)]) == 1, "none"


def test_a_table_of_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SystemExit, match=f"--table {path}: "):
            gpu_check.main(["--table", str(path)])


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="no /proc")


@pytest.mark.parametrize("name", ["", "check-cpu.txt", pytest.param("/proc", marks=LINUX)])
def test_results_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """OUT is a file, has a folder where a file goes, or takes none; nothing runs then."""
    out = Path("/proc") if name == "/proc" else tmp_path / "out"
    if name:
        (out / name).mkdir(parents=True, exist_ok=True)
    else:
        out.write_text("")
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(gpu_check, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit, match=f"OUT={out}: no results can be written there, "):
        gpu_check.main(["--backend", "cpu"])


def test_what_the_smoke_stage_leaves_out(
    results: Results, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_smoke, "names", lambda _: ["a", "not ready"])
    gpu_check.smoke(results, time.monotonic() + FOREVER, gpu_check.parse([]))
    left = "left out (no process got ready for it)"
    assert shown(results)["smoke", "smoke"] == (
        1, 1, {"not ready: ended with status 9": 1, left: 2},
    )  # fmt: skip
    late = Results(results.folder, "cuda")
    gpu_check.smoke(late, time.monotonic() - 1, gpu_check.parse([]))
    assert shown(late) == {("smoke", "smoke"): (0, 0, {"left out (out of time)": 3})}


@pytest.mark.parametrize(
    ("shapes", "until", "expected"),
    [
        (["a", "b"], FOREVER, {}),
        (["a", "hangs"], FOREVER, {"failed": "{'hang': 60.0} after a"}),
        (["a", "b", "crashes"], FOREVER, {"failed": f"{{'status': {-signal.SIGSEGV}}} after b"}),
        (["not ready"], FOREVER, {"failed": "{'status': 9} after nothing"}),
        (["a", "hangs"], 50.0, {"left out": "{'late': True} after a"}),
    ],
)
def test_the_headline_stage(
    results: Results,
    stand_in: None,
    clock: None,
    monkeypatch: pytest.MonkeyPatch,
    shapes: list[str],
    until: float,
    expected: dict[str, str],
) -> None:
    """The stand-in says a line for each shape, as the benchmark does for each record."""
    monkeypatch.setattr(gpu_check, "HEADLINE", shapes)
    gpu_check.headline(results, until, gpu_check.parse([]))
    (line,) = results.lines
    known = ("failed", "left out")
    assert {
        x: line[x].partition(", see headline-cuda.txt")[0] for x in line if x in known
    } == expected


def test_the_benchmark_says_when_it_is_ready_and_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record when it is in the file; so a parent's limit is for a case."""
    lines = tmp_path / "lines"
    kept: list[int] = []

    def say(**line: Any) -> None:
        path = tmp_path / "results.json"
        kept.append(len(json.loads(path.read_text())["records"]) if path.exists() else 0)
        children.say(**line)

    monkeypatch.setattr(benchmark, "say", say)
    monkeypatch.setattr(benchmark, "draw", lambda *_: [])
    monkeypatch.setenv(children.LINES, str(lines))
    arguments = ["--device", "cpu", "--losses", "kd", "--shapes", "4x10", "4x20", "--seconds"]
    arguments += ["1e-9", "--dtypes", "float32", "--providers", "eager", "--out", str(tmp_path)]
    benchmark.main(arguments)
    names = [f"KD 4x{x} float32, {y}" for x in (10, 20) for y in ("copy", "eager")]
    assert list(map(json.loads, lines.read_text().splitlines())) == [
        {"ready": True}, *({"name": x} for x in names),
    ]  # fmt: skip
    assert kept == [0, 2, 2, 4, 4]


SANITIZER = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> "$0.log"
tool=$2
while [ "$1" != --print-limit ]; do shift; done
shift 2
"$@"
test $tool != racecheck || exit 86
"""


def test_the_sanitizers_stage(
    results: Results, stand_in: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    gpu_check.sanitizers(results, time.monotonic() + FOREVER, gpu_check.parse([]))
    clusters = [
        x for x, calls in gpu_smoke.CASES.items() if any(y.regime == "cluster" for y in calls)
    ]
    count = len(gpu_smoke.CASES)
    found = {"found by compute-sanitizer, see racecheck-cuda.txt": 1}
    assert shown(results) == {
        ("sanitizers", "memcheck"): (count, 0, {}),
        ("sanitizers", "racecheck"): (count - len(clusters), 1, found),
        ("sanitizers", "initcheck"): (count, 0, {}),
        ("sanitizers", "synccheck"): (count, 0, {}),
    }
    calls = (tmp_path / "compute-sanitizer.log").read_text().splitlines()
    memcheck = next(x for x in calls if "memcheck" in x)
    assert memcheck.startswith("1 --tool memcheck --error-exitcode 86 ")
    assert "cluster of 16 after cluster of 1" in memcheck
    assert not any("cluster" in x for x in calls if "racecheck" in x)


def test_no_sanitizer_is_not_a_failure(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu_check.sanitizers(results, FOREVER, gpu_check.parse(["--tools", "memcheck"]))
    reason = "skipped (compute-sanitizer is not on PATH)"
    assert shown(results) == {("sanitizers", "memcheck"): (0, 0, {reason: 1})}


TORCH = """
import os

class cuda:
    is_initialized = staticmethod(lambda: True)

    @staticmethod
    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

lost = False
"""
PLANTED = """
import os, pathlib, time, torch, pytest

@pytest.fixture(autouse=True)
def once(request):
    with open(__file__ + ".log", "a") as log:
        log.write(request.node.name + "\\n")

@pytest.mark.gpu
def test_loses_the_device():  # the first of its process
    torch.lost = True

@pytest.fixture
def stumbles():
    yield
    raise ValueError("words of a fixture")

@pytest.mark.gpu
def test_loses_the_device_and_stumbles(stumbles):
    torch.lost = True

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(12))
@pytest.mark.parametrize("backend", ["cuda"])
def test_passes(backend, i, record_property):
    record_property("backend", backend)

@pytest.mark.gpu
def test_fails():
    assert [1, 2] == [1, 3]

@pytest.mark.gpu
def test_skips():
    pytest.skip("a reason")

@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda"])
def test_hangs(backend):
    while True:  # as in a kernel that never ends: no interrupt gets it out
        try:
            time.sleep(100)
        except KeyboardInterrupt:
            pass

@pytest.mark.gpu
def test_crashes():
    os._exit(7)

@pytest.mark.gpu
@pytest.mark.alone
def test_by_itself():
    assert os.environ["PYTEST_XDIST_WORKER_COUNT"] == "1"

@pytest.mark.gpu
def test_triton():
    assert 0

@pytest.mark.gpu
def test_left_out():
    assert 0

def test_not_marked():
    assert 0
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of tests, and a torch that knows when its device is lost: one to import quickly."""
    pytest.importorskip("xdist")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take longer than the tests
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p xdist.plugin -p no:cacheprovider")
    for name in [x for x in os.environ if x.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  alone:\n  gpu:\n")
    path = tmp_path / "test_it.py"
    path.write_text(PLANTED)
    return path


def test_the_tests_stage(results: Results, planted: Path) -> None:
    """Of two workers; each failure takes one along, but what is not wrong passes, once."""
    arguments = ["--limit", "5", "--jobs", "2", "-k", "not left_out", str(planted)]
    gpu_check.tests(results, time.monotonic() + FOREVER, gpu_check.parse(arguments))
    lost = "RuntimeError: CUDA error: an illegal memory access was encou"
    gone = "its process crashed, or 5 s were over"
    assert shown(results) == {
        ("tests", "passes"): (12, 0, {}),
        ("tests", "fails"): (0, 1, {"assert [1, 2] == [1, 3]": 1}),
        ("tests", "skips"): (0, 0, {"skipped (a reason)": 1}),
        ("tests", "hangs"): (0, 1, {gone: 1}),
        ("tests", "crashes"): (0, 1, {gone: 1}),
        ("tests", "loses the device"): (0, 1, {lost: 1}),
        ("tests", "loses the device and stumbles"): (0, 1, {"ValueError: words of a fixture": 1}),
        ("tests", "by itself"): (1, 0, {}),
    }
    ran = Path(f"{planted}.log").read_text().split()
    assert len(ran) == len(set(ran)) == 19
    assert ("tests", "cuda", "hangs") in gpu_check.grouped(results.lines), "by its name"
    failures = results.failures.read_text()
    assert "At index 1 diff: 2 != 3" in failures
    assert failures.count("RuntimeError: CUDA error: an illegal memory access") == 2
    assert "Timeout (0:00:05)!" in results.path("tests").read_text()


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("error", [None, KeyError("from a hook")])
def test_a_test_ends_its_timer_and_a_lost_process(
    monkeypatch: pytest.MonkeyPatch, lost: bool, error: Exception | None
) -> None:
    """Whether what is inside raises, and its error goes on, or not."""
    did: list[Any] = []
    timer = SimpleNamespace(
        dump_traceback_later=lambda limit, **_: did.append(limit),
        cancel_dump_traceback_later=lambda: did.append("cancelled"),
    )
    monkeypatch.setattr(live_report, "faulthandler", timer)
    monkeypatch.setattr(os, "_exit", did.append)
    guard = live_report.Guard(5.0)
    os.close(guard.stderr)
    protocol = guard.pytest_runtest_protocol()
    next(protocol)
    guard.lost = lost
    with pytest.raises(KeyError if error else StopIteration):
        protocol.throw(error) if error else next(protocol)
    assert did == [5.0, "cancelled", *([1] if lost else [])]


def test_groups_and_table() -> None:
    """A process that crashes behind a test's end fails it; names tell where the backend is not."""
    lines = [
        {"stage": "tests", "backend": "cuda", "name": "a.py::test_some_thing[cuda-x::y]"},
        {"stage": "tests", "backend": "", "name": "a.py::test_some_thing[cuda-x::y]"},
        {"stage": "tests", "backend": "-", "name": "a.py::C::test_some_thing[cuda-2]"},
        {"stage": "tests", "backend": "cuda", "name": "a.py::test_some_thing[cuda-3]"},
        {"stage": "sanitizers", "backend": "cuda", "tool": "memcheck", "name": "block"},
        {"stage": "smoke", "backend": "cuda", "name": "block"},
    ]
    lines[1]["failed"] = "its process crashed"
    lines[3] |= {"skipped": "why", "seconds": 1.5}
    lines[4]["left out"] = "out of time"
    lines += [lines[0]]
    assert gpu_check.table(lines).splitlines() == [
        "stage       backend  what        passed  failed  seconds  remarks",
        "smoke       cuda     smoke            1       0      0.0",
        "tests       -        some thing       1       0      0.0",
        "tests       cuda     some thing       0       1      1.5  1 its process crashed, "
        "1 skipped (why)",
        "sanitizers  cuda     memcheck         0       0      0.0  1 left out (out of time)",
    ]


def lines_of(*lines: dict[str, Any]) -> Callable[..., Any]:
    return lambda *_, **__: iter(lines)


@pytest.mark.parametrize(
    ("end", "collected", "expected"),
    [
        ({"late": True}, 5, {"b": "stopped: out of time", "pytest, alone": "3 tests were not"}),
        ({"status": 3}, 5, {"b": "did not end"}),
        ({"status": 4}, 0, {"b": "did not end", "pytest, alone": "{'status': 4}"}),
        ({"status": 5}, 0, {"b": "did not end"}),
    ],
)
def test_how_pytest_ends(
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
    end: dict[str, Any],
    collected: int,
    expected: dict[str, str],
) -> None:
    a = {"name": "a", "backend": "cuda", "seconds": 1.0}
    if end == {"status": 3}:
        a["failed"] = "assert 0"
    lines = [{"collected": collected}, {"begun": "a"}, a, {"begun": "b"}, end]
    monkeypatch.setattr(children, "watch", lines_of(*lines))
    gpu_check.pytest(results, FOREVER, gpu_check.parse([]), "alone", 1)
    said = {x["name"]: x.get("failed") or x.get("left out") for x in results.lines[1:]}
    assert said.keys() == expected.keys()
    assert all(value in str(said[key]) for key, value in expected.items())


# ---- the whole ------------------------------------------------------------------------------


def test_arguments() -> None:
    given = ["-m", "gpu or slow", "-x", "--stages", "tests,smoke", "--tools", "", "a", "--budget=9"]
    options = gpu_check.parse(given)
    assert (options.m, options.rest, options.budget) == ("gpu or slow", ["-x", "a"], 9.0)
    assert (options.stages, options.tools) == (["smoke", "tests"], [])


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--tools", "x"], ["--stages", "x"], ["--jobs", "0"]),
        *([name, value] for name in ("--budget", "--limit") for value in ("0", "nan")),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        gpu_check.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As if there were one, and the CUDA backend."""
    states = {
        "cuda": SimpleNamespace(available=True, reason="yes"),
        "triton": SimpleNamespace(available=False, reason="no Triton"),
    }
    monkeypatch.setattr(kdkernels, "backends", lambda: states)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_check, "describe", lambda: "facts")
    monkeypatch.setattr(gpu_check, "START", time.monotonic())
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


def test_stages_share_the_budget(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {}
    for stage in gpu_check.STAGES:
        monkeypatch.setitem(
            gpu_check.RUN, stage, lambda _, until, __, x=stage: ends.setdefault(x, until)
        )
    gpu_check.main(["--budget", "110"])
    assert {x: round(y - gpu_check.START) for x, y in ends.items()} == {
        "smoke": 20, "headline": 30, "tests": 80, "sanitizers": 110,
    }  # fmt: skip
    ends.clear()
    gpu_check.main(["--budget", "80", "--stages", "tests,sanitizers"])
    assert {x: round(y - gpu_check.START) for x, y in ends.items()} == {
        "tests": 50, "sanitizers": 80,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "expected", "words"),
    [
        ({}, 0, "1 passed on a GPU"),
        ({"skipped": "why"}, 1, "0 passed on a GPU"),
        ({"failed": "why"}, 1, "FAILED: 1 failures"),
    ],
)
def test_verdict(
    device: Path, monkeypatch: pytest.MonkeyPatch, line: dict[str, str], expected: int, words: str
) -> None:
    def stage(results: Results, *_: Any) -> None:
        results.add("smoke", {"name": "a"} | line)

    monkeypatch.setitem(gpu_check.RUN, "smoke", stage)
    assert gpu_check.main(["--stages", "smoke"]) == expected
    text = (device / "check-cuda.txt").read_text()
    assert text.startswith("facts\n") and words in text and " s of 500 s" in text
    assert gpu_check.main(["--stages", "smoke", "--backend", "triton"]) == 1
    assert "1 skipped (no Triton)" in (device / "check-triton.txt").read_text()


def test_a_run_that_is_stopped_says_what_it_leaves_out(
    device: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage that it is in, and those behind it; nothing of it is a failure."""
    stop = threading.Event()
    lines = [{"collected": 7}, {"begun": "a"}, {"name": "a"}, {"begun": "b"}, {"late": True}]

    def watch(*_: Any, **__: Any) -> Any:
        stop.set()
        return iter(lines)

    watched = children.watch
    monkeypatch.setattr(children, "STOP", stop)
    monkeypatch.setattr(gpu_smoke, "names", lambda _: ["x", "y"])

    def tests(results: Results, until: float, options: Any) -> None:
        monkeypatch.setattr(children, "watch", watch)
        gpu_check.pytest(results, until, options, "not alone", 1)
        monkeypatch.setattr(children, "watch", watched)
        gpu_check.headline(results, until, options)

    monkeypatch.setitem(gpu_check.RUN, "tests", tests)
    monkeypatch.setitem(gpu_check.RUN, "sanitizers", lambda *x: gpu_check.smoke(*x, "memcheck"))
    assert gpu_check.main(["--stages", "smoke,tests,sanitizers"]) == 1
    text = (device / "check-cuda.txt").read_text()
    # The test that had begun, the 5 behind it, the headline, and both of memcheck.
    assert "\nSTOPPED by a signal: 9 were not done, 4 passed, 0 failed\n" in text
    assert "pytest, not alone: left out, stopped: 5 tests were not begun" in text


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_commands_end_within_ten_minutes() -> None:
    """Their budgets leave room for the build, which BUILD=no leaves out."""
    targets = ["gpu-check", "gpu-check-triton", "gpu-counters", "gpu-sweep", "gpu-bench"]

    def steps(*arguments: str) -> list[str]:
        command = ["make", "-n", "-C", str(gpu_check.ROOT), "ENV=current", "PYTHON=py", "OUT=/o"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        return [x for x in done.stdout.splitlines() if x.startswith("py ")]

    for target in targets:
        build, run = steps(target)
        assert "build_ext" in build and steps(target, "BUILD=no") == [run]
        words = shlex.split(run)
        assert 0 < float(words[words.index("--budget") + 1]) <= 500
        assert "gpu_check.py" in run or words[words.index("--out") + 1] == "/o"


@pytest.mark.parametrize(
    ("cores", "free", "expected"), [(16, 139, 16), (4, 139, 4), (64, 22, 5), (64, 3, 1), (1, 80, 1)]
)
def test_processes_that_share_the_device(
    device: Path, monkeypatch: pytest.MonkeyPatch, cores: int, free: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free << 30, 192 << 30))
    assert gpu_check.jobs() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.jobs() == 1


@pytest.mark.full
@pytest.mark.skipif(not ISAS, reason="no CPU kernels")
def test_a_rehearsal_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The smoke test as it is, in a child; the other stages say that there is no device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "START", time.monotonic())
    monkeypatch.setattr(gpu_smoke, "names", lambda _: ["16 lanes", "strided"])
    monkeypatch.setattr(gpu_smoke, "first", lambda _: [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main(["--backend", "cpu", "--budget", "1e6"]) == 0
    printed = capsys.readouterr().out
    assert "smoke: 16 lanes: ok, error" in printed and "smoke: strided: ok, error" in printed
    assert printed.count("1 skipped (no CUDA device)") == 3
    assert "nothing was checked on one" in printed


# ---- what counts ----------------------------------------------------------------------------

NCU = """#!/bin/sh
printf '%s\\n' "$*" >> "$0.log"
case "$*" in
  *10007*) echo "no permission"; exit 1 ;;
  *--export*) touch "$NCU_OUT/counters-4x64.ncu-rep" ;;
  *--csv*) test -e "$2" && echo '"Metric Name"' ;;
  *) test -e "$2" && echo "Memory Throughput" ;;
esac
"""


def test_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A stand-in for ncu, which keeps its arguments."""
    out = tmp_path / "out"
    arguments = ["--shapes", "4x10007", "4x64", "--device", "cpu", "--out", str(out)]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.main(arguments) == 0
    assert capsys.readouterr().out == "ncu is not on PATH: nothing was counted\n"
    program = tmp_path / "ncu"
    program.write_text(NCU)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("NCU_OUT", str(out))
    assert counters.main(arguments) == 1, "the other shape goes on"
    printed = capsys.readouterr().out
    assert "4x10007 bfloat16: ncu ended with status 1, see counters-4x10007.log\nno perm" in printed
    assert (out / "counters-4x64.csv").read_text() == '"Metric Name"\n'
    assert (out / "counters-4x64.txt").read_text() == "Memory Throughput\n"
    profiled = (tmp_path / "ncu.log").read_text().splitlines()[1]
    for words in ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats"):
        assert f"--section {words} " in profiled
    assert "--launch-skip 1 --launch-count 1 --clock-control none" in profiled
    target = [sys.executable, "-m", "bench.counters", "--device", "cpu", "--call", "4x64"]
    assert shlex.split(profiled)[-len(target) :] == target


@pytest.mark.parametrize(
    ("budget", "expected", "begun", "failed"),
    [
        ("50", 0, ["5x10"], []),
        ("150", 1, ["5x10", "6x10"], ["5x10"]),  # which had all the time of a shape
    ],
)
def test_what_counters_leave_out(
    tmp_path: Path,
    clock: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    budget: str,
    expected: int,
    begun: list[str],
    failed: list[str],
) -> None:
    """Of an ncu that never ends: the shape in which the budget ends, and those after it."""
    program, flag = tmp_path / "ncu", tmp_path / "child.hangs"
    program.write_text(
        f'#!/bin/sh\nfor last; do :; done\necho "$last" >> "$0.log"\ntouch "{flag}"\nsleep 300\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(counters, "time", children.time)
    arguments = ["--shapes", "5x10", "6x10", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert counters.main([*arguments, "--budget", budget]) == expected
    assert (tmp_path / "ncu.log").read_text().split() == begun
    printed = capsys.readouterr().out
    for shape in ("5x10", "6x10"):
        why = f"ncu ran out of time, see counters-{shape}.log" if shape in failed else (
            "left out, the budget is spent"
        )  # fmt: skip
        assert f"KD {shape} bfloat16: {why}\n" in printed


@pytest.mark.skipif(not ISAS, reason="no CPU kernels")
def test_what_is_profiled_is_called_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = counters.LossCall.run
    monkeypatch.setattr(
        counters.LossCall, "run", lambda self, state: calls.append(run(self, state)[1].shape)
    )
    assert counters.main(["--device", "cpu", "--call", "4x64"]) == 0
    assert calls == [(4, 64), (4, 64)]


def test_kernels_of_a_trace() -> None:
    """Copies, ranges and the host's events are no launches."""
    ours = "void kd::sm::cuda::(anonymous namespace)::{}<kd::Pair>(kd::Args)"
    events = [
        {"cat": "kernel", "name": ours.format("split_gradient"), "ts": 3.0},
        {"cat": "gpu_memset", "name": "Memset (Device)", "ts": 0.0},
        {"cat": "gpu_user_annotation", "name": "ProfilerStep#1", "ts": 0.5},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernelExC", "ts": 0.6},
        {"cat": "kernel", "name": ours.format("split_stats"), "ts": 2.0},
        {"cat": "kernel", "name": "at::native::fill", "ts": 1.0},
        {"name": "process_name", "ph": "M"},
    ]
    names = kernels_in({"traceEvents": events})
    assert our_kernels(names) == ["at::native::fill", "split_stats", "split_gradient"]
    assert json.dumps(names)
