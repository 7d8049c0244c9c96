"""Launches of the CUDA kernels on a runtime that refuses what a device would refuse.

The objects are those of the build, compiled for sm_90: they stand for every device, because how a
kernel is launched does not depend on the code, but for registers, which test_cuda_compiled.py holds
down for the other architectures. Rules are those of csrc/fake/runtime.h. A device is used by one
test only, so that nothing has been asked of it or told to it before.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_cuda_compiled import built_module, cubins, resources

import kdkernels
from bench import sweep

try:
    from kdkernels import _fake
except ImportError:
    cuda = kdkernels.backends()["cuda"]
    why = "KDKERNELS_SIMT=1" if cuda.build.get("nvcc") else cuda.reason
    pytest.skip(f"the fake runtime is not built: {why}", allow_module_level=True)

pytestmark = pytest.mark.full

KNOWN = _fake.known_devices()
# Compute capability, and the largest cluster: 8 blocks and, where they may ask for more, 16.
CAPABILITY = {
    "A100": (80, 1),
    "RTX 3090": (86, 1),
    "L40S": (89, 1),
    "H100": (90, 16),
    "H200": (90, 16),
    "B200": (100, 16),
    "RTX 5090": (120, 8),
}
WITH_CLUSTERS = [name for name in KNOWN if CAPABILITY[name][1] > 1]
NO_ERROR, BAD_VALUE, BAD_CONFIGURATION, BAD_DEVICE, BAD_FUNCTION = 0, 1, 9, 101, 98
BAD_STREAM, TOO_MANY_RESOURCES, NOT_SUPPORTED, BAD_CLUSTER = 400, 701, 801, 912
ILLEGAL_ADDRESS, CAPTURE_UNSUPPORTED, ANY = 700, 900, 999

# Calls of every kind: a few blocks of shared memory; a cluster of 1, and of 16.
SMALL: dict[str, Any] = {"rows": 4096, "classes": 1000}
ALONE: dict[str, Any] = {"rows": 4096, "classes": 8000}
LARGE: dict[str, Any] = {"rows": 4096, "classes": 262144}


def add_device(name: str, **otherwise: Any) -> int:
    capability, largest = CAPABILITY[name]
    facts = {"capability": capability, "code": capability, "largest_cluster": largest}
    return _fake.add_device(**(KNOWN[name] | facts | otherwise))


@pytest.fixture
def new_device() -> Iterator[Callable[..., int]]:
    """Adds a device like a known one and makes it the current one."""

    def add(name: str = "H100", **otherwise: Any) -> int:
        index = add_device(name, **otherwise)
        _fake.use_device(index)
        return index

    _fake.forget()
    yield add
    assert _fake.mode() == "global"


def call(**options: Any) -> tuple[dict, list[dict]]:
    """A call's plan and launches, without what tells devices and graphs apart."""
    _fake.take_launches()
    plan = _fake.call(**options)
    launches = [
        {k: x for k, x in launch.items() if k not in ("device", "captured")}
        for launch in _fake.take_launches()
    ]
    assert launches and not _fake.take_refusals()
    return {k: x for k, x in plan.items() if not k.endswith("counter")}, launches


# ---- every plan -----------------------------------------------------------------------------

CLASSES = [1, 2, 3, 10, 31, 33, 64, 71, 100, 200, 263, 513, 1000, 1003, 2053, 3001, 4097, 6145]
CLASSES += [8003, 8201, 10007, 16384, 20011, 28000, 32000, 50257, 65536, 100003, 128256, 151936]
CLASSES += [262144, 262145, 400000, 600001, 1000003, 3000000]
ROWS = [1, 2, 7, 33, 66, 132, 135, 1000, 4096, 70000, 600001]


