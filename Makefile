# Every target sets the environment up first; a second call finds it done.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a process: tests start up to four ranks, and the order of sums must not depend on the machine.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest

.PHONY: help install demo test test-unit test-distributed test-e2e test-gpu lint format docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-18s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv with Python >= 3.12 and install the package with its tests' needs

$(INSTALLED): pyproject.toml tests/constraints.txt scripts/install.sh scripts/find_python.sh
	@scripts/install.sh $(VENV)
	@touch $@

demo: $(INSTALLED) ## train three jobs together on a real small model, on CPU, and compare before and after
	@scripts/demo/run.sh

test: $(INSTALLED) ## all tests, the cheap ones first; those that need a GPU are skipped without one
	@$(PYTEST)

test-unit: $(INSTALLED) ## no processes, under a minute or so
	@$(PYTEST) tests/unit

test-distributed: $(INSTALLED) ## two to four gloo processes
	@$(PYTEST) tests/distributed

test-e2e: $(INSTALLED) ## whole runs against independent references
	@$(PYTEST) tests/e2e

test-gpu: $(INSTALLED) ## kernels and whole runs on a GPU
	@$(PYTEST) tests/gpu

lint: $(INSTALLED) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED) ## let ruff mend what it can, and write the files that are made from the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python -m scripts.generate

docs: $(INSTALLED) ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean: ## remove the environment and everything that was built
	@rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
