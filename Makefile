# Everything on a fresh machine: `make demo` and `make test`. Both build .venv first.
#
# TORCH_INDEX=URL   takes torch from another package index, for instance one with CPU-only builds, which are
#                   gigabytes smaller than the default for machines without a GPU.
# PYTHON=python3.12 chooses the interpreter of the environment.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest

.PHONY: help install demo test test-kernels test-gpu test-slow lint format bench clean

help:  ## Lists the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(PIP) torch --index-url $(TORCH_INDEX))
	$(PIP) --editable .
	touch $@

.venv/.dev: .venv/.base
	$(PIP) --editable '.[dev]'
	touch $@

install: .venv/.base  ## Builds .venv with the versions of constraints.txt

demo: .venv/.base  ## Trains, evaluates and samples a small model on real text, from nothing (under 10 minutes, 2 cores)
	$(BIN)/farspan train recipes/demo.yaml
	$(BIN)/farspan eval runs/demo
	$(BIN)/farspan generate runs/demo "import " --num-samples 5 --seed 1 --max-new-tokens 200 --temperature 0.7 \
		--check-python --json runs/demo/samples.json
	@echo "Report: $(CURDIR)/runs/demo/report.html"

test: .venv/.dev  ## Fast tests, without a GPU
	$(PYTEST) -m 'not slow and not gpu'

test-kernels: .venv/.dev  ## The Triton kernels in the interpreter, without a GPU
	TRITON_INTERPRET=1 $(PYTEST) tests/ops/test_*_interpreted.py tests/ops/test_*step.py tests/ops/test_*steps.py tests/ops/test_cross_entropy.py tests/ops/test_swiglu.py tests/ops/test_dynamic_mask_scores.py

test-gpu: .venv/.dev  ## The kernels on an NVIDIA GPU
	$(PYTEST) -m gpu

test-slow: .venv/.dev  ## The tests that `make test` leaves out, without a GPU
	$(PYTEST) -m 'slow and not gpu'

lint: .venv/.dev  ## Formatting, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.dev  ## Applies the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev  ## Measures the operators on this machine's CPU, writes docs/results/
	$(BIN)/python benchmarks/ops_cpu.py
	$(BIN)/python benchmarks/attention_cpu.py

clean:  ## Removes the environment and all caches, keeps runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
