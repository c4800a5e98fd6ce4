# Two commands for a new machine: `make repro` shows the result, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that wait for work sleep instead of spinning: a shared machine stays usable, and small batches lose nothing.
export OMP_WAIT_POLICY ?= passive

.PHONY: repro test test-remotes check format docs bench faults golden page clean

repro: $(VENV)/installed
	dvc repro
	@cat data/report/results.md
	@echo "The page: data/report/index.html"

$(VENV)/installed: pyproject.toml setup.py cache/gather.c
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

# Faults at random instants: 100 kills of the cache's writer, 320 runs over twelve faults and every stage, and some of
# `dvc repro`. Prints seeds and what was lost; begins no run after 50 minutes. docs/reliability.md
faults: $(VENV)/installed
	$(BIN)/python tests/faults/kill.py
	$(BIN)/python tests/faults/campaign.py --runs 320 --minutes 50 --out benchmarks/results/faults.json
	$(BIN)/python tests/faults/repro.py --runs 3

# Two clones over three remotes, and caches on S3 and behind SSH. Installs OpenSSH's server where there is none.
test-remotes: $(VENV)/installed
	test -x /usr/sbin/sshd || (apt-get update && apt-get install --yes --no-install-recommends openssh-server)
	H2T_REMOTES=benchmarks/results/remotes.json $(BIN)/python -m pytest tests/test_two_clones.py tests/test_remote_stores.py

# One of the paper's analyses on the finished cache: make analysis-ratio, analysis-donors, ... (presets/analyses).
analysis-%: $(VENV)/installed
	$(BIN)/python -m benchmarks.analyses $* --data $(or $(DATA),data)

# The report with the time and the machine of these runs, which data/report leaves out.
page: $(VENV)/installed
	h2t report data/evaluate data/page --runs data/runs

clean:
	rm -rf data $(VENV)
