# `make demo` and `make test` work from a fresh clone with nothing but Python (3.10 or newer) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Made when the environment is complete; older than pyproject.toml means: install again.
INSTALLED := $(VENV)/.installed
# The same with the runtimes that the bench suite compares with.
PEERS := $(VENV)/.peers
DEMO := demo-out
BENCH := bench-out
# The levels whose logs are shipped, how long each model is tuned in each precision, and where all records are kept.
LEVELS := x86-64-avx512-vnni x86-64-avx2
BUDGET := 5m
LOGS := logs-out

.DEFAULT_GOAL := help
.PHONY: help venv install demo test test-all lint types bench logs clean

help:
	@echo "make demo       train, quantize and compile a small network; one table, bundles in $(DEMO)"
	@echo "make test       the tests, but for long sweeps"
	@echo "make test-all   all tests"
	@echo "make lint       ruff: rules and format"
	@echo "make types      mypy, strict"
	@echo "make bench      tvmq and its peers on a model zoo, kernels, compile time: files in $(BENCH)"
	@echo "make logs       tunes the suite's models, $(BUDGET) each, for the logs that are shipped (resumes from $(LOGS))"
	@echo "make install    the environment $(VENV) with tvmq and its tools (the others do it first)"
	@echo "make clean      remove what make made"

venv: $(BIN)/python

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/tvmq demo -o $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 -m 'not slow' --durations 25

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

$(PEERS): pyproject.toml $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev,peers,chart]'
	@touch $@

bench: $(PEERS)
	$(BIN)/tvmq bench --suite --repeat 15 --per-op -o $(BENCH)
	$(BIN)/tvmq bench --kernels --repeat 20 -o $(BENCH)
	$(BIN)/tvmq bench --matvec --repeat 20 -o $(BENCH)
	$(BIN)/tvmq bench --compile -o $(BENCH)

# Of levels that this machine can run; each thread count that a user may have would be another log's worth of trials.
logs: $(INSTALLED)
	for level in $(LEVELS); do \
		$(BIN)/tvmq tune --suite -t $$level --threads $$(nproc) --budget $(BUDGET) -o $(LOGS)/$$level || exit 1; \
		rm -rf tuning_logs/$$level && $(BIN)/tvmq logs export $(LOGS)/$$level tuning_logs/$$level || exit 1; \
	done

clean:
	rm -rf $(VENV) $(DEMO) $(BENCH) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
