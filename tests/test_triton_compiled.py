"""The Triton kernels compiled ahead of time, without a device: registers, accesses, exponentials.

Calls of the operators go the usual way up to the launch, which compiles; see compile_triton.py.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, MAIN_CASES, OPERATORS

from kdkernels import ops

triton = pytest.importorskip("triton")
from kdkernels.triton_kernels import losses  # noqa: E402
from kdkernels.triton_kernels.stats import (  # noqa: E402
    APART,
    AT_ONE,
    PLAIN,
    SMOOTH,
    pair_grad,
    student_grad,
)

pytestmark = pytest.mark.full
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
CUOBJDUMP = shutil.which("cuobjdump", path=os.pathsep.join([str(TOOLS), os.environ["PATH"]]))
HAS_AMD = (TOOLS.parents[1] / "amd").is_dir()
OLD = tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 9)
needs_clusters = pytest.mark.skipif(OLD, reason="this Triton does not compile clusters")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump")

SCRIPT = Path(__file__).with_name("compile_triton.py")
CUDA = ("cuda:80", "cuda:90", "cuda:100")
AMD = "hip:gfx942"
MAIN = "cuda:90"

# ---- jobs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A call of an operator. The sizes decide about the kernel: the planner's tests say how."""

    loss: str = "kd"
    params: tuple[float, ...] = (4.0, 1.0, 0.0, 0.0, 1.0, 4.0)
    op: str = "reduced"
    rows: int = 4096
    classes: int = 50257
    layout: str = "contiguous"
    student: str = "bfloat16"
    teacher: str | None = "bfloat16"
    teacher_layout: str = "contiguous"
    weight: bool = False
    ignore_index: int = -100
    scale: float = 1.0
    normalizer: bool = False
    of_rows: bool = False  # numbers of each row
    compile: bool = True
    sass: bool = False
    plant: tuple[tuple[str, int], ...] = ()  # arguments that the planner never gives
    ctas: int = 1  # of the device's largest cluster

    def __str__(self) -> str:
        dtypes = f"{self.student}/{self.teacher}"
        layouts = f"{self.layout}/{self.teacher_layout}"
        params = ",".join(f"{x:g}" for x in self.params)
        said = [
            f"{self.loss}({params})" + " of rows" * self.of_rows,
            self.op,
            f"{self.rows}x{self.classes}",
            dtypes,
        ]
        if layouts != "contiguous/contiguous":
            said.append(layouts)
        if self.ctas > 1:
            said.append(f"clusters<={self.ctas}")
        return " ".join([*said, *(f"{name}={x}" for name, x in self.plant)])


def served(name: str, params: tuple[float, ...]) -> tuple[Any, list[float]]:
    """The module that serves a call, and the numbers it gets."""
    own = params if ops.LOSSES[name].temperature else (1.0, *params)
    return losses.serving(losses.LOSSES[name], list(own))


def variant(name: str, params: tuple[float, ...]) -> int:
    """Which variant of its kernels a call takes."""
    module, own = served(name, params)
    return module.variant(False, *own)


def variants(name: str) -> dict[int, list[tuple[float, ...]]]:
    """The parameters that an operator is tested with, by the variant that they need; those which
    another loss serves are left to it. Each loss with a cross-entropy, too."""
    tested = dict.fromkeys(case.operator for case in CASES)  # each once
    every = [x for loss, x in tested if loss == name and served(name, x)[0] is losses.LOSSES[name]]
    if ops.LOSSES[name].params[2:3] == ("ce_weight",):
        every += [(*x[:2], 0.7, *x[3:]) for x in every[:1]]
    return {
        kind: found
        for kind in (PLAIN, AT_ONE, SMOOTH, APART + PLAIN, APART + SMOOTH)
        if (found := [x for x in every if variant(name, x) == kind])
    }


PARAMS = {name: variants(name) for name in OPERATORS}


def job_of(name: str, params: tuple[float, ...]) -> Job:
    """Its mean where it has one."""
    facts = ops.LOSSES[name]
    op = "reduced" if facts.outputs == 1 else "forward"
    return Job(name, params, op, teacher="bfloat16" if facts.teacher else None)


VARIANTS = [job_of(name, x[0]) for name, kinds in PARAMS.items() for x in kinds.values()]


