# Every target makes its environment first: .venv, from the versions in constraints.txt.
# ENV=current uses the Python at hand instead, installs nothing, and builds the extension in place.
#   make demo | bench            run the example, the benchmark (ARGS=... is passed on)
#   make test                    the tests of what this machine can use
#   make test-full               all tests: of the CUDA kernels too, emulated and as nvcc compiles them
#   make lint | format           style and types; apply the style
#   make gate | check            what nvcc and Triton make of the kernels, for all architectures; lint and gate
#   make asan                    the fuzz tests under AddressSanitizer and UBSan (GCC on Linux)
#   make gpu-check               on a GPU, CUDA kernels: a smoke test, the headline, tests, memory checkers; one table
#   make gpu-check-triton        the same of Triton's, which take minutes to compile
#   make gpu-counters | gpu-sweep | gpu-bench   what Nsight Compute counts; all plans of long rows; the benchmark
# Each of the five ends within 10 minutes after the build, and leaves its results in OUT as they come (CONTRIBUTING.md).
# ENV=current BUILD=no builds nothing: the kdkernels that comes first on PYTHONPATH is used.
#   make versions                what a source build gives under the oldest torch (TORCH=2.14.1: another one)
#   make triton-newest           the Triton kernels as compiled, with clusters, which the pinned Triton has not
#   make prebuilt                the package with its modules in OUT, or in build/prebuilt, for a machine without compilers
#   make mutants                 plant the faults of tests/mutants_list.py: which test catches which
#   make build                   what demo, test and bench use: the CUDA kernels where there is a GPU, no emulation
#   make clean | distclean
PYTHON ?= python3
ARGS ?=
# Of the CUDA kernels, only the architecture at hand, and none where nothing would use them. Their emulation is for tests.
# Without nvidia-smi its device file still says that there is one, of an architecture that is not known.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep GPU)
DEVICE := $(or $(GPU),$(wildcard /dev/nvidia[0-9]*))
ifeq ($(KDKERNELS_CUDA_ARCHS)$(TORCH_CUDA_ARCH_LIST),)
KDKERNELS_CUDA_ARCHS := $(if $(GPU),native,90)
endif
ON_GPU := gpu-check gpu-check-triton gpu-counters gpu-sweep gpu-bench
ifneq ($(filter test-full gate check,$(MAKECMDGOALS)),)
KDKERNELS_SIMT ?= 1
else ifeq ($(DEVICE),)
KDKERNELS_BUILD ?= $(if $(shell command -v c++ || command -v g++ || command -v clang++),cpu,auto)
export KDKERNELS_BUILD
endif
export KDKERNELS_CUDA_ARCHS KDKERNELS_SIMT

BUILT := $(if $(filter no,$(BUILD)),,build)
ifeq ($(BUILT)$(ENV),)
$(error BUILD=no builds nothing and needs ENV=current, a Python that finds kdkernels elsewhere)
endif
ifeq ($(ENV),current)
PY := $(PYTHON)
ifeq ($(BUILT),)
export PYTHONPATH := $(if $(PYTHONPATH),$(PYTHONPATH):)$(CURDIR)
export PYTHONSAFEPATH := 1
else
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
TOOLS :=
PACKAGE :=
else ifeq ($(ENV),)
PY := .venv/bin/python
TOOLS := .venv/.tools
PACKAGE := .venv/.package
else
$(error ENV=$(ENV): the only value is "current")
endif

CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT = $(PY) -c 'import clang_format; clang_format.clang_format()'
# Memory tests suffer from more processes; conftest.py groups tests that share what was costly to compile.
# ENV=current may lack pytest-xdist.
WORKERS = $(if $(shell $(PY) -c 'import xdist; print(1)' 2>/dev/null),-n auto --maxprocesses=8 --dist=loadgroup)

.PHONY: build demo test test-full bench $(ON_GPU) lint format gate check asan mutants versions triton-newest prebuilt clean distclean
.DEFAULT_GOAL := build
.NOTPARALLEL:

.venv/.tools: constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	    sys.exit(f"kdkernels needs Python >= 3.10, $(PYTHON) is {v}" if sys.version_info < (3, 10) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r constraints.txt
	@touch $@

.venv/.package: .venv/.tools pyproject.toml setup.py
	$(PY) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Always run: it takes a second when nothing changed, and knows what did.
build: $(PACKAGE)
	@$(PY) setup.py -q build_ext --inplace

demo: $(BUILT)
	$(PY) examples/digits.py $(ARGS)

bench: $(BUILT)
	$(PY) -m bench $(ARGS)

test: $(BUILT)
	$(PY) -m pytest -q $(WORKERS) $(ARGS)

# REST=1 leaves out what `make test` runs, but for the fuzz tests, which draw more examples here.
test-full: export KDKERNELS_FUZZ_EXAMPLES ?= 400
test-full: $(BUILT)
	$(PY) -m pytest -q -m "not gate$(if $(REST), and (full or fuzz))" $(WORKERS) $(ARGS)

# The budgets are seconds, of 600 after the build.
gpu-check: $(BUILT)
	$(PY) tests/gpu_check.py --budget 500 $(ARGS)

gpu-check-triton: $(BUILT)
	$(PY) tests/gpu_check.py --backend triton --stages tests,sanitizers --tools memcheck --budget 500 $(ARGS)

gpu-counters: $(BUILT)
	$(PY) -m bench.counters --budget 300 $(if $(OUT),--out '$(OUT)') $(ARGS)

# A second one goes on where the first one ended.
gpu-sweep: $(BUILT)
	$(PY) -m bench.sweep --device cuda --budget 240 $(if $(OUT),--out '$(OUT)') $(ARGS)

# And the case under way when the budget ends.
gpu-bench: $(BUILT)
	$(PY) -m bench --device cuda --budget 170 $(if $(OUT),--out '$(OUT)',--keep) $(ARGS)

lint: $(TOOLS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP_FILES)
	$(PY) -m mypy

format: $(TOOLS)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP_FILES)

