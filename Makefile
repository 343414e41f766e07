# klpfs from a fresh checkout. Every target installs what it needs: Debian packages where they are missing (as root;
# others are told which), Python packages into .venv. A second run finds the stamps and installs nothing.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
# The first of these that is 3.11 or later; override with: make PYTHON=...
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# More for pytest, such as: make test ARGS='-k replace'
ARGS ?=
# Parts of names of scripts for conformance
ONLY ?=

.PHONY: help demo test conformance lint format bench install clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.compiled ## A session on a mounted /sys/kernel/livepatch, printed as it happens
	@PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

test: $(VENV)/.compiled $(VENV)/.packages-test ## All tests
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

conformance: install $(VENV)/.packages-conformance ## The twins and the kernel's own selftests; some: ONLY=twin-05
	$(BIN)/python tools/conformance/run.py $(ONLY)

bench: $(VENV)/.compiled $(VENV)/.packages-bench ## Measure, as ratios within one run; results also in build/bench.json
	@mkdir -p build
	$(BIN)/python -m bench --json build/bench.json $(ARGS)

install: $(VENV)/.compiled ## Only install

$(VENV)/.installed: pyproject.toml .ci/packages
	@bash .ci/packages base $(or $(PYTHON),python3)
	python=$(or $(PYTHON),python3)
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
		echo "klpfs needs Python 3.11 or later; $$python is $$("$$python" -V 2>&1). Give another one: make PYTHON=..." >&2
		exit 1
	}
	[ -x $(BIN)/python ] && $(BIN)/python -c '' 2>/dev/null || "$$python" -m venv --clear $(VENV)
	echo "Installing Python packages into $(VENV)" >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[exec,dev]'
	touch $@

# Start-up times are part of what klpfs promises, and some systems keep Python from writing its caches by itself.
$(VENV)/.compiled: $(VENV)/.installed $(shell find klpfs -name '*.py')
	@$(BIN)/python -m compileall -q klpfs
	touch $@

$(VENV)/.packages-%: .ci/packages | $(VENV)/.installed
	@bash .ci/packages $* $(BIN)/python
	touch $@

clean: ## Remove what was built, .venv included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.ONESHELL:
