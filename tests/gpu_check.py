"""`make gpu-check`: everything that needs a GPU, in one table, within a limit of time.

    python tests/gpu_check.py                               all tests marked `gpu`
    python tests/gpu_check.py -m "gpu and not slow" -x      arguments go on to pytest
    python tests/gpu_check.py --tools memcheck,racecheck    these of the sanitizer's tools, or none
    python tests/gpu_check.py --budget 1200 --jobs 4        seconds in all, processes at once

Prints the device, the versions and the backends, runs the tests marked `gpu` and, where
compute-sanitizer is installed, its four tools on a selection. Tests run in several processes where
pytest-xdist is installed, those marked `alone` after them in one, and then the sanitizer's runs at
the same time. What runs out of time is stopped and has failed; what had ended by then counts. The
table has one line for each backend and group of tests or tool. Where there is a device it is
written, too: to check.txt in the folder named by the environment's OUT, or else in
bench/results/<GPU>. Exit status 1 when something failed, or when there is a device and nothing
passed on it; without a device it says so and ends with 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

START = time.monotonic()  # importing torch counts, too
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # run as a script; an installed kdkernels comes first

import torch  # noqa: E402
from live_report import Group, Groups, group, lines_of  # noqa: E402

import kdkernels  # noqa: E402
from bench import measure, report  # noqa: E402

# Of compute-sanitizer: the tests that each tool runs. memcheck sees what leaves an allocation,
# racecheck shared memory, initcheck what is read from global memory before it is written,
# synccheck barriers.
TOOLS = {
    "memcheck": "every_kernel_once or accesses_stay_inside",
    "racecheck": "every_kernel_once",
    "initcheck": "every_kernel_once",
    "synccheck": "every_kernel_once",
}
BACKENDS = ("cuda", "triton")
FOUND = 86  # what compute-sanitizer exits with when it has found something
OUT_OF_TIME = 124
NOTHING_SELECTED = 5  # of pytest's
# The two calls of pytest, and the part of the budget that is over when each must have ended.
CALLS = {"not alone": 0.5, "alone": 0.6}
SANITIZED = 0.98  # the same for the sanitizer's runs; what is killed may take seconds to go
GRACE = 15.0  # seconds from an interrupt to the end: pytest-xdist waits 10 for a worker that hangs
MEMORY = 10 << 30  # free memory of the GPU for each process
RUNNING: set[subprocess.Popen] = set()


@dataclass
class Budget:
    """Seconds since the start of the process."""

    seconds: float

    def left(self, part: float) -> float:
        """Until this part of it is over."""
        return START + self.seconds * part - time.monotonic()


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


def jobs() -> int:
    """How many processes share the GPU: two cores each (Triton compiles), and memory for each."""
    if not torch.cuda.is_available():
        return 1
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, min(8, cores // 2, torch.cuda.mem_get_info()[0] // MEMORY))


def send(process: subprocess.Popen, number: signal.Signals) -> None:
    """To it and all that it has started."""
    with suppress(ProcessLookupError, PermissionError):  # none is left; macOS: or none but zombies
        os.killpg(process.pid, number)


def run_limited(command: Sequence[str], seconds: float, **options) -> int:
    """The exit status. What runs out of time is interrupted first: pytest then still reports."""
    if seconds <= 0:
        return OUT_OF_TIME
    grace = min(GRACE, seconds / 4)
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    RUNNING.add(process)
    try:
        return process.wait(seconds - grace)
    except subprocess.TimeoutExpired:
        send(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return OUT_OF_TIME
    finally:
        send(process, signal.SIGKILL)
        RUNNING.discard(process)
        with suppress(subprocess.TimeoutExpired):  # a driver may take its time
            process.wait(5)


def run_tests(
    arguments: Sequence[str],
    seconds: float,
    prefix: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    **options,
) -> tuple[int, list[dict]]:
    """Runs pytest; its exit status, and the lines that live_report.py has written meanwhile."""
    paths = filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | (environment or {})
    hung = f"faulthandler_timeout={max(1, seconds / 2):.0f}"  # shows where
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines"
        command = [*prefix, sys.executable, "-m", "pytest", "-q", "-o", hung]
        command += ["-p", "live_report", f"--live-report={file}", *arguments]
        return run_limited(command, seconds, env=variables, **options), lines_of(file)


def unfinished(status: int) -> str:
    return "out of time" if status == OUT_OF_TIME else "did not end"


def run_all_tests(
    chosen: str, rest: Sequence[str], budget: Budget, processes: int
) -> tuple[list[int], Groups]:
    """The tests that can share the GPU, then those that cannot; the exit statuses that matter."""
    groups: Groups = defaultdict(Group)
    statuses = []
    for marker, part in CALLS.items():
        arguments = ["-m", f"({chosen}) and {marker}" if chosen.strip() else marker, *rest]
        environment = {}
        if marker == "alone":
            if any(x.startswith(("-n", "--numprocesses")) for x in rest):
                arguments.append("-n0")
        elif processes > 1 and importlib.util.find_spec("xdist"):
            # Neighbours share what had to be compiled: chunks of them, and help at the end.
            arguments = ["-n", str(processes), "--dist=worksteal", *arguments]
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in each of them
        status, lines = run_tests(arguments, budget.left(part), environment=environment)
        for key, entry in group(lines, unfinished(status)).items():
            groups[key].add(entry)
        if status == OUT_OF_TIME:
            ended = len({x["test"] for x in lines if x.get("outcome") in ("ended", "failed")})
            collected = max((x.get("collected", 0) for x in lines), default=0)
            remark = f"out of time: {ended} of {collected or '?'} tests had ended"
            groups["-", f"pytest, {marker}"].fail(remark)
        statuses.append(status)
    selected = [x for x in statuses if x != NOTHING_SELECTED]
    return selected or [NOTHING_SELECTED], groups


def sanitize(tools: Sequence[str], budget: Budget, processes: int) -> Groups:
    """compute-sanitizer over the tests made for it, tools and backends at the same time.

    It knows what CUDA has allocated, so every tensor gets its own allocation instead of a part of
    a block of the caching allocator's; tests end theirs with a granule that is written, because
    Triton's kernels read whole ones (see on_device in test_gpu.py).
    """
    groups: Groups = defaultdict(Group)
    program = shutil.which("compute-sanitizer")
    runs = []
    for tool in tools:
        if not torch.cuda.is_available() or program is None:
            missing = torch.cuda.is_available() and "compute-sanitizer is not on PATH"
            groups["-", tool].skip(missing or "no CUDA device")
            continue
        for backend in BACKENDS:
            state = kdkernels.backends()[backend]
            if state.available:
                runs.append((program, tool, backend))
            else:
                groups[backend, tool].skip(state.reason)

    def run(i: int) -> Group:
        # Where not all run at once, those that wait for their turn keep their part of the time.
        return sanitized(*runs[i], budget.left(SANITIZED) / -(-(len(runs) - i) // processes))

    pool = ThreadPoolExecutor(processes)
    try:
        for (_, tool, backend), entry in zip(runs, pool.map(run, range(len(runs))), strict=True):
            groups[backend, tool].add(entry)
    finally:  # at once, where this is interrupted
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(RUNNING):
            send(process, signal.SIGKILL)
    return groups


def sanitized(program: str, tool: str, backend: str, seconds: float) -> Group:
    start = time.monotonic()
    prefix = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    # What is killed must not take along what it had to say.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    arguments = ["tests/test_gpu.py", "-k", f"({TOOLS[tool]}) and {backend}"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        status, lines = run_tests(
            arguments, seconds, prefix, environment, stdout=output, stderr=subprocess.STDOUT
        )
        output.seek(0)
        printed = output.read().splitlines()[-60:]
    entry = Group()
    for part in group(lines, unfinished(status)).values():
        entry.add(part)
    entry.seconds = time.monotonic() - start
    remark = {FOUND: "found by compute-sanitizer", OUT_OF_TIME: "out of time"}
    if status in remark and not entry.remarks[remark[status]]:
        entry.fail(remark[status])  # it does not say in which test
    elif status != 0 and not entry.failed:
        entry.fail(f"ended with status {status}")
    words = f"compute-sanitizer {tool}, {backend}: status {status}, {entry.seconds:.0f} s"
    print("\n".join([words, *(printed if status else ())]), flush=True)  # one write: no mixture
    return entry


def table(groups: Groups) -> str:
    header = ["backend", "tests", "passed", "failed", "seconds", "remarks"]
    lines = [header, *(entry.line(*key) for key, entry in sorted(groups.items()))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header) - 1)]
    out = []
    for line in lines:
        words = [x.ljust(w) for x, w in zip(line[:2], widths[:2], strict=True)]
        words += [x.rjust(w) for x, w in zip(line[2:5], widths[2:], strict=True)]
        out.append("  ".join([*words, line[5]]))
    return "\n".join(out)


def write(text: str) -> None:
    """Where there is a device."""
    folder = os.environ.get("OUT")
    out = Path(folder or report.RESULTS / report.folder_of(torch.cuda.get_device_name()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "check.txt").write_text(text + "\n", encoding="utf-8")
    print(f"written: {out / 'check.txt'}")


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, with the sanitizer's tools as a list, and what goes on to pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tools", default=",".join(TOOLS), metavar="TOOL,..")
    parser.add_argument("--budget", type=float, default=330.0, metavar="SECONDS")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that share the GPU")
    parser.add_argument("-m", default="gpu", metavar="EXPRESSION", help="as pytest's")
    options, rest = parser.parse_known_args(arguments)
    options.tools = [x for x in options.tools.split(",") if x not in ("", "none")]
    if unknown := sorted(set(options.tools) - set(TOOLS)):
        parser.error(f"--tools: {', '.join(unknown)}; there are {', '.join(TOOLS)} and none")
    if options.budget <= 0 or (options.jobs is not None and options.jobs < 1):
        parser.error("--budget and --jobs: must be positive")
    return options, rest


def main(arguments: Sequence[str] | None = None) -> int:
    options, rest = parse(arguments)
    # What ends this ends what it has started; a background job of a shell would ignore interrupts.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    budget, processes = Budget(options.budget), options.jobs or jobs()
    facts = describe()
    print(facts + "\n", flush=True)
    statuses, groups = run_all_tests(options.m, rest, budget, processes)
    groups |= sanitize(options.tools, budget, processes)
    passed = sum(entry.passed for entry in groups.values())
    failed = sum(entry.failed for entry in groups.values())
    bad = any(statuses) or failed > 0
    if bad:
        ends = ["out of time" if x == OUT_OF_TIME else f"status {x}" for x in statuses]
        verdict = f"FAILED: {failed} failures, pytest ended with {' and '.join(ends)}"
    elif torch.cuda.is_available():
        verdict = f"{passed} passed on {torch.cuda.get_device_name()}"
    else:
        verdict = (
            "There is no CUDA device here: nothing ran on a GPU, and nothing was checked on one."
        )
    took = f"{time.monotonic() - START:.0f} s of {budget.seconds:.0f} s, {processes} at a time"
    print(f"\n{table(groups)}\n\n{verdict}\n{took}")
    if torch.cuda.is_available():
        write(f"{facts}\n\n{table(groups)}\n\n{verdict}\n{took}")
    return int(bad or (torch.cuda.is_available() and not passed))


if __name__ == "__main__":
    sys.exit(main())
