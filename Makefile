# Everything here sets itself up: a virtual environment in .venv, then what was asked for.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --constraint
PIP := $(BIN)/python $(INSTALL) constraints.txt
LOWEST := $(VENV)-lowest
# At most so many processes share the tests, each on one thread; never more than there are cores.
WORKERS ?= 4

# Of a campaign of hostile inputs or of harms (docs/reliability.md): how long, and what its cases are drawn from.
MINUTES ?= 10
SEED ?= $(shell date +%s)

.PHONY: compare words test fast lowest fuzz chaos lint clean

compare: $(VENV)/.installed
	$(BIN)/dgpo-bench compare shapes

# The same on the world of words, whose reward reads text.
words: $(VENV)/.installed-rewards
	$(BIN)/dgpo-bench compare words

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder

fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m fast --numprocesses auto --maxprocesses $(WORKERS) --dist loadgroup

# The fast tests with the oldest versions that pyproject.toml allows.
lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -m fast --numprocesses auto --maxprocesses $(WORKERS) --dist loadgroup

# Findings are written to runs/fuzz; a finding that was mended is kept in tests/cases/fuzz.
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz.campaign --minutes $(MINUTES) --seed $(SEED)

# Runs killed, starved of disk and robbed of their folder, for some minutes; SEED= for the same cases again (Linux).
chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(SEED)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# torch first and alone, so that pip takes exactly the pinned build and nothing pulls another.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-rewards: $(VENV)/.installed
	$(PIP) --editable '.[rewards]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints.txt constraints-lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python $(INSTALL) constraints.txt torch
	$(LOWEST)/bin/python $(INSTALL) constraints-lowest.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(VENV)-parity build *.egg-info .pytest_cache .mypy_cache .ruff_cache
