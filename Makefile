# Every target uses one virtual environment, .venv, made on first use with the versions of constraints.txt.
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test check format format-check lint types layers audit update clean

PYTHON ?= python3
# Where the CPU build of torch is: PyPI's own brings gigabytes of CUDA along. Left out where it cannot be reached, or with
# `make TORCH_INDEX= ...`, which takes what pip's own indexes offer.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Test processes; each computes on one thread.
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt
# pip's talk, cut down to a line for every ten packages (and without a line for each package that a local index lacks).
BRIEFLY := 2> >(grep -v '^WARNING: Location .* is ignored' >&2) | awk '\
	/^Collecting/ {n++; if (n % 10 == 1) {print "  fetching " $$2 " ..."; fflush()}} \
	/^Installing collected/ {print "  installing " NF - 3 " packages ..."; fflush()}'

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mechmerge needs Python 3.11 or newer; found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 2; }
	@echo "== making .venv with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "== installing torch"
	@index=; if [ -n "$(TORCH_INDEX)" ] && $(PYTHON) -c 'import sys, urllib.request; \
		urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10)' "$(TORCH_INDEX)" 2> /dev/null; \
		then index="--extra-index-url $(TORCH_INDEX)"; fi; $(PIP) $$index torch $(BRIEFLY)
	@echo "== installing mechmerge and its tools"
	@$(PIP) -e '.[dev]' $(BRIEFLY)
	@touch $@

demo: $(READY) ## Run the whole pipeline on SmolLM2-135M (about half an hour on two cores; again: under a minute)
	@$(BIN)/mechmerge demo

test: $(READY) ## Run all tests, those on the real SmolLM2 included
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: format-check lint types layers test ## Everything that CI runs

format: $(READY) ## Rewrite the code in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix-only --quiet .

format-check: $(READY)
	@$(BIN)/ruff format --check .

lint: $(READY) ## ruff
	@$(BIN)/ruff check .

types: $(READY) ## mypy, strict
	@$(BIN)/mypy

layers: $(READY) ## import-linter: layers point one way
	@$(BIN)/lint-imports

audit: $(READY) ## Known vulnerabilities, licences and a bill of materials of what we depend on (says what it could not check)
	@$(BIN)/python .ci/audit.py

update: ## Resolve all dependencies anew and write constraints.txt
	@PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) .ci/update

clean: ## Remove the virtual environment, caches and builds (runs and the model cache stay)
	@rm -rf .venv .audit dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
