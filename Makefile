# `make quickstart` learns, `make check` and `make test` test. All set up .venv first if it is missing or out of date.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.installed
LOCK := requirements/cpu.lock
TORCH := torch==2.13.0+cpu
# Where pip finds the CPU build of torch, if it is not where pip looks by itself.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

# How long `make soak` kills.
MINUTES ?= 30

.PHONY: help setup quickstart check test slow faults soak fuzz lint
help:
	@echo "make quickstart   set up, then run one round of online experiential learning on this machine's CPU"
	@echo "make check        set up, then lint, type-check, and the tests that start no other process; minutes"
	@echo "make test         set up, then lint, type-check and test, as CI does; half an hour"
	@echo "make slow         set up, then all other tests; hours"
	@echo "make faults       set up, then run every test that docs/faults.md names; about an hour"
	@echo "make soak         set up, then kill a random part of a run every 20 s for MINUTES=30"
	@echo "make fuzz         set up, then read 100,000 damaged trajectory files; minutes"
	@echo "make setup        only set up .venv"

setup: $(READY)

$(READY): $(LOCK) pyproject.toml setup.cfg
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or say make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -d .venv || $(PYTHON) -m venv .venv
	@echo "setup: torch, CPU build (about 200 MB)"
	@$(PIP) "$(TORCH)" $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") || { \
	  echo "setup: pip does not find $(TORCH) where it is configured to look." >&2; \
	  echo "setup: take the address of the CPU wheel index from PyTorch's 'Get Started' page (pip, CPU) and run" >&2; \
	  echo "setup:     make $(MAKECMDGOALS) TORCH_INDEX=ADDRESS" >&2; exit 2; }
	@echo "setup: the packages of $(LOCK)"
	@$(PIP) -r $(LOCK)
	@$(PIP) --editable .
	@touch $@

quickstart: setup
	@$(BIN)/oel run quickstart

lint: setup
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

check: lint
	@$(BIN)/python -m pytest -m "not (ray or vllm or process or slow)"

test: lint
	@$(BIN)/python -m pytest

slow: setup
	@$(BIN)/python -m pytest -m slow --durations=20

faults: setup
	@$(BIN)/python -m pytest -m faults

soak: setup
	@$(BIN)/python -m tests.support.soak $(MINUTES)

fuzz: setup
	@OEL_RAY_FUZZ=100000 $(BIN)/python -m pytest --timeout=3600 tests/imports/test_fuzz.py
