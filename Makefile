# `make` lists the targets. Every target sets up what it needs; a second run of `setup` costs nothing.
#   make setup PYTHON=/path/to/python   chooses the interpreter
#   make test JOBS=8                    runs tests in 8 processes
# Which torch wheel is installed is pip's decision: PIP_INDEX_URL and PIP_EXTRA_INDEX_URL are respected.

PYTHON ?= python3 python3.13 python3.12 python3.11 python3.14 python
JOBS   ?= 2
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.wspace-setup
PIP    := $(BIN)/python -m pip -qq --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP)  ## create .venv and install wspace with everything its tests need

$(BIN)/python:
	@for python in $(PYTHON); do \
	  if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "setup: $(VENV) from $$($$python --version) ($$python)"; \
	    exec $$python -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "setup: no suitable Python" >&2; \
	echo "  expected Python >= 3.11 with the modules venv and ensurepip" >&2; \
	echo "  got none among: $(PYTHON)" >&2; \
	echo "  help: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
	exit 1

# torch first and exactly as pinned: a looser request may fetch gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -r constraints.txt
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## run the demonstration; its pages go to demo/
	$(BIN)/wspace demo --out demo

test: setup  ## run the whole suite but the slow tests
	$(PYTEST)

test-slow: setup  ## run the slow tests, with more random examples
	$(PYTEST) -m slow --hypothesis-profile=slow

lint: setup  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup  ## format the code and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## install what we compare with, and measure
	$(PIP) install -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/run.py

clean:  ## remove everything that was generated
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
