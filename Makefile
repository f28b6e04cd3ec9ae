# One target per task. Targets that need .venv and the compiled libraries build them first.
# Requirements: Python >= 3.10, a C++ compiler and make.
#
#   PYTHON=...  the Python that creates .venv (default python3)
#   CXX=...     the C++ compiler (default: the first of g++, c++, clang++)
#   SANITIZE_SECONDS=...  duration of `make sanitize` in seconds (default 600)
#   ONEPASS_CUDA_ARCH=...  architectures of the CUDA library (default 9.0; wheels have more)
#   KERNELS=...  all: every CUDA kernel; sample: those whose machine code the tests read, in a third
#                of the time. A GPU does not run a sample. Default: all if nvidia-smi lists a GPU.
#   REPOSITORY=...  the address of the repository, for `make docs` and `make wheel` (default: git's remote origin)

PYTHON ?= python3
REPOSITORY ?= $(shell git remote get-url origin 2>/dev/null)
VENV := .venv
FRAMEWORKS := build/frameworks
DOCS_ENV := build/docs
RELEASE_ENV := build/release-tools
COPY := build/release
RUN := $(VENV)/bin/python
LIBRARY := python/onepass/libonepass_cpu.so
CUDA_LIBRARY := python/onepass/libonepass_cuda.so
SANITIZED := build/sanitize/onepass/libonepass_cpu.so
SANITIZE_SECONDS ?= 600
# With folders, because their modification times change when a file is added or removed.
CSRC := $(shell find csrc)
BUILD_INPUTS := setup.py pyproject.toml python/onepass/rules/limits.py $(CSRC)
CXX_FILES := $(shell find csrc -name generated -prune -o \( -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) -print)

# make sets CXX to g++ by default, even if there is no g++. Export CXX only if the user set it;
# otherwise setup.py selects the compiler.
ifneq ($(origin CXX),default)
export CXX
endif

# One architecture, because that builds fast; the longer default of setup.py is for wheels.
ONEPASS_CUDA_ARCH ?= 9.0
export ONEPASS_CUDA_ARCH
KERNELS ?= $(if $(shell nvidia-smi -L 2>/dev/null),all,sample)

# Some machines forbid Python to cache compiled modules. Each process that imports torch would then
# compile its modules again, because pip does not either (see .tools), which takes 10 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-frameworks sanitize bench gpu lint format docs sdist wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.built ## create .venv, install the pinned tools into it and build the libraries

demo: $(VENV)/.built ## train a small text model with onepass and with torch.optim, and compare them
	$(RUN) -m onepass demo

test: $(VENV)/.built ## run the tests
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: export ONEPASS_THOROUGH = 1
test-all: KERNELS = all
test-all: test ## run also the tests that take long: about half an hour on two cores

test-frameworks: $(FRAMEWORKS)/.tools ## run the tests with transformers, accelerate, Lightning, peft, torchtitan
	PYTHONPATH=$(abspath python) $(FRAMEWORKS)/bin/python -m pytest tests/frameworks -p no:cacheprovider
	PYTHONPATH=$(abspath python) $(FRAMEWORKS)/bin/python -m pytest tests/test_readme.py -k frameworks -p no:cacheprovider

# LD_PRELOAD: Python is not instrumented, so the sanitizers must be loaded before it starts, and
# libstdc++ with them, because AddressSanitizer looks for the functions that throw when it starts.
# detect_leaks=0: Python and torch keep memory until they exit.
runtime = $(shell $(CXX) -print-file-name=lib$(1).so)
sanitize: $(SANITIZED) ## run the random test under AddressSanitizer and UndefinedBehaviorSanitizer
	LD_PRELOAD="$(call runtime,asan) $(call runtime,ubsan) $(call runtime,stdc++)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	ONEPASS_CPU_LIBRARY=$(abspath $(SANITIZED)) ONEPASS_RANDOM_SECONDS=$(SANITIZE_SECONDS) \
	$(RUN) -m pytest tests/test_random_steps.py -s -p no:cacheprovider

bench: $(VENV)/.built ## measure optimizer steps on this machine
	$(RUN) -m bench
	$(RUN) -m bench.phase

gpu: ## build, test and measure the CUDA kernels on the GPU of this machine
	PYTHON="$(PYTHON)" bash bench/gpu.sh

lint: $(VENV)/.built ## check style and types, without changing files
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(RUN) -m mypy

