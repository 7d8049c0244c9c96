"""The CUDA kernels as nvcc compiled them, without a device: registers, accesses, exponentials.

By default of the build at hand, for sm_90. `make gate` compiles anew, for KDKERNELS_GATE_ARCHS,
each of which may name the types of logits, those of setup.py's KD_TYPES: "80:f32+bf16 100".

    python tests/test_cuda_compiled.py [80 90 100]    a table; with architectures, compiles for them
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "gate"
MAIN = "90"
BUILT = "built"
GATE = re.findall(r"\w+(?::[\w+]+)?", os.environ.get("KDKERNELS_GATE_ARCHS", "80,90,100"))


# ---- facts of the sources -------------------------------------------------------------------


def fact(path: str, pattern: str) -> str:
    """What the pattern's first group is there."""
    return facts(path, pattern)[0]


def facts(path: str, pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, re.sub(r"\s+", " ", (ROOT / path).read_text()))
    assert found, f"{path} has no {pattern}"
    return found.groups()


PLAN, SPLIT = "csrc/cuda/plan.h", "csrc/cuda/split.cuh"


def number(name: str) -> int:
    return int(fact(PLAN, rf"\b{name} = (\d+)"))


NVCC_FLAGS = fact("setup.py", r'NVCC_COMPILE = "([^"]*)"').split()
KD_TYPES = re.findall(r"\w+", fact("setup.py", r"KD_TYPES = \(([^)]*)\)"))
MOST_OUTPUTS = int(fact("csrc/losses/list.h", r"kMostValues = (\d+);"))
MANY_CLASSES, FEW_CLASSES = number("kManyRowsClasses"), number("kFewRowsClasses")  # of a lane
LANES, MIDDLE, MANY_MOST, FEW_MOST = map(
    int, facts(PLAN, r"int lanes : \{(\d+), (\d+), many \? (\d+) : (\d+)\}")
)
# (lanes of a row, classes of a lane), a kernel each; many rows where fewer than so many are kept.
FEW_ROWS = [(x, FEW_CLASSES) for x in (LANES, MIDDLE, FEW_MOST)]
MANY_ROWS = [(x, MANY_CLASSES) for x in sorted({LANES, MIDDLE, MANY_MOST})]
MANY_KEPT = int(fact(PLAN, r"many = x\.kept < (\d+)"))
BY_FEATURES = r"\(kept > 3 \? (\d+) : kept > 2 \? (\d+) : (\d+)\) - "
*KEPT, LESS_OF_FOUR = map(int, facts(PLAN, BY_FEATURES + r"\(vector == 4 \? (\d+) : 0\)"))
MOST_KEPT, LEAST_CLASSES = map(int, facts(PLAN, r"return kept > (\d) \? (\d+) : \(kept > 3"))
*CLUSTER, CLUSTER_LESS, CLUSTER_LEAST = map(
    int, facts(PLAN, BY_FEATURES + r"(\d+) \* less; return classes < (\d+)")
)
STAGED_MOST, STAGED_CROWDED, STAGED = map(
    int, facts(PLAN, r"staged_threads\(int kept\) \{ return kept > (\d) \? (\d+) : (\d+);")
)
MOST_OF_TWO, ONE_BLOCK, TWO_BLOCKS = map(int, facts(PLAN, r"return kept > (\d) \? (\d) : (\d); \}"))
FEWER_CLASSES = int(
    fact("csrc/cuda/cluster.cuh", r"kFewerRegisters \? (\d) : F::wide\) \+ Sums::crowded")
)
FEWER_FROM = int(fact("csrc/cuda/arch.cuh", r"__CUDA_ARCH__ >= (\d+) constexpr bool kFewer")) // 10
CLUSTERS_FROM = int(fact("csrc/cuda/arch.cuh", r"__CUDA_ARCH__ < (\d+) constexpr bool kHas")) // 10
# By rounds, less for those of two.
BY_ROUNDS = r"\(?Sums::refined \? (\d+) : (\d+)\)?"
UNROLL_WIDE, *UNROLLS = map(
    int,
    facts(
        "csrc/cuda/sweeps.cuh", rf"int U = F::wide \? (\d+) : kSkewed \? {BY_ROUNDS} : {BY_ROUNDS};"
    ),
)
UNROLL_SKEWED, UNROLL = UNROLLS[1::-1], UNROLLS[:1:-1]
PART_WIDE, PART = map(int, facts(SPLIT, r"int kPartUnroll = F::wide \? (\d+) : (\d+);"))
REFINED_LESS = int(fact(SPLIT, r"int U = kPartUnroll<F> / (\d+);"))
STRIDED_WIDE, STRIDED = map(
    int, facts("csrc/cuda/strided.cuh", r"int U = F::wide \? (\d+) : (\d+);")
)