@pytest.fixture(scope="module")
def compiled() -> None:
    """Tells the runtime what nvcc made of each kernel."""
    reserved = 1 << 10  # of a block's shared memory, for the driver: counted by the tools as static
    with cubins(built_module()) as paths:
        known = {name: x for path in paths for name, x in resources(path).items()}
    names = [name for name in _fake.kernels() if "probe" not in name]
    assert known.keys() == set(names)
    for name in names:
        x = known[name]
        _fake.know_kernel(
            name,
            registers=x["registers"],
            shared=max(0, x["shared"] - reserved),
            most_threads=x["most_threads"],
        )


@pytest.mark.parametrize("large_first", [False, True], ids=["small-first", "large-first"])
@pytest.mark.parametrize("name", KNOWN)
def test_no_launch_is_refused(compiled, new_device, name, large_first):
    """Of any loss, pass, types and layout; and grids of persistent blocks are resident."""
    new_device(name)
    found = _fake.sweep(classes=CLASSES, rows=ROWS, large_first=large_first)
    wrong = [f"{what}, as in {calls[0]}" for what, calls in found["wrong"].items()]
    assert not wrong, f"{found['refused']} of {found['calls']} calls\n" + "\n".join(wrong)
    regimes = {"lanes", "block", "staged", "sweeps", "split", "strided"}
    if name in WITH_CLUSTERS:
        regimes = regimes - {"staged"} | {"cluster"}
        sizes = [2**i for i, most in enumerate(KNOWN[name]["clusters"]) if most]
        assert sorted(map(int, found["clusters"])) == sizes
    assert set(found["regimes"]) == regimes


# The fewest threads and the most, residents at the edge of what registers hold, uneven parts.
ODD_PLANS = [
    "regime=staged threads=32",
    "regime=staged threads=32 per_multiprocessor=2",
    "regime=staged threads=768",
    "regime=staged threads=384 per_multiprocessor=1",
    "regime=split threads=64 parts=7",
    "regime=split threads=32 parts=64",
    "regime=split parts=1",
    "regime=sweeps threads=32",
    "regime=sweeps threads=32 per_multiprocessor=12",
    "regime=sweeps threads=32 per_multiprocessor=16",
    "regime=sweeps threads=160",
    "regime=cluster",
    "regime=cluster threads=32",
    "regime=cluster threads=224 per_multiprocessor=1",
    "regime=cluster threads=160 per_multiprocessor=2",
    "parts=16 stages=3",
    "threads=32",
    "per_multiprocessor=1",
]
ODD_CLASSES = [1, 7, 100, 513, 4097, 8201, 50257, 1000003]


@pytest.mark.parametrize("name", ["H100", "H200", "B200"])
def test_what_is_asked_for_is_refused_by_the_planner_or_by_nobody(compiled, new_device, name):
    """What only the device refused would be taken for a fault of the kernel."""
    new_device(name)
    regimes, clusters, not_possible = set(), set(), 0
    for plan in dict.fromkeys([*sweep.PLANS, *ODD_PLANS]):
        found = _fake.sweep(
            classes=[*sweep.CLASSES, *ODD_CLASSES],
            rows=[4096, 3],
            types=["bfloat16", "float32"],
            override=plan,
        )
        wrong = [f"{what}, as in {calls[0]}" for what, calls in found["wrong"].items()]
        assert not wrong, f"{plan}\n" + "\n".join(wrong)
        assert found["launches"]  # of backward passes at least, which have no choice
        for said in found["not_possible"]:
            asked, _, why = said.partition(" is not possible for ")
            assert sorted(asked.split()) == sorted(["KDKERNELS_PLAN:", *plan.split()]) and why
        not_possible += len(found["not_possible"])
        regimes |= found["regimes"].keys()
        clusters |= found["clusters"].keys()
    assert not_possible
    assert regimes == {"lanes", "block", "staged", "sweeps", "split", "strided", "cluster"}
    assert sorted(map(int, clusters)) == [1, 2, 4, 8, 16]


def test_a_call_may_ask_for_a_plan(new_device):
    new_device()
    plan, launches = call(**LARGE, override="regime=cluster parts=16 threads=192 stages=2")
    assert (plan["regime"], plan["parts"], plan["stages"]) == ("cluster", 16, 2)
    assert [(x["cluster"], x["threads"]) for x in launches][-1] == (16, 192)
    with pytest.raises(ValueError, match=r"^KDKERNELS_PLAN: parts=3 is not possible"):
        _fake.call(**LARGE, override="parts=3")
    assert not _fake.take_launches()


