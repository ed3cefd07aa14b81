# One command each. `make demo` and `make test` are all you need; everything is installed into .venv on first use.
#
#   make VENV= test        with the current Python as it is, nothing installed (a machine with torch and no network)
#   make TORCH=2.11.0 test with another torch

PYTHON ?= python3
TORCH ?= 2.13.0
# Where torch came without one. Not in constraints.txt: CUDA builds of torch bring the one that they need.
TRITON ?= 3.9.0
VENV ?= .venv
# Tests compare our Hessians with this library's. Not by the extra dev: it would bring a torchvision for another torch.
CURVLINOPS := curvlinops-for-pytorch backpack-for-pytorch einconv einops linear_operator opt_einsum unfoldNd

ifeq ($(strip $(VENV)),)
RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
CLANG_FORMAT := clang-format
BUILT := build-in-place
else
RUN := $(VENV)/bin/python
CLANG_FORMAT := $(VENV)/bin/clang-format
BUILT := $(VENV)/installed-$(TORCH)
endif

.PHONY: install demo test lint soak bench kernels gpu clean build-in-place

install: $(BUILT)

# torch first: the extension is built against the one that is there, and nothing may replace it afterwards.
$(VENV)/installed-%: pyproject.toml constraints.txt setup.py $(wildcard csrc/*) $(wildcard csrc/cpu/*) $(wildcard csrc/cuda/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet torch==$* -c constraints.txt
	$(VENV)/bin/python -m pip install --quiet setuptools wheel ninja -c constraints.txt
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation -e '.[dev]' torch==$* -c constraints.txt
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || test "$$(uname)" != Linux || \
		$(VENV)/bin/python -m pip install --quiet triton==$(TRITON)
	$(VENV)/bin/python -m pip install --quiet --no-deps $(CURVLINOPS) -c constraints.txt
	rm -f $(VENV)/installed-* && touch $@

build-in-place:
	$(PYTHON) setup.py --quiet build_ext --inplace

# Ends with the path of a page that compares the runs: demo-results/report.html.
demo: $(BUILT)
	$(RUN) -m samkern demo $(OPTIONS)

# In as many processes as there are cores, test by test, if pytest-xdist is installed. OPTIONS=-n0 takes one.
SPREAD = $$($(RUN) -c 'import xdist' 2>/dev/null && echo --numprocesses=auto --maxschedchunk=1)

test: $(BUILT)
	$(RUN) -m pytest $(SPREAD) --cov --cov-report=term-missing:skip-covered --cov-fail-under=95 $(OPTIONS)

lint: $(BUILT)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/* tests/cuda_on_cpu.* tests/*.cu

# 20 minutes of random configurations and long trainings, whose memory is watched: OPTIONS="--minutes 2 --seed 7".
soak: $(BUILT)
	$(RUN) -m tests.soak $(OPTIONS)

bench: $(BUILT)
	$(RUN) -m pytest bench -q $(OPTIONS)

# Registers and spills of every GPU kernel, by nvcc alone.
kernels: $(BUILT)
	$(RUN) -m bench.kernels

# On a GPU machine that has torch: builds in place with the current Python, then tests, benchmarks and sanitizers.
gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) -m bench.gpu $(OPTIONS)

clean:
	rm -rf build dist *.egg-info .venv .coverage .hypothesis .mypy_cache .ruff_cache demo-results samkern/*.so samkern/_build.json samkern/triton_kernels
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
