"""`make gpu-check`: everything that needs a GPU, the most telling first, within a limit of time.

    python tests/gpu_check.py                          the CUDA backend
    python tests/gpu_check.py --backend triton         Triton's tests, which compile 1000 kernels
    python tests/gpu_check.py --backend cpu            rehearses the smoke test without a GPU
    python tests/gpu_check.py --stages tests -k mean   some stages; other arguments go on to pytest
    python tests/gpu_check.py --table FILE             the table of a run, of its check-*.jsonl

After the device, the versions and the backends come, in this order,

    smoke       one small call per way of launching a kernel, gpu_smoke.py
    headline    KD at four vocabularies against eager PyTorch and a copy, `python -m bench`
    tests       those marked `gpu`, in several processes (pytest-xdist)
    sanitizers  the smoke test under compute-sanitizer's tools, racecheck without clusters

each in child processes (bench/children.py): what hangs, crashes or loses the device is a failure,
and the next one gets another process. Each stage has its share of --budget, and what earlier ones
leave; what is not begun by then is left out, and the table says so. Results go to the folder named
by the environment's OUT, or else to bench/results/<GPU>, as they come: check-<backend>.txt is what
the screen shows, check-<backend>.jsonl has a line for everything that ended, failures-<backend>.txt
the texts of failures; other files are what the children print. SIGTERM, SIGHUP and SIGINT end all
of it, and the table says what was left out. Exit status 1 when something failed, or when there is a
device and nothing passed on it; without a device it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

START = time.monotonic()  # importing torch counts, too
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path += [str(TESTS), str(ROOT)]  # an installed kdkernels comes first

import gpu_smoke  # noqa: E402
import torch  # noqa: E402

import kdkernels  # noqa: E402
from bench import children, measure, report  # noqa: E402

# Shares of the budget, in the order of the stages.
STAGES = {"smoke": 2.0, "headline": 1.0, "tests": 5.0, "sanitizers": 3.0}
# memcheck sees what leaves an allocation, racecheck shared memory, initcheck what is read from
# global memory before it is written, synccheck barriers.
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # what compute-sanitizer exits with when it has found something
CALL, CALL_SANITIZED = 30.0, 60.0  # seconds without a word from a smoke test
CASE = 60.0  # from the benchmark, whose largest case takes tens of them on a GPU
TEST = 120.0  # seconds for a test
MEMORY = 4 << 30  # free memory of the GPU for each process
NOTHING_SELECTED = 5  # of pytest's
STOPPED = "stopped"  # left out because of a signal
HEADLINE = ["4096x128256", "4096x32000", "4096x262144", "4096x10007"]


# ---- results ----------------------------------------------------------------------------------


@dataclass
class Group:
    """Results of one kind, whatever their parameters."""

    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    remarks: Counter[str] = field(default_factory=Counter)  # why failed, skipped or left out


def key_of(line: dict[str, Any]) -> tuple[str, str, str]:
    """Stage, backend, and of a test its function; of the others, tool or stage."""
    if line["stage"] != "tests":
        return line["stage"], line["backend"], line.get("tool", line["stage"])
    known = re.search(r"[\[-](cuda|triton)[]-]", line["name"])  # of a crash, no more than its name
    backend = line["backend"] or (known[1] if known else "-")
    name = line["name"].partition("[")[0].rpartition("::")[2].removeprefix("test_")
    return "tests", backend, name.replace("_", " ")


def grouped(lines: Iterable[dict[str, Any]]) -> dict[tuple[str, str, str], Group]:
    """Of things with two lines, one that says failed counts."""
    last: dict[Any, dict[str, Any]] = {}
    for line in lines:
        key = (*key_of(line), line["name"])
        if "failed" not in last.get(key, {}):
            last[key] = line
    groups: dict[tuple[str, str, str], Group] = {}
    for key, line in last.items():
        entry = groups.setdefault(key[:3], Group())
        entry.seconds += line.get("seconds", 0.0)
        if "failed" in line:
            entry.failed += 1
            entry.remarks[str(line["failed"])[:60]] += 1
        elif why := line.get("skipped") or line.get("left out"):
            entry.remarks[f"{'skipped' if 'skipped' in line else 'left out'} ({why})"] += 1
        else:
            entry.passed += 1
    return groups


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a check-*.jsonl, and how many there are that are none: it may be damaged."""
    lines, unreadable = [], 0
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
            words = [line[x] for x in ("stage", "backend", "name")] + [line.get("tool", "")]
            good = all(isinstance(x, str) for x in words) and line["stage"] in STAGES
            good = good and isinstance(line.get("seconds", 0.0), (int, float))
        except (KeyError, RecursionError, TypeError, ValueError):
            good = False
        if good:
            lines.append(line)
        else:
            unreadable += bool(text.strip())
    return lines, unreadable


