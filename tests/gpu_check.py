"""`make gpu-check`: everything that needs a GPU, in one table.

    python tests/gpu_check.py                               all tests marked `gpu`
    python tests/gpu_check.py -m "gpu and not slow" -x      arguments go on to pytest

Prints the device, the versions and the backends, runs the tests marked `gpu` and, where
compute-sanitizer is installed, its memory checker on a selection. The table has one line for each
backend and group of tests. Exit status 1 when something failed, or when there is a device and
nothing passed on it; without a device it says so and ends with 0.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # run as a script; an installed kdkernels comes first

import torch  # noqa: E402

import kdkernels  # noqa: E402

MEMCHECK = "memcheck"
MEMCHECK_STATUS = 86  # what compute-sanitizer exits with when it has found something
MEMCHECK_SECONDS = 300


@dataclass
class Group:
    """Tests of one function on one backend, whatever their parameters."""

    passed: int = 0
    failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    seconds: float = 0.0

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


def describe() -> None:
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            print(
                f"device {i}: {device.name}, sm_{device.major}{device.minor}, "
                f"{device.multi_processor_count} multiprocessors, "
                f"{device.total_memory / 2**30:.0f} GiB"
            )
    else:
        print("device: no CUDA device")
    print(
        f"python {platform.python_version()}, torch {torch.__version__} "
        f"(CUDA {torch.version.cuda or 'not built in'}), triton {version('triton')}, "
        f"kdkernels {kdkernels.__version__}"
    )
    for name, state in kdkernels.backends().items():
        print(f"backend {name}: {'yes' if state.available else 'no'}, {state.reason}")
    print(flush=True)


def run_tests(arguments: list[str], prefix: list[str] | None = None, **options) -> tuple[int, str]:
    """Runs pytest; its exit status and its report in JUnit's format, empty if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*(prefix or []), sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}"]
        try:
            status = subprocess.run([*command, *arguments], cwd=ROOT, **options).returncode
        except subprocess.TimeoutExpired:
            status = 124
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


def memcheck() -> Groups:
    """compute-sanitizer over the tests made for it. It sees what leaves an allocation of CUDA, so
    every tensor gets its own instead of a part of a block of the caching allocator's."""
    groups: Groups = defaultdict(Group)
    program = shutil.which("compute-sanitizer")
    if not torch.cuda.is_available() or program is None:
        missing = torch.cuda.is_available() and "compute-sanitizer is not on PATH"
        groups["-", MEMCHECK].skipped[missing or "no CUDA device"] += 1
        return groups
    print("\ncompute-sanitizer memcheck", flush=True)
    prefix = [program, "--tool", "memcheck", "--error-exitcode", str(MEMCHECK_STATUS)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    arguments = ["tests/test_gpu.py", "-k", "accesses_stay_inside"]
    status, report = run_tests(arguments, prefix, env=environment, timeout=MEMCHECK_SECONDS)
    for (backend, _), part in group(report).items() if report else ():
        groups[backend, MEMCHECK] = part
    if status != 0 and not any(part.failed for part in groups.values()):
        # Found by the sanitizer, which does not say in which test; out of time; or crashed.
        groups["-", MEMCHECK].failed = 1
        print(f"memcheck ended with status {status}")
    return groups


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


def main() -> int:
    describe()
    # The last -m counts, so that one among the arguments replaces this one.
    status, report = run_tests(["-m", "gpu", *sys.argv[1:]])
    groups = group(report) if report else {}
    groups |= memcheck()
    print("\n" + table(groups) + "\n")
    passed = sum(entry.passed for entry in groups.values())
    failed = sum(entry.failed for entry in groups.values())
    if status != 0 or failed:
        print(f"FAILED: {failed} failures, pytest ended with status {status}")
        return 1
    if not torch.cuda.is_available():
        print("There is no CUDA device here: nothing ran on a GPU, and nothing was checked on one.")
        return 0
    print(f"{passed} passed on {torch.cuda.get_device_name()}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
