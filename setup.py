"""Builds kdkernels._C (the operators) and kdkernels._host (for tests), or neither.

KDKERNELS_BUILD     auto (default: what the tools here allow) | cuda | cpu (it or an error) | none
KDKERNELS_SANITIZE  a value for -fsanitize
CXX, CXXFLAGS, LDFLAGS and MAX_JOBS have their usual meaning.

The kernels are compiled once per instruction set and one is chosen at run time, so a build does not
depend on the machine it runs on. The outcome goes to kdkernels/_build.json, for backends().
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
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

# A subpackage that lives outside kdkernels/ gets a line here: "kdkernels.name": "folder".
PACKAGES = {"kdkernels": "kdkernels", "kdkernels.triton_kernels": "triton_kernels"}
MODES = ("auto", "cuda", "cpu", "none")

# No -ffast-math: the kernels rely on infinities and NaN.
COMPILE = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno"
COMPILE += " -fno-trapping-math -Wall -Wextra -Wno-psabi"
AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {"baseline": ""} | ({"avx2": AVX2, "avx512": AVX512} if X86 else {})
MACOS = sys.platform == "darwin"
LINK = "-bundle -undefined dynamic_lookup" if MACOS else "-shared"
SANITIZE = os.environ.get("KDKERNELS_SANITIZE", "")
if SANITIZE:
    COMPILE += f" -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize={SANITIZE}"
    LINK += f" -fsanitize={SANITIZE}"
# The stable ABIs of torch 2.10 and Python 3.10; free-threaded Python has none.
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
STABLE_PYTHON = not sysconfig.get_config_var("Py_GIL_DISABLED")
PYTHON_ABI = "-DPy_LIMITED_API=0x030a0000" if STABLE_PYTHON else ""


def find_torch():
    """(folder, version), or None. Nothing here imports torch or looks for a GPU."""
    spec = importlib.util.find_spec("torch")
    found = spec and spec.origin
    return (Path(found).parent, importlib.metadata.version("torch")) if found else None


def find_compiler():
    """(command, first line of --version), or None."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        command = [*shlex.split(name), "--version"]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return shlex.split(name), shown.stdout.splitlines()[0]
    return None


