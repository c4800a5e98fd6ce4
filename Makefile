# Two commands for a new machine: `make repro` shows the result, `make test` runs the tests. What takes hours: tests/Makefile.
# PYTHON makes the environment; another one later takes `make clean` first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that wait for work sleep instead of spinning: a shared machine stays usable, and small batches lose nothing.
export OMP_WAIT_POLICY ?= passive
# The answer and the short table of a report; those below it are wider than a terminal.
ANSWER := sed '/All figures/,$$d'

.PHONY: repro table arena test check format bench gpu audit clean

repro: $(VENV)/installed
	dvc repro
	@echo
	@$(ANSWER) data/report/results.md
	@echo "CIFAR-10-LT, on features that lie in examples/cifar10_lt:"
	cd examples/cifar10_lt && dvc repro
	@echo
	@$(ANSWER) examples/cifar10_lt/data/report/results.md
	@echo "The paper's top-1 there, on original images: DR 79.15, with H2T 82.87; MiSLAS 82.12, with H2T 83.23."
	@echo "All figures: data/report/index.html and results.md there, in both folders."
	@echo "The commands h2t and dvc: source $(VENV)/bin/activate"

# All hosts of the paper on the digits (presets/digits.yaml), in data/table: a quarter of an hour. params.yaml and what
# `make repro` made stay as they are; killed, it resumes.
table: $(VENV)/installed
	$(BIN)/python -m benchmarks.paper digits --data data/table --out data/table/digits.json

# Every method of stage II on one cache, tuned alike (presets/arena.yaml), in data/arena; killed, it resumes. Another
# cache: make arena ARENA="--cache CACHE --backbone FOLDER".
arena: $(VENV)/installed
	$(BIN)/python -m benchmarks.arena $(ARENA)

$(VENV)/installed: pyproject.toml setup.py cache/read/gather.c
	@test -x $(BIN)/python || $(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || \
	  { echo "error: $(PYTHON) is no Python 3.11 to 3.13; name one, for example: make repro PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), which takes minutes, as torch is large; what pip says: $(VENV)/install.log"
	@($(BIN)/python -m pip install --upgrade "pip>=25.1" && $(BIN)/python -m pip install --editable '.[pipeline]' --group dev) \
	  > $(VENV)/install.log 2>&1 || { tail -n 20 $(VENV)/install.log >&2; exit 1; }
	@touch $@

# Two processes on two cores; tests compute on one thread each.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	for page in messages methods_page parameters_page rooms; do $(BIN)/python tests/$$page.py > /dev/null || exit 1; done

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# What only a GPU can show, with JSON for every piece in benchmarks/results: make gpu, make gpu PIECES="stack stage2".
gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu $(PIECES)

# Known vulnerabilities of what is installed, where the package index tells of them.
audit: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group audit
	$(BIN)/python tests/vulnerabilities.py

clean:
	rm -rf data $(VENV)
