"""The sources as such: what may include what; and the outcomes of a build."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import kdkernels

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
# The only files that see torch, and the only ones that see the GPU's machinery, or stand for it.
BINDING = {CSRC / "ops.cpp", CSRC / "ops_cuda.cpp", CSRC / "binding.h"}
MACHINE = {CSRC / "cuda" / "arch.cuh", CSRC / "cuda" / "device.cu"}
FAKE = {CSRC / "fake" / "runtime.cpp"}
# Everywhere else in csrc/cuda: what the emulation on the host knows, too.
COMMON = {"__global__", "__device__", "__host__", "__forceinline__", "__restrict__"}
COMMON |= {"__launch_bounds__", "__CUDACC__", "__VA_ARGS__", "__builtin_nanf"}


# ---- layers ---------------------------------------------------------------------------------


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), re.MULTILINE)


def sources(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in CSRC.glob(pattern)]
    assert found
    return found


def names(path: Path) -> str:
    return str(path.relative_to(CSRC))


@pytest.mark.parametrize("path", sources("**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh"), ids=names)
def test_only_the_bindings_see_torch(path):
    found = [x for x in includes(path) if re.match(r"(torch|ATen|c10|caffe2)\b|.*binding\.h$", x)]
    assert not found or path in BINDING, found


@pytest.mark.parametrize("path", sources("cuda/*.cu", "cuda/*.cuh"), ids=names)
def test_kernels_reach_the_machine_through_one_header(path):
    """What stands in arch.cuh can be emulated; an intrinsic elsewhere could not be."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    found = set(re.findall(r"\basm\b|\b__\w+|\bcuda\w+", text)) - COMMON
    assert not found or path in MACHINE, found


@pytest.mark.parametrize("path", sources("**/*.h", "**/*.cpp", "**/*.cu", "**/*.cuh"), ids=names)
def test_few_files_see_cuda(path):
    found = [x for x in includes(path) if re.match(r"cuda\w*\.h$", Path(x).name)]
    assert not found or path in MACHINE | FAKE, found


@pytest.mark.parametrize("path", sources("lane.h", "stats.h", "losses/*.h"), ids=names)
def test_the_algebra_depends_on_nothing_but_itself(path):
    for name in includes(path):
        assert (
            name in ("math.h", "new", "type_traits", "utility") or (path.parent / name).is_file()
        ), name


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


OURS = ("KDKERNELS_", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "NVCC", "MAX_JOBS")


def build(
    checkout: Path, before: str = "", command: str = "build", **environment: str
) -> subprocess.CompletedProcess:
    script = f"import runpy, sys; {before}\nsys.argv = ['setup.py', '-q', {command!r}]\n"
    script += "runpy.run_path('setup.py', run_name='__main__')"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
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


@pytest.mark.full
@pytest.mark.parametrize(
    ("before", "environment", "message"),
    [
        ("", {"KDKERNELS_BUILD": "gpu"}, "KDKERNELS_BUILD='gpu'; allowed: auto, cuda, cpu, none"),
        ("", {"KDKERNELS_BUILD": "cpu", "CXX": "no-such-c++"}, "KDKERNELS_BUILD=cpu, but no C"),
        (
            "",
            {"KDKERNELS_BUILD": "cpu", "CXXFLAGS": "-include no_such_header.h"},
            "the C++ build failed",
        ),
        (NO_TORCH, {}, "pip install --no-build-isolation"),
        (
            "",
            {"KDKERNELS_CPU_ISAS": "mmx"},
            "KDKERNELS_CPU_ISAS: got 'mmx'; allowed: baseline",
        ),
        ("", {"KDKERNELS_PYTHON": "/bin/true"}, "KDKERNELS_PYTHON='/bin/true': must be the"),
        ("", {"CXX": "'"}, """CXX="'": must be words"""),
    ],
    ids=["mode", "no-compiler", "compile-error", "no-torch", "isa", "python", "quotes"],
)
def test_a_build_that_cannot_be_says_why(checkout, before, environment, message):
    done = build(checkout, before, **environment)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-2000:]


@pytest.mark.full
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


# ---- building for CUDA ----------------------------------------------------------------------