def is_light(job: Job) -> bool:
    """Whether its tiles hold nothing but the exponentials of one temperature."""
    module, _ = served(job.loss, job.params)
    return module.grad in (pair_grad, student_grad) and variant(job.loss, job.params) == PLAIN


def is_heavy(job: Job) -> bool:
    """Whether the planner gives it smaller tiles, and no clusters."""
    return getattr(served(job.loss, job.params)[0], "HEAVY", False)


def rounds(job: Job) -> int:
    """Over the classes of a row, before the gradient."""
    return 1 if getattr(served(job.loss, job.params)[0], "refine", None) is None else 2


def largest(job: Job) -> int:
    """Classes, a multiple of the widest vector, for the largest resident block."""
    dtypes = {job.student, job.teacher} - {None}
    if "float64" in dtypes:
        return 2000
    if is_heavy(job):
        return 4000
    return 16000 if dtypes == {"bfloat16"} and is_light(job) else 8000


def regimes(job: Job) -> list[Job]:
    """A call for every kernel at every kind of size."""
    return [
        replace(job, classes=largest(job)),
        replace(job, classes=128),
        job,  # sweeps
        replace(job, rows=4),  # partial, refined and gradient
        replace(job, op="backward"),
    ]


def counted(job: Job) -> list[Job]:
    """The calls whose exponentials are counted."""
    resident, _, sweeps, *_ = regimes(job)
    return [replace(call, sass=True) for call in (resident, sweeps)]


def clusters(job: Job) -> list[Job]:
    """Rows for two CTAs per multiprocessor, and for CTAs that fill one."""
    classes = (50257, 128256) if largest(job) == 8000 else (50257, 151669)
    return [replace(job, classes=x, ctas=16, sass=True) for x in classes]


def other_dtypes() -> Iterator[Job]:
    for loss, kind in (
        ("kd", PLAIN), ("kd", AT_ONE), ("nkd", AT_ONE), ("mixed_kl", PLAIN), ("jsd", PLAIN),
    ):  # fmt: skip
        for pair in (("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")):
            job = Job(loss, PARAMS[loss][kind][0], normalizer=True)
            yield replace(job, student=pair[0], teacher=pair[1])


EVERY_REGIME = [job for variant in VARIANTS for job in regimes(variant)]
OTHERS = [
    *(call for job in other_dtypes() for call in regimes(job)[:4] if call.classes != 128),
    *(replace(call, op="forward", weight=True) for call in regimes(Job())[:4]),
]
SIZES = [(target, job) for target in CUDA for job in EVERY_REGIME] + [(MAIN, x) for x in OTHERS]

# Rows of student and teacher lie alike; those of the gradient, which is dense, only if `stores`.
LAYOUTS = {
    "aligned": (Job(classes=32000), True),
    "unaligned": (Job(classes=50257), True),
    "next_token": (Job(classes=50257, layout="next_token", teacher_layout="next_token"), False),
    "odd_offset": (Job(classes=50257, layout="odd_offset", teacher_layout="odd_offset"), False),
}


def vector_jobs() -> Iterator[tuple[str, Job, bool]]:
    for name, (sweeps, stores) in LAYOUTS.items():
        classes = 16000 if name == "aligned" else 16001
        yield f"{name}-sweeps", sweeps, stores
        yield f"{name}-resident", replace(sweeps, classes=classes), stores
    yield "unaligned-split", Job(rows=4), True
    yield "unaligned-backward", Job(op="backward"), True
    yield "unaligned-float32", Job(student="float32", teacher="float32"), True
    yield "unaligned-mixed", Job(student="float32", teacher="bfloat16"), True


VECTORS = list(vector_jobs())

CLUSTERS = [
    *((MAIN, call) for job in VARIANTS for call in clusters(job) if not is_heavy(job)),
    *(("cuda:100", clusters(job)[0]) for job in VARIANTS if not is_heavy(job)),
    (MAIN, Job(classes=128256, ctas=8)),
    (MAIN, Job(classes=128256, ctas=16)),
    (MAIN, Job(op="forward", weight=True, ctas=16)),
    *((MAIN, Job(student=x, teacher="float32", ctas=16)) for x in ("bfloat16", "float32")),
    *((MAIN, replace(x, ctas=16)) for name, (x, _) in LAYOUTS.items() if name != "unaligned"),
]
CLUSTER_SPILLS = Job(ctas=16, plant=(("warps", 4),))
SCALE = Job(op="scale", classes=32000)
SPILLS = Job(classes=16000, plant=(("BLOCK", 32768), ("warps", 4)))
SCALAR = Job(teacher_layout="odd_offset")

