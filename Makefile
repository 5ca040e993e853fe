# Every target makes the environment that it needs in $(VENV); nothing is installed outside this directory.
#
#   make demo       check, list, snapshot and change a sample pool
#   make test       every test that can run here; tests without their oracle are skipped, saying why
#   make check      format, lint, types, fast tests: before each commit
#   make test-all   as test, with long property runs, and a missing oracle is a failure
#   make test-crash every state that power cuts may leave, 100,000 images of them; make crash-long: two millions
#   make bench      measure; BENCH="engine --help" says how
#   make format     rewrite the sources in the project's format
#   make clean      remove what builds and runs leave behind; make distclean: the environment too

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
TESTS ?= tests
BENCH ?= engine

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal
SOURCES := bufio persistent_data thinpool tools examples tests

.PHONY: demo test check test-all test-crash crash-long bench format lint types fast clean distclean

demo: $(VENV)/.installed
	@$(BIN)/python examples/tour.py

test: $(VENV)/.test
	$(PYTEST) $(TESTS)

test-all: $(VENV)/.test
	THINPOOL_REQUIRE_ORACLES=1 THINPOOL_HYPOTHESIS_PROFILE=long $(PYTEST) $(TESTS)

CRASH_SEED ?= 1

test-crash: $(VENV)/.test
	$(BIN)/python -m tests.crash --images 100000 --seed $(CRASH_SEED)
	$(BIN)/python -m tests.crash mutations
	$(BIN)/python -m tests.crash fuzz --cases 3000 --seed $(CRASH_SEED)

crash-long: $(VENV)/.test
	$(BIN)/python -m tests.crash --images 2000000 --all --seed $(CRASH_SEED)
	$(BIN)/python -m tests.crash mutations
	$(BIN)/python -m tests.crash fuzz --cases 200000 --seed $(CRASH_SEED)
	$(BIN)/python -m tests.crash kill --rounds 300 --seed $(CRASH_SEED)

check: lint types fast

lint: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

types: $(VENV)/.dev
	$(BIN)/mypy

fast: $(VENV)/.dev
	$(PYTEST) -m "not slow and not kernel and not peer" $(TESTS)

bench: $(VENV)/.bench
	$(BIN)/python -m tools.bench.$(BENCH)

format: $(VENV)/.dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# What is installed beside the packages themselves, by target.
$(VENV)/.installed: EXTRAS =
$(VENV)/.test: EXTRAS = [test]
$(VENV)/.bench: EXTRAS = [bench]
$(VENV)/.dev: EXTRAS = [dev]

$(VENV)/.installed $(VENV)/.test $(VENV)/.bench $(VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
	@touch $@

# A stale build directory would put deleted modules into the next wheel.
clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
