# The one door. Each target makes its virtual environment and installs what it lacks; a second run starts at once.
#
#   make demo | test | bench | soak | lint | types | docs | mutate | clean
#
# Variables, each with its default:
#   PYTHON=python3   the interpreter that makes the environment (3.11 or later)
#   VENV=.venv       where the environment lives
#   WHEEL=           `make test`: test this built wheel in place of the source tree
#   COVER=99         `make test`: the least branch coverage in percent (100, but for branches that only a race takes);
#                    empty measures none
#   ARGS=            passed on: to pytest, to the demo, to the benchmarks, to the soak, to mutmut

PYTHON ?= python3
VENV   ?= .venv
WHEEL  ?=
COVER  ?= 99
ARGS   ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
# What is under test: the tree itself, or one wheel.
KIT := $(if $(WHEEL),$(WHEEL)[all],-e .[all])
# All that tests need beside the package; no `resilient/`, so that a wheel is what they import.
TREE := README.md benchmarks conftest.py docs pyproject.toml tests

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test bench soak lint types docs mutate clean

help:
	@sed -n 's/^# \{0,1\}//; 2,11p' Makefile

# -- environments ------------------------------------------------------------------------------------------------------

$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "resilient needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@# Dependency groups need pip 25.1; Debian 12 brings 23.
	$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	$(PIP) install -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.base pyproject.toml $(WHEEL)
	$(if $(WHEEL),$(PIP) uninstall --yes resilient-kit)
	$(PIP) install --group test $(KIT)
	@touch $@

$(VENV)/.lint: $(VENV)/.base pyproject.toml
	$(PIP) install --group lint
	@touch $@

$(VENV)/.types: $(VENV)/.base pyproject.toml
	$(PIP) install --group test --group types -e '.[all]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base pyproject.toml
	$(PIP) install --group docs -e .
	@touch $@

$(VENV)/.bench: $(VENV)/.base pyproject.toml
	$(PIP) install --group bench -e '.[all]'
	@touch $@

$(VENV)/.mutate: $(VENV)/.base pyproject.toml
	$(PIP) install --group test --group mutate -e '.[all]'
	@touch $@

# -- work --------------------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo
	@$(BIN)/resilient demo $(ARGS)

test: $(VENV)/.test
	$(if $(WHEEL),rm -rf $(VENV)/tree && mkdir $(VENV)/tree && cp -R $(TREE) $(VENV)/tree)
	@cd $(if $(WHEEL),$(VENV)/tree,.) && rm -f .coverage .coverage.* && \
	$(if $(COVER),\
	$(BIN)/python -m coverage run -m pytest $(ARGS) && \
	$(BIN)/python -m coverage combine --quiet && \
	$(BIN)/python -m coverage report --fail-under=$(COVER),\
	$(BIN)/python -m pytest $(ARGS))

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

soak: $(VENV)/.test
	$(BIN)/python -m tests.soak $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.types
	$(BIN)/mypy --python-executable $(BIN)/python
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

mutate: $(VENV)/.mutate
	$(BIN)/mutmut run $(ARGS)
	@$(BIN)/mutmut export-cicd-stats >/dev/null
	@$(BIN)/python -m tests.mutants

clean:
	rm -rf .venv .venv-* build dist site mutants .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
