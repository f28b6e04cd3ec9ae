# One command for each thing to do here; the first one that needs it does the set-up as well.
# A fresh machine needs Python >= 3.10, a C++ compiler and make.
#
#   PYTHON=...  the Python that makes .venv (default python3)
#   CXX=...     the C++ compiler (default: the first of g++, c++, clang++)
#   SANITIZE_SECONDS=...  how long `make sanitize` runs (default 600)
#   ONEPASS_CUDA_ARCH=...  what the CUDA library is built for, where nvcc is (default 9.0; wheels have more)

PYTHON ?= python3
VENV := .venv
FRAMEWORKS := build/frameworks
RUN := $(VENV)/bin/python
LIBRARY := python/onepass/libonepass_cpu.so
CUDA_LIBRARY := python/onepass/libonepass_cuda.so
SANITIZED := build/sanitize/onepass/libonepass_cpu.so
SANITIZE_SECONDS ?= 600
# The folders too: their times change when a file comes or goes.
CSRC := $(shell find csrc)
CXX_FILES := $(shell find csrc -name generated -prune -o \( -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) -print)

# make's own default for CXX is g++, there or not; setup.py chooses unless a person does.
ifneq ($(origin CXX),default)
export CXX
endif

# One architecture, which is quick; setup.py's own list is for wheels.
ONEPASS_CUDA_ARCH ?= 9.0
export ONEPASS_CUDA_ARCH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-frameworks sanitize bench gpu lint format wheel clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.built ## make .venv, install the pinned tools into it and build the library

demo: $(VENV)/.built ## train a small text model with onepass and with torch.optim, and compare them
	$(RUN) -m onepass demo

test: $(VENV)/.built ## run the tests
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-frameworks: $(FRAMEWORKS)/.tools ## run the tests with transformers, accelerate, Lightning, peft, torchtitan
	PYTHONPATH=python $(FRAMEWORKS)/bin/python -m pytest tests/frameworks -p no:cacheprovider

# LD_PRELOAD: Python is not instrumented, so the sanitizers must be loaded before it starts, and
# libstdc++ with them, because AddressSanitizer looks for the functions that throw when it starts.
# detect_leaks=0: Python and torch keep memory until they exit.
runtime = $(shell $(CXX) -print-file-name=lib$(1).so)
sanitize: $(SANITIZED) ## run the random test under AddressSanitizer and UndefinedBehaviorSanitizer
	LD_PRELOAD="$(call runtime,asan) $(call runtime,ubsan) $(call runtime,stdc++)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	ONEPASS_CPU_LIBRARY=$(abspath $(SANITIZED)) ONEPASS_RANDOM_SECONDS=$(SANITIZE_SECONDS) \
	$(RUN) -m pytest tests/test_random_steps.py -s -p no:cacheprovider

bench: $(VENV)/.built ## measure the steps on this machine
	$(RUN) -m bench
	$(RUN) -m bench.phase

gpu: ## build, check and measure the CUDA kernels on the GPU at hand
	PYTHON="$(PYTHON)" bash bench/gpu.sh

lint: $(VENV)/.built ## check style and types, changing nothing
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN) -m mypy

format: $(VENV)/.built ## rewrite the sources in the style that lint checks
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

wheel: export ONEPASS_CUDA_ARCH =
wheel: $(VENV)/.built ## build the wheel into dist/
	rm -rf build
	$(RUN) -m pip wheel --no-build-isolation --no-deps -w dist .

clean: ## delete .venv and everything that was built
	rm -rf $(VENV) build dist python/*.egg-info $(LIBRARY) $(CUDA_LIBRARY) gpu-out .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.tools: requirements/dev.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make: PYTHON=$(PYTHON): no such program; onepass needs Python 3.10 or later"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: PYTHON=$(PYTHON) is Python %d.%d; onepass needs 3.10 or later: make setup PYTHON=python3.12" % sys.version_info[:2])'
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install -r requirements/dev.txt
	@touch $@

# The frameworks ask for versions of their own, and take gigabytes.
$(FRAMEWORKS)/.tools: requirements/frameworks.txt $(VENV)/.built
	"$(PYTHON)" -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet -r requirements/frameworks.txt
	@touch $@

# Beside the package, whose own library stays as it is.
$(SANITIZED): $(VENV)/.built
	ONEPASS_SANITIZE=1 ONEPASS_CUDA=0 $(RUN) setup.py --quiet build_ext --build-lib build/sanitize --build-temp build/sanitize/objects

# Not stamped as built when there was no compiler to build with: the next call tries again.
$(VENV)/.built: $(VENV)/.tools setup.py pyproject.toml python/onepass/rules/limits.py $(CSRC)
	@rm -f $(LIBRARY) $(CUDA_LIBRARY)
	$(RUN) -m pip install --quiet --no-build-isolation -e .
	@if test -f $(LIBRARY); then touch $@; else echo "make: no C++ compiler found: only the slow reference backend is there"; fi
