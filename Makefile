# Two commands for a new machine: `make repro` shows the result, `make test` runs the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that wait for work sleep instead of spinning: a shared machine stays usable, and small batches lose nothing.
export OMP_WAIT_POLICY ?= passive

.PHONY: repro test test-remotes coverage mutants check format docs bench faults golden page clean

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

# 100 SIGKILLs at random instants of writing; prints its seed and what was lost.
faults: $(VENV)/installed
	$(BIN)/python tests/faults/kill.py

# Two clones over three remotes, and caches on S3 and behind SSH. Installs OpenSSH's server where there is none.
test-remotes: $(VENV)/installed
	test -x /usr/sbin/sshd || (apt-get update && apt-get install --yes --no-install-recommends openssh-server)
	H2T_REMOTES=benchmarks/results/remotes.json $(BIN)/python -m pytest tests/test_two_clones.py tests/test_remote_stores.py

# The tests again, counting lines, those of child processes too: at least 95 % of cache/ and 90 % of pipeline/.
coverage: $(VENV)/installed
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include='cache/*'
	$(BIN)/coverage report --include='pipeline/*'
	@echo "cache/ $$($(BIN)/coverage report --include='cache/*' --format=total) %," \
	  "pipeline/ $$($(BIN)/coverage report --include='pipeline/*' --format=total) %"
	@$(BIN)/coverage report --include='cache/*' --fail-under=95 > /dev/null
	@$(BIN)/coverage report --include='pipeline/*' --fail-under=90 > /dev/null

# About a thousand small changes to three files, one at a time: does a test fail? Half an hour on two idle cores.
# Caches of the tests lie in memory where they can: each of their files waits for the disk.
mutants: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group mutants
	rm -rf mutants
	TMPDIR=$$(test -w /dev/shm && mktemp -d -p /dev/shm || mktemp -d) OMP_NUM_THREADS=1 timeout 3h $(BIN)/mutmut run > mutants.log
	$(BIN)/python tests/mutants.py

# One of the paper's analyses on the finished cache: make analysis-ratio, analysis-donors, ... (presets/analyses).
analysis-%: $(VENV)/installed
	$(BIN)/python -m benchmarks.analyses $* --data $(or $(DATA),data)

# The report with the time and the machine of these runs, which data/report leaves out.
page: $(VENV)/installed
	h2t report data/evaluate data/page --runs data/runs

clean:
	rm -rf data $(VENV)