NVCC = r"""#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release $RELEASE, V$RELEASE.1"; echo "Build r.1" ;;
*--list-gpu-arch*) printf 'compute_%s\n' 75 80 86 90 100 103 ;;
*--dryrun*) echo '#$ _TARGET_DIR_=' >&2; echo '#$ TOP='"${0%/*}"/.. >&2 ;;
*) echo "what does not compile"; exit 1 ;;
esac
"""
# Writes down what it is asked for, and makes the files that are expected of it.
COMPILER = r"""#!/bin/sh
case "$*" in --version) echo "no compiler 1.0"; exit ;; esac
echo "$* " >> "${0%/*}/compiled"
while [ $# -gt 1 ]; do
  case "$1" in -o | -MF) : > "$2" ;; esac
  shift
done
"""
NVIDIA_SMI = r"""#!/bin/sh
if [ -z "$GPUS" ]; then echo "No devices were found"; exit 6; fi
printf '%s\n' $GPUS
"""


def add_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def toolkit(checkout) -> Path:
    """Enough of a CUDA toolkit to be found, by a PATH that holds nothing else."""
    add_program(checkout / "toolkit/bin/nvcc", NVCC)
    for name in ("include/cuda_runtime.h", "lib/libcudart_static.a"):
        path = checkout / "toolkit" / name
        path.parent.mkdir()
        path.touch()
    return checkout / "toolkit"


CXX = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler on PATH")


def decided(checkout: Path, **environment: str) -> tuple[dict, str]:
    """What a build would be: the record, and what is printed; nothing is compiled."""
    path = str(checkout / "toolkit" / "bin")
    environment = {"PATH": path, "CXX": CXX or "", "RELEASE": "13.0", **environment}
    done = build(checkout, command="build_py", **environment)
    if done.returncode:
        return {}, done.stderr
    (record,) = (checkout / "build").glob("lib*/kdkernels/_build.json")
    return json.loads(record.read_text()), done.stderr


DEFAULT = "sm_80, sm_86, sm_90, sm_100, compute_100, baseline"


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(
    ("environment", "printed", "archs", "ptx"),
    [
        ({}, DEFAULT, "80 86 90 100", "100"),
        ({"KDKERNELS_CUDA_ARCHS": " "}, DEFAULT, "80 86 90 100", "100"),
        ({"KDKERNELS_CUDA_ARCHS": "90"}, "sm_90, baseline", "90", ""),
        (
            {"KDKERNELS_CUDA_ARCHS": "80,90a;10.0+PTX 80", "TORCH_CUDA_ARCH_LIST": "8.6"},
            "sm_80, sm_90a, sm_100, compute_100, baseline",
            "80 90a 100",
            "100",
        ),
        (
            {"TORCH_CUDA_ARCH_LIST": "7.0;8.0;9.0+PTX"},
            "sm_80, sm_90, compute_90, baseline",
            "80 90",
            "90",
        ),
        (
            {"KDKERNELS_CUDA_ARCHS": "native", "GPUS": "9.0 8.0 9.0"},
            "sm_80, sm_90, baseline",
            "80 90",
            "",
        ),
    ],
    ids=["default", "blank", "one", "list", "torch", "native"],
)
def test_architectures(checkout, toolkit, environment, printed, archs, ptx):
    add_program(toolkit / "bin" / "nvidia-smi", NVIDIA_SMI)
    record, said = decided(checkout, **environment)
    assert f"kdkernels: building cuda ({printed}" in said
    assert record["outcome"] == "cuda" and record["reasons"] == {}
    assert (record["archs"], record["ptx"]) == (archs.split(), ptx.split())
    assert record["nvcc"] == "Cuda compilation tools, release 13.0, V13.0.1"


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"KDKERNELS_CUDA_ARCHS": "80 95"},
            "KDKERNELS_CUDA_ARCHS='80 95': '95' is not among what this nvcc can compile for: "
            "80, 86, 90, 100, 103;",
        ),
        ({"KDKERNELS_CUDA_ARCHS": "75"}, "KDKERNELS_CUDA_ARCHS='75': '75' is not among"),
        ({"KDKERNELS_CUDA_ARCHS": "hopper"}, "KDKERNELS_CUDA_ARCHS='hopper': 'hopper' is not"),
        ({"TORCH_CUDA_ARCH_LIST": "12.0"}, "TORCH_CUDA_ARCH_LIST='12.0': '12.0' is not among"),
        (
            {"KDKERNELS_CUDA_ARCHS": "native"},
            "KDKERNELS_CUDA_ARCHS=native, but nvidia-smi fails: No devices were found",
        ),
        (
            {"KDKERNELS_CUDA_ARCHS": "native", "GPUS": "12.0"},
            "KDKERNELS_CUDA_ARCHS='native': '12.0' is not among",
        ),
    ],
    ids=["unknown", "too-old", "name", "torch", "no-gpu", "newer-gpu"],
)
def test_architectures_that_cannot_be_are_refused(checkout, toolkit, environment, message):
    add_program(toolkit / "bin" / "nvidia-smi", NVIDIA_SMI)
    record, said = decided(checkout, **environment)
    assert not record and message in said, said