# Calls that differ in numbers only, by the kernel that they share.
SAME: dict[str, list[Job]] = {
    "sweeps": [
        Job(),
        *(Job(classes=x) for x in (30000, 32000, 32017)),
        *(Job(rows=x) for x in (132, 133, 144, 4097)),
        *(Job(ignore_index=x) for x in (0, 1, 16)),
        *(Job(params=(x, 1.0, 0.0, 0.0, 1.0, x)) for x in (1.0, 2.0, 16.0)),
        Job(params=(1.0, 0.5, 0.0, 0.0, 1.0, 1.0)),
        Job(params=(1.0, 1.0, 0.0, 0.0, 0.0, 1.0)),
        Job(params=(1.0, 1.0, 0.5, 0.0, 1.0, 1.0)),
        Job(params=(1.0, 1.0, 1.0, 0.0, 1.0, 1.0)),
        *(Job(scale=x) for x in (16.0, 0.3)),
    ],
    "resident": [
        Job(classes=1000),
        *(Job(classes=1000, rows=x) for x in (1, 2, 16, 17)),
        *(Job(classes=x) for x in (520, 992, 1001)),
        Job(classes=1000, ignore_index=1),
        Job(classes=1000, params=(1.0, 1.0, 16.0, 0.0, 1.0, 1.0), scale=2.0),
    ],
    "split": [
        *(Job(rows=x) for x in (1, 2, 16, 17, 131)),
        *(Job(rows=4, classes=x) for x in (30000, 32000, 250001)),
    ],
    "backward": [
        Job(op="backward"),
        *(Job(op="backward", rows=x) for x in (1, 16, 17)),
        *(Job(op="backward", classes=x) for x in (30000, 32000, 250001)),
        Job(op="backward", params=(1.0, 1.0, 16.0, 0.0, 1.0, 1.0)),
    ],
    **{
        f"{name}, variant {kind}": [job_of(name, x) for x in every]
        for name, kinds in PARAMS.items()
        for kind, every in kinds.items()
        if len(every) > 1
    },
    "scale": [Job(op="scale", rows=x, classes=32000) for x in (1, 3, 4096)],
    "cluster": [
        *(Job(ctas=16, rows=x) for x in (1, 2, 16, 4096)),
        *(Job(ctas=16, classes=x) for x in (32769, 50257, 65520)),
    ],
}
if OLD:
    del SAME["cluster"]
    CLUSTERS.clear()
SAME = {name: [replace(x, compile=False) for x in jobs] for name, jobs in SAME.items()}
DIFFERENT = [
    replace(Job(), compile=False, student=student, teacher=teacher)
    for student, teacher in (
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("float32", "float32"),
        ("float64", "float64"),
    )
]
# Kernels are launched once in each precision, and for a mixture that is another loss at its ends.
OF_ROWS = [
    (replace(call, of_rows=True, ctas=16 if call.classes == 50257 and not OLD else 1), services)
    for job, services in ((Job(), 2), (job_of("jsd", PARAMS["jsd"][PLAIN][0]), 4))
    for call in regimes(job)
]
# And of every loss the compiler takes the code that only these reach.
OF_ROWS_COMPILED = [
    replace(job_of(name, next(iter(PARAMS[name].values()))[0]), classes=100, of_rows=True)
    for name in PARAMS
]
ON_AMD = [Job(), Job(classes=16000)]

ALL = dict.fromkeys(
    [
        *SIZES,
        *((MAIN, call) for job in VARIANTS for call in counted(job)),
        *((MAIN, job) for _, job, _ in VECTORS),
        *((MAIN, job) for job in (SCALE, SPILLS, SCALAR)),
        *((MAIN, job) for job, _ in OF_ROWS),
        *((MAIN, job) for job in OF_ROWS_COMPILED),
        *(() if OLD else (*CLUSTERS, (MAIN, CLUSTER_SPILLS))),
        *((MAIN, job) for jobs in SAME.values() for job in jobs),
        *((MAIN, job) for job in DIFFERENT),
        *((AMD, job) for job in ON_AMD if HAS_AMD),
    ]
)