@pytest.mark.parametrize("dtype", _fake.types)
@pytest.mark.parametrize("in_double", [False, True])
def test_gradients_of_any_size_are_scaled(new_device, dtype, in_double):
    new_device()
    for size in (1, 7, 8, 4095, 1 << 20, (1 << 33) + 1):
        _fake.scale(dtype, size, in_double or dtype == "float64")
    assert not _fake.take_refusals() and len(_fake.take_launches()) == 6


@pytest.mark.parametrize("name", WITH_CLUSTERS)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_the_order_of_calls_does_not_matter(new_device, name, first):
    """Least of all a cluster of 16 after one of 1, which is the same kernel."""
    calls = [SMALL, ALONE, LARGE]
    new_device(name)
    expected = [call(**options) for options in calls]
    new_device(name)
    for i in range(3):
        i = (first + i) % 3
        assert call(**calls[i]) == expected[i]


def test_grids_beyond_what_a_device_takes_are_an_error(new_device):
    """They must not wrap around to a grid that it takes."""
    new_device()
    assert call(**SMALL, blocks=2**31 - 1)
    for blocks in (-1, 2**31, 2**32 + 1):
        with pytest.raises(RuntimeError, match=f"error {BAD_CONFIGURATION}$"):
            _fake.call(**SMALL, blocks=blocks)


# ---- devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
def test_facts_are_those_of_the_device(new_device, name):
    new_device(name)
    assert _fake.device_facts() == KNOWN[name]
    assert _fake.last_error() == NO_ERROR and not _fake.take_refusals()


def test_clusters_of_which_none_fits_are_not_planned(new_device):
    """Part of a device, say: its size is allowed, but nowhere are so many multiprocessors."""
    new_device(clusters=[14, 7, 3, 1, 0])
    assert _fake.device_facts()["clusters"] == [14, 7, 3, 1, 0]
    plan, _ = call(rows=4096, classes=151936)
    assert (plan["regime"], plan["parts"]) == ("cluster", 8)


@pytest.mark.parametrize("name", WITH_CLUSTERS)
def test_code_for_older_devices_takes_no_clusters(new_device, name):
    """PTX for sm_80 runs on all of them, with cluster kernels that do nothing."""
    new_device(name, code=80)
    assert _fake.device_facts() == KNOWN[name] | {"clusters": [0] * 5}
    plan, _ = call(**LARGE)
    assert plan["regime"] == "split"


@pytest.mark.parametrize("names", [("A100", "H100"), ("H100", "RTX 5090"), ("RTX 5090", "B200")])
def test_devices_are_told_apart(new_device, names):
    devices = [new_device(name) for name in names]
    alone = [add_device(name) for name in names]
    for options in (SMALL, ALONE, LARGE):
        for device, other in zip(devices, alone, strict=True):
            _fake.use_device(device)
            got = call(**options)
            _fake.use_device(other)
            assert call(**options) == got
    counters = set()
    for device in devices:
        _fake.use_device(device)
        counters.add(_fake.call(**SMALL)["counter"] >> 20)
    assert len(counters) == 2


def test_more_devices_than_bits(new_device):
    """What one of them has been told is not taken for told to the one 64 further on."""
    first = new_device()
    while new_device() < first + 64:
        pass
    expected = call(**LARGE)
    _fake.use_device(first)
    assert call(**LARGE) == expected


def test_more_devices_than_are_kept_track_of():
    script = f"""
for _ in range(257):
    device = fake.add_device(**{KNOWN["A100"] | {"capability": 80, "code": 80}}, largest_cluster=1)
said = []
for device in (255, 256):
    fake.use_device(device)
    try:
        said.append(fake.call(**{SMALL})["regime"])
    except RuntimeError as error:
        said.append(str(error))
"""
    assert in_new_process(script) == ["block", f"error {BAD_DEVICE}"]


