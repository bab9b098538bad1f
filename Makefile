# Every target works in a bare clone: the first one to run makes .venv from constraints.txt.
# Another Python: make test PYTHON=python3.12. Another place: make test VENV=/path/to/venv.

VENV ?= .venv
BIN := $(VENV)/bin
# A file's tests stay in one process, where they share what is costly to make.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

# The first that runs, is 3.11 or newer and can make a virtualenv.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && echo $$python && break; done)

.PHONY: help demo test test-slow check docs bench fixtures clean

help:
	@echo "make demo      a tour on the trained model that the repository carries"
	@echo "make test      the test suite, without the tests marked slow"
	@echo "make test-slow the tests marked slow"
	@echo "make check     style, types, layers, generated docs"
	@echo "make docs      write docs/reference from the code"
	@echo "make bench     speed and memory against the physical limit"
	@echo "make fixtures  train the fixtures again (minutes)"
	@echo "make clean     remove .venv, caches and demo output"

demo: $(VENV)/.installed-test
	$(BIN)/surgery demo

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow

check: $(VENV)/.installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/style.py
	$(BIN)/python .ci/imports.py
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.installed-test
	$(BIN)/python docs/generate.py

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.stack
	$(BIN)/python -m benchmarks.merging

fixtures: $(VENV)/.installed-test
	$(BIN)/python fixtures/make.py

clean:
	rm -rf .venv demo-out dist build .coverage htmlcov .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with the venv module;" \
	"name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: it is by far the largest, and a failure should name it.
$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.installed-check: $(VENV)/.installed-test
	$(BIN)/python -m pip install -c constraints.txt -e ".[check]"
	@touch $@
