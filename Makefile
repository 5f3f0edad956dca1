# `make demo` and `make test` each do all the set-up they need on a fresh machine: a virtual environment, the package.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Of the packages' modules most are never imported. Python compiles those that are, at their first import, and keeps them.
unexport PYTHONDONTWRITEBYTECODE
# What setuptools says of every editable installation says nothing of this one.
INSTALL := PYTHONWARNINGS="ignore:Editable installation" $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
# A test process a core, one thread each; a file's tests stay together, because they share what they set up. Files come in
# the order of tests/conftest.py, not those of few tests last: one of them takes minutes.
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo docs test test-faults lint clean

# One thread: the demo's products are so small that a second one costs more than it brings (481 against 362 images/s).
demo: $(VENV)/.runtime
	OMP_NUM_THREADS=1 $(BIN)/torchrun recipes/deit_digits.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels $(PARALLEL) $(ARGS)

# Faults done to real runs, minutes each; `ARGS=--full` for the full counts, `ARGS="--rows 1 15"` for some.
test-faults: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

# The pages of docs/ as a site, in build/site.
docs: $(VENV)/.docs
	$(BIN)/python docs/pages.py --check
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# pip first: the one that Python 3.11 brings takes twice as long over the rest.
$(VENV)/.runtime: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 to 3.13 is needed. Name one: make PYTHON=python3.12"; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) pip
	$(INSTALL) setuptools wheel torch
	$(INSTALL) --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(INSTALL) --no-build-isolation -e ".[test,dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.runtime
	$(INSTALL) --no-build-isolation -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info runs
