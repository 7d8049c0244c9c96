# Every target makes its environment first: .venv, from the versions in constraints.txt.
# ENV=current uses the Python at hand instead, installs nothing, and builds the extension in place.
#   make demo | test | bench     run the example, the tests, the benchmark (ARGS=... is passed on)
#   make lint | format           style and types; apply the style
#   make gate | check            what nvcc makes of the CUDA kernels, for all architectures; lint and gate
#   make asan                    the fuzz tests under AddressSanitizer and UBSan (GCC on Linux)
#   make gpu-check               what needs a GPU: tests and memory checker, one table (ARGS go to pytest)
#   make gpu-bench               the benchmark of a GPU; both leave results in OUT, or in bench/results/<GPU>
#   make versions                what a source build gives under the oldest torch (TORCH=2.14.1: another one)
#   make prebuilt                the package with its modules in OUT, or in build/prebuilt, for a machine without compilers
#   make build | clean | distclean
PYTHON ?= python3
ARGS ?=
# Of the CUDA kernels, only the architecture at hand, and none where nothing would use them. Their emulation is for tests.
# Without nvidia-smi its device file still says that there is one, of an architecture that is not known.
GPU := $(shell nvidia-smi -L 2>/dev/null | grep GPU)
DEVICE := $(or $(GPU),$(wildcard /dev/nvidia[0-9]*))
ifeq ($(KDKERNELS_CUDA_ARCHS),)
KDKERNELS_CUDA_ARCHS := $(if $(GPU),native,90)
endif
ifneq ($(filter-out demo bench asan gpu-check gpu-bench versions prebuilt,$(or $(MAKECMDGOALS),build)),)
KDKERNELS_SIMT ?= 1
else ifeq ($(DEVICE),)
KDKERNELS_BUILD ?= $(if $(shell command -v c++ g++ clang++),cpu,auto)
export KDKERNELS_BUILD
endif
export KDKERNELS_CUDA_ARCHS KDKERNELS_SIMT

ifeq ($(ENV),current)
PY := $(PYTHON)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
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
# Memory tests suffer from more processes; the tests of a file share what was costly to compile.
# ENV=current may lack pytest-xdist.
WORKERS = $(if $(shell $(PY) -c 'import xdist; print(1)' 2>/dev/null),-n auto --maxprocesses=8 --dist=loadfile)

.PHONY: build demo test bench gpu-check gpu-bench lint format gate check asan versions prebuilt clean distclean
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

demo: build
	$(PY) examples/digits.py $(ARGS)

bench: build
	$(PY) -m bench $(ARGS)

test: build
	$(PY) -m pytest -q $(WORKERS) $(ARGS)

gpu-check: build
	$(PY) tests/gpu_check.py $(ARGS)

# With gpu-check and the build 10 minutes on 16 cores, and the case under way when the budget ends.
# make -k gpu-check gpu-bench: also when a check fails.
gpu-bench: build
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

gate: export KDKERNELS_GATE_ARCHS ?= 80,90,100
gate: build
	$(PY) -m pytest -q -m gate tests/test_cuda_compiled.py $(ARGS)

check: lint gate

# Python itself is not instrumented, so the runtimes are preloaded (libstdc++ too, for exceptions), and
# its own leaks are not looked at. pythonpath puts the instrumented copy of the package before this one;
# --capture=sys lets the report of a crash through.
ASAN_TESTS ?= tests/test_fuzz.py
asan: $(PACKAGE)
	CXX="$(CXX)" KDKERNELS_BUILD=cpu KDKERNELS_SIMT=0 KDKERNELS_SANITIZE=address,undefined \
	    $(PY) setup.py -q build --build-lib build/asan
	PYTHONPATH="$(CURDIR)/build/asan" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    $(PY) -m pytest -q --capture=sys -o pythonpath=build/asan $(ASAN_TESTS) $(ARGS)

# An environment beside .venv, with everything as pinned but torch and what torch itself pins. The three numbers of classes
# together bring every pair of types to every loss.
TORCH ?= 2.10.0
BESIDE := .venv-torch-$(TORCH)
VERSIONS_TESTS := build equivalence autograd compile
VERSIONS_CHOICE := loads or (test_shapes and (-17] or -32] or -100])) or opcheck or any_upstream or (every_loss and cpu])
$(BESIDE)/.tools: constraints.txt
	test -x $(BESIDE)/bin/python || $(PYTHON) -m venv $(BESIDE)
	sed -E '/^(torch|triton|setuptools)==/d' constraints.txt > $(BESIDE)/constraints.txt
	$(BESIDE)/bin/python -m pip install --disable-pip-version-check -c $(BESIDE)/constraints.txt \
	    torch==$(TORCH) setuptools==81.0.0 ninja numpy pytest hypothesis tqdm
	@touch $@

versions: KDKERNELS_BUILD := auto
versions: $(BESIDE)/.tools
	$(BESIDE)/bin/python setup.py -q build --build-lib build/torch-$(TORCH)
	$(BESIDE)/bin/python -m pytest -q -o pythonpath=build/torch-$(TORCH) \
	    $(VERSIONS_TESTS:%=tests/test_%.py) -k '$(VERSIONS_CHOICE)' $(ARGS)

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
