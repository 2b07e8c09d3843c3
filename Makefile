# Two commands do nearly everything, on a machine with Python 3.11 and pip:
#   make demo    installs what is missing, compares the methods on digits, writes runs/demo/report.html
#   make test    installs what is missing, checks style and types, runs the tests
# `make slow` runs those that start a whole deployment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# Data sets for the larger tasks, where there are any beside the repository and nothing else is said.
ifndef UMBEL_DATA
ifneq ($(wildcard ../shared/data),)
export UMBEL_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: demo test slow check bench install

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/umbel compare digits --out runs/demo

check: $(INSTALLED)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

slow: $(INSTALLED)
	$(BIN)/pytest -m slow

bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py --out benchmarks/results/speed.json
	$(BIN)/python benchmarks/population.py --out benchmarks/results/population.json
	$(BIN)/python benchmarks/theory.py --out benchmarks/results/theory.json
	$(BIN)/python benchmarks/theory_page.py
