# The commands of fusee. `make help` lists them, the README says a line on each.

PYTHON ?= python3
TORCH ?= 2.13.0
OUT ?= build/device

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
BUILD_TOOLS := scikit-build-core==1.1.2 pybind11==3.1.0 cmake==4.4.4 ninja==1.13.2
INSTALL := $(PIP) install --no-build-isolation
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*/*.h)
EMULATOR := $(wildcard tests/emulator/*.h tests/emulator/*.cpp)
FORMATTED := $(NATIVE) $(EMULATOR) $(wildcard tests/emulator/*.cu)
SOURCES := $(NATIVE) CMakeLists.txt pyproject.toml csrc/exports.map \
	$(shell find python/fusee -name '*.py' -o -name '*.pyi' -o -name 'py.typed') \
	$(shell find csrc python/fusee -type d -not -name __pycache__ -not -path python/fusee/lib)

# Empty files that say what .venv holds. A build for tests has all that a build for use has.
HAS_TORCH := $(VENV)/.torch-$(TORCH)
BUILT := $(VENV)/.built
BUILT_FOR_TESTS := $(VENV)/.built-for-tests

.DEFAULT_GOAL := help
.PHONY: help build build-for-tests demo lint test bench wheel device clean
.DELETE_ON_ERROR:

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## +/\t/' | expand -t 18

build: $(BUILT)  ## make .venv with torch, compile fusee and install it there
build-for-tests: $(BUILT_FOR_TESTS)  ## the same with the emulated engine, and CUDA for sm_90 if nvcc is there

$(HAS_TORCH):
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==$(TORCH) $(BUILD_TOOLS)
	touch $@

# CUDA where torch sees a GPU, for that GPU.
$(BUILT): $(SOURCES) | $(HAS_TORCH)
	cuda=$$($(PY) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")') && \
	FUSEE_BUILD_CUDA=$${FUSEE_BUILD_CUDA:-$$([ "$$cuda" ] && echo AUTO || echo OFF)} \
	FUSEE_CUDA_ARCHITECTURES="$${FUSEE_CUDA_ARCHITECTURES:-$${cuda:-90}}" \
	$(INSTALL) -v ".[bench,examples]"
	rm -f $(BUILT_FOR_TESTS)
	touch $@

$(BUILT_FOR_TESTS): $(SOURCES) $(EMULATOR) | $(HAS_TORCH)
	FUSEE_BUILD_EMULATED=ON FUSEE_CUDA_ARCHITECTURES="$${FUSEE_CUDA_ARCHITECTURES:-90}" \
	$(INSTALL) -v ".[test]"
	touch $(BUILT) $@

demo: $(BUILT)  ## train on real digits: softmax, StableMax, the compander, few filters; prints tables, saves pictures
	$(PY) examples/demo.py

lint: $(BUILT_FOR_TESTS)  ## ruff, mypy, clang-format
	status=0; \
	$(PY) -m ruff check . || status=1; \
	$(PY) -m ruff format --check . || status=1; \
	$(PY) -m mypy || status=1; \
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED) || status=1; \
	exit $$status

test: $(BUILT_FOR_TESTS)  ## lint, then every test on every engine that this machine can run
	status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(PY) tests/run.py || status=1; \
	exit $$status

bench: $(BUILT)  ## microbenchmarks against peers and the machine's ceiling; BENCH="-k linear --threads 2"
	$(PY) -m pytest bench $(BENCH)
	@echo "report: build/bench/report.html"

wheel: $(HAS_TORCH)  ## a wheel for elsewhere in build/wheel; CUDA for all architectures if nvcc is there
	$(PIP) wheel -v --no-build-isolation --no-deps -C build-dir=build/for-wheel --wheel-dir build/wheel .

device:  ## everything for a machine with a GPU, no network; results in OUT, STEPS="build suite" for some
	$(PYTHON) tests/device.py --out "$(OUT)" $(STEPS)

clean:  ## remove what was built, and what pip installed of it; .venv stays
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	rm -f $(BUILT) $(BUILT_FOR_TESTS)
