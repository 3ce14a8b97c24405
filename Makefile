# `make demo` runs the main job, `make test` the tests. Each makes or reuses `.venv`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types contract check clean

demo: $(VENV)/.lab
	$(BIN)/wellcond compare --out runs/demo

test: $(VENV)/.dev
	# Two or more processes with one thread each: the tests are many and small.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contract: $(VENV)/.dev
	$(BIN)/lint-imports

# What CI runs.
check: lint types contract test

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

# A stamp file per set of extras: reinstalled when pyproject.toml changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lab: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[lab]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[lab,dev]"
	touch $@ $(VENV)/.lab
