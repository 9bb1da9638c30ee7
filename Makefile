# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
# Processes that run the tests: more than cores, since most of the time they wait for Slurm.
JOBS ?= 4

.PHONY: help demo test test-oldest wheel lint bench chaos ablation reference docs clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(READY)  ## The whole job on real data made from fonts
	$(BIN)/tripletkit demo

test: lint  ## Every check and test; as root on Debian it installs Slurm and PostgreSQL for them
	tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile

test-oldest:  ## The tests without Slurm, with the oldest versions of everything (Python 3.11)
	PYTHON=$(PYTHON) .ci/oldest

wheel:  ## Build the distribution, install it alone, run its first commands
	.ci/wheel $(PYTHON)

lint: $(READY)  ## Formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)  ## Speed and memory, as ratios; BENCH="--only step" for a part
	$(BIN)/python -m tests.benchmarks $(BENCH)

chaos: $(READY)  ## A study under faults for ten minutes; CHAOS="--seed 7 --minutes 10"
	tests/cluster/install.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(CHAOS)

ablation: $(READY)  ## Rebuild docs/ablation.md (about an hour on two cores)
	$(BIN)/python -m tests.benchmarks.ablation

reference: $(READY)  ## Rewrite config.toml and the reference of keys and commands from the code
	$(BIN)/python -m tests.reference

docs: $(READY)  ## The documentation as a site, in build/docs
	$(BIN)/python -m sphinx -E -a -W -n --keep-going --quiet docs build/docs
	@echo build/docs/index.html

clean:  ## Remove the virtual environment and the demo
	rm -rf $(VENV) .venv-oldest demo

# Debian ships venv apart from Python; root may install it.
$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "tripletkit needs Python 3.11 or newer; name one with make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "python3-venv is missing; installing it (needs root)"; \
	    apt-get update -qq && apt-get install -y -qq python3-venv; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c .ci/constraints.txt -e '.[test]'
	@touch $@
