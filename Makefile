# Loupe: the commands of a working day. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ROOT   ?= loupe-data
# Processes that share the tests' files out, the slow ones first: most tests use one core, and many wait for servers.
TESTERS ?= 2
STAMP  := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

# No telemetry from any library, and Ray workers find the environment's programs.
export RAY_USAGE_STATS_ENABLED := 0
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export HF_HUB_DISABLE_TELEMETRY := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

STUDY := dci single sti sci global-only mixture alternating authors-runs selector learnable-selector int8 pooled

.PHONY: help install demo study test test-fast test-all check format bench golden clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Loupe needs Python >= 3.11, found " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v uv > /dev/null; then \
	  UV_FIND_LINKS="$${PIP_FIND_LINKS:-}" VIRTUAL_ENV=$(CURDIR)/$(VENV) uv pip install --quiet -e '.[dev]' -c constraints.txt; \
	else \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt; \
	fi
	@rm -f $(VENV)/.installed-*
	@touch $@

install: $(STAMP)  ## create .venv with the pinned versions (the others do it by themselves)

demo: $(STAMP)  ## the whole path on the demo recipe: ten minutes and more on two cores, seconds when it is all there
	$(BIN)/loupe run demo --root $(ROOT)

study: $(STAMP)  ## the component study, into ROOT/study: twelve recipes, three seeds each, hours; goes on where it stopped
	for recipe in $(STUDY); do $(BIN)/loupe run components/$$recipe --root $(ROOT)/study; done
	for pair in "dci single" "dci sci" "single sti" "dci mixture" "dci global-only" "dci selector" "dci learnable-selector" "dci int8" "dci pooled" \
	  "mixture alternating" "mixture authors-runs"; do \
	  set -- $$pair; $(BIN)/loupe compare components/$$1 components/$$2 --root $(ROOT)/study; \
	done

test: $(STAMP)  ## all tests of a working day, six minutes to twenty, by the machine
	$(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)  ## the tests that start no servers, a minute to five, by the machine
	$(BIN)/python -m pytest --numprocesses $(TESTERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(STAMP)  ## also the tests that train for minutes
	$(BIN)/python -m pytest -m "heavy or not heavy"

check: $(STAMP)  ## style, types, docstrings, direction of imports
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py

format: $(STAMP)  ## put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## measure what the documents claim
	$(BIN)/python -m pytest -m benchmark -s --jaxtyping-packages=

golden: $(STAMP)  ## write the golden files anew and show what changed
	LOUPE_WRITE_GOLDEN=1 $(BIN)/python -m pytest -m golden
	git --no-pager diff --stat -- tests/golden

clean:  ## delete caches and build leftovers (not .venv, not $(ROOT))
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find model workers pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +
