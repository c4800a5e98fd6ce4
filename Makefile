# Two commands for a new machine: `make repro` shows the result, `make test` runs the tests.
# PYTHON makes the environment; another one later takes `make clean` first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that wait for work sleep instead of spinning: a shared machine stays usable, and small batches lose nothing.
export OMP_WAIT_POLICY ?= passive

.PHONY: repro test test-remotes stranger check format bench gpu faults fuzz audit coverage mutants page clean

repro: $(VENV)/installed
	dvc repro
	@echo
	@cat data/report/results.md
	@echo "The page: data/report/index.html. The commands h2t and dvc: source $(VENV)/bin/activate"

$(VENV)/installed: pyproject.toml setup.py cache/read/gather.c
	@test -x $(BIN)/python || $(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || \
	  { echo "error: $(PYTHON) is no Python 3.11 to 3.13; name one, for example: make repro PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), which takes minutes, as torch is large; what pip says: $(VENV)/install.log"
	@($(BIN)/python -m pip install --upgrade "pip>=25.1" && $(BIN)/python -m pip install --editable . --group dev) \
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

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# What only a GPU can show, with JSON for every piece in benchmarks/results: make gpu, make gpu PIECES="stack stage2".
gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu $(PIECES)

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

# A fresh clone, `make repro` with PYTHON, then what README and docs print, command by command: half an hour.
stranger:
	$(PYTHON) tests/stranger.py --python $(PYTHON)

# A million executions of every parser under the coverage-guided fuzzer; prints the seed and a table.
fuzz: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group fuzz
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/campaign.py

# Known vulnerabilities of what is installed, where the package index tells of them.
audit: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --group audit
	$(BIN)/python tests/vulnerabilities.py
# The tests again, counting lines, those of child processes too: at least 95 % of cache/ and 90 % of pipeline/.
coverage: $(VENV)/installed
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(TESTS)
	find . -maxdepth 1 -name '.coverage.*' -size -100c -delete    # what a test killed while it was written
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include='cache/*'
	$(BIN)/coverage report --include='pipeline/*'
	@echo "cache/ $$($(BIN)/coverage report --include='cache/*' --format=total) %," \
	  "pipeline/ $$($(BIN)/coverage report --include='pipeline/*' --format=total) %"
	@$(BIN)/coverage report --include='cache/*' --fail-under=95 > /dev/null
	@$(BIN)/coverage report --include='pipeline/*' --fail-under=90 > /dev/null

# About a thousand small changes to three files, one at a time: does a test fail? A quarter of an hour on two idle cores.
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
