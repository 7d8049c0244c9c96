"""Measuring on a device: interleaved timing, peak memory, errors, facts of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.cases import DTYPES, IGNORED, LAYOUTS, Case, Loss

MIB = 2**20
# Of a multiprocessor's special function units, and the compute capabilities known to have so many.
EXPONENTIALS_PER_CLOCK = 16
EXPONENTIALS_KNOWN = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


# ------------------------------------------------------------------------------------------- inputs
@dataclass
class Inputs:
    """Sets of student, teacher and target, which calls take in turn."""

    students: list[Tensor]
    teachers: list[Tensor]
    targets: list[Tensor]
    stores: list[tuple[Tensor, Tensor]]  # the logits as they lie in memory, in one dimension

    @staticmethod
    def draw(case: Case, sets: int, seed: int, device: str) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        made: list[Tensor] = []

        def dense(*shape: int) -> Tensor:
            tensor = torch.empty(shape, dtype=DTYPES[case.dtype], device=device)
            made.append(tensor.normal_(0, 2, generator=generator))
            return made[-1]

        def logits() -> Tensor:
            return LAYOUTS[case.layout](dense, case.rows, case.classes)

        inputs = Inputs([], [], [], [])
        for _ in range(sets):
            # Detached, so that nothing in `stores` requires a gradient.
            inputs.students.append(logits().detach().requires_grad_())
            inputs.teachers.append(logits())
            student, teacher = (x.flatten() for x in made[-2:])
            inputs.stores.append((student, teacher))
            size = (case.rows,)
            target = torch.randint(case.classes, size, device=device, generator=generator)
            order = torch.randperm(case.rows, device=device, generator=generator)
            target[order[case.counted :]] = IGNORED
            inputs.targets.append(target)
        return inputs


def sets_beyond_cache(case: Case, cache: int, limit: int = 1024) -> int:
    """How many input sets to rotate through for the students alone to exceed the cache 4 times."""
    return max(1, min(limit, -(-4 * cache // case.tensor_bytes)))


# -------------------------------------------------------------------------------------------- calls
class Call(Protocol):
    """Something that is timed, on the input set of an index."""

    def prepare(self, index: int) -> Any:
        """What is not timed; its result is what `run` gets."""

    def run(self, state: Any) -> Any: ...


@dataclass
class LossCall:
    """A loss in the direction of a case; `run` returns (mean, gradient), or None in their place."""

    loss: Loss
    inputs: Inputs
    direction: str

    def _mean(self, index: int) -> tuple[Tensor, Tensor]:
        student = self.inputs.students[index]
        value = self.loss(student, self.inputs.teachers[index], self.inputs.targets[index])
        return value, student

    def prepare(self, index: int) -> Any:
        return self._mean(index) if self.direction == "backward" else index

    def run(self, state: Any) -> tuple[Tensor, Tensor | None]:
        if self.direction == "forward":
            with torch.no_grad():
                return self._mean(state)[0], None
        value, student = state if self.direction == "backward" else self._mean(state)
        (gradient,) = torch.autograd.grad(value, student)
        return value.detach(), gradient


class CopyCall:
    """A stream of as many bytes as a case's logits and gradient: copy_, or add for 3 passes.

    Of dense memory whatever the layout, of whole integers whatever the dtype (so that the bytes
    alone decide), to memory used before.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.streams = 3 if case.passes == 3 else 2
        self.stores = inputs.stores
        self._count = max(1, case.logit_bytes // self.streams // 4)
        self._logits = -(-4 * self._count // DTYPES[case.dtype].itemsize)
        self.out = torch.empty_like(self._words(inputs.stores[0][1]))

    @property
    def bytes(self) -> int:
        return self.streams * self.out.nbytes

    def prepare(self, index: int) -> tuple[Tensor, Tensor]:
        student, teacher = (self._words(x) for x in self.stores[index])
        return student, teacher

    def _words(self, store: Tensor) -> Tensor:
        return store[: self._logits].view(torch.int32)[: self._count]

    def run(self, state: tuple[Tensor, Tensor]) -> None:
        if self.streams == 3:
            torch.add(*state, out=self.out)
        else:
            self.out.copy_(state[0])


def gradient_errors(
    result: tuple[Tensor, Tensor | None], truth: tuple[Tensor, Tensor, list[int]]
) -> dict[str, float]:
    """Absolute error of the loss; largest error of the gradient over its largest entry."""
    (value, gradient), (true_value, true_gradient, rows) = result, truth
    out = {"loss_error": abs(float(value) - float(true_value))}
    if gradient is not None:
        worst = (gradient[rows].double() - true_gradient).abs().max() / true_gradient.abs().max()
        out["grad_error"] = float(worst)
    return out


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


Clock = Callable[[Call, int], float]  # seconds of one call


def wall_clock(call: Call, index: int) -> float:
    """Seconds that one call takes on the host; its result is released afterwards."""
    state = call.prepare(index)
    begin = time.perf_counter()
    result = call.run(state)
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
        state = call.prepare(index)
        torch.cuda._sleep(self._cycles)
        return self._between(lambda: call.run(state))


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    clock: Clock = wall_clock,
    sets: int = 1,
    seconds: float = 10.0,
    min_rounds: int = 5,
    min_slow: int = 3,
    max_rounds: int = 200,
    share: float = 0.05,
    max_calls: int = 10,
) -> dict[str, Timing]:
    """Time every call in every round, so that a drift of the machine hits all alike.

    Rounds go on until `seconds` have passed, within [min_rounds, max_rounds]; each starts with
    another call. After `min_slow` rounds one that has taken its part of the time is left out.
    Within a round a fast one is repeated until it took about `share` seconds (at most `max_calls`
    times), for a steadier median. Every repetition takes the next input set, of all calls together:
    none finds in the cache what another has just read. The calls must be warm.
    """
    timings = {name: Timing() for name in calls}
    repeats = {name: 1 for name in calls}
    index = 0
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
                if done >= min_slow and sum(timings[name].seconds) > seconds / len(order):
                    continue
                for _ in range(repeats[name]):
                    index = (index + 1) % sets
                    timings[name].seconds.append(clock(calls[name], index))
                wanted = int(share / max(timings[name].median, 1e-9))
                repeats[name] = max(1, min(max_calls, wanted))
    finally:
        if enabled:
            gc.enable()
    return timings


# ------------------------------------------------------------------------------------------- memory
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
MALLOC_POLICIES = {  # (mmap threshold, trim threshold) in bytes
    "default": (32 << 20, 64 << 20),
    "keep": (1 << 30, (1 << 31) - 1),
}


def set_malloc_policy(name: str) -> bool:
    """What glibc does with freed blocks, for the whole process; false where there is no glibc.

    "default" is where glibc's adaptive thresholds end up in any process that frees large tensors:
    a block above 32 MiB goes back to the kernel, so every call pays for the page faults of all
    that it allocates: of a gradient, several times what a fused kernel takes; of each intermediate
    tensor of a plain formula. "keep" keeps freed blocks, as jemalloc, tcmalloc or a caching
    allocator do.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    mmap_threshold, trim_threshold = MALLOC_POLICIES[name]
    libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
    libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
    return True


def _allocated_peak(call: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log lines
    # What kdkernels keeps of earlier gradients is no allocation: for once it keeps none.
    pool = os.environ.pop("KDKERNELS_POOL", None)
    os.environ["KDKERNELS_POOL"] = "0"
    try:
        return _recorded_peak(call)
    finally:
        del os.environ["KDKERNELS_POOL"]
        if pool is not None:
            os.environ["KDKERNELS_POOL"] = pool


def _recorded_peak(call: Callable[[], Any]) -> int:
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


# ------------------------------------------------------------------------------------------ devices
class Cpu:
    """How this process measures on the CPU."""

    type = "cpu"

    def __init__(self, threads: int | None = None, malloc: str = "keep") -> None:
        if threads:
            torch.set_num_threads(threads)
        self.malloc = malloc if set_malloc_policy(malloc) else "system"

        self.name = cpu_name()
        self.cache = last_level_cache()

    @property
    def free_memory(self) -> int:
        try:
            found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        except OSError:
            found = None
        if found:
            return 1024 * int(found[1])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

    def facts(self) -> dict[str, Any]:
        return machine_facts()

    def clock(self, calls: Mapping[str, Call]) -> tuple[Clock, dict[str, dict[str, float]]]:
        """The clock for these warm calls, and what else it found out about each."""
        return wall_clock, {}

    def peak_memory(self, call: Callable[[], Any]) -> int:
        """Peak extra memory of one warm call, in bytes: torch's allocations, event by event.

        Exact and the same on every run, but blind to memory that a kernel takes by other means;
        of ours, tests/test_memory.py shows that they do not.
        """
        gc.collect()
        return _allocated_peak(call)

    def synchronize(self) -> None:
        """Waits for what was begun; raises if the device is lost."""

    def release(self) -> None:
        """Gives memory back that is held for later."""
        gc.collect()


class Cuda:
    """How this process measures on the current CUDA device."""

    type = "cuda"
    malloc = None

    def __init__(self) -> None:
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.name = self._properties.name
        self.cache = self._properties.L2_cache_size
        self.multiprocessors = self._properties.multi_processor_count

    @property
    def free_memory(self) -> int:
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + kept

    def facts(self) -> dict[str, Any]:
        """The machine, its GPU, and what drives it."""
        device = self._properties
        clock = _nvidia_smi(device, "clocks.max.sm")
        megahertz = float(clock) if clock and clock.isdecimal() else None
        return machine_facts() | {
            "gpu": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "max_clock_mhz": megahertz,
            "exponentials_per_s": (
                megahertz
                and (device.major, device.minor) in EXPONENTIALS_KNOWN
                and 1e6 * megahertz * device.multi_processor_count * EXPONENTIALS_PER_CLOCK
            )
            or None,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "l2_mib": device.L2_cache_size / MIB,
            "driver": _nvidia_smi(device, "driver_version"),
            "cuda": torch.version.cuda,
            "triton": version("triton"),
        }

    def clock(self, calls: Mapping[str, Call]) -> tuple[Clock, dict[str, dict[str, float]]]:
        found = {name: {"launch_ms": 1e3 * _launch_seconds(call)} for name, call in calls.items()}
        longest = max(x["launch_ms"] for x in found.values())
        return EventClock(hold_up=min(1e-2, 2e-3 * longest + 2e-4)), found

    def peak_memory(self, call: Callable[[], Any]) -> int:
        """Peak extra memory of one warm call, in bytes as they were asked for.

        Not as they were handed out: the caching allocator leaves up to 1 MiB at a block's end.
        """
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def _launch_seconds(call: Call, count: int = 5) -> float:
    """Seconds that one call takes on the host, the device being idle; the median of some."""
    taken = []
    for _ in range(count):
        torch.cuda.synchronize()
        taken.append(wall_clock(call, 0))
    torch.cuda.synchronize()
    return statistics.median(taken)


def _nvidia_smi(device: Any, what: str) -> str | None:
    """What nvidia-smi says of a device, if it is there and knows."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [*command, f"--id=GPU-{device.uuid}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        return done.stdout.strip()
    return None


Machine = Cpu | Cuda


# ------------------------------------------------------------------------------------------- facts
def cpu_name() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return (found[1] if found else platform.processor() or platform.machine()).strip()


@lru_cache
def last_level_cache(fallback: int = 32 * MIB) -> int:
    """Bytes of the largest cache of the first core, as Linux reports it."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"K": 1024, "M": MIB}[found[2]])
    return max(sizes, default=fallback)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this checkout, with "+changes" when more than its results have changed."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        others = ["..", ":!../bench/results", ":!../README.md", ":!../docs/performance.md"]
        changes = "+changes" if git("status", "--porcelain", "--", *others) else ""
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
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
    }
