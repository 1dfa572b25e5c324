# Every target sets up what it needs: a virtual environment with the versions of pyproject.toml, made once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cksum pyproject.toml | cut -d' ' -f1)
ARGS ?=
# Processes that tests run in; 0: in that of make alone.
WORKERS ?= 2
SEEDS ?= 0,1,2,3,4
CIFAR10 ?= data/cifar10

.PHONY: help setup train eval test test-all check format clean benchmark reproduce-cifar10
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP)  ## Make .venv and install the pinned versions

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fewtokens needs Python >= 3.11; found $$($(PYTHON) --version). Set PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	rm -f $(VENV)/.installed-*
	touch $@

train: $(STAMP)  ## Train on the embedded digits (ARGS="data=cifar10 ..." for anything else)
	$(BIN)/python train.py $(ARGS)

eval: $(STAMP)  ## Evaluate: make eval ARGS="checkpoint=outputs/digits/<time>"
	$(BIN)/python eval.py $(ARGS)

test: $(STAMP)  ## The tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) $(ARGS)

test-all: $(STAMP)  ## All tests
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(STAMP)  ## Format, lint, types, import contract, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) test

format: $(STAMP)  ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(STAMP)  ## Input speed and training-step overhead, as ratios
	$(BIN)/python -m fewtokens.benchmarks.image_input $(if $(wildcard $(CIFAR10)),--root $(CIFAR10),--generated)
	$(BIN)/python -m fewtokens.benchmarks.train_step

reproduce-cifar10: $(STAMP)  ## The Keras example's table (SEEDS=0,1,2,3,4 CIFAR10=<folder>); goes on where it stopped
	$(BIN)/python -m fewtokens.benchmarks.keras_table --seeds $(SEEDS) --root $(CIFAR10) $(ARGS)

clean:  ## Remove .venv and caches; outputs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