def table(lines: Iterable[dict[str, Any]]) -> str:
    header = ["stage", "backend", "what", "passed", "failed", "seconds", "remarks"]
    rows = [header]
    order = [*STAGES]
    groups = sorted(grouped(lines).items(), key=lambda x: (order.index(x[0][0]), x[0]))
    for key, x in groups:
        remarks = ", ".join(f"{n} {remark}" for remark, n in x.remarks.items())
        rows.append([*key, str(x.passed), str(x.failed), f"{x.seconds:.1f}", remarks])
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    out = []
    for row in rows:
        words = [x.ljust(w) for x, w in zip(row[:3], widths[:3], strict=True)]
        words += [x.rjust(w) for x, w in zip(row[3:6], widths[3:], strict=True)]
        out.append("  ".join([*words, row[6]]).rstrip())
    return "\n".join(out)


class Results:
    """Everything that a run has found out, in files as soon as it is known."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folder, self.backend = folder, backend
        self.lines: list[dict[str, Any]] = []
        self._lock = Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self.path("check", "txt"), self.path("check", "jsonl"), self.failures):
            path.unlink(missing_ok=True)
        self.path("check").touch()  # an error now, if ever

    def path(self, what: str, suffix: str = "txt") -> Path:
        return self.folder / f"{what}-{self.backend}.{suffix}"

    @property
    def failures(self) -> Path:
        return self.path("failures")

    def _append(self, path: Path, text: str) -> None:
        with self._lock, path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def print(self, text: str) -> None:
        self._append(self.path("check"), text)
        with suppress(OSError):  # the screen goes with its connection, the files stay
            print(text, flush=True)

    def add(self, stage: str, line: dict[str, Any]) -> None:
        """A line says failed, skipped, left out, or else that it passed."""
        line = {"stage": stage, "backend": self.backend} | line
        text = line.pop("text", None)
        self.lines.append(line)
        self._append(self.path("check", "jsonl"), json.dumps(line))
        if "failed" in line:
            where = f"{stage} {line.get('tool', '')}".strip()
            self._append(self.failures, f"== {where}: {line['name']}\n{text or line['failed']}\n")
        if "failed" in line or "left out" in line or stage != "tests" or line["name"] == stage:
            known = ("failed", "skipped", "left out")
            word = next((f"{x}, {line[x]}" for x in known if x in line), "ok")
            error = f", error {line['error']:.1e}" if "error" in line else ""
            what = f"{line.get('tool', stage)}: {line['name']}"
            self.print(f"{what}: {word}{error}, {line.get('seconds', 0.0):.1f} s")


# ---- stages -----------------------------------------------------------------------------------


def smoke(results: Results, until: float, options: argparse.Namespace, tool: str = "") -> None:
    """All of it in one process while that lasts, then what needs a fresh one; under a tool or not.

    A memory checker knows what CUDA has allocated, so every tensor gets an allocation of its own
    instead of a part of a block of the caching allocator's.
    """
    stage, limit = ("sanitizers", CALL_SANITIZED) if tool else ("smoke", CALL)
    prefix: list[str] = []
    variables = environment()
    names = gpu_smoke.names(results.backend)
    begun = [names, gpu_smoke.first(results.backend)]
    if tool:
        # It would give up on a process that takes 10 s to begin. What a call of the runtime
        # returns is for its caller to judge.
        prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
        prefix += ["--launch-timeout", "0", "--report-api-errors", "no", "--print-limit", "20"]
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        if tool == "racecheck":  # bulk copies that barriers in memory wait for look like races
            names = [x for x in names if not any(y.regime == "cluster" for y in gpu_smoke.CASES[x])]
        begun = [names]
    command = [*prefix, sys.executable, str(TESTS / "gpu_smoke.py"), "--backend", results.backend]
    command += ["--sanitized"] if tool else []
    output = results.path(tool or "smoke")
    output.unlink(missing_ok=True)
    for group in begun:
        left = set(group)
        for line in children.work_through(
            group, command, limit=limit, until=until, output=output, environment=variables
        ):
            if "name" not in line and str(FOUND) in line["failed"]:
                line["failed"] = f"found by compute-sanitizer, see {output.name}"
            left.discard(line.setdefault("name", "the process"))
            results.add(stage, line | ({"tool": tool} if tool else {}))
        why = "out of time" if time.monotonic() >= until else "no process got ready for it"
        why = STOPPED if children.STOP.is_set() else why
        for name in (x for x in group if x in left):
            line = {"name": name, "left out": why}
            results.add(stage, line | ({"tool": tool} if tool else {}))


def headline(results: Results, until: float, options: argparse.Namespace) -> None:
    output = results.path("headline")
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench", "--device", "cuda", "--losses", "kd", "--shapes"]
    command += [*HEADLINE, "--dtypes", "bfloat16", "--providers", results.backend, "eager"]
    command += ["--seconds", "0.5", "--out", str(results.folder / f"headline-{results.backend}")]
    begin = time.monotonic()
    *said, end = children.watch(
        command, limit=CASE, until=until, output=output, environment=environment(TQDM_DISABLE="1")
    )
    line = {"name": "KD against eager and a copy", "seconds": time.monotonic() - begin}
    if end != {"status": 0}:
        last = ["nothing", *(x["name"] for x in said if "name" in x)][-1]
        why = f"{end} after {last}, see {output.name}"
        line["left out" if "late" in end else "failed"] = why
        if children.STOP.is_set():
            line["left out"] = STOPPED
    if output.exists():
        results.print(output.read_text(encoding="utf-8", errors="replace"))
    results.add("headline", line)


def tests(results: Results, until: float, options: argparse.Namespace) -> None:
    """The tests that can share the GPU, then those that cannot."""
    if importlib.util.find_spec("xdist") is None:
        results.add("tests", {"name": "all", "failed": "pytest-xdist is not installed"})
        return
    results.path("tests").unlink(missing_ok=True)
    pytest(results, until, options, "not alone", options.jobs or jobs())
    pytest(results, until, options, "alone", 1)


def pytest(
    results: Results, until: float, options: argparse.Namespace, marker: str, processes: int
) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "live_report"]
    # Neighbours share what had to be compiled: chunks of them, and help at the end.
    command += ["-n", str(processes), "--dist=worksteal", "--max-worker-restart=200"]
    command += [f"--test-limit={options.limit}", "-o", "faulthandler_timeout=0"]
    command += ["-m", f"({options.m}) and {marker}" if options.m else marker]
    backend = "triton" if results.backend == "triton" else "not triton"
    command += ["-k", f"({options.k}) and {backend}" if options.k else backend]
    command += options.rest
    if not any(Path(x.partition("::")[0]).exists() for x in options.rest):
        command += [str(x) for x in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in x.read_text()]
    collected, begun, ended, failed = 0, set(), set(), False
    end: dict[str, Any] = {}
    shown = time.monotonic()
    for line in children.watch(
        command,
        limit=options.limit + 60,
        until=until,
        output=results.path("tests"),
        environment=environment(TORCHINDUCTOR_COMPILE_THREADS="1"),
    ):
        if "name" in line:
            ended.add(line["name"])
            failed |= "failed" in line
            results.add("tests", line)
        elif "begun" in line:
            begun.add(line["begun"])
        else:
            collected = line.get("collected", collected)
            end = line
        if time.monotonic() > shown + 10:
            shown = time.monotonic()
            results.print(f"tests, {marker}: {len(ended)} of {collected} ended")
    stopped = "late" in end and children.STOP.is_set()
    for name in sorted(begun - ended):
        why = "stopped: out of time" if "late" in end else "did not end"
        word = {"left out": STOPPED} if stopped else {"failed": why}
        results.add("tests", {"name": name, "backend": ""} | word)
    name = f"pytest, {marker}"
    if "late" in end:
        count = collected - len(begun) if collected else "all"
        why = f"{STOPPED if stopped else 'out of time'}: {count} tests were not begun"
        line = {"name": name, "backend": "-", "left out": why}
        results.add("tests", line | ({"count": count} if collected else {}))
    elif end.get("status") not in (0, NOTHING_SELECTED) and not failed:
        results.add("tests", {"name": name, "backend": "-", "failed": f"{end}, see tests"})


def sanitizers(results: Results, until: float, options: argparse.Namespace) -> None:
    """The tools at the same time."""
    if shutil.which("compute-sanitizer") is None:
        for tool in options.tools:
            line = {"name": tool, "tool": tool, "skipped": "compute-sanitizer is not on PATH"}
            results.add("sanitizers", line)
        return
    with ThreadPoolExecutor(max(1, len(options.tools))) as pool:
        list(pool.map(lambda tool: smoke(results, until, options, tool), options.tools))


RUN: dict[str, Callable[[Results, float, argparse.Namespace], None]] = {
    "smoke": smoke,
    "headline": headline,
    "tests": tests,
    "sanitizers": sanitizers,
}


# ---- the machine ------------------------------------------------------------------------------


def describe() -> str:
    lines = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            lines.append(
                f"device {i}: {device.name}, sm_{device.major}{device.minor}, "
                f"{device.multi_processor_count} multiprocessors, "
                f"{device.total_memory / 2**30:.0f} GiB"
            )
        if program := shutil.which("nvidia-smi"):
            done = subprocess.run([program], capture_output=True, text=True, timeout=60)
            lines.append(done.stdout.strip())
    else:
        lines.append("device: no CUDA device")
    lines.append(
        f"python {platform.python_version()}, torch {torch.__version__} "
        f"(CUDA {torch.version.cuda or 'not built in'}), "
        f"triton {measure.version('triton') or 'not installed'}, "
        f"kdkernels {kdkernels.__version__}, commit {measure.commit()}"
    )
    for name, state in kdkernels.backends().items():
        lines.append(f"backend {name}: {'yes' if state.available else 'no'}, {state.reason}")
    return "\n".join(lines)


def environment(**more: str) -> dict[str, str]:
    """For children: kdkernels from where this process has it, whatever the folder; the plugin."""
    paths = [Path(kdkernels.__file__).parents[1], TESTS, ROOT, os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(str(x) for x in paths if x)
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | more


def jobs() -> int:
    """How many processes share the GPU: a core each, and memory for each."""
    if not torch.cuda.is_available():
        return 1
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, min(16, cores, torch.cuda.mem_get_info()[0] // MEMORY))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Our own options; `rest` goes on to pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--backend", choices=("cuda", "triton", "cpu"), default="cuda")
    add("--stages", default=",".join(STAGES), metavar="STAGE,..")
    add("--tools", default=",".join(TOOLS), metavar="TOOL,..", help="of the sanitizer")
    add("--budget", type=float, default=500.0, metavar="SECONDS")
    add("--limit", type=float, default=TEST, metavar="SECONDS", help="of a test")
    add("--jobs", type=int, metavar="N", help="processes that share the GPU in the tests")
    add("--table", type=Path, metavar="FILE", help="of what a check-*.jsonl has, and nothing else")
    add("-m", default="gpu", metavar="EXPRESSION", help="as pytest's")
    add("-k", default="", metavar="EXPRESSION", help="as pytest's")
    options, options.rest = parser.parse_known_args(arguments)
    for name, known in (("stages", STAGES), ("tools", TOOLS)):
        words = [x for x in getattr(options, name).split(",") if x]
        if unknown := sorted(set(words) - set(known)):
            parser.error(f"--{name}: {', '.join(unknown)}; there are {', '.join(known)}")
        setattr(options, name, [x for x in known if x in words])
    above = options.budget > 0 and options.limit > 0  # NaN is not
    if not above or (options.jobs is not None and options.jobs < 1):
        parser.error("--budget, --limit and --jobs: must be positive")
    return options


def run(results: Results, options: argparse.Namespace) -> None:
    """The stages, each until its share of the budget, of all that were chosen, is over."""
    over, whole = 0.0, sum(STAGES[x] for x in options.stages)
    for stage in options.stages:
        over += STAGES[stage]
        state = kdkernels.backends()[results.backend]
        if not state.available:
            results.add(stage, {"name": stage, "skipped": state.reason})
        elif stage != "smoke" and (results.backend == "cpu" or not torch.cuda.is_available()):
            results.add(stage, {"name": stage, "skipped": "no CUDA device"})
        else:
            until = START + options.budget * over / whole
            if not children.STOP.is_set():  # then it says what is left out
                results.print(f"\n{stage}, for at most {until - time.monotonic():.0f} s")
            RUN[stage](results, until, options)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.table:
        try:
            lines, unreadable = read(options.table)
        except OSError as error:
            sys.exit(f"--table {options.table}: {error.strerror}")
        print(table(lines))
        if unreadable:
            print(f"{options.table}: {unreadable} lines could not be read, and are left out")
        return int(not lines)
    device = torch.cuda.is_available()
    kept = report.RESULTS / report.folder_of(torch.cuda.get_device_name()) if device else None
    folder = Path(os.environ.get("OUT") or kept or ROOT / "out" / "gpu-check")
    try:
        results = Results(folder, options.backend)
    except OSError as error:
        sys.exit(f"OUT={folder}: no results can be written there, {error.strerror}")
    results.print(describe())
    try:
        run(results, options)
    finally:
        results.print(f"\n{table(results.lines)}\n")
    groups = grouped(results.lines).values()
    passed, failed = sum(x.passed for x in groups), sum(x.failed for x in groups)
    verdict = f"{passed} passed on {torch.cuda.get_device_name()}" if device else (
        "There is no CUDA device here: nothing ran on a GPU, and nothing was checked on one."
    )  # fmt: skip
    verdict = f"FAILED: {failed} failures" if failed else verdict
    if stopped := children.STOP.is_set():
        left = [x for x in results.lines if str(x.get("left out", "")).startswith(STOPPED)]
        count = sum(x.get("count", 1) for x in left)
        verdict = f"STOPPED by a signal: {count} were not done, {passed} passed, {failed} failed"
    results.print(verdict)
    took = time.monotonic() - START
    results.print(f"{took:.0f} s of {options.budget:.0f} s; files are in {results.folder}")
    return int(stopped or failed > 0 or (device and not passed))


if __name__ == "__main__":
    sys.exit(children.stoppable(main))
