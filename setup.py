"""Builds kdkernels._C (the CPU's operators), kdkernels._cuda and, but for wheels, kdkernels._host.

KDKERNELS_BUILD       auto (default: what the tools here allow) | cuda | cpu (it or an error) | none
KDKERNELS_CUDA_ARCHS  such as "80 90a 120+PTX", or native: the GPUs here. Without it,
                      TORCH_CUDA_ARCH_LIST, and without both all that this nvcc has of ARCHS
KDKERNELS_CPU_ISAS    such as "avx2": of the instruction sets below, only these and the baseline
KDKERNELS_SIMT        1: kdkernels._simt too, the CUDA kernels emulated on the host, and with nvcc
                      kdkernels._fake, their launches on a runtime that checks them (for tests)
KDKERNELS_SANITIZE    a value for -fsanitize
KDKERNELS_PYTHON      another Python, such as python3.12, to build for (see make prebuilt)
NVCC, CUDA_HOME, CXX, CXXFLAGS, LDFLAGS and MAX_JOBS have their usual meaning.

The CPU kernels are compiled once per instruction set and one is chosen at run time, so a build does
not depend on the machine it runs on. The outcome goes to kdkernels/_build.json, for backends().
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    raise SystemExit(
        "\nkdkernels cannot be built: setuptools >= 70.1 is needed, this environment has "
        f"{setuptools.__version__}\n"
    ) from None

# A subpackage that lives outside kdkernels/ gets a line here: "kdkernels.name": "folder".
PACKAGES = {
    "kdkernels": "kdkernels",
    "kdkernels.losses": "kdkernels/losses",
    "kdkernels.triton_kernels": "triton_kernels",
}
MODES = ("auto", "cuda", "cpu", "none")

# No -ffast-math: the kernels rely on infinities and NaN.
COMPILE = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno"
COMPILE += " -fno-trapping-math -Wall -Wextra -Wno-psabi"
AVX2 = "-mavx2 -mfma -mf16c -mbmi2 -mprfchw"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"baseline": ""} | ({"avx2": AVX2, "avx512": AVX512} if X86 else {})
WANTED_ISAS = os.environ.get("KDKERNELS_CPU_ISAS", "").split() or list(ISAS)
BAD_ISAS = [
    f"KDKERNELS_CPU_ISAS: got {name!r}; allowed: {', '.join(ISAS)}"
    for name in WANTED_ISAS
    if name not in ISAS
]
ISAS = {name: flags for name, flags in ISAS.items() if name in ("baseline", *WANTED_ISAS)}
MACOS = sys.platform == "darwin"
LINK = "-bundle -undefined dynamic_lookup" if MACOS else "-shared -Wl,--no-as-needed"
SANITIZE = os.environ.get("KDKERNELS_SANITIZE", "")
if SANITIZE:
    COMPILE += f" -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize={SANITIZE}"
    LINK += f" -fsanitize={SANITIZE}"
# The stable ABIs of torch 2.10 and Python 3.10. The rest is for one Python and stays out of wheels.
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
PYTHON_ABI = "-DPy_LIMITED_API=0x030a0000"
STABLE = ("_C", "_cuda")

NVCC_OLDEST = (12, 8)  # the first that knows sm_100 and sm_120
ARCH_OLDEST = 80  # the first with bfloat16
ARCHS = ("80", "86", "89", "90", "100", "120")
NVCC_COMPILE = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden"
# torch has a CUDA runtime too, and puts it where every module looks for symbols first. With this
# one's symbols hidden, all of its calls stay inside.
CUDART_LINK = "-Wl,--exclude-libs,ALL -ldl -lrt -lpthread"
KERNELS = "csrc/cuda/kernels.cu"
# The kernels are compiled once for each set of logit types; the slowest first.
KD_TYPES = ("mixed", "f64", "f32", "f16", "bf16")
SIMT_SOURCES = ("barriers", "clocks", "context", "global_memory", "mbarriers", "schedule", "shadow")
SIMT_SOURCES += ("shared_memory", "state", "faults", "module")
FAKE_SOURCES = ("runtime", "module")
SIMT = os.environ.get("KDKERNELS_SIMT", "0") not in ("", "0")


def find_torch():
    """(folder, version), or None. Nothing here imports torch or looks for a GPU."""
    spec = importlib.util.find_spec("torch")
    found = spec and spec.origin
    return (Path(found).parent, importlib.metadata.version("torch")) if found else None


@dataclass(frozen=True)
class Python:
    include: str
    suffix: str  # of modules for this Python only
    free_threaded: bool  # which has no stable ABI


def find_python():
    """The Python to build for."""
    command = os.environ.get("KDKERNELS_PYTHON") or sys.executable
    script = "import json, sysconfig as s; v = s.get_config_vars(); print(json.dumps("
    script += "[s.get_path('include'), v['EXT_SUFFIX'], bool(v.get('Py_GIL_DISABLED'))]))"
    try:
        return Python(*json.loads(output([command, "-c", script])))
    except (OSError, subprocess.CalledProcessError, ValueError, TypeError):
        raise SystemExit(
            f"\nkdkernels cannot be built: KDKERNELS_PYTHON={command!r}: must be the command of a "
            "Python that runs here, such as python3.12\n"
        ) from None


def words_of(variable):
    """The value of a variable of the environment that holds a command or flags."""
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        why = f"{variable}={value!r}: must be words as for a shell: {error}"
        raise SystemExit(f"\nkdkernels cannot be built: {why}\n") from None


def find_compiler():
    """(command, first line of --version), or None."""
    own = words_of("CXX")
    for command in [own] if own else [["c++"], ["g++"], ["clang++"]]:
        try:
            shown = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        if lines := shown.stdout.splitlines():
            return command, lines[0]
    return None


def missing_tool():
    """Why no C++ can be compiled here, or None."""
    if sys.platform == "win32":
        return "the C++ sources do not build on Windows"
    if COMPILER is None:
        return (
            f"no C++ compiler at build time (tried {os.environ.get('CXX') or 'c++, g++, clang++'})"
        )
    if not Path(PYTHON.include, "Python.h").exists():
        return "no Python headers (Python.h) at build time"
    return None


class NoCuda(Exception):
    """Why there is no CUDA backend in this build."""


class BadArchs(Exception):
    """A value in the environment that no build can follow."""


@dataclass(frozen=True)
class Cuda:
    nvcc: list[str]
    version: str
    include: Path
    runtime: Path
    archs: list[str]  # "80", "90a", ...
    ptx: list[str]  # those of them that are also there as PTX

    @functools.cached_property
    def names(self):
        return [*(f"sm_{x}" for x in self.archs), *(f"compute_{x}" for x in self.ptx)]

    def gencode(self):
        return [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in self.names]


def find_nvcc():
    """(command, the line of its version)."""
    tried = ["nvcc"]
    if os.environ.get("CUDA_HOME"):
        tried.insert(0, shlex.quote(str(Path(os.environ["CUDA_HOME"], "bin", "nvcc"))))
    if words_of("NVCC"):
        tried = [os.environ["NVCC"]]
    for name in tried:
        try:
            shown = output([*shlex.split(name), "--version"])
        except (OSError, subprocess.CalledProcessError):
            continue
        version = next((line for line in shown.splitlines() if "release" in line), "unknown")
        return shlex.split(name), version
    raise NoCuda(f"no nvcc at build time (tried {', '.join(tried)})")


def output(command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def find_cuda():
    """The toolkit and what to compile for."""
    nvcc, version = find_nvcc()
    release = re.search(r"release (\d+)\.(\d+)", version)
    if not release or tuple(map(int, release.groups())) < NVCC_OLDEST:
        oldest = ".".join(map(str, NVCC_OLDEST))
        raise NoCuda(f"CUDA >= {oldest} is needed, {nvcc[-1]} says: {version}")
    listed = re.findall(r"compute_(\d+)", output([*nvcc, "--list-gpu-arch"]))
    archs, ptx = choose_archs([x for x in listed if int(x) >= ARCH_OLDEST])
    # nvcc may be a script or a link: where its toolkit lies is what it would tell its compilers.
    dry = [*nvcc, "--dryrun", "-x", "cu", "-c", "any.cu"]
    shown = subprocess.run(dry, capture_output=True, text=True).stderr
    facts = dict(re.findall(r"^#\$ (\w+)=(.*)$", shown, re.MULTILINE))
    top = Path(facts.get("TOP", "")).resolve()
    tops = [top / facts.get("_TARGET_DIR_", ""), top]

    def find(*names):
        for path in (folder / name for folder in tops for name in names):
            if path.exists():
                return path
        raise NoCuda(f"the CUDA toolkit of {nvcc[-1]}, {top}, has no {names[0]}")

    include = find("include/cuda_runtime.h").parent
    runtime = find("lib/libcudart_static.a", "lib64/libcudart_static.a")
    return Cuda(nvcc, version, include, runtime, archs, ptx)


def choose_archs(listed):
    """(architectures, those also as PTX), of `listed`, which this nvcc knows."""
    for variable in ("KDKERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        value = os.environ.get(variable, "")
        words = re.split(r"[,;\s]+", value.strip(" ,;"))
        if words != [""]:
            break
    else:
        archs = sorted((x for x in ARCHS if x in listed), key=int)
        return archs, archs[-1:]
    if words == ["native"]:
        words = native_archs(variable)
    archs, ptx = [], []
    for word in words:
        found = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        arch = found and found[1] + found[2]
        # The list for torch itself may reach further back than these kernels do.
        if found and variable == "TORCH_CUDA_ARCH_LIST" and int(arch) < ARCH_OLDEST:
            continue
        if arch not in listed:
            raise BadArchs(
                f"{variable}={os.environ[variable]!r}: {word!r} is not among what this nvcc can "
                f"compile for: {', '.join(listed)}; with a or f after it, or +PTX; or native"
            )
        archs.append(arch + found[3])
        ptx += [archs[-1]] if found[4] else []
    if not archs:
        raise NoCuda(f"{variable}={os.environ[variable]!r} names nothing from {ARCH_OLDEST} on")
    return list(dict.fromkeys(archs)), list(dict.fromkeys(ptx))


def native_archs(variable):
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = sorted(set(output(command).split()))
    except OSError:
        raise BadArchs(f"{variable}=native, but there is no nvidia-smi to ask") from None
    except subprocess.CalledProcessError as error:
        said = (error.stdout + error.stderr).strip()
        raise BadArchs(f"{variable}=native, but nvidia-smi fails: {said}") from None
    if not found:
        raise BadArchs(f"{variable}=native, but nvidia-smi lists no GPU")
    return found


def decide():
    """(outcome, Cuda or None, reason for each backend not built, what stops the build or None)."""
    mode = os.environ.get("KDKERNELS_BUILD") or "auto"
    if mode not in MODES:
        return "none", None, {}, f"KDKERNELS_BUILD={mode!r}; allowed: {', '.join(MODES)}"
    if BAD_ISAS:
        return "none", None, {}, BAD_ISAS[0]
    if mode == "none":
        return "none", None, dict.fromkeys(("cuda", "cpu"), "built with KDKERNELS_BUILD=none"), None
    if reason := missing_tool():
        error = f"KDKERNELS_BUILD={mode}, but {reason}" if mode != "auto" else None
        return "none", None, dict.fromkeys(("cuda", "cpu"), reason), error
    error = None
    if TORCH is None:
        error = (
            "the C++ operators are compiled against your torch, and this environment has none.\n"
            "pip install torch 'setuptools>=70.1' ninja\n"
            "pip install --no-build-isolation .\n"
            "(KDKERNELS_BUILD=none installs the pure Python package without them.)"
        )
    elif tuple(map(int, re.findall(r"\d+", TORCH[1])[:2])) < (2, 10):
        error = f"torch >= 2.10 is needed, this environment has {TORCH[1]}"
    if mode == "cpu":
        return "cpu", None, {"cuda": "built with KDKERNELS_BUILD=cpu"}, error
    try:
        return "cuda", find_cuda(), {}, error
    except NoCuda as reason:
        if mode == "cuda":
            error = error or f"KDKERNELS_BUILD=cuda, but {reason}"
        return "cpu", None, {"cuda": str(reason)}, error
    except BadArchs as reason:
        return "cpu", None, {"cuda": str(reason)}, error or str(reason)


os.chdir(Path(__file__).resolve().parent)
PYTHON, TORCH, COMPILER = find_python(), find_torch(), find_compiler()
OUTCOME, CUDA, REASONS, ERROR = decide()


@functools.cache
def check():
    """For the commands that build or install; a source archive needs no torch and no compiler."""
    if ERROR:
        raise SystemExit(f"\nkdkernels cannot be built: {ERROR}\n")
    if OUTCOME == "none":
        what = f"pure Python; {REASONS['cpu']}"
    else:
        what = ", ".join([*(CUDA.names if CUDA else ()), *ISAS])
        what += "" if CUDA else f"; CUDA: {REASONS['cuda']}"
    print(f"kdkernels: building {OUTCOME} ({what})", file=sys.stderr)


def name_of(module):
    return module.split(".")[-1]


def record(package, extensions):
    """Writes the build record, and removes the extensions that only an earlier build had."""
    built = OUTCOME != "none"
    facts = {
        "outcome": OUTCOME,
        "compiler": COMPILER[1] if built else None,
        "isas": list(ISAS) if built else [],
        "torch": TORCH[1] if built else None,
        "nvcc": CUDA.version if CUDA else None,
        "archs": CUDA.archs if CUDA else [],
        "ptx": CUDA.ptx if CUDA else [],
        "reasons": REASONS,
    }
    (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")
    kept = {name_of(extension.name) for extension in extensions}
    for path in package.glob("*.so"):
        if path.name.split(".")[0] not in kept:
            path.unlink()


def link_packages():
    """Lets a checkout be imported as it lies, for packages whose folder is elsewhere."""
    for name, folder in PACKAGES.items():
        link = Path(*name.split("."))
        if link != Path(folder) and not link.exists():
            link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


def compile_modules(folder, names):
    """Compiles every object once, links the modules. Paths are relative, so __FILE__ is too.

    Returns the folder of the modules: they and the objects that see torch or Python are apart, and
    the kernels, which do not, are compiled once for all versions.
    """
    torch = TORCH[0]
    local = f"{PYTHON.suffix.split('.')[1]}-torch-{TORCH[1]}"
    cxx = [*COMPILER[0], *words_of("CXXFLAGS"), *COMPILE.split()]
    # pybind11's headers are those inside torch: they fit every Python that this torch runs on.
    python = ["-isystem", PYTHON.include, "-isystem", str(torch / "include")]
    python.append(f"-ffile-prefix-map={torch.parent}{os.sep}=")
    steps = []  # (rule, output, inputs, command)

    def compile(name, source, *flags):
        out = str(folder / f"{name}.o")
        command = [*cxx, *flags, "-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
        steps.append(("compile", out, [source], command))
        return out

    def compile_cuda(name, source, *flags):
        out = str(folder / f"{name}.o")
        command = [*CUDA.nvcc, *CUDA.gencode(), *ccbin(), *NVCC_COMPILE.split(), *flags]
        command += ["-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
        steps.append(("compile", out, [source], command))
        return out

    def link(name, *inputs, libraries=(), flags=()):
        out = str(folder / local / f"{name}.so")
        flags = [*flags, *words_of("LDFLAGS")]
        command = [*COMPILER[0], *LINK.split(), *inputs, *libraries, *flags, "-o", out]
        steps.append(("link", out, inputs, command))
        return out

    # The slow ones first.
    if CUDA:
        threads = nvcc_threads()
        cuda = [compile_cuda(f"cuda_{x}", KERNELS, f"-DKD_TYPES={x}", *threads) for x in KD_TYPES]
    shared = [
        compile(f"kernels_{isa}", "csrc/cpu/kernels.cpp", *flags.split(), f"-DKD_ISA={isa}")
        for isa, flags in ISAS.items()
    ]
    if SIMT:
        # The same source, without the toolkit.
        flags = ["-x", "c++", "-O1"]
        simt = [compile(f"simt_{x}", KERNELS, *flags, f"-DKD_TYPES={x}") for x in KD_TYPES]
        simt += [compile(f"{local}/simt_{x}", f"csrc/simt/{x}.cpp", *python) for x in SIMT_SOURCES]
    binding = [TORCH_ABI, *([] if PYTHON.free_threaded else [PYTHON_ABI]), *python]
    if CUDA:
        flags = ["-DUSE_CUDA", "-I", str(CUDA.include)]  # -isystem /usr/include would break g++
        ops_cuda = compile(f"{local}/ops_cuda", "csrc/ops_cuda.cpp", *binding, *flags)
        cuda.append(compile_cuda("device", "csrc/cuda/device.cu"))
        if SIMT:
            fake = [
                compile(f"{local}/fake_{x}", f"csrc/fake/{x}.cpp", *python, "-I", str(CUDA.include))
                for x in FAKE_SOURCES
            ]
    have = [f"-DKD_HAVE_{isa.upper()}" for isa in ISAS if isa != "baseline"]
    shared.append(compile("dispatch", "csrc/cpu/dispatch.cpp", *have))
    ops = [compile(f"{local}/ops", "csrc/ops.cpp", *binding), compile("pool", "csrc/cpu/pool.cpp")]
    torch_cpu = str(torch / "lib" / f"libtorch_cpu.{'dylib' if MACOS else 'so'}")
    link("_C", *ops, *shared, libraries=[torch_cpu])
    if "_host" in names:
        link("_host", compile(f"{local}/host", "csrc/host.cpp", *python), *shared)
    if CUDA:
        # Only a name: the module asks for torch's CUDA library whether this torch has one or not,
        # and then loads under every torch that has. backend.py leaves it alone under the others.
        empty = ["-x", "c++", os.devnull, "-Wl,-soname,libtorch_cuda.so"]
        torch_cuda = link("libtorch_cuda", flags=empty)
        libraries = [torch_cpu, str(CUDA.runtime), *CUDART_LINK.split()]
        link("_cuda", ops_cuda, *cuda, torch_cuda, libraries=libraries)
        if SIMT:
            link("_fake", *fake, *cuda)
    if SIMT:
        link("_simt", *simt)
    (folder / local).mkdir(parents=True, exist_ok=True)
    run(steps, folder / "build.ninja")
    return folder / local


def ccbin():
    """The compiler of the user's choice, without what stands before it (ccache) or after."""
    if not os.environ.get("CXX"):
        return []
    return ["-ccbin", [word for word in COMPILER[0] if not word.startswith("-")][-1]]


