"""What the benchmarks share: losses, interleaved timing, peak memory, traffic, facts, tables."""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kdkernels

Call = Callable[[int], Any]  # one call on the input set of that index
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

MIB = 2**20


# ------------------------------------------------------------------------------------------- losses
TEMPERATURE = 4.0  # KD, DKD and AEKT; NKD runs at its own default of 1
NAMES = {"kd": "KD", "dkd": "DKD", "nkd": "NKD", "aekt": "AEKT", "tf_nkd": "tf-NKD"}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def fused_loss(name: str, backend: str | None) -> Loss:
    """kdkernels' loss with the parameters that `eager` has as defaults."""

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        match name:
            case "kd":
                return kdkernels.kd_loss(student, teacher, temperature=TEMPERATURE, backend=backend)
            case "dkd":
                return kdkernels.dkd_loss(
                    student, teacher, target, temperature=TEMPERATURE, backend=backend
                )
            case "nkd":
                return kdkernels.nkd_loss(student, teacher, target, backend=backend)
            case "aekt":
                return kdkernels.aekt_loss(
                    student, teacher, target, temperature=TEMPERATURE, backend=backend
                )
            case "tf_nkd":
                return kdkernels.tf_nkd_loss(student, target, backend=backend)
        raise KeyError(name)

    return loss


