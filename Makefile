# Every target that needs Python makes .venv from constraints.txt first, when it is missing or stale.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

# The models under test are small and two workers run side by side: one thread each.
TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test check laws mutants models docs demo-target clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.base ## plain generate and every method on the bundled model, with a table
	$(BIN)/specdec demo

test: .venv/.dev ## the test suite without the slow grids
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 tests -m "not slow"

laws: .venv/.dev ## the law suite with its full grids (slow)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 tests/laws tests/hf/test_long.py

mutants: .venv/.dev ## plants known faults; a test must catch each (ARGS="--only NAME", "--list")
	$(TEST_ENV) PYTHONPATH=tests $(BIN)/python -m mutants.run $(ARGS)

models: .venv/.dev ## every causal LM class of transformers, built tiny: writes docs/models.md (slow)
	$(TEST_ENV) $(BIN)/python tests/sweep/run.py --write docs/models.md $(ARGS)

check: .venv/.dev ## lint, format, types, import direction and size limits
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest tests/architecture

docs: .venv/.docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

demo-target: .venv/.base ## train the bundled model again from scratch
	$(BIN)/python -m specdec.demo.build_target

clean: ## remove build products and caches (keeps .venv)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Stamps: one per set of dependencies.
.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.base
	$(PIP) -e ".[dev]"
	@touch $@

.venv/.docs: .venv/.base
	$(PIP) -e ".[docs]"
	@touch $@
