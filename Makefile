# make demo   a first kernel, compiled and run on what this machine has
# make test   lint and tests (what CI runs)
# make test-all   the same with all cases
# make lint   style, formatting, layering, types
# Each makes .venv on its first call; PYTHON=... chooses the interpreter (3.11 or newer).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
# keyed on the content, so that a checkout that only touches the files installs nothing
KEY := $(shell cat pyproject.toml setup.py tilewright/runtime/extension/* | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(KEY)
TESTED := $(VENV)/.tested-$(KEY)

.PHONY: help demo test test-all lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	  echo "tilewright needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=/path/to/python3.12" >&2
	  exit 1
	}
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || {
	  echo "$(PYTHON) cannot make a virtual environment: ensurepip is missing." >&2
	  echo "On Debian and Ubuntu: apt-get install python3-venv. Or name another interpreter: make PYTHON=..." >&2
	  exit 1
	}
	$(PYTHON) -m venv $(VENV)

$(STAMP): | $(BIN)/python
	@echo "Installing tilewright and its tools into $(VENV) (once)"
	rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda,amd,dev,linker]'
	touch $@

$(TESTED): $(STAMP)
	@echo "Installing what the tests of tilewright.torch need (once; PyTorch is about 1 GB)"
	rm -f $(VENV)/.tested-*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda,amd,dev,linker,test]'
	touch $@

demo: $(STAMP)
	@$(BIN)/python examples/gemm.py

lint: $(STAMP)
	@$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

test: lint $(TESTED)
	@$(BIN)/python -m pytest -q -n 2 --durations=20

test-all: lint $(TESTED)
	@$(BIN)/python -m pytest -q -n 2 -m ""

format: $(STAMP)
	@$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

clean:
	rm -rf $(VENV) build dist *.egg-info tilewright/runtime/_native*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
