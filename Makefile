# `make test` needs python3 (3.11 or newer) and nothing else: it makes .venv and installs there.
# `make test PYTHON=/path/to/python` runs in an environment of your own instead, and installs nothing.

VENV := .venv
DEMO_WORK ?= demo_work

ifndef PYTHON
PYTHON := $(VENV)/bin/python
TEST_INSTALL := $(VENV)/.installed-test
LINT_INSTALL := $(VENV)/.installed-lint
endif

# One process for each core, each file of tests in one of them, so that its fixtures are made once. Several threads in
# each would wait for one another in loops that take the cores from all.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(PYTHON) -m pytest -q --durations=15 \
	--numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: venv test test-slow test-gpu fuzz demo bench lint

venv: $(TEST_INSTALL)

test: $(TEST_INSTALL)
	$(PYTEST)

test-slow: $(TEST_INSTALL)
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(TEST_INSTALL)
	$(PYTHON) -m pytest -q --durations=15 -m gpu

fuzz: $(TEST_INSTALL)
	FUZZ_PROFILE=long $(PYTEST) tests/fuzz

demo: $(TEST_INSTALL)
	$(PYTHON) examples/demo.py --work $(DEMO_WORK)

bench: $(TEST_INSTALL)
	$(PYTHON) benchmarks/bench.py

lint: $(LINT_INSTALL)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command as lint; lint()'

# The start-up files are copied at installation, so a change to them needs another one.
# `venv` is repeated because it mends an environment whose creation was interrupted.
$(VENV)/.installed-%: pyproject.toml $(wildcard startup/*)
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --editable '.[$*]'
	touch $@