def test_a_device_that_broke_stays_broken_alone(new_device):
    broken, other = new_device(), add_device("H100")
    expected = call(**LARGE)
    _fake.break_device(broken, ILLEGAL_ADDRESS)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"error {ILLEGAL_ADDRESS}"):
            _fake.call(**LARGE)
        assert _fake.last_error() == ILLEGAL_ADDRESS
    _fake.use_device(other)
    assert call(**LARGE) == expected


def test_the_counters_of_calls_in_flight_differ(new_device):
    new_device()
    assert len({_fake.call(**SMALL)["counter"] for _ in range(100)}) == 100


# ---- errors ---------------------------------------------------------------------------------

ASKED = ["cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncGetAttributes", "cudaFuncSetAttribute"]
ASKED += ["cudaStreamIsCapturing", "cudaGetSymbolAddress"]
TOLD = ["cudaFuncGetAttributes", "cudaFuncSetAttribute", "cudaDeviceGetAttribute"]
CASES = [*((x, False) for x in [*ASKED, "cudaLaunchKernelExC"]), *((x, True) for x in TOLD)]


@pytest.mark.parametrize(("function", "knows_device"), CASES)
def test_what_failed_once_is_asked_again(new_device, function, knows_device):
    """It is an error, of this call alone: not a fact about the device, nor one of the next call."""
    new_device()
    expected = call(**LARGE)
    new_device()
    if knows_device:
        _fake.device_facts()
    _fake.plant_error(function, ANY)
    with pytest.raises(RuntimeError, match=f"error {ANY}$"):
        _fake.call(**LARGE)
    assert _fake.last_error() == NO_ERROR and _fake.mode() == "global"
    assert call(**LARGE) == expected


OCCUPANCY = "cudaOccupancyMaxActiveClusters"


@pytest.mark.parametrize("size", range(5))
def test_clusters_that_a_device_does_not_answer_for_are_none_to_this_call(new_device, size):
    new_device()
    clusters = list(KNOWN["H100"]["clusters"])
    clusters[size] = 0
    _fake.plant_error(OCCUPANCY, ANY, after=size)
    assert _fake.device_facts() == KNOWN["H100"] | {"clusters": clusters}
    assert _fake.last_error() == NO_ERROR and not _fake.take_refusals()
    assert _fake.device_facts() == KNOWN["H100"]


def test_clusters_beyond_eight_that_may_not_be_asked_for_are_none_to_this_call(new_device):
    """The first thing that a kernel is told is its shared memory, which others need, too."""
    new_device()
    _fake.plant_error("cudaFuncSetAttribute", ANY, after=1)
    assert _fake.device_facts()["clusters"] == [*KNOWN["H100"]["clusters"][:4], 0]
    assert _fake.last_error() == NO_ERROR
    assert _fake.device_facts() == KNOWN["H100"]


def test_a_call_does_without_clusters_that_a_device_does_not_answer_for(new_device):
    """Each time that it does not; and has the right plan as soon as it does."""
    new_device(clusters=[0] * 5)
    without = [call(**options) for options in (SMALL, LARGE)]
    new_device()
    expected = [call(**options) for options in (SMALL, LARGE)]
    assert without[0] == expected[0] and without[1] != expected[1]
    new_device()
    _fake.plant_error(OCCUPANCY, ANY, calls=20)
    for _ in range(2):
        assert [call(**options) for options in (SMALL, LARGE)] == without
    assert _fake.last_error() == NO_ERROR and _fake.mode() == "global"
    assert [call(**options) for options in (SMALL, LARGE)] == expected


# ---- graphs ---------------------------------------------------------------------------------