OF_THE_GATE = {x for x in SIZES if x[0] != MAIN}

# ---- compilation ----------------------------------------------------------------------------

Launches = list[dict[str, Any]]
Compiled = Callable[[str, Job], Launches]


def compile_jobs(jobs: list[tuple[str, Job]], cache: Path) -> list[Launches | str]:
    env = {name: x for name, x in os.environ.items() if not name.startswith("TRITON_")}
    path = [str(SCRIPT.parents[1]), *env.get("PYTHONPATH", "").split(os.pathsep)]
    env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, path))}
    text = json.dumps([(target, asdict(job)) for target, job in jobs])
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=env, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr, done.stderr[-4000:]
    return json.loads(done.stdout)


def asked(items: list[pytest.Item]) -> dict[tuple[str, Job], None]:
    """The jobs that the parameters of tests name."""
    found = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if isinstance(params.get("job"), Job):
            found[params.get("target", MAIN), params["job"]] = None
    return found


@pytest.fixture(scope="session")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compiled]:
    """What a job launches on a target. Two processes compile everything that any test needs; with
    -k, what the chosen ones name, and the rest when it is asked for. So it is with the gate's.
    """
    cache = tmp_path_factory.mktemp("triton")
    chosen = asked(request.session.items)
    if not request.config.option.keyword:
        chosen |= {x: None for x in ALL if x not in OF_THE_GATE}
    jobs = list(chosen)
    halves = jobs[::2], jobs[1::2]
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(compile_jobs, half, cache) for half in halves]
        place = {key: (i, j) for i, half in enumerate(halves) for j, key in enumerate(half)}

        def get(target: str, job: Job) -> Launches:
            if (target, job) not in place:
                place[target, job] = len(results), 0
                results.append(pool.submit(compile_jobs, [(target, job)], cache))
            half, at = place[target, job]
            found = results[half].result()[at]
            assert not isinstance(found, str), f"{job} on {target} does not compile: {found}"
            assert found, f"{job} on {target} launches nothing"
            return found

        yield get


def says(target: str, job: Job, x: dict[str, Any]) -> str:
    size = f"{x['block']}x{x['rows']}, {x['warps']} warps"
    if x["ctas"] > 1:
        size += f" in each of {x['ctas']} CTAs"
    return f"{x['kernel']} {size}, of {job} on {target}"


# ---- registers ------------------------------------------------------------------------------


def check_registers(target: str, job: Job, launches: Launches, spared: int = 0) -> None:
    for x in launches:
        what = says(target, job, x)
        assert x["stack"] <= spared, (
            f"{what} spills: {x['stack']} bytes, {x['registers']} registers"
        )
        used = x["registers"] * x["warps"] * 32
        assert used <= 65536, f"{what} does not fit: {used} registers"


@needs_cuobjdump
@pytest.mark.parametrize(
    ("target", "job"),
    [x if x[0] == MAIN else pytest.param(*x, marks=pytest.mark.gate) for x in SIZES],
    ids=str,
)
def test_no_kernel_spills_registers(compiled, target, job):
    # A few numbers of the row may be spilled, once a row, to keep to the registers of its warps:
    # aekt's most of all, those that label smoothing sums, and in float64 around the subroutine that
    # divides. A tile that does not fit spills hundreds of bytes.
    spared = 32 if OLD else 16
    if OLD and job.loss == "mixed_kl":
        # Its tile keeps up to four numbers of a class, where all others keep three at most, and a
        # row has more of them than any other.
        spared = 64
    check_registers(target, job, compiled(target, job), spared)


@needs_cuobjdump
@pytest.mark.parametrize(("job", "services"), OF_ROWS, ids=str)
def test_numbers_of_each_row_fit_as_well(compiled, job, services):
    launches = compiled(MAIN, job)
    # Several short rows of float64 in a tile spill with the numbers of a call, too.
    check_registers(MAIN, job, launches, 300 if job.classes == 128 else 64)
    assert len({x["key"] for x in launches}) >= services