def missing_tool():
    """Why no C++ can be compiled here, or None."""
    if sys.platform == "win32":
        return "the C++ sources do not build on Windows"
    if COMPILER is None:
        return (
            f"no C++ compiler at build time (tried {os.environ.get('CXX') or 'c++, g++, clang++'})"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python headers (Python.h) at build time"
    return None


def decide():
    """(outcome, reason for each backend that is not built, what stops the build or None)."""
    mode = os.environ.get("KDKERNELS_BUILD", "auto")
    cuda = "this version has no CUDA sources"
    if mode not in MODES:
        return "none", {}, f"KDKERNELS_BUILD={mode!r}; allowed: {', '.join(MODES)}"
    if mode == "cuda":
        return "none", {}, f"KDKERNELS_BUILD=cuda, but {cuda}; allowed now: auto, cpu, none"
    if mode == "none":
        return "none", dict.fromkeys(("cuda", "cpu"), "built with KDKERNELS_BUILD=none"), None
    if reason := missing_tool():
        error = f"KDKERNELS_BUILD=cpu, but {reason}" if mode == "cpu" else None
        return "none", {"cuda": cuda, "cpu": reason}, error
    error = None
    if TORCH is None:
        error = (
            "the C++ operators are compiled against your torch, and this environment has none.\n"
            "Install torch, setuptools and ninja, then: pip install --no-build-isolation .\n"
            "(KDKERNELS_BUILD=none installs the pure Python package without them.)"
        )
    elif tuple(map(int, re.findall(r"\d+", TORCH[1])[:2])) < (2, 10):
        error = f"torch >= 2.10 is needed, this environment has {TORCH[1]}"
    return "cpu", {"cuda": cuda}, error


os.chdir(Path(__file__).resolve().parent)
TORCH, COMPILER = find_torch(), find_compiler()
OUTCOME, REASONS, ERROR = decide()


@functools.cache
def check():
    """For the commands that build or install; a source archive needs no torch and no compiler."""
    if ERROR:
        raise SystemExit(f"\nkdkernels cannot be built: {ERROR}\n")
    what = ", ".join(ISAS) if OUTCOME == "cpu" else f"pure Python; {REASONS['cpu']}"
    print(f"kdkernels: building {OUTCOME} ({what})", file=sys.stderr)


def record(package):
    """Writes the build record; without an extension, removes those of an earlier build."""
    built = OUTCOME != "none"
    facts = {
        "outcome": OUTCOME,
        "compiler": COMPILER[1] if built else None,
        "isas": list(ISAS) if built else [],
        "torch": TORCH[1] if built else None,
        "reasons": REASONS,
    }
    (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")
    if not built:
        for stale in [*package.glob("_C.*so"), *package.glob("_host.*so")]:
            stale.unlink()


def link_packages():
    """Lets a checkout be imported as it lies, for packages whose folder is elsewhere."""
    for name, folder in PACKAGES.items():
        link = Path(*name.split("."))
        if link != Path(folder) and not link.exists():
            link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


def compile_modules(folder):
    """Compiles every object once, links both modules. Paths are relative, so __FILE__ is too."""
    torch = TORCH[0]
    cxx = [*COMPILER[0], *shlex.split(os.environ.get("CXXFLAGS", "")), *COMPILE.split()]
    cxx += [f"-DKD_HAVE_{isa.upper()}" for isa in ISAS if isa != "baseline"]
    # pybind11's headers are those inside torch: they fit every Python that this torch runs on.
    python = ["-isystem", sysconfig.get_path("include"), "-isystem", str(torch / "include")]
    python.append(f"-ffile-prefix-map={torch.parent}{os.sep}=")
    steps = []  # (rule, output, inputs, command)

    def compile(name, source, *flags):
        out = str(folder / f"{name}.o")
        command = [*cxx, *flags, "-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
        steps.append(("compile", out, [source], command))
        return out

    def link(name, *inputs):
        out = str(folder / f"{name}.so")
        flags = [*LINK.split(), *shlex.split(os.environ.get("LDFLAGS", ""))]
        steps.append(("link", out, inputs, [*COMPILER[0], *inputs, *flags, "-o", out]))

    # The slow ones first.
    shared = [
        compile(f"kernels_{isa}", "csrc/cpu/kernels.cpp", *flags.split(), f"-DKD_ISA={isa}")
        for isa, flags in ISAS.items()
    ]
    shared.append(compile("dispatch", "csrc/cpu/dispatch.cpp"))
    ops = compile("ops", "csrc/ops.cpp", TORCH_ABI, *PYTHON_ABI.split(), *python)
    host = compile("host", "csrc/host.cpp", *python)
    link("_C", ops, *shared, str(torch / "lib" / f"libtorch_cpu.{'dylib' if MACOS else 'so'}"))
    link("_host", host, *shared)
    folder.mkdir(parents=True, exist_ok=True)
    run(steps, folder / "build.ninja")


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
            record(Path("kdkernels"))
            link_packages()

    def build_extensions(self):
        tag = f"{sys.implementation.cache_tag}-{platform.machine()}"
        folder = Path("build", f"{tag}-sanitize" if SANITIZE else tag)
        compile_modules(folder)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / f"{extension.name.split('.')[1]}.so", target)


class BuildPy(build_py):
    def run(self):
        check()
        super().run()
        record(Path("." if self.editable_mode else self.build_lib, "kdkernels"))


class DistInfo(dist_info):
    """Asked for before pip downloads dependencies: the time to say that torch must come first."""

    def run(self):
        check()
        super().run()


operators = Extension("kdkernels._C", ["csrc/ops.cpp"], py_limited_api=STABLE_PYTHON)
host = Extension("kdkernels._host", ["csrc/host.cpp"])
setup(
    license="Apache-2.0",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    ext_modules=[operators, host] if OUTCOME != "none" else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "dist_info": DistInfo},
)