CAPTURED = """
device = fake.add_device(**{device})
fake.use_device(device)
stream = fake.new_stream(device)
if {mode!r}:
    fake.begin_capture(stream, {mode!r})
plan = fake.call(**{options}, stream=stream)
launches = fake.take_launches()
captured = [x.pop("captured") for x in launches]
said = {{
    "graph": {mode!r} and fake.end_capture(stream),
    "captured": all(captured),
    "own_counter": plan.pop("own_counter"),
    "counter": plan.pop("counter"),
    "mode": fake.mode(),
    "last_error": fake.last_error(),
    "refusals": fake.take_refusals(),
    "call": [plan, launches],
}}
"""


def in_new_process(script: str) -> Any:
    """`said` after the script, by a Python that has loaded nothing but the fake runtime."""
    spec = importlib.util.spec_from_file_location("_fake", _fake.__file__)
    assert spec and spec.origin
    load = f"""
import importlib.util, json
spec = importlib.util.spec_from_file_location("_fake", {spec.origin!r})
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)
"""
    script = f"{load}{script}\nprint(json.dumps(said))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
@pytest.mark.parametrize("pass_", ["forward", "forward_grad"])
@pytest.mark.parametrize(
    ("name", "options"), [("H100", LARGE), ("H100", SMALL), ("A100", {"rows": 9, "classes": 50000})]
)
def test_a_process_may_begin_with_a_capture(name, options, pass_, mode):
    """The graph gets what a call outside of it gets, and nothing that would be its end."""
    capability, largest = CAPABILITY[name]
    device = KNOWN[name] | {
        "capability": capability,
        "code": capability,
        "largest_cluster": largest,
    }
    options = options | {"pass_": pass_}
    outside = in_new_process(CAPTURED.format(device=device, options=options, mode=""))
    inside = in_new_process(CAPTURED.format(device=device, options=options, mode=mode))
    assert outside["call"] == inside["call"]
    assert inside["graph"] and inside["captured"]
    assert inside["mode"] == outside["mode"] == "global"
    assert inside["last_error"] == 0 and not inside["refusals"]
    # A graph is replayed at any time: its counter is nobody else's for good.
    assert inside["own_counter"] == (pass_ == "forward_grad") and not outside["own_counter"]


def test_a_first_call_leaves_the_graph_of_another_thread_alone(new_device):
    device = new_device()
    stream = _fake.new_stream(device)
    began, done, graphs = threading.Event(), threading.Event(), []

    def capture() -> None:
        _fake.use_device(device)
        _fake.begin_capture(stream, "global")
        began.set()
        done.wait()
        graphs.append(_fake.end_capture(stream))

    other = threading.Thread(target=capture)
    other.start()
    began.wait()
    try:
        call(**LARGE)
    finally:
        done.set()
        other.join()
    assert graphs == [True]


def test_the_counter_of_a_captured_call_is_in_its_memory(new_device):
    device = new_device()
    stream = _fake.new_stream(device)
    _fake.begin_capture(stream)
    plans = [_fake.call(**options, stream=stream) for options in (SMALL, ALONE, LARGE)]
    assert _fake.end_capture(stream)
    assert all(plan["counter"] % 16 == 0 and plan["own_counter"] for plan in plans)
    outside = _fake.call(**SMALL, stream=stream)
    assert not outside["own_counter"] and outside["counter"] >> 30 != plans[0]["counter"] >> 30


# ---- threads --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["cudaFuncGetAttributes", "cudaFuncSetAttribute"])
def test_a_thread_does_not_rely_on_what_another_is_about_to_say(new_device, function):
    device = new_device()
    _fake.device_facts()
    first: list[Any] = []

    def run() -> None:
        try:
            _fake.use_device(device)
            first.append(_fake.call(**LARGE)["regime"])
        finally:
            _fake.release()

    other = threading.Thread(target=run)
    _fake.hold(function)
    other.start()
    try:
        assert _fake.await_held()
        plan, _ = call(**LARGE)
    finally:
        _fake.release()
        other.join()
    assert [plan["regime"]] == first == ["cluster"] and not _fake.take_refusals()


