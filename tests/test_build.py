"""The sources as such: what may include what, device code, and the outcomes of a build."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc")
ARCHITECTURES = (80, 90)


# ---- layers ---------------------------------------------------------------------------------


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)


def sources(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in CSRC.glob(pattern)]
    assert found
    return found


def names(path: Path) -> str:
    return str(path.relative_to(CSRC))


@pytest.mark.parametrize("path", sources("**/*.h", "**/*.cpp"), ids=names)
def test_only_the_binding_sees_torch(path):
    torch_headers = [x for x in includes(path) if re.match(r"(torch|ATen|c10|caffe2)\b", x)]
    assert bool(torch_headers) == (path == CSRC / "ops.cpp")


@pytest.mark.parametrize("path", sources("*.h", "losses/*.h"), ids=names)
def test_the_algebra_depends_on_nothing_but_itself(path):
    for name in includes(path):
        assert name == "math.h" or (path.parent / name).is_file(), name


# ---- device code ----------------------------------------------------------------------------

# A row per warp, with every function of the algebra: each lane sweeps its classes, the statistics
# are merged over the lanes, the row is finished, its coefficients are rebased to the lane's pivots.
PROBE = r"""
#include "losses/list.h"

using namespace kd;
using Logits = const float*;

template <class Loss>
__global__ void probe(typename Loss::template Params<float> params, Logits s, Logits t, int classes,
                      int target, const float* upstream, float* loss, float* grad) {
  using Sums = typename Loss::Sums;
  const Scales<float> scales(params);
  Pivots<float> mine = {-infinity<float>(), -infinity<float>()};
  for (int c = threadIdx.x; c < classes; c += 32)
    if (c != target) mine = {max_of(mine.s, s[c]), max_of(mine.t, t[c])};
  const auto exps = [&](int c) {
    return Sums::template exps<float>(scales, s[c] - usable(mine.s), t[c] - usable(mine.t));
  };
  typename Sums::template Stats<float> stats = {};
  for (int c = threadIdx.x; c < classes; c += 32)
    if (c != target) Sums::add(stats, exps(c));
  Pivots<float> row = mine;
  for (int step = 16; step > 0; step /= 2) {
    const auto from = [&](float x) { return __shfl_xor_sync(~0u, x, step); };
    typename Sums::template Stats<float> other;
    for (int k = 0; k < Sums::count; ++k) other.v[k] = from(stats.v[k]);
    Sums::merge(scales, stats, row, other, Pivots<float>{from(row.s), from(row.t)});
  }
  float g[Loss::outputs], value[Loss::outputs];
  for (int k = 0; k < Loss::outputs; ++k) g[k] = upstream[k];
  typename Sums::template Coef<float> coef;
  Loss::finish(params, stats, row, s[target], t[target], g, value, coef);
  Sums::rebase(scales, coef, row, mine);
  for (int c = threadIdx.x; c < classes; c += 32)
    grad[c] = c == target ? coef.y : gradient(exps(c).e, coef.c);
  if (threadIdx.x == 0)
    for (int k = 0; k < Loss::outputs; ++k) loss[k] = value[k];
}

#define PROBE_ONE(name, ...)                                               \
  template __global__ void probe<__VA_ARGS__>(__VA_ARGS__::Params<float>,  \
                                              Logits, Logits, int, int,    \
                                              Logits, float*, float*);
#define PROBE_TWO(name, Loss) PROBE_ONE(name, Loss<false>) PROBE_ONE(name, Loss<true>)
KD_LOSSES(PROBE_ONE, PROBE_TWO)
"""


def kernels_in_list() -> int:
    text = (CSRC / "losses" / "list.h").read_text()
    return len(re.findall(r"^ +KD_LOSS\(", text, re.M)) + 2 * len(
        re.findall(r"^ +KD_LOSS_TWO\(", text, re.M)
    )


def compile_probe(folder: Path, *flags: str) -> str:
    (folder / "probe.cu").write_text(PROBE)
    command = [NVCC, "-std=c++17", "-O3", "-I", str(CSRC), "-Werror", "all-warnings", "probe.cu"]
    done = subprocess.run([*command, *flags], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
def test_every_loss_is_device_code_without_spills(tmp_path):
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
    shown = compile_probe(tmp_path, "-c", "-o", "probe.o", "-Xptxas", "-v", *flags)
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", shown)
    assert len(set(compiled)) == kernels_in_list() * len(ARCHITECTURES)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", shown)
    assert len(memory) >= len(compiled)
    assert set(memory) == {("0", "0")}, shown


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
def test_float_lanes_compute_in_float(tmp_path):
    """One constant that is a double would make a GPU many times slower."""
    compile_probe(tmp_path, "-ptx", "-o", "probe.ptx", f"-arch=sm_{ARCHITECTURES[0]}")
    code = (tmp_path / "probe.ptx").read_text()
    assert "fma.rn.f32" in code and ".f64" not in code


# ---- building -------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    pytest.importorskip("setuptools")
    if not (ROOT / "setup.py").is_file():
        pytest.skip("an installed copy has no setup.py")
    for name in ("kdkernels", "csrc", "triton_kernels"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "triton_kernels"),
        )
    for name in ("setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(checkout: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    script = f"import runpy, sys; {before}\nsys.argv = ['setup.py', '-q', 'build']\n"
    script += "runpy.run_path('setup.py', run_name='__main__')"
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("KDKERNELS_") and k != "PYTHONPATH"
    }
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


NO_TORCH = """
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "environment", "message"),
    [
        ("", {"KDKERNELS_BUILD": "gpu"}, "KDKERNELS_BUILD='gpu'; allowed: auto, cuda, cpu, none"),
        ("", {"KDKERNELS_BUILD": "cpu", "CXX": "no-such-c++"}, "KDKERNELS_BUILD=cpu, but no C"),
        ("", {"CXXFLAGS": "-include no_such_header.h"}, "the C++ build failed"),
        (NO_TORCH, {}, "pip install --no-build-isolation"),
    ],
    ids=["mode", "no-compiler", "compile-error", "no-torch"],
)
def test_a_build_that_cannot_be_says_why(checkout, before, environment, message):
    done = build(checkout, before, **environment)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"KDKERNELS_BUILD": "none"}, "built with KDKERNELS_BUILD=none"),
        ({"CXX": "no-such-c++"}, "no C++ compiler at build time (tried no-such-c++)"),
    ],
    ids=["none", "no-compiler"],
)
def test_a_pure_python_build_works_and_tells_its_reason(checkout, environment, reason):
    done = build(checkout, **environment)
    assert done.returncode == 0, done.stderr
    (package,) = (checkout / "build").glob("lib*/kdkernels")
    assert json.loads((package / "_build.json").read_text())["outcome"] == "none"
    assert not list(package.glob("*.so"))
    # An editable installation answers for submodules that this build lacks: leave its finder out.
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"
        "import kdkernels; print(kdkernels.backends()['cpu'].reason)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        cwd=package.parent,
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == f"not built: {reason}", shown.stderr