@needs_cuobjdump
@pytest.mark.parametrize("job", OF_ROWS_COMPILED, ids=str)
def test_every_loss_is_compiled_with_numbers_of_each_row(compiled, job):
    check_registers(MAIN, job, compiled(MAIN, job), 600)


@needs_cuobjdump
def test_a_block_too_large_for_its_warps_counts_as_a_spill(compiled):
    with pytest.raises(AssertionError, match=r"resident 32768x1, 4 warps.* spills"):
        check_registers(MAIN, SPILLS, compiled(MAIN, SPILLS))


def test_the_calls_reach_every_kernel_at_its_largest_sizes(compiled):
    for job in VARIANTS:
        seen = {(x["kernel"], x["block"]) for call in regimes(job) for x in compiled(MAIN, call)}
        block = 4096 if is_heavy(job) else 16384 if is_light(job) else 8192
        assert seen == {
            *(("resident", x) for x in (128, block)),
            ("sweeps", min(block, 8192)),
            ("partial", 4096),
            *([("refined", 4096)] if rounds(job) == 2 else []),
            ("gradient", 4096),
        }, str(job)


# ---- vectors --------------------------------------------------------------------------------

# Accesses of one element, or of a few, that do not grow with the block: targets, weights, the
# statistics and results of a row, and the edges of a row where granules are stored.
FEW = 32
# How often a kernel loads the logits; a second round takes the sweeps one more.
SWEEPS = {"resident": 1, "partial": 1, "refined": 1, "gradient": 1, "sweeps": 2}
WITHOUT_GRADIENT = {"resident": 1, "partial": 1, "refined": 1, "gradient": 0, "sweeps": 1}


ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def granules(x: dict[str, Any], dtype: str) -> int:
    """16-byte accesses of a thread that walk a tile of one tensor once."""
    return x["block"] * x["rows"] * ITEMSIZE[dtype] // (16 * 32 * x["warps"] * x["ctas"])


def check_loads(target: str, job: Job, launches: Launches) -> None:
    for x in launches:
        what = says(target, job, x)
        sweeps = (WITHOUT_GRADIENT if job.op == "forward" else SWEEPS)[x["kernel"]]
        sweeps += x["kernel"] == "sweeps" and rounds(job) == 2
        expected = sweeps * sum(granules(x, y) for y in (job.student, job.teacher) if y)
        # Loads that run ahead stand in front of the loop, too, for each chunk that they are ahead.
        expected *= x["stages"]
        assert x["loads"]["vector"] == expected, f"{what}: {x['loads']}, not {expected} vectors"
        assert x["loads"]["scalar"] <= FEW, f"{what}: {x['loads']}"


def check_stores(target: str, job: Job, launches: Launches) -> None:
    for x in launches:
        what = says(target, job, x)
        reads = job.op == "forward" or x["kernel"] in ("partial", "refined")
        expected = 0 if reads else granules(x, job.student)
        assert x["stores"]["vector"] == expected, f"{what}: {x['stores']}, not {expected} vectors"
        assert x["stores"]["scalar"] <= FEW, f"{what}: {x['stores']}"


@pytest.mark.parametrize(
    ("job", "stores"), [x[1:] for x in VECTORS], ids=[name for name, *_ in VECTORS]
)
def test_logits_are_loaded_as_vectors_wherever_rows_begin(compiled, job, stores):
    launches = compiled(MAIN, job)
    assert {x["aligned"] for x in launches} == {1 + stores}
    check_loads(MAIN, job, launches)
    if stores:
        check_stores(MAIN, job, launches)
    else:  # a gradient that lies otherwise than the logits is written element by element
        assert {x["stores"]["vector"] for x in launches} == {0}


@pytest.mark.parametrize("job", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "target", [x if x == MAIN else pytest.param(x, marks=pytest.mark.gate) for x in CUDA]
)
def test_every_loss_loads_and_stores_vectors(compiled, target, job):
    for call in regimes(job):
        check_loads(target, call, compiled(target, call))
        check_stores(target, call, compiled(target, call))


@pytest.mark.parametrize("kernel", ["sweeps", "resident"])
def test_aligned_rows_and_unaligned_ones_share_a_kernel(compiled, kernel):
    jobs = {name: job for name, job, _ in VECTORS}
    aligned, unaligned = (
        compiled(MAIN, jobs[f"{x}-{kernel}"])[0]["key"] for x in ("aligned", "unaligned")
    )
    assert aligned == unaligned