def test_threads_learn_the_same_of_a_device(new_device):
    device = new_device()
    found: list[Any] = []

    def ask() -> None:
        try:
            _fake.use_device(device)
            found.append(_fake.device_facts())
        finally:
            _fake.release()

    threads = [threading.Thread(target=ask) for _ in range(2)]
    _fake.hold("cudaOccupancyMaxActiveClusters")
    for thread in threads:
        thread.start()
    held = _fake.await_held()
    _fake.release()
    for thread in threads:
        thread.join()
    assert held
    assert found == [KNOWN["H100"]] * 2


# ---- the rules themselves -------------------------------------------------------------------

RULES = [
    ("H100", {}, NO_ERROR, ""),
    ("H100", {"blocks": 0}, BAD_CONFIGURATION, "a grid of 0 blocks"),
    ("H100", {"blocks": 2**31}, BAD_CONFIGURATION, "a grid of 2147483648 blocks"),
    ("H100", {"threads": 0}, BAD_CONFIGURATION, "a block of 0 threads cannot be"),
    ("H100", {"threads": 1056}, BAD_CONFIGURATION, "a block of 1056 threads cannot be"),
    ("H100", {"threads": 100}, BAD_CONFIGURATION, "a block of 100 threads is no number of warps"),
    ("H100", {"threads": 416}, BAD_VALUE, "a block of 416 threads of a kernel for 384"),
    ("H100", {"threads": 256, "registers": 169}, NO_ERROR, ""),
    ("H100", {"threads": 288, "registers": 169}, TOO_MANY_RESOURCES, "of 169 registers"),
    ("H100", {"threads": 384, "registers": 168}, NO_ERROR, ""),
    ("H100", {"shared": 48 << 10}, NO_ERROR, ""),
    ("H100", {"shared": (48 << 10) + 1}, BAD_VALUE, "with 49153 bytes of shared memory"),
    ("H100", {"cluster": 8}, NO_ERROR, ""),
    ("H100", {"cluster": 16, "blocks": 16}, BAD_CLUSTER, "without NonPortableClusterSizeAllowed"),
    ("H100", {"cluster": 3}, BAD_CONFIGURATION, "8 blocks in clusters of 3"),
    ("A100", {"cluster": 2}, NOT_SUPPORTED, "on a device that has no clusters"),
    ("A100", {"kernel": "none"}, BAD_FUNCTION, "a function that is no kernel"),
]


@pytest.fixture
def probe() -> Iterator[str]:
    """A kernel that is only asked about."""
    name = next(x for x in _fake.kernels() if "probe" in x)
    yield name
    _fake.know_kernel(name, registers=16, shared=0, most_threads=1024)


@pytest.mark.parametrize(("name", "how", "error", "why"), RULES)
def test_the_runtime_refuses(new_device, probe, name, how, error, why):
    new_device(name)
    # Four partitions of 16384 registers, which a warp takes by the 256.
    registers = how.get("registers", 64)
    _fake.know_kernel(probe, registers=registers, shared=0, most_threads=384)
    how = {"kernel": probe} | {k: x for k, x in how.items() if k != "registers"}
    assert _fake.launch(**how) == error
    assert [_fake.last_error() for _ in range(2)] == [error, NO_ERROR]
    refusals = _fake.take_refusals()
    assert len(refusals) == (error != NO_ERROR) and all(why in x for x in refusals)


def test_the_runtime_refuses_a_stream_of_another_device(new_device):
    stream = _fake.new_stream(new_device())
    new_device()
    with pytest.raises(RuntimeError, match=f"error {BAD_STREAM}: .* a stream of device"):
        _fake.call(**SMALL, pass_="forward", stream=stream)


def test_the_runtime_gives_up_a_graph(new_device):
    """Where what is unsafe is not done beside it."""
    device = new_device()
    stream = _fake.new_stream(device)
    _fake.begin_capture(stream, "global")
    _fake.plant_error("cudaThreadExchangeStreamCaptureMode", ANY)
    with pytest.raises(RuntimeError, match=f"error {CAPTURE_UNSUPPORTED}: .* graph is captured"):
        _fake.call(**LARGE, stream=stream)
    assert not _fake.end_capture(stream)