def nvcc_threads():
    """Several architectures at a time, where there are more cores than compilations of kernels."""
    cores = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = min(len(CUDA.names), cores // len(KD_TYPES))
    return [f"--threads={threads}"] if threads > 1 else []


def run(steps, script):
    """With ninja: in parallel, and only what changed. Without: all, one after the other."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    ninja = shutil.which("ninja", path=path)
    if ninja:
        lines = [f"builddir = {script.parent}", "rule link", "  command = $line"]
        lines += ["rule compile", "  command = $line", "  depfile = $out.d", "  deps = gcc"]
        for rule, out, inputs, command in steps:
            inputs = " ".join(re.sub(r"([$ :])", r"$\1", name) for name in inputs)
            lines += [f"build {out}: {rule} {inputs}", f"  description = {rule} {out}"]
            lines.append(f"  line = {shlex.join(command).replace('$', '$$')}")
        script.write_text("\n".join(lines) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        commands = [[ninja, "-f", str(script), *(["-j", jobs] if jobs else [])]]
    else:
        print("kdkernels: no ninja, compiling one file after the other", file=sys.stderr)
        commands = [command for *_, command in steps]
    for command in commands:
        if subprocess.run(command).returncode:
            raise SystemExit("\nkdkernels: the C++ build failed, see the messages above\n")


class BuildExt(build_ext):
    def run(self):
        check()
        super().run()
        if self.inplace:
            record(Path("kdkernels"), self.extensions)
            link_packages()

    def get_ext_filename(self, fullname):
        stable = name_of(fullname) in STABLE and not PYTHON.free_threaded
        return fullname.replace(".", os.sep) + (".abi3.so" if stable else PYTHON.suffix)

    def build_extensions(self):
        folder = Path("build", platform.machine() + ("-sanitize" if SANITIZE else ""))
        folder = compile_modules(folder, [name_of(x.name) for x in self.extensions])
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{name_of(extension.name)}.so", target)


class BuildPy(build_py):
    def run(self):
        check()
        super().run()
        package = Path("." if self.editable_mode else self.build_lib, "kdkernels")
        record(package, self.distribution.ext_modules)


class DistInfo(dist_info):
    """Asked for before pip downloads dependencies: the time to say that torch must come first."""

    def run(self):
        check()
        super().run()


class BdistWheel(bdist_wheel):
    """Fits every Python from 3.10 on, so what does not is left out (free-threaded: this one)."""

    def finalize_options(self):
        if not PYTHON.free_threaded:
            self.py_limited_api = "cp310"
        super().finalize_options()

    def run(self):
        modules = self.distribution.ext_modules
        self.distribution.ext_modules = [x for x in modules if name_of(x.name) in STABLE]
        super().run()


EXTENSIONS = []
if OUTCOME != "none":
    EXTENSIONS += [
        Extension("kdkernels._C", ["csrc/ops.cpp"]),
        Extension("kdkernels._host", ["csrc/host.cpp"]),
    ]
    if CUDA:
        EXTENSIONS.append(Extension("kdkernels._cuda", ["csrc/ops_cuda.cpp"]))
    if SIMT:
        EXTENSIONS.append(Extension("kdkernels._simt", ["csrc/simt/module.cpp"]))
        if CUDA:
            EXTENSIONS.append(Extension("kdkernels._fake", ["csrc/fake/module.cpp"]))
setup(
    license="Apache-2.0",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    ext_modules=EXTENSIONS,
    cmdclass={
        "bdist_wheel": BdistWheel,
        "build_ext": BuildExt,
        "build_py": BuildPy,
        "dist_info": DistInfo,
    },
)