def test_scaling_a_gradient_moves_vectors(compiled):
    (x,) = compiled(MAIN, SCALE)
    assert x["loads"]["scalar"] <= FEW and x["loads"]["vector"] == granules(x, SCALE.student), x[
        "loads"
    ]
    check_stores(MAIN, SCALE, [x])


def test_logits_that_lie_differently_count_as_scalar_loads(compiled):
    launches = compiled(MAIN, SCALAR)
    assert launches[0]["aligned"] == 0
    with pytest.raises(AssertionError, match=r"not \d+ vectors"):
        check_loads(MAIN, SCALAR, launches)
    with pytest.raises(AssertionError, match=r"not \d+ vectors"):
        check_stores(MAIN, SCALAR, launches)


# ---- exponentials ---------------------------------------------------------------------------

# Per class, for the sums and, in a second sweep, for the gradient. The sums take one exponential
# of each tensor and, at two temperatures, the student's at T = 1 and for a cross-entropy (nkd) the
# teacher's, which the gradient does without. A resident tile keeps those of the sums. So a thread
# with n classes has n * sums of them, in the sweeps n * (sums + gradient), with a second round
# n * 2 more, and PER_ROW at most. Where the temperatures differ there are as many. A second round
# that works on logits has exponentials of its own.
EXPONENTIALS = {
    (case.operator[0], kind): case.facts.exponentials[
        min(kind % APART, len(case.facts.exponentials) - 1)
    ]
    for case in MAIN_CASES
    for kind in PARAMS[case.operator[0]]
}
REFINING = {case.operator[0]: case.facts.refining for case in MAIN_CASES}
# Those of a row, in every thread: pivots that move, the finish, an edge of the gradient.
PER_ROW = 16


def check_exponentials(target: str, job: Job, x: dict[str, Any]) -> None:
    sums, gradient = EXPONENTIALS[job.loss, variant(job.loss, job.params)]
    again = x["kernel"] == "sweeps" and job.op != "forward"
    per_class = sums + (gradient if again else 0)
    if x["kernel"] == "sweeps" and rounds(job) == 2 and not REFINING[job.loss]:
        per_class += 2
    per_class += REFINING[job.loss]
    expected = per_class * x["block"] * x["rows"] // (32 * x["warps"] * x["ctas"])
    what = f"{says(target, job, x)}: {x['ex2']} exponentials, {expected} for the classes"
    least = expected - 2 if REFINING[job.loss] else expected  # of 160, ptxas makes do with 158
    assert least <= x["ex2"] <= expected + PER_ROW, what


@needs_cuobjdump
@pytest.mark.parametrize("job", VARIANTS, ids=str)
def test_no_exponential_is_computed_twice(compiled, job):
    for call in counted(job):
        (x,) = compiled(MAIN, call)
        check_exponentials(MAIN, call, x)


@needs_cuobjdump
def test_exponentials_of_a_second_temperature_exceed_the_budget_of_one(compiled):
    job = counted(Job("kd", PARAMS["kd"][AT_ONE][0]))[0]
    (x,) = compiled(MAIN, job)
    with pytest.raises(AssertionError, match="exponentials"):
        check_exponentials(MAIN, replace(job, params=PARAMS["kd"][PLAIN][0]), x)


# ---- clusters -------------------------------------------------------------------------------


# Sums of a loss that are not of exponentials alone: for most a mean.
BESIDE_EXPONENTIALS = {
    "reverse_kl": 2,  # and the classes that the teacher lacks
    "mixed_kl": 3,
    **dict.fromkeys(("jsd", "skew_kl", "skew_reverse_kl", "tvd", "ab"), 0),
}


def check_cluster(target: str, job: Job, launches: Launches) -> None:
    """Registers for as many CTAs as share a multiprocessor, and what they exchange."""
    # A number of the row. Where a thread has 32 classes, also up to 24 of its 64 exponentials: the
    # finish of a row, most of all aekt's with its variants, needs their registers.
    (x,) = launches
    many = x["block"] == 32 * 32 * x["warps"] * x["ctas"]
    smooth = variant(job.loss, job.params) % APART == SMOOTH
    check_registers(target, job, launches, spared=96 if many else 48 if smooth else 8)
    what = says(target, job, x)
    used = x["registers"] * x["warps"] * 32 * (2 if x["warps"] == 8 else 1)
    assert used <= 65536, f"{what}: {used} registers of a multiprocessor"