# ---- kernels --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sums:
    tensors: int
    exps: int  # of a class, for the sums
    kept: int  # those of them that its gradient needs
    finish: int  # at most, per row, by all losses that sum so; of float kernels
    crowded: bool = False  # as Sums::crowded
    logarithms: int = -1  # of a class, in the second round; -1: there is none
    features: int = 0  # as Sums::held, where it is not the number of exponentials kept
    refining: int = 0  # exponentials of a class in the second round

    @property
    def held(self) -> int:
        return self.features or self.kept

    @property
    def rounds(self) -> int:
        return 1 if self.logarithms < 0 else 2

    def room(self, by_features: list[int]) -> int:
        """Of the classes that a thread has room for with 4, 3 and 2 features."""
        return by_features[4 - min(max(self.held, 2), 4)]


# By Variant, and for a pair whether it is a cross-entropy, for reverse KL whether KL is beside it.
# nkd, the only loss that takes a cross-entropy, has a shorter finish than the others together.
SUMS = {
    "StudentSums<0>": Sums(1, 1, 1, 3),
    "StudentSums<2>": Sums(1, 1, 1, 3, crowded=True),
    "PairSums<0,0>": Sums(2, 2, 2, 11),
    "PairSums<0,1>": Sums(2, 2, 2, 3),
    "PairSums<1,0>": Sums(2, 3, 3, 11),
    "PairSums<1,1>": Sums(2, 4, 3, 3),
    "PairSums<2,0>": Sums(2, 3, 3, 11, crowded=True),
    "PairSums<2,1>": Sums(2, 4, 3, 3, crowded=True),
    "PairSums<3,0>": Sums(2, 2, 2, 11, crowded=True, features=3),
    "PairSums<4,0>": Sums(2, 3, 3, 11, crowded=True, features=4),
    "ReverseSums<0,0>": Sums(2, 2, 1, 11, features=3),
    "ReverseSums<0,1>": Sums(2, 2, 2, 11, features=4),
    "ReverseSums<2,0>": Sums(2, 3, 2, 11, crowded=True, features=4),
    "ReverseSums<2,1>": Sums(2, 3, 3, 11, crowded=True, features=5),
    "TvdSums<0>": Sums(2, 2, 2, 11, logarithms=0, features=3),
    "TvdSums<2>": Sums(2, 3, 3, 15, logarithms=0, crowded=True, features=4),
    "MixtureSums<0>": Sums(2, 2, 2, 11, logarithms=2, crowded=True, features=3),
    "MixtureSums<2>": Sums(2, 3, 3, 15, logarithms=2, crowded=True, features=4),
    # What is kept of a class are its logits, and in the second one its exponential at T = 1.
    "AbSums<0>": Sums(2, 2, 0, 17, logarithms=0, crowded=True, features=5, refining=4),
    "AbSums<2>": Sums(2, 3, 1, 21, logarithms=0, crowded=True, features=6, refining=4),
}
PARTS = ("split_stats", "split_refined", "split_gradient")
TYPES = {"float": "f", "F16": "3F16", "BF16": "4BF16", "double": "d"}
FORMATS = {
    "f32": "Format<float>",
    "f16": "Format<F16>",
    "bf16": "Format<BF16>",
    "mixed": "AnyFormat<float>",
    "f64": "AnyFormat<double>",
}
BYTES = {"float": 4, "F16": 2, "BF16": 2, "double": 8}