format: $(VENV)/.built ## rewrite the sources in the style that lint checks
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

docs: $(DOCS_ENV)/.tools ## build the documentation site into build/site
	REPOSITORY=$(REPOSITORY) NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/python -m mkdocs build --strict --quiet

# From a copy of the checkout, because the URLs of the project and the links of the README become those of REPOSITORY.
sdist: $(VENV)/.tools ## build the source distribution into dist/
	rm -rf $(COPY) dist
	mkdir -p $(COPY) dist
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents --target-directory=$(COPY)
	$(RUN) docs/links.py $(COPY) $(REPOSITORY)
	cd $(COPY) && $(abspath $(RUN)) -c "from setuptools.build_meta import build_sdist; build_sdist('$(abspath dist)')" >$(abspath $(COPY)).log

# auditwheel names the oldest glibc that the wheel runs with; torch brings its own libraries.
wheel: export ONEPASS_CUDA_ARCH =
wheel: sdist $(RELEASE_ENV)/.tools ## build wheel and source distribution into dist/ and check them
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps -w $(COPY)/wheel dist/onepass-*.tar.gz
	PATH="$(abspath $(RELEASE_ENV))/bin:$$PATH" auditwheel repair --exclude libtorch_cpu.so --exclude libtorch_cuda.so -w dist $(COPY)/wheel/*.whl
	$(RELEASE_ENV)/bin/python -m twine check --strict dist/*

clean: ## delete .venv and all build outputs
	rm -rf $(VENV) build dist python/*.egg-info $(LIBRARY) $(CUDA_LIBRARY) gpu-out .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# pip 22 and later build editable packages as pyproject.toml says. --no-compile: Python compiles the
# modules that are imported when they are imported; most are not.
$(VENV)/.torch: requirements/build.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "make: PYTHON must be Python 3.10 or later; $(PYTHON) is not on PATH"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: PYTHON=$(PYTHON) is Python %d.%d; onepass needs 3.10 or later: make setup PYTHON=python3.12" % sys.version_info[:2])'
	"$(PYTHON)" -m venv $(VENV)
	@$(RUN) -c 'import pip; raise SystemExit(int(pip.__version__.split(".")[0]) < 22)' || $(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --no-compile -r requirements/build.txt
	@touch $@

$(VENV)/.tools: $(VENV)/.torch requirements/dev.txt
	$(RUN) -m pip install --quiet --no-compile -r requirements/dev.txt
	@touch $@

# A separate environment, because the frameworks need other versions and take gigabytes.
$(FRAMEWORKS)/.tools: requirements/frameworks.txt $(VENV)/.built
	"$(PYTHON)" -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet -r requirements/frameworks.txt
	@touch $@

$(DOCS_ENV)/.tools: requirements/docs.txt
	"$(PYTHON)" -m venv $(DOCS_ENV)
	$(DOCS_ENV)/bin/python -m pip install --quiet -r requirements/docs.txt
	@touch $@

$(RELEASE_ENV)/.tools: requirements/release.txt
	"$(PYTHON)" -m venv $(RELEASE_ENV)
	$(RELEASE_ENV)/bin/python -m pip install --quiet -r requirements/release.txt
	@touch $@

# Built in build/sanitize, so that the library in the package does not change.
$(SANITIZED): $(VENV)/.built
	ONEPASS_SANITIZE=1 ONEPASS_CUDA=0 $(RUN) setup.py --quiet build_ext --build-lib build/sanitize --build-temp build/sanitize/objects

# Without a compiler, .library is not touched, so that the next call tries again. --no-deps, because
# the dependencies may be in the middle of their installation (.built).
$(VENV)/.library: $(VENV)/.torch $(BUILD_INPUTS)
	@rm -f $(LIBRARY) $(CUDA_LIBRARY)
	ONEPASS_CUDA_KERNELS=$(KERNELS) $(RUN) -m pip install --quiet --no-deps --no-build-isolation -e .
	@if test -f $(LIBRARY); then touch $@; else echo "make: no C++ compiler found (g++, c++ or clang++): only the slow reference backend is available"; fi

# Two jobs, because pip uses one core and waits for the network while the compilers run.
$(VENV)/.built: requirements/build.txt requirements/dev.txt $(BUILD_INPUTS)
	@$(MAKE) --no-print-directory --jobs=2 KERNELS=$(KERNELS) $(VENV)/.tools $(VENV)/.library
	@if test -f $(VENV)/.library; then touch $@; fi
