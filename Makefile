# `make demo` runs the main job, `make test` the tests, `make docs` builds the site. Each makes or reuses `.venv`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types contract docs build check clean

demo: $(VENV)/.lab
	$(BIN)/wellcond compare --out runs/demo

test: $(VENV)/.dev
	# Two or more processes with one thread each: the tests are many and small. Each process takes its share in
	# their order, since a file's tests share what is costly to make, and at last some of another's.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

contract: $(VENV)/.dev
	$(BIN)/lint-imports

# The site, in site/; warnings, such as of a link to nowhere, are errors.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The wheel and the source distribution, in dist/.
build: $(VENV)/.dev
	$(BIN)/python -m build

# What CI runs.
check: lint types contract docs test

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache

# A stamp file per set of extras: reinstalled when pyproject.toml changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lab: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[lab]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install -q -e ".[lab,dev]"
	touch $@ $(VENV)/.lab

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install -q -e ".[docs]"
	touch $@