def errors(result: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Absolute error of the loss; largest error of the gradient over its largest entry."""
    (value, grad), (true_value, true_grad) = result, truth
    worst = (grad.double() - true_grad).abs().max() / true_grad.abs().max()
    return abs(float(value) - float(true_value)), float(worst)


# --------------------------------------------------------------------------------------------- time
@dataclass
class Timing:
    """Seconds of single calls."""

    seconds: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        """Median, spread (20th to 80th percentile) and best, in milliseconds."""
        return {
            "ms": 1e3 * self.median,
            "ms_p20": 1e3 * self.quantile(0.2),
            "ms_p80": 1e3 * self.quantile(0.8),
            "ms_min": 1e3 * min(self.seconds),
            "calls": len(self.seconds),
        }


def wall_clock(call: Call, index: int) -> float:
    """Seconds that one call takes on the host; its result is released afterwards."""
    begin = time.perf_counter()
    result = call(index)
    seconds = time.perf_counter() - begin
    del result
    return seconds


class EventClock:
    """Seconds that one call keeps a GPU busy, between two CUDA events.

    The device is held up first, so that the call is queued by the time it starts: its launches on
    the host are then no part of the time, unless the call itself waits for the device.
    """

    def __init__(self, hold_up: float = 2e-3) -> None:
        """hold_up: seconds, more than the launches of a call take on the host."""
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1000)  # loads it
        cycles = 10_000_000
        seconds = self._between(lambda: torch.cuda._sleep(cycles))
        self._cycles = int(cycles * hold_up / seconds)

    def _between(self, call: Callable[[], Any]) -> float:
        self._start.record()
        result = call()
        self._end.record()
        self._end.synchronize()
        del result
        return 1e-3 * self._start.elapsed_time(self._end)

    def __call__(self, call: Call, index: int) -> float:
        torch.cuda._sleep(self._cycles)
        return self._between(lambda: call(index))


def launch_seconds(call: Call, count: int = 5) -> float:
    """Seconds that one call takes on the host, the device being idle; the median of some."""
    taken = []
    for _ in range(count):
        torch.cuda.synchronize()
        taken.append(wall_clock(call, 0))
    torch.cuda.synchronize()
    return statistics.median(taken)


def time_interleaved(
    calls: Mapping[Any, Call],
    *,
    clock: Callable[[Call, int], float] = wall_clock,
    sets: int = 1,
    seconds: float = 10.0,
    min_rounds: int = 3,
    max_rounds: int = 50,
    share: float = 0.05,
    max_calls: int = 10,
    on_round: Callable[[], object] = lambda: None,
) -> dict[Any, Timing]:
    """Time every call in every round, so that a drift of the machine hits all alike.

    Rounds go on until `seconds` have passed, within [min_rounds, max_rounds]; each starts with
    another provider. Within a round a fast call is repeated until it took about `share` seconds
    (at most `max_calls` times), for a steadier median; every repetition takes the next input set.
    The calls must be warm.
    """
    timings = {name: Timing() for name in calls}
    repeats = {name: 1 for name in calls}
    cursor = {name: 0 for name in calls}
    order = list(calls)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(max_rounds):
            if done >= min_rounds and time.perf_counter() - start > seconds:
                break
            for name in order[done % len(order) :] + order[: done % len(order)]:
                call = calls[name]
                for _ in range(repeats[name]):
                    index = cursor[name] = (cursor[name] + 1) % sets
                    timings[name].seconds.append(clock(call, index))
                wanted = int(share / max(timings[name].median, 1e-9))
                repeats[name] = max(1, min(max_calls, wanted))
            on_round()
    finally:
        if enabled:
            gc.enable()
    return timings


def sets_beyond_cache(bytes_per_set: int, cache: int, limit: int = 64) -> int:
    """How many input sets to rotate through to exceed the last-level cache 4 times."""
    return max(1, min(limit, -(-4 * cache // bytes_per_set)))


# ------------------------------------------------------------------------------------------ traffic
def modelled_bytes(rows: int, classes: int, dtype: torch.dtype, passes: int = 3) -> int:
    """Bytes that must cross memory: 3 passes are read student, read teacher, write gradient."""
    return passes * rows * classes * dtype.itemsize


# ------------------------------------------------------------------------------------------- memory
BYTES_PER_ROW = 256  # allowance for "O(rows)" beside the gradient
BYTES_PER_CALL = 64 << 10

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h

MALLOC_POLICIES = {  # (mmap threshold, trim threshold) in bytes
    "keep": (1 << 30, (1 << 31) - 1),
    "default": (32 << 20, 64 << 20),
    "return": (64 << 10, 128 << 10),
}


def _libc() -> Any | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if libc is not None and hasattr(libc, "mallopt") else None


def set_malloc_policy(name: str) -> bool:
    """What glibc does with freed blocks, for the whole process; false where there is no glibc.

    "keep" keeps them, as jemalloc, tcmalloc or a caching allocator do. "default" is where glibc's
    adaptive thresholds end up in any process that frees large tensors: a block above 32 MiB goes
    back to the kernel, so every call pays for the page faults of its own gradient, which is several
    times what a fused kernel takes. "return" gives every larger block back, for `peak_memory`.
    """
    libc = _libc()
    if libc is None:
        return False
    mmap_threshold, trim_threshold = MALLOC_POLICIES[name]
    libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
    libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
    return True


@dataclass
class Memory:
    """Peak memory of one call beyond what was held before it, in bytes."""

    allocated: int
    resident: int | None


def _status_bytes(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return 1024 * int(found[1])


def _allocated_peak(call: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
        del result
    events = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        peak = max(peak, held)
    return peak


def _resident_peak(call: Callable[[], Any]) -> int | None:
    libc = _libc()
    if libc is None:
        return None
    try:
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _status_bytes("VmRSS")
        result = call()
        del result
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:  # a container without these files, or not writable
        return None


def peak_memory(call: Callable[[], Any]) -> Memory:
    """Peak extra memory of one warm call, measured in two ways that check each other.

    `allocated`: torch's allocator, event by event, from the profiler: exact, the same on every run,
    but blind to memory that a kernel takes by other means. `resident`: growth of the process's
    peak resident set, which sees all of it. The latter is only right (then to 0.1 %) in a process
    that has never kept freed memory: call set_malloc_policy("return") before any large tensor is
    made, and measure memory before time.
    """
    gc.collect()
    return Memory(_allocated_peak(call), _resident_peak(call))


def gpu_peak_memory(call: Callable[[], Any]) -> int:
    """Peak extra memory of one warm call on the current GPU, in bytes as they were asked for.

    Not as they were handed out: the caching allocator leaves up to 1 MiB at the end of a block.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


# ------------------------------------------------------------------------------------------ machine
def cpu_name() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return (found[1] if found else platform.processor() or platform.machine()).strip()


def last_level_cache(fallback: int = 32 * MIB) -> int:
    """Bytes of the largest cache of the first core, as Linux reports it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"K": 1024, "M": MIB}[found[2]])
    return max(sizes, default=fallback)


def commit() -> str:
    """The commit of this checkout, with "+changes" when the tree is not clean."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changes = "+changes" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short=12", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine_facts() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "last_level_cache_mib": last_level_cache() / MIB,
        "system": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def gpu_facts() -> dict[str, Any]:
    """The current GPU, and what drives it."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "l2_mib": device.L2_cache_size / MIB,
        "cuda": torch.version.cuda,
        "triton": triton,
    }


# ------------------------------------------------------------------------------------------- tables
def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned text: the first column to the left, the others to the right; "-" for None."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str | None:
    """Three significant digits, without an exponent where one can read it."""
    if value is None or math.isnan(value):
        return None
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    before = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:.{max(0, digits - before)}f}"


def spread(row: dict[str, Any]) -> str:
    return f"{number(row['ms'])} [{number(row['ms_p20'])}-{number(row['ms_p80'])}]"


def results(machine: str) -> Path:
    """Where the results of a machine of this name are kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    return Path(__file__).resolve().parent / "results" / slug


def write(out: Path, stem: str, report: dict[str, Any]) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = out / f"{stem}.json", out / f"{stem}.csv"
    as_json.write_text(json.dumps(report, indent=1) + "\n")
    columns = list(dict.fromkeys(key for row in report["records"] for key in row))
    with as_csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(report["records"])
    return [as_json, as_csv]


def shape_of(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCLASSES, such as 512x32000")
    return int(found[1]), int(found[2])