@needs_compiler
@pytest.mark.full
def test_native_needs_nvidia_smi(checkout, toolkit):
    record, said = decided(checkout, KDKERNELS_CUDA_ARCHS="native")
    assert not record and "=native, but there is no nvidia-smi to ask" in said, said


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(
    ("missing", "environment", "reason"),
    [
        ("bin/nvcc", {}, "no nvcc at build time (tried nvcc)"),
        ("bin/nvcc", {"NVCC": "my-nvcc"}, "no nvcc at build time (tried my-nvcc)"),
        ("", {"RELEASE": "12.4"}, "CUDA >= 12.8 is needed, nvcc says: Cuda compilation tools"),
        ("lib/libcudart_static.a", {}, "has no lib/libcudart_static.a"),
        ("", {"TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST='7.5' names nothing from 80"),
    ],
    ids=["no-nvcc", "other-nvcc", "old-nvcc", "no-runtime", "old-gpu"],
)
def test_without_cuda_the_build_degrades_or_is_refused(
    checkout, toolkit, missing, environment, reason
):
    if missing:
        (toolkit / missing).unlink()
    record, said = decided(checkout, **environment)
    assert "kdkernels: building cpu" in said and reason in said, said
    assert record["outcome"] == "cpu" and reason in record["reasons"]["cuda"]
    record, said = decided(checkout, **environment, KDKERNELS_BUILD="cuda")
    assert not record and "KDKERNELS_BUILD=cuda, but " in said and reason in said, said


@needs_compiler
@pytest.mark.full
def test_without_cuda_on_request(checkout, toolkit):
    """And nothing stays behind of a build that had it."""
    decided(checkout)
    (package,) = (checkout / "build").glob("lib*/kdkernels")
    for name in ("_C", "_cuda", "_fake", "_simt"):
        (package / f"{name}.abi3.so").touch()
    record, _ = decided(checkout, KDKERNELS_BUILD="cpu")
    assert record["reasons"] == {"cuda": "built with KDKERNELS_BUILD=cpu"}
    assert [path.name for path in package.glob("*.so")] == ["_C.abi3.so"]


@needs_compiler
@pytest.mark.full
def test_an_nvcc_that_fails_fails_the_build(checkout, toolkit):
    nvcc, path = toolkit / "bin" / "nvcc", os.environ["PATH"]
    done = build(checkout, CUDA_HOME=str(nvcc.parents[1]), RELEASE="13.0", MAX_JOBS="1", PATH=path)
    assert done.returncode != 0 and "the C++ build failed" in done.stderr
    assert "what does not compile" in done.stdout + done.stderr


# ---- what was built -------------------------------------------------------------------------

PACKAGE = Path(kdkernels.__file__).parent
OPERATORS = ("forward", "backward", "reduced", "scale_")
# Loads the CUDA module where torch has no CUDA as well: what it needs of torch's library is in a
# stand-in, which torch would load as this does, out of sight of other modules.
LOAD_CUDA = """
import ctypes, sys, torch
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[1])
import kdkernels, kdkernels._cuda
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(name for name in sys.argv[2:] if has(f"kdkernels::{name}", "CUDA")))
"""
STAND_IN = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'


def test_what_was_built_loads():
    """Tests of kernels that do not load would all be skipped."""
    record = PACKAGE / "_build.json"
    if not record.is_file() or json.loads(record.read_text())["outcome"] == "none":
        pytest.skip("nothing was built")
    assert kdkernels.backends()["cpu"].reason == "compiled kernels are loaded"
    assert "does not load" not in kdkernels.backends()["cuda"].reason


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CUDA modules are Linux'")
def test_the_cuda_module_loads_under_every_torch_with_cuda(tmp_path):
    if importlib.util.find_spec("kdkernels._cuda") is None:
        pytest.skip("built without CUDA")
    (tmp_path / "stand_in.cpp").write_text(STAND_IN)
    library = tmp_path / "libtorch_cuda.so"
    command = [str(CXX), "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "stand_in.cpp"]
    subprocess.run([*command, "-o", str(library)], cwd=tmp_path, check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_CUDA, str(library), *OPERATORS],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == list(OPERATORS), done.stderr


@needs_compiler
@pytest.mark.full
def test_a_wheel_fits_every_python(checkout, tmp_path):
    """With a compiler that does nothing: what is in it, and as what."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        pytest.skip("a free-threaded Python has no stable ABI")
    add_program(checkout / "c++", COMPILER)
    environment = {"CXX": str(checkout / "c++"), "KDKERNELS_BUILD": "cpu"}
    done = build(checkout, **environment)  # leaves its modules behind, for the wheel to ignore
    assert done.returncode == 0, done.stderr
    (package,) = (checkout / "build").glob("lib*/kdkernels")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {x.name for x in package.glob("*.so")} == {"_C.abi3.so", f"_host{suffix}"}
    done = build(checkout, command="bdist_wheel", **environment)
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [x for x in names if x.endswith(".so")] == ["kdkernels/_C.abi3.so"]
    assert {"kdkernels/_build.json", "kdkernels/triton_kernels/kernels.py"} < set(names)


@needs_compiler
@pytest.mark.full
def test_a_build_for_another_python(checkout):
    include = checkout / "include"
    include.mkdir()
    (include / "Python.h").touch()
    add_program(checkout / "c++", COMPILER)
    add_program(
        checkout / "other", f'#!/bin/sh\necho \'["{include}", ".cpython-399-x.so", false]\'\n'
    )
    environment = {"CXX": str(checkout / "c++"), "KDKERNELS_BUILD": "cpu"}
    done = build(checkout, **environment, KDKERNELS_PYTHON=str(checkout / "other"))
    assert done.returncode == 0, done.stderr
    (package,) = (checkout / "build").glob("lib*/kdkernels")
    assert {x.name for x in package.glob("*.so")} == {"_C.abi3.so", "_host.cpython-399-x.so"}
    assert f"-isystem {include} " in (checkout / "compiled").read_text()
    done = build(checkout, **environment, KDKERNELS_PYTHON="no-such-python")
    assert done.returncode != 0 and "KDKERNELS_PYTHON='no-such-python': " in done.stderr


def test_an_old_setuptools_is_refused(checkout):
    before = "sys.modules['setuptools.command.bdist_wheel'] = None"
    done = build(checkout, before)
    assert done.returncode != 0 and "setuptools >= 70.1 is needed, this environment" in done.stderr


def test_the_oldest_versions_are_the_same_everywhere():
    """They are claimed, asked for, tested, and what the stable ABIs are set to."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("an installed copy has no setup.py")
    project, setup, make, readme = (
        (ROOT / name).read_text()
        for name in ("pyproject.toml", "setup.py", "Makefile", "README.md")
    )
    python = re.search(r'requires-python = ">=3\.(\d+)"', project)[1]
    torch = re.search(r'dependencies = \["torch>=2\.(\d+)"\]', project)[1]
    setuptools = re.search(r'requires = \["setuptools>=([\d.]+)"', project)[1]
    assert f'"-DPy_LIMITED_API=0x03{int(python):02x}0000"' in setup
    assert f'"-DTORCH_TARGET_VERSION=0x02{int(torch):02x}000000000000"' in setup
    assert f'self.py_limited_api = "cp3{python}"' in setup and f"< (2, {torch})" in setup
    assert f"setuptools >= {setuptools} is needed" in setup
    assert f"\nTORCH ?= 2.{torch}.0\n" in make
    assert f"Python >= 3.{python} and" in readme and f"torch >= 2.{torch} " in readme
    assert f"'setuptools>={setuptools}'" in readme and f'"setuptools>={setuptools}"' in project


def test_the_version_is_the_same_everywhere():
    if not (ROOT / "setup.py").is_file():
        pytest.skip("an installed copy has no setup.py")
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert kdkernels.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert version in (ROOT / "CHANGELOG.md").read_text()
