# Two commands for a new machine: `make repro` shows the result, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that wait for work sleep instead of spinning: a shared machine stays usable, and small batches lose nothing.
export OMP_WAIT_POLICY ?= passive

.PHONY: repro test check format docs bench faults golden clean

repro: $(VENV)/installed
	dvc repro
	@cat data/report/results.md
	@echo "The page: data/report/index.html"

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python tests/architecture.py

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf data $(VENV)