@needs_clusters
@needs_cuobjdump
@pytest.mark.parametrize(("target", "job"), CLUSTERS, ids=str)
def test_clusters_fit_as_planned(compiled, target, job):
    (x,) = launches = compiled(target, job)
    small = largest(job) == 16000
    own = x["block"] // x["ctas"]
    assert (x["kernel"], own, x["warps"]) in (
        ("resident", 8192 if small else 4096, 8),
        ("resident", 16384 if small else 8192, 16),
    )
    check_cluster(target, job, launches)
    assert x["cluster"] == [x["ctas"]], says(target, job, x)
    # The maxima are one reduction, four sums another one; each further sum is one of its own: those
    # of exponentials, of what else a loss sums, and for label smoothing two. A second round is one
    # more. Each passes a barrier when its numbers are written, and one when they have been read. A
    # tile that is not stored as it was loaded passes one more.
    which = variant(job.loss, job.params)
    beside = BESIDE_EXPONENTIALS.get(job.loss, 1)
    sums = EXPONENTIALS[job.loss, which][0] + beside + (2 if which % APART == SMOOTH else 0)
    reductions = 2 + max(sums - 4, 0) + (rounds(job) == 2)
    barriers = 2 * reductions + (x["aligned"] != 2)
    assert (x["remote"], x["barriers"]) == (reductions, barriers), says(target, job, x)


@needs_clusters
@needs_cuobjdump
@pytest.mark.parametrize(("target", "job"), CLUSTERS, ids=str)
def test_clusters_move_vectors_and_compute_nothing_twice(compiled, target, job):
    (x,) = launches = compiled(target, job)
    check_loads(target, job, launches)
    if x["aligned"] == 2:
        check_stores(target, job, launches)
    if job.sass:
        check_exponentials(target, job, x)


@needs_clusters
@needs_cuobjdump
def test_a_share_too_large_for_its_warps_counts_as_a_spill(compiled):
    with pytest.raises(
        AssertionError, match=r"resident 65536x1, 4 warps in each of 8 CTAs.*spills"
    ):
        check_cluster(MAIN, CLUSTER_SPILLS, compiled(MAIN, CLUSTER_SPILLS))


def test_without_clusters_no_kernel_knows_of_them(compiled):
    for x in compiled(MAIN, Job()) + compiled(MAIN, Job(rows=4)):
        assert (x["ctas"], x["cluster"], x["barriers"], x["remote"]) == (1, [], 0, 0)


# ---- variants -------------------------------------------------------------------------------


def keys(compiled: Compiled, jobs: list[Job]) -> dict[str, set[str]]:
    """What Triton tells compiled variants apart by, for every kernel that is launched."""
    found: dict[str, set[str]] = {}
    for job in jobs:
        for x in compiled(MAIN, job):
            found.setdefault(x["kernel"], set()).add(x["key"])
    return found


@pytest.mark.parametrize("name", SAME)
def test_other_numbers_do_not_recompile(compiled, name):
    found = keys(compiled, SAME[name])
    kernels = {"split": {"partial", "gradient"}, "backward": {"gradient"}}
    kernels |= {"resident": {"resident"}, "cluster": {"resident"}, "scale": {"scale_in_place"}}
    assert found.keys() == kernels.get(name, {"sweeps"})
    for kernel, variants in found.items():
        assert len(variants) == 1, f"{kernel}: {len(variants)} variants of {name}"


def test_other_dtypes_do_recompile(compiled):
    assert len(keys(compiled, DIFFERENT)["sweeps"]) == len(DIFFERENT)


# ---- AMD ------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_AMD, reason="Triton without its AMD backend")
@pytest.mark.parametrize("job", ON_AMD, ids=["sweeps", "resident"])
def test_the_kernels_compile_for_amd(compiled, request, job):
    (x,) = compiled(AMD, job)
    assert x["kernel"] == request.node.callspec.id
    assert x["bytes"] > 0