@dataclass(frozen=True)
class Kernel:
    name: str
    sums: str = ""
    format: str = ""  # of scale: the types of the gradient and of the factor
    lanes: int = 0  # lanes: of a row
    classes: int = 0  # lanes: of a lane
    skewed: bool = True  # sweeps, cluster: tensors may lie otherwise than the gradient
    arch: str = field(default="", compare=False)
    registers: int = field(default=0, compare=False)
    stack: int = field(default=0, compare=False)
    local: int = field(default=0, compare=False)
    shared: int = field(default=0, compare=False)
    most_threads: int = field(default=0, compare=False)
    ops: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        numbers = [f"{self.lanes}, {self.classes}"] if self.lanes else []
        if self.name in ("sweeps", "cluster"):
            numbers = ["skewed" if self.skewed else "alike"]
        inner = ", ".join(filter(None, [self.sums, self.format, *numbers]))
        return f"{self.name}<{inner}>" if inner else self.name

    def count(self, pattern: str) -> int:
        """Instructions whose whole name fits."""
        return sum(n for op, n in self.ops.items() if re.fullmatch(pattern, op))

    @property
    def wide(self) -> bool:
        return self.format.startswith("Any")

    @property
    def in_double(self) -> bool:
        return "double" in self.format

    @property
    def itemsize(self) -> int:
        return BYTES[re.findall(r"\w+", self.format)[-1]]

    @property
    def vector(self) -> int:
        """Logits of a vector."""
        return {4: 8, 8: 2}[self.itemsize] if self.wide else 16 // self.itemsize

    @property
    def granules(self) -> int:
        """Of a stored vector, at most."""
        return self.vector * self.itemsize // 16

    @property
    def vectors(self) -> int:
        """That a thread has at a time."""
        if self.name == "lanes":
            return self.classes // self.vector
        if self.name == "block":
            less = LESS_OF_FOUR if self.vector == 4 else 0
            classes = SUMS[self.sums].room(KEPT) - less
            return (LEAST_CLASSES if SUMS[self.sums].held > MOST_KEPT else classes) // self.vector
        if self.name == "staged":
            return 1
        if self.name == "cluster":  # that registers hold
            less = FEWER_CLASSES if int(self.arch) >= FEWER_FROM else self.wide
            less += SUMS[self.sums].crowded
            classes = SUMS[self.sums].room(CLUSTER) - CLUSTER_LESS * less
            return max(classes, CLUSTER_LEAST) // self.vector
        if self.name in PARTS:
            each = PART_WIDE if self.wide else PART
            return each // REFINED_LESS if self.name == "split_refined" else each
        unroll = UNROLL_SKEWED if self.skewed else UNROLL
        return UNROLL_WIDE if self.wide else unroll[SUMS[self.sums].rounds - 1]

    @property
    def empty(self) -> bool:
        """Nothing is launched of it on this architecture."""
        return self.name == "cluster" and int(self.arch) < CLUSTERS_FROM

    @property
    def edges(self) -> int:
        """Edge logits that a thread has, of each tensor."""
        return -(-2 * self.vector // self.lanes) if self.name == "lanes" else 1

    @property
    def pairs(self) -> int:
        """Pairs of logits in the code of one sweep."""
        if self.name == "strided":
            return STRIDED_WIDE if self.wide else STRIDED
        return self.vectors * self.vector + (0 if self.name == "cluster" else self.edges)


def expected(source: str) -> set[Kernel]:
    """What is compiled for "80", "80:f32+bf16", or in the build at hand."""
    found = {Kernel("count")}
    forms = [FORMATS[x] for x in types_of(source)]
    for sums, facts in SUMS.items():
        for form in forms:
            parts = PARTS if facts.rounds == 2 else PARTS[::2]
            found |= {Kernel(name, sums, form) for name in ("strided", "sweeps", *parts)}
            if form != "AnyFormat<double>":
                found.add(Kernel("cluster", sums, form))
            if form.startswith("Any"):
                continue
            found |= {Kernel(name, sums, form) for name in ("block", "staged")}
            found |= {Kernel(name, sums, form, skewed=False) for name in ("sweeps", "cluster")}
            few = FEW_ROWS + (MANY_ROWS if facts.held < MANY_KEPT else [])
            found |= {Kernel("lanes", sums, form, *x) for x in few}
    for form in forms:
        data = form.removeprefix("Any").removeprefix("Format<").removesuffix(">")
        factors = ("double",) if form.startswith("Any") else ("float", "double")
        data = "double" if form.startswith("Any") else data
        found |= {Kernel("scale", "", f"{data}, {x}") for x in factors}
    return found


def types_of(source: str) -> list[str]:
    _, _, types = source.partition(":")
    chosen = types.split("+") if types else KD_TYPES
    assert set(chosen) <= set(KD_TYPES), f"KDKERNELS_GATE_ARCHS: {source}; types: {KD_TYPES}"
    return chosen


MANGLED = re.compile(
    r"_ZN2kd\d+\w+?4cuda\d+(?P<name>[a-z_]+)I"
    r"(?:NS0_\d+(?P<sums>(?:Student|Pair|Reverse|Score|Ab)SumsI(?:NS0_\d+(?P<form>\w+)FormE)?"
    r"LNS_7VariantE\dE(?:Lb\dE)?E)E)?"
    r"(?:NS\d_\d+(?P<format>Format|AnyFormat)I(?:NS0_)?(?P<type>f|d|3F16|4BF16)E?EE)?"
    r"(?:(?:NS0_)?(?P<data>f|d|3F16E|4BF16E)(?P<factor>[fd])E)?"
    r"(?:Li(?P<number>\d+)E(?:Li(?P<classes>\d+)E)?)?(?:Lb(?P<skewed>\d)E)?"
)


def kernel(mangled: str) -> Kernel:
    x = MANGLED.match(mangled)
    assert x, f"{mangled} is no kernel's name"
    types = {short: name for name, short in TYPES.items()}
    numbers = ",".join(re.findall(r"(?:Variant|Lb)E?(\d)E", x["sums"] or ""))
    sums = re.sub(r"I.*", f"<{numbers}>", x["sums"] or "")
    sums = sums.replace("Score", x["form"] or "")
    form = f"{x['format']}<{types[x['type']]}>" if x["format"] else ""
    if x["data"]:
        form = f"{types[x['data'].removesuffix('E')]}, {types[x['factor']]}"
    few = (int(x["number"]), int(x["classes"])) if x["name"] == "lanes" else (0, 0)
    return Kernel(x["name"], sums, form, *few, skewed=x["skewed"] != "0")


# ---- tools ----------------------------------------------------------------------------------


def tools() -> dict[str, str]:
    """Triton brings them along, without importing it: that would take seconds."""
    spec = importlib.util.find_spec("triton")
    path = os.environ["PATH"]
    if spec and spec.origin:
        path = f"{Path(spec.origin).parent / 'backends/nvidia/bin'}{os.pathsep}{path}"
    found = {name: shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")}
    if missing := [name for name, at in found.items() if at is None]:
        pytest.skip(f"no {' and no '.join(missing)}: neither the Triton package nor a toolkit")
    return found


def output(*command: str, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{shlex.join(command)}:\n{done.stderr[-4000:]}"
    return done.stdout


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?([A-Z]\w*(?:\.\w+)*)", re.M)


def resources(path: Path) -> dict[str, dict[str, int]]:
    """Of the kernels of a cubin, by their mangled names: fields of Kernel."""
    tool = tools()["cuobjdump"]
    usage = output(tool, "--dump-resource-usage", str(path))
    info = output(tool, "-elf", str(path))
    threads = {}
    for name, text in re.findall(r"^\.nv\.info\.(\w+)\n(.*?)(?=^\.[a-z])", info, re.M | re.S):
        if x := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+0x(\w+)", text):
            threads[name] = int(x[1], 16)
    found = {}
    for name, text in re.findall(r"Function (\w+):\n(.*)", usage):
        if name.endswith("5probeEv"):  # of device.cu, which no call launches
            continue
        has = {key: int(x) for key, x in re.findall(r"([A-Z]+):(\d+)", text)}
        found[name] = {"registers": has["REG"], "stack": has["STACK"], "local": has["LOCAL"]}
        found[name] |= {"shared": has["SHARED"], "most_threads": threads.get(name, 0)}
    return found


def read_cubin(path: Path, arch: str) -> list[Kernel]:
    sass = output(tools()["nvdisasm"], "-c", str(path))
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^//-|\Z)", sass, re.M | re.S))
    found = []
    for name, uses in resources(path).items():
        ops = dict(Counter(INSTRUCTION.findall(code[name])))
        found.append(Kernel(**asdict(kernel(name)) | uses | {"arch": arch, "ops": ops}))
    return found


def cached(key: str, make: Callable[[], list[Kernel]]) -> list[Kernel]:
    """What `make` gives, made once: the workers of a test run wait for each other."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{key}.json"
    kind = key.rpartition("-")[0]
    with (CACHE / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            text = json.dumps([asdict(x) for x in make()])
            for old in CACHE.glob(f"{kind}-*.json"):
                old.unlink()
            part = path.with_suffix(".part")
            part.write_text(text)
            part.replace(path)
    return [Kernel(**x) for x in json.loads(path.read_text())]


def digest(*parts: bytes | str) -> str:
    whole = hashlib.sha256(Path(__file__).read_bytes())
    for x in parts:
        whole.update(b"\0" + (x.encode() if isinstance(x, str) else x))
    return whole.hexdigest()[:16]


def read_cubins(paths: Iterable[Path], arch: str) -> list[Kernel]:
    with ThreadPoolExecutor(2) as pool:
        biggest = sorted(paths, key=lambda x: -x.stat().st_size)
        found = {x: x for each in pool.map(lambda x: read_cubin(x, arch), biggest) for x in each}
    return list(found.values())


def built_module() -> Path:
    record = ROOT / "kdkernels" / "_build.json"
    facts = json.loads(record.read_text()) if record.exists() else {}
    if facts.get("outcome") != "cuda":
        pytest.skip(
            f"built without CUDA: {facts.get('reasons', {}).get('cuda', 'no build record')}"
        )
    if MAIN not in facts["archs"]:
        pytest.skip(f"built for {', '.join(facts['archs'])}, not for {MAIN}")
    (module,) = (ROOT / "kdkernels").glob("_cuda*.so")
    return module


@contextlib.contextmanager
def cubins(module: Path) -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory() as folder:
        output(tools()["cuobjdump"], "-xelf", f".sm_{MAIN}.", str(module), cwd=folder)
        yield list(Path(folder).glob("*.cubin"))


def from_build() -> list[Kernel]:
    module = built_module()
    tools()

    def make() -> list[Kernel]:
        with cubins(module) as paths:
            return read_cubins(paths, MAIN)

    return cached(f"built-{digest(module.read_bytes())}", make)


# ---- compilation ----------------------------------------------------------------------------

STRICT = ["-Werror", "all-warnings", "-Xptxas", "-warn-spills"]


def find_nvcc() -> list[str]:
    home = os.environ.get("CUDA_HOME")
    names = [os.environ.get("NVCC"), home and shlex.quote(f"{home}/bin/nvcc"), "nvcc"]
    for words in (shlex.split(x) for x in names if x):
        if shutil.which(words[0]):
            return words
    pytest.skip("no nvcc")


def known_to(nvcc: list[str], arch: str) -> None:
    if f"compute_{re.sub('[af]', '', arch)}\n" not in output(*nvcc, "--list-gpu-arch"):
        pytest.skip(f"this nvcc does not know {arch}")


def compile_cuda(nvcc: list[str], arch: str, source: str, out: Path, *flags: str) -> None:
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [*nvcc, code, *NVCC_FLAGS, *STRICT, *flags, str(CSRC / "cuda" / source)]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "warning" not in said.lower(), said[-4000:]


def compiled(source: str) -> list[Kernel]:
    arch, types = source.partition(":")[0], types_of(source)
    nvcc = find_nvcc()
    tools()
    known_to(nvcc, arch)
    files = sorted(x for x in CSRC.rglob("*") if x.suffix in (".h", ".cuh", ".cu"))
    text = [x.read_bytes() for x in files if x.parent.name not in ("cpu", "simt")]
    flags = shlex.join([*nvcc, *NVCC_FLAGS, *STRICT])

    def make() -> list[Kernel]:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            paths = [Path(folder, f"{x}.cubin") for x in types]
            jobs = [
                pool.submit(
                    compile_cuda,
                    nvcc,
                    arch,
                    "kernels.cu",
                    path,
                    "-cubin",
                    f"-DKD_TYPES={path.stem}",
                )
                for path in paths
            ]
            for job in jobs:
                job.result()
            return read_cubins(paths, arch)

    appended = os.environ.get("NVCC_APPEND_FLAGS", "")
    key = digest(*text, flags, output(*nvcc, "--version"), appended, *types)
    return cached(f"sm_{arch}-{key}", make)


SOURCES = [
    pytest.param(BUILT, marks=pytest.mark.full),
    *(pytest.param(x, marks=pytest.mark.gate) for x in GATE),
]


@pytest.fixture(scope="session", params=SOURCES)
def kernels(request: pytest.FixtureRequest) -> Iterator[list[Kernel]]:
    yield from_build() if request.param == BUILT else compiled(request.param)


@pytest.mark.gate
def test_device_compiles_without_a_warning(tmp_path):
    nvcc = find_nvcc()
    compile_cuda(nvcc, MAIN, "device.cu", tmp_path / "device.o", "-c")


# ---- checks ---------------------------------------------------------------------------------

# Each gives what is wrong with a kernel, or nothing.
Check = Callable[[Kernel], Iterator[str]]


def check(kernels: list[Kernel], wrong: Check) -> None:
    said = [f"{x} for sm_{x.arch}: {what}" for x in kernels for what in wrong(x)]
    assert not said, f"{len(said)} findings\n" + "\n".join(sorted(said))


def threads_and_blocks(x: Kernel) -> list[tuple[int, int]]:
    """How many blocks of how many threads the planner counts on per multiprocessor."""
    if x.name == "lanes":
        blocks = ONE_BLOCK if SUMS[x.sums].held > MOST_OF_TWO else TWO_BLOCKS
        return [(number("kLanesThreads"), blocks)]
    if x.name == "block":
        return [(number("kBlockThreads"), 2)]
    if x.name == "staged":
        threads = STAGED_CROWDED if SUMS[x.sums].held > STAGED_MOST else STAGED
        return [(threads, 1), (threads // 2, 2)]
    if x.name == "cluster":
        return [(number("kClusterThreads"), 1), (number("kClusterThreads") // 2, 2)]
    if x.name == "strided":
        # Numbers in double take two registers each.
        return [(number("kStridedThreads"), 2 if x.in_double else 4)]
    if x.name in ("count", "scale"):
        return [(number("kCountThreads" if x.name == "count" else "kScaleThreads"), 4)]
    if x.wide:
        twice = x.name == "sweeps" and not x.in_double
        return [(number("kWideThreads"), 2 if twice else 1)]
    return [(number("kLongThreads"), 1)] if x.name == "sweeps" else [(number("kPartThreads"), 2)]


def spared(x: Kernel) -> int:
    """Bytes that may be spilled: a few numbers of a row, where logits of two types that do not lie
    alike meet the powers of AB's second round.
    """
    mixed = x.sums.startswith("AbSums") and x.format == "AnyFormat<float>" and x.skewed
    return 24 if mixed and x.name in ("cluster", "sweeps") else 0


def spills(x: Kernel) -> Iterator[str]:
    if x.stack > spared(x) or x.local:
        yield f"stack {x.stack}, local {x.local}"
    if (n := x.count(r"(LDL|STL)(\..*)?")) > spared(x):
        yield f"{n} accesses of local memory"


def too_large(x: Kernel) -> Iterator[str]:
    """Four partitions of 16384 registers; a warp takes them by the 256."""
    warp = -(-x.registers // 8) * 8 * 32
    fitting = 4 * (16384 // warp)
    for threads, blocks in threads_and_blocks(x):
        if threads > x.most_threads:
            yield f"launched with {threads} threads, compiled for {x.most_threads}"
        if threads * blocks > 32 * fitting:
            yield f"{x.registers} registers, {blocks} x {threads} threads do not fit"


def logits_read(x: Kernel) -> int:
    """How often the code reads a logit of its own, edges and targets, all tensors together."""
    if x.name in ("count", "scale"):
        return 0
    if x.name == "cluster":  # all logits come by the copy engine
        return 0
    if x.name == "strided":  # the row in each round and for the gradient, and the target
        return SUMS[x.sums].tensors * ((1 + SUMS[x.sums].rounds) * x.pairs + 1)
    reads = 1 + SUMS[x.sums].rounds if x.name in ("sweeps", "staged") else 1
    target = 0 if x.name == "split_stats" else 1
    return SUMS[x.sums].tensors * (reads * x.edges + target)


# Loads of what a row or a call has beside its logits, as the compiler unrolls them.
OTHER_LOADS = 48


def unrolled_sums(x: Kernel) -> int:
    """For sm_100, ptxas unrolls loops of thread_sum over numbers in double, 8 at a time, by 4."""
    return 4 * 8 if x.arch == "100" and x.sums and x.name != "split_stats" else 0


def scalar_loads(x: Kernel) -> Iterator[str]:
    most = logits_read(x)
    halves, words = x.count(r"LDG\.E\.[US]16.*"), x.count(r"LDG\.E(\.CONSTANT)?")
    doubles = x.count(r"LDG\.E\.64(\.CONSTANT)?")
    if x.name == "scale":  # its edges, in a loop that may be unrolled
        most = 5
    if halves > most * (2 if x.wide else 1):  # float16 or bfloat16
        yield f"{halves} loads of 2 bytes, {most} logits"
    if words > most + OTHER_LOADS or doubles > most + OTHER_LOADS + unrolled_sums(x):
        yield f"{words} loads of 4 bytes and {doubles} of 8, {most} logits"
    if n := x.count(r"LDG\..*[US]8\b.*"):
        yield f"{n} loads of a byte"


def vector_loads(x: Kernel) -> Iterator[str]:
    """A tensor that lies otherwise is read in a granule more per vector."""
    loads = x.count(r"LDG\.E\..*\b128\b.*")
    if x.name in ("count", "strided"):
        wanted = 0
    elif x.name == "cluster":
        wanted = 0
        # Of the first rows, beside a row, and after one that is longer than registers.
        copies, tensors = x.count(r"UBLKCP\..*"), SUMS[x.sums].tensors
        if copies != 3 * tensors and not x.empty:
            yield f"{copies} bulk copies"
        # For the maxima, for what is kept, and for the rest, of sums and of the gradient.
        reads = tensors * (x.granules if not x.wide else 1) * (x.vectors + 3)
        if (n := x.count(r"LDS\..*\b128\b.*")) < reads and not x.empty:
            yield f"{n} loads of granules, not {reads}"
        if not x.empty and (x.count(r"STAS\..*") == 0 or x.count(r"UCGABAR_ARV.*") == 0):
            yield "no messages, or no barrier of the cluster"
    elif x.name == "scale":
        wanted = max(1, loads)  # a loop that may be unrolled
    elif x.name == "staged":
        wanted = 0
        copies, reads = x.count(r"LDGSTS\..*\b128\b.*"), x.count(r"LDS\..*\b128\b.*")
        # Copies: of the first row; of the next one, beside it, in its gradient's place, the rest.
        if copies < 4 * SUMS[x.sums].tensors or reads < 2 * SUMS[x.sums].tensors:
            yield f"{copies} copies of granules, {reads} loads of them"
        if n := x.count(r"LDGSTS.*") - copies:
            yield f"{n} copies of less than a granule"
    else:
        alike = x.name in ("lanes", "block") or not x.skewed
        granules = x.granules if alike else x.granules + 1
        # Of sweeps, all. split_gradient: before the row is finished, and in its loop.
        sweeps = {"sweeps": 1 + SUMS[x.sums].rounds, "split_gradient": 2}.get(x.name, 1)
        wanted = sweeps * SUMS[x.sums].tensors * x.vectors * granules
    if loads != wanted:
        yield f"{loads} loads of 16 bytes, not {wanted}"


def vector_stores(x: Kernel) -> Iterator[str]:
    stores = x.count(r"STG\.E\..*\b128\b.*")
    halves = x.count(r"STG\.E\.[US]16.*")
    if x.name in ("count", "strided", "split_stats", "split_refined") or x.empty:
        wanted = 0
    elif x.name == "cluster":  # of what is kept, of the rest, and zeros
        wanted = x.granules * (x.vectors + 2)
    elif x.name == "scale":
        wanted = 1
    else:  # gradients, and zeros where a row is ignored
        wanted = x.granules * (x.vectors + 1)
    if stores < wanted or (stores and not wanted):
        yield f"{stores} stores of 16 bytes, not {wanted}"
    # The edges: of the gradient, and of zeros in a loop that is unrolled. Of strided, all classes
    # that it has at a time.
    edges = x.edges if x.sums else 1
    gradient = x.pairs if x.name == "strided" else edges
    most = (gradient + edges + 6) * (2 if x.wide else 1)
    if halves > most:
        yield f"{halves} stores of 2 bytes"


def ex2_model(x: Kernel) -> tuple[int, int]:
    """(exponentials of a pair, most of the row beside), as they stand in the code."""
    s = SUMS[x.sums]
    moves = 1 + x.vectors + 2  # an edge, vectors, merges of the lanes and of the warps
    # Where nothing is kept: for a second round, and for the gradient.
    anew = s.kept + s.refining
    # Where logits are kept, the second round's sums need none of what the gradient does.
    refined = s.refining or s.kept
    again = anew + (refined if s.rounds == 2 else 0)
    if x.name == "lanes":
        return s.exps + s.refining, s.finish
    if x.name == "cluster":
        # What is kept: those of the sums alone. Beside it the rest, once per sweep, an edge, the
        # merges of warps and of blocks, and coefficients moved to a warp's pivots.
        rest = x.vector * (s.exps + again)
        return s.exps + s.refining, rest + 7 * s.exps + anew + s.finish
    if x.name == "block":  # forward and, from saved statistics, backward: two pieces of code
        opening = 2 * s.tensors if s.rounds == 2 else 0
        return s.exps + s.refining + anew, 2 * s.exps + anew + opening + s.finish
    if x.name == "split_gradient":  # merges parts in a loop that is unrolled
        return anew, 13 * s.exps + s.finish
    if x.name == "split_stats":
        # The merge of the warps stands there twice: ptxas has code of its own for the case that
        # the warp, of which the others have returned, has diverged (BRA.DIV). It never runs.
        return s.exps, (moves + 1) * s.exps
    if x.name == "split_refined":
        return refined, 13 * s.exps + s.finish
    if x.name == "strided":
        return s.exps + again, 3 * s.exps + s.finish
    return s.exps + again, moves * s.exps + s.finish


def exponentials(x: Kernel) -> Iterator[str]:
    ex2 = x.count(r"MUFU\.EX2.*")
    if not x.sums or x.in_double or x.empty:
        if ex2:
            yield f"{ex2} exponentials"
        return
    each, row = ex2_model(x)
    # Code, not work: ptxas unrolls a loop over so few classes again, or copies what follows a
    # load into the branches for its type.
    copies = 3 if x.name == "strided" else 1
    if not each * x.pairs <= ex2 <= copies * each * x.pairs + row:
        yield f"{ex2} exponentials, not {each} x {x.pairs} pairs and up to {row}"


def logarithms(x: Kernel) -> Iterator[str]:
    """Of a class in the second round, and half of them again where a gradient refines it anew; the
    finish has those of the target. Other logarithms are not the unit's."""
    found = x.count(r"MUFU\.LG2.*")
    if not x.sums or x.empty or x.in_double or SUMS[x.sums].rounds == 1:
        each, row = 0, 0
    else:
        round_, again = SUMS[x.sums].logarithms, SUMS[x.sums].logarithms // 2
        each = {
            "split_stats": 0,
            "split_gradient": again,
            "lanes": round_,
            "split_refined": round_,
        }.get(x.name, round_ + again)
        each *= x.pairs
        if x.name == "cluster":  # of what registers hold, and of the rest
            each = round_ * x.pairs + (round_ + again) * x.vector
        # block and cluster have two pieces of code that finish
        row = 0 if x.name in PARTS[:2] else 2 * round_
    if not each <= found <= each + row:
        yield f"{found} logarithms, not {each} and up to {row}"


# Of float kernels: losses are summed up in double, and a flag lies among those numbers.
IN_DOUBLE = r"DADD|DSETP\.(NEU|EQ)\.AND"
MOST_IN_DOUBLE = 128  # the sums of few and strided: unrolled over warps, twice


def opcodes(x: Kernel) -> Iterator[str]:
    # For sm_100, ptxas forgets of which kind the pointer to the losses of a row is.
    losses = MOST_OUTPUTS if x.arch == "100" and x.sums and x.name != "split_stats" else 0
    n, stores = x.count(r"(LD|ST|ATOM)(\..*)?"), x.count(r"ST\.E")
    if n > stores or stores > losses:
        yield f"{n} accesses of an address of any kind"
    atomics = {op for op in x.ops if re.match(r"(RED|ATOM[GS]?)\b", op)}
    if others := {op for op in atomics if not re.fullmatch(r"ATOMG?\.E\.INC\..*GPU", op)}:
        yield f"atomics: {', '.join(sorted(others))}"
    if x.in_double:
        return
    double = {
        op: n for op, n in x.ops.items() if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU.*64", op)
    }
    if others := {op for op in double if not re.fullmatch(IN_DOUBLE, op)}:
        yield f"in double: {', '.join(sorted(others))}"
    if sum(double.values()) > MOST_IN_DOUBLE + unrolled_sums(x):
        yield f"{double}"


def test_every_kernel_is_there(kernels, request):
    wanted = expected(request.node.callspec.params["kernels"])
    assert set(map(str, kernels)) == set(map(str, wanted))
    assert len(kernels) == len(wanted)


def test_no_kernel_spills_registers(kernels):
    check(kernels, spills)


def test_as_many_blocks_fit_as_are_planned(kernels):
    check(kernels, too_large)


def test_logits_are_loaded_as_vectors(kernels):
    check(kernels, vector_loads)


def test_scalar_loads_are_edges_and_targets(kernels):
    check(kernels, scalar_loads)


def test_gradients_are_stored_as_vectors(kernels):
    check(kernels, vector_stores)


def test_no_exponential_is_computed_twice(kernels):
    check(kernels, exponentials)


def test_no_logarithm_is_computed_twice(kernels):
    check(kernels, logarithms)


def test_instructions_are_those_expected(kernels):
    check(kernels, opcodes)


# ---- the checks themselves ------------------------------------------------------------------


def test_names_are_read():
    long = "_ZN2kd6scalar4cuda"
    assert kernel(
        f"{long}5lanesINS0_8PairSumsILNS_7VariantE0ELb1EEENS1_6FormatINS0_4BF16EEELi8ELi16EEEvNS1_4ArgsE"
    ) == (Kernel("lanes", "PairSums<0,1>", "Format<BF16>", 8, 16))
    assert kernel(
        f"{long}14split_gradientINS0_11StudentSumsILNS_7VariantE2EEENS1_9AnyFormatIdEEEEvNS1_4ArgsE"
    ) == (Kernel("split_gradient", "StudentSums<2>", "AnyFormat<double>"))
    for skewed in (False, True):
        assert kernel(
            f"{long}6sweepsINS0_8PairSumsILNS_7VariantE1ELb0EEENS1_6FormatIfEELb{skewed:d}EEEvNS1_4ArgsE"
        ) == Kernel("sweeps", "PairSums<1,0>", "Format<float>", skewed=skewed)
    assert kernel(f"{long}5scaleINS0_3F16EfEEvNS1_9ScaleArgsE") == Kernel("scale", "", "F16, float")
    assert kernel(f"{long}5scaleIddEEvNS1_9ScaleArgsE") == Kernel("scale", "", "double, double")
    assert kernel(f"{long}5countILi256EEEvNS1_9CountArgsE") == Kernel("count")


# A good kernel, and what would be wrong with it.
GOOD = Kernel(
    *("sweeps", "PairSums<0,1>", "Format<BF16>"),
    **{"arch": MAIN, "registers": 168, "most_threads": 384},
    ops={
        "LDG.E.128.CONSTANT": 16,
        "LDG.E.U16.CONSTANT": 6,
        "STG.E.EF.128": 3,
        "MUFU.EX2": 81,
        "DADD": 72,
        "ATOMG.E.INC.STRONG.GPU": 1,
    },
)
CHECKS = [
    spills, too_large, vector_loads, scalar_loads, vector_stores, exponentials, logarithms, opcodes
]  # fmt: skip
FAULTS: list[tuple[Check, dict[str, Any]]] = [
    (spills, {"stack": 8}),
    (spills, {"ops": {"LDL.64": 1}}),
    (too_large, {"registers": 169}),
    (too_large, {"most_threads": 352}),
    (vector_loads, {"ops": {"LDG.E.128.CONSTANT": 15}}),
    (scalar_loads, {"ops": {"LDG.E.U16.CONSTANT": 7}}),
    (scalar_loads, {"ops": {"LDG.E.CONSTANT": 99}}),
    (vector_stores, {"ops": {"STG.E.EF.128": 2}}),
    (vector_stores, {"ops": {"STG.E.U16": 16}}),
    (exponentials, {"ops": {"MUFU.EX2": 90}}),
    (exponentials, {"ops": {"MUFU.EX2": 67}}),
    (logarithms, {"ops": {"MUFU.LG2": 1}}),
    (opcodes, {"ops": {"RED.E.ADD.F32.FTZ.RN.STRONG.GPU": 1}}),
    (opcodes, {"ops": {"ATOMG.E.ADD.F64.RN.STRONG.GPU": 1}}),
    (opcodes, {"ops": {"DFMA": 1}}),
    (opcodes, {"ops": {"LD.E": 1}}),
    (opcodes, {"ops": {"ST.E": 1}}),
    (opcodes, {"arch": "100", "ops": {"ST.E": MOST_OUTPUTS + 1}}),
]


@pytest.mark.parametrize(
    ("wrong", "change"), FAULTS, ids=[f"{x.__name__}-{i}" for i, (x, _) in enumerate(FAULTS)]
)
def test_every_check_finds_its_fault(wrong, change):
    for each in CHECKS:
        check([GOOD], each)
    bad = Kernel(**asdict(GOOD) | change | {"ops": GOOD.ops | change.get("ops", {})})
    with pytest.raises(
        AssertionError, match=r"1 findings\n *sweeps<PairSums<0,1>, Format<BF16>, skewed>"
    ):
        check([bad], wrong)


# ---- as a script ----------------------------------------------------------------------------


def main() -> None:
    print("kernel\tarch\tregisters\tshared\tex2\tpairs\tex2 per pair")
    for arch in sys.argv[1:] or [BUILT]:
        found = from_build() if arch == BUILT else compiled(arch)
        for x in sorted(found, key=str):
            ex2 = x.count(r"MUFU\.EX2.*")
            each = ""
            if x.sums and not x.in_double:
                # By the model, which the count must agree with. block has code for
                # either pass, of which a call runs one.
                each = str(SUMS[x.sums].exps if x.name == "block" else ex2_model(x)[0])
                each = "?" if list(exponentials(x)) else each
            pairs = x.pairs if x.sums else ""
            print(x, x.arch, x.registers, x.shared, ex2, pairs, each, sep="\t")


if __name__ == "__main__":
    main()
