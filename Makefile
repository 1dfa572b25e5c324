# Every target first makes a virtual environment with the versions of pyproject.toml, if it does not exist.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cksum pyproject.toml | cut -d' ' -f1)
DEMO_STAMP := $(subst .installed,.demo,$(STAMP))
ARGS ?=
# Number of test processes; 0 runs the tests in a single process.
WORKERS ?= 2
SEEDS ?= 0,1,2,3,4
CIFAR10 ?= data/cifar10
# make gpu uses an environment that is there, since machines with GPUs come with their own torch.
GPU_PYTHON ?= PYTHONPATH=$(CURDIR)/src python3
OLDEST ?= .venv-oldest

.PHONY: help setup train eval demo test test-all test-oldest check docs docs-serve gpu setup-cluster test-cluster format clean benchmark reproduce-cifar10
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

demo: $(DEMO_STAMP)  ## The demo in the browser (ARGS="checkpoint=outputs/digits/<time>"); trains a model if there is none
	$(BIN)/python -m fewtokens.demo $(ARGS)

$(DEMO_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	rm -f $(VENV)/.demo-*
	touch $@

test: $(STAMP)  ## The tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) $(ARGS)

test-all: $(STAMP)  ## All tests
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(STAMP)  ## Format, lint, types, import contract, documentation, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs
	$(MAKE) test

# The variable silences mkdocs-material's advertisement of its successor.
docs: $(STAMP)  ## Build the documentation into site/; a dead link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file .mkdocs.yml --strict

docs-serve: $(STAMP)  ## Show the documentation on this machine while it is edited
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --config-file .mkdocs.yml

gpu:  ## Tests, speed and a short training on a GPU, in the current environment (ARGS="smoke=true" on a CPU)
	$(GPU_PYTHON) -m fewtokens.benchmarks.gpu $(ARGS)

test-oldest: $(OLDEST)/.installed  ## The tests with the oldest supported torch, in an environment of its own
	PYTHONPATH=$(CURDIR)/src $(OLDEST)/bin/python -m pytest -m "not slow" -n $(WORKERS) $(ARGS)

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0 torchvision==0.26.0
	$(OLDEST)/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  extra = p['optional-dependencies']; own = ('torch==', 'torchvision==', 'fewtokens'); \
	  print(*(d for d in p['dependencies'] + extra['export'] + extra['search'] + extra['dev'] if not d.startswith(own)), sep='\n')" \
	  | $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
	touch $@

setup-cluster: $(STAMP)  ## Install SLURM and what else make test-cluster needs from Debian's packages (as root)
	apt-get update -qq
	apt-get install -y --no-install-recommends slurm-wlm slurmd slurmctld slurm-client munge iproute2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[slurm]'

test-cluster: $(STAMP)  ## Jobs of SLURM, two hosts, restarts and killed processes, on this machine (as root)
	$(BIN)/python -m fewtokens.benchmarks.cluster $(ARGS)

format: $(STAMP)  ## Format the code and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(STAMP)  ## Speed of the image input and overhead of the training step, as ratios
	$(BIN)/python -m fewtokens.benchmarks.image_input $(if $(wildcard $(CIFAR10)),--root $(CIFAR10),--generated)
	$(BIN)/python -m fewtokens.benchmarks.train_step

reproduce-cifar10: $(STAMP)  ## The Keras example's table (SEEDS=0,1,2,3,4 CIFAR10=<folder>); continues an interrupted run
	$(BIN)/python -m fewtokens.benchmarks.keras_table --seeds $(SEEDS) --root $(CIFAR10) $(ARGS)

clean:  ## Remove .venv, site/ and caches; outputs/ and data/ stay
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