GATE_TESTS ?= tests/test_cuda_compiled.py tests/test_triton_compiled.py
gate: export KDKERNELS_GATE_ARCHS ?= 80,90,100
gate: build
	$(PY) -m pytest -q -m gate $(GATE_TESTS) $(ARGS)

check: lint gate

# Python itself is not instrumented, so the runtimes are preloaded (libstdc++ too, for exceptions), and
# its own leaks are not looked at. pythonpath puts the instrumented copy of the package before this one;
# --capture=sys lets the report of a crash through.
ASAN_TESTS ?= tests/test_fuzz.py
asan: export KDKERNELS_FUZZ_EXAMPLES ?= 400
asan: $(PACKAGE)
	CXX="$(CXX)" KDKERNELS_BUILD=cpu KDKERNELS_SIMT=0 KDKERNELS_SANITIZE=address,undefined \
	    $(PY) setup.py -q build --build-lib build/asan
	PYTHONPATH="$(CURDIR)/build/asan" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(PY) -m pytest -q --capture=sys -o pythonpath=build/asan $(ASAN_TESTS) $(ARGS)

# Builds in copies of the tree, of what it needs itself. ARGS: see python tests/mutants.py --help.
mutants: $(PACKAGE)
	$(PY) tests/mutants.py $(ARGS)

# An environment beside .venv, with everything as pinned but torch and what torch itself pins.
TORCH ?= 2.10.0
BESIDE := .venv-torch-$(TORCH)
VERSIONS_TESTS := build equivalence autograd compile
VERSIONS_CHOICE := loads or layouts or opcheck or any_upstream or fall_backs_warn or without_the_fast or (every_loss and cpu])
$(BESIDE)/.tools: constraints.txt
	test -x $(BESIDE)/bin/python || $(PYTHON) -m venv $(BESIDE)
	sed -E '/^(torch|triton|setuptools)==/d' constraints.txt > $(BESIDE)/constraints.txt
	$(BESIDE)/bin/python -m pip install --disable-pip-version-check -c $(BESIDE)/constraints.txt \
	    torch==$(TORCH) setuptools==81.0.0 ninja numpy pytest hypothesis tqdm
	@touch $@

# Unless the caller says otherwise, the CUDA module too.
versions: export KDKERNELS_BUILD := $(if $(filter environment,$(origin KDKERNELS_BUILD)),$(KDKERNELS_BUILD),auto)
versions: $(BESIDE)/.tools
	$(BESIDE)/bin/python setup.py -q build --build-lib build/torch-$(TORCH)
	$(BESIDE)/bin/python -m pytest -q -o pythonpath=build/torch-$(TORCH) \
	    $(VERSIONS_TESTS:%=tests/test_%.py) -k '$(VERSIONS_CHOICE)' $(ARGS)

# No release of torch asks for a Triton with clusters yet. This one has no wheel for Python 3.10.
CLUSTERS_TRITON := build/triton-3.9.0
$(CLUSTERS_TRITON)/.installed: $(TOOLS)
	rm -rf $(@D)
	$(PY) -m pip install --disable-pip-version-check --no-deps --target $(@D) triton==$(CLUSTERS_TRITON:build/triton-%=%)
	@touch $@

triton-newest: $(BUILT) $(CLUSTERS_TRITON)/.installed
	PYTHONPATH="$(CURDIR)/$(CLUSTERS_TRITON)$(if $(PYTHONPATH),:$(PYTHONPATH))" \
	    $(PY) -m pytest -q -m "not gate" tests/test_triton_compiled.py $(ARGS)

# For any Python >= 3.10 with torch >= 2.10, and FOR=python3.12 names the Python to build kdkernels._host for (by which
# bench names kernels). To use it from a checkout: PYTHONSAFEPATH=1 PYTHONPATH=build/prebuilt:. python -m bench
prebuilt: export KDKERNELS_PYTHON ?= $(FOR)
prebuilt: $(TOOLS)
	KDKERNELS_BUILD=cuda $(PY) setup.py -q build --build-lib '$(or $(OUT),build/prebuilt)'
	@du -sh '$(or $(OUT),build/prebuilt)'

clean:
	rm -rf build dist *.egg-info kdkernels/_build.json kdkernels/*.so kdkernels/triton_kernels
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f .venv/.package

distclean: clean
	rm -rf .venv .venv-torch-*
