"""`make gpu-check`: everything that needs a GPU, in one table.

    python tests/gpu_check.py                               all tests marked `gpu`
    python tests/gpu_check.py -m "gpu and not slow" -x      arguments go on to pytest
    python tests/gpu_check.py --tools memcheck,racecheck    these of the sanitizer's tools, or none

Prints the device, the versions and the backends, runs the tests marked `gpu` and, where
compute-sanitizer is installed, its four tools on a selection. The table has one line for each
backend and group of tests or tool. Where there is a device it is written, too: to check.txt in the
folder named by the environment's OUT, or else in bench/results/<GPU>. Exit status 1 when something
failed, or when there is a device and nothing passed on it; without a device it says so and ends
with 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # run as a script; an installed kdkernels comes first

import torch  # noqa: E402

import kdkernels  # noqa: E402
from bench import measure  # noqa: E402

# Of compute-sanitizer: the tests each tool runs, and for how many seconds per backend at most.
# memcheck sees what leaves an allocation, racecheck shared memory, initcheck what is read from
# global memory before it is written, synccheck barriers.
TOOLS = {
    "memcheck": ("every_kernel_once or accesses_stay_inside", 300),
    "racecheck": ("every_kernel_once", 300),
    "initcheck": ("every_kernel_once", 300),
    "synccheck": ("every_kernel_once", 300),
}
BACKENDS = ("cuda", "triton")
FOUND = 86  # what compute-sanitizer exits with when it has found something
OUT_OF_TIME = 124


@dataclass
class Group:
    """Tests of one function on one backend, whatever their parameters."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    seconds: float = 0.0

    def add(self, other: Group) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.seconds += other.seconds

    def line(self, backend: str, name: str) -> list[str]:
        skipped = ", ".join(f"{n} ({reason})" for reason, n in self.skipped.items())
        numbers = [str(self.passed), str(self.failed), f"{self.seconds:.1f}"]
        return [backend, name, *numbers, skipped or "0"]


Groups = dict[tuple[str, str], Group]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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
        f"(CUDA {torch.version.cuda or 'not built in'}), triton {version('triton')}, "
        f"kdkernels {kdkernels.__version__}, commit {measure.commit()}"
    )
    for name, state in kdkernels.backends().items():
        lines.append(f"backend {name}: {'yes' if state.available else 'no'}, {state.reason}")
    return "\n".join(lines)


def run_limited(command: Sequence[str], seconds: float | None, **options) -> int:
    """The exit status. What runs out of time is ended with all that it has started."""
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=seconds is not None, **options)
    try:
        return process.wait(seconds)
    except BaseException as error:
        if seconds is not None:  # before the wait: its group is still its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return OUT_OF_TIME
        raise


def run_tests(
    arguments: Sequence[str],
    prefix: Sequence[str] = (),
    seconds: float | None = None,
    **options,
) -> tuple[int, str]:
    """Runs pytest; its exit status and its report in JUnit's format, empty if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*prefix, sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}"]
        status = run_limited([*command, *arguments], seconds, **options)
        return status, report.read_text(encoding="utf-8") if report.exists() else ""


def group(report: str) -> Groups:
    groups: Groups = defaultdict(Group)
    for case in ET.fromstring(report).iter("testcase"):
        found = case.find("properties/property[@name='backend']")
        backend = "-" if found is None else found.get("value", "-")
        name = re.sub(r"\[.*", "", case.get("name", "")).removeprefix("test_").replace("_", " ")
        entry = groups[backend, name]
        entry.seconds += float(case.get("time", 0))
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            entry.failed += 1
        elif skipped is not None:
            entry.skipped[skipped.get("message", "no reason given")] += 1
        else:
            entry.passed += 1
    return groups


def sanitize(tools: Sequence[str]) -> Groups:
    """compute-sanitizer over the tests made for it, a tool and a backend at a time.

    It knows what CUDA has allocated, so every tensor gets its own allocation instead of a part of
    a block of the caching allocator's; tests end theirs with a granule that is written, because
    Triton's kernels read whole ones (see on_device in test_gpu.py).
    """
    groups: Groups = defaultdict(Group)
    program = shutil.which("compute-sanitizer")
    for tool in tools:
        if not torch.cuda.is_available() or program is None:
            missing = torch.cuda.is_available() and "compute-sanitizer is not on PATH"
            groups["-", tool].skipped[missing or "no CUDA device"] += 1
            continue
        for backend in BACKENDS:
            entry = groups[backend, tool]
            state = kdkernels.backends()[backend]
            if state.available:
                entry.add(sanitized(program, tool, backend))
            else:
                entry.skipped[state.reason] += 1
    return groups


def sanitized(program: str, tool: str, backend: str) -> Group:
    print(f"\ncompute-sanitizer {tool}, {backend}", flush=True)
    tests, seconds = TOOLS[tool]
    prefix = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    arguments = ["tests/test_gpu.py", "-k", f"({tests}) and {backend}"]
    status, report = run_tests(arguments, prefix, seconds, env=environment)
    entry = Group()
    for part in group(report).values() if report else ():
        entry.add(part)
    if status != 0 and not entry.failed:
        # Found by the sanitizer, which does not say in which test; out of time; or crashed.
        entry.failed = 1
        why = {FOUND: "it found something", OUT_OF_TIME: f"out of time, {seconds} s"}
        print(f"{tool} on {backend}: status {status}, {why.get(status, 'see above')}")
    return entry


def table(groups: Groups) -> str:
    header = ["backend", "tests", "passed", "failed", "seconds", "skipped"]
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
    out = Path(folder) if folder else measure.results(torch.cuda.get_device_name())
    out.mkdir(parents=True, exist_ok=True)
    (out / "check.txt").write_text(text + "\n", encoding="utf-8")
    print(f"written: {out / 'check.txt'}")


def parse(arguments: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """The sanitizer's tools, and what goes on to pytest."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tools", default=",".join(TOOLS), metavar="TOOL,..")
    options, rest = parser.parse_known_args(arguments)
    tools = [x for x in options.tools.split(",") if x not in ("", "none")]
    if unknown := sorted(set(tools) - set(TOOLS)):
        parser.error(f"--tools: {', '.join(unknown)}; there are {', '.join(TOOLS)} and none")
    return tools, rest


def main() -> int:
    tools, rest = parse()
    facts = describe()
    print(facts + "\n", flush=True)
    # The last -m counts, so that one among the arguments replaces this one.
    status, report = run_tests(["-m", "gpu", *rest])
    groups = group(report) if report else {}
    groups |= sanitize(tools)
    passed = sum(entry.passed for entry in groups.values())
    failed = sum(entry.failed for entry in groups.values())
    bad = status != 0 or failed > 0
    if bad:
        verdict = f"FAILED: {failed} failures, pytest ended with status {status}"
    elif torch.cuda.is_available():
        verdict = f"{passed} passed on {torch.cuda.get_device_name()}"
    else:
        verdict = (
            "There is no CUDA device here: nothing ran on a GPU, and nothing was checked on one."
        )
    print("\n" + table(groups) + "\n\n" + verdict)
    if torch.cuda.is_available():
        write(f"{facts}\n\n{table(groups)}\n\n{verdict}")
    return int(bad or (torch.cuda.is_available() and not passed))


if __name__ == "__main__":
    sys.exit(main())
