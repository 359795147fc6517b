# Every target that needs Python makes .venv from constraints.txt first, when it is missing or stale.

PYTHON ?= python3
BIN := .venv/bin
# Python compiles what it imports, and keeps it; pip would compile all of torch: half the install.
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check -q -c constraints.txt

# The models under test are small and two workers run side by side: one thread each. Where Python is
# told not to keep what it compiles, every process under test would compile torch anew.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

.DEFAULT_GOAL := help
.PHONY: help demo train-demo bench-smoke test test-kernels compat compat-triton check laws mutants \
	attack fuzz models docs demo-target demo-head clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.base ## plain generate and every method on the bundled model, with a table
	$(BIN)/specdec demo

train-demo: .venv/.train ## prepare, train and use an EAGLE-3 head for the bundled model (a quarter of an hour)
	$(TEST_ENV) $(BIN)/specdec data regenerate --input demo --limit 2000 --min-lines 2 --max-lines 10 \
		--max-new-tokens 192 --batch-size 48 --drop-loops --output runs/demo-data/answers.jsonl
	$(TEST_ENV) $(BIN)/specdec data prepare --input runs/demo-data/answers.jsonl --draft-vocab 1920 \
		--max-length 512 --held-out 24 --held-out-input demo-held-out --min-lines 4 --max-lines 12 \
		--output runs/demo-data/prepared --overwrite
	$(TEST_ENV) $(BIN)/specdec train --data runs/demo-data/prepared --output runs/demo-head --minutes 8 \
		--ttt-steps 3 --fc-norm --feed-post-norm --threads 1
	$(TEST_ENV) $(BIN)/specdec generate --prompt "class Stack:" --max-new-tokens 64 --stats \
		--method eagle3 --option draft=runs/demo-head/head --option depth=16 --option top_k=1 \
		--option confidence_threshold=0.01

bench-smoke: .venv/.base ## a small benchmark of the bundled model, with its report in runs/ (a minute)
	$(TEST_ENV) $(BIN)/specdec bench run --tasks smoke --output runs/bench/smoke.jsonl --overwrite
	$(TEST_ENV) $(BIN)/specdec bench report runs/bench/smoke.jsonl --output runs/bench/smoke

test: .venv/.dev ## the test suite without the slow grids
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 tests -m "not slow"

# Triton's interpreter replaces its compiler for a whole process, so each has one. What the compiler
# made is kept by a hash of the sources, of Triton and of the target.
KERNEL_ENV := $(TEST_ENV) OPENBLAS_NUM_THREADS=1 TRITON_CACHE_DIR=build/triton
KERNEL_TESTS := -m pytest -n 2 -p no:cacheprovider --confcutdir=tests/kernels

test-kernels: .venv/.dev ## the kernels in Triton's interpreter, then compiled for GPUs that are not here
	$(KERNEL_ENV) TRITON_INTERPRET=1 $(BIN)/python $(KERNEL_TESTS) tests/kernels/interpreted
	$(KERNEL_ENV) $(BIN)/python $(KERNEL_TESTS) tests/kernels/compiled
	$(KERNEL_ENV) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/laws/test_kernels.py \
		-m "not slow" -k test_text

laws: .venv/.dev ## the law suite with its full grids, and every other slow test (hours)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 tests/laws tests/hf/test_long.py
	$(KERNEL_ENV) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/laws/test_kernels.py -m slow
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 tests/hf tests/unit tests/training tests/heads tests/mutants -m slow

mutants: .venv/.dev ## plants known faults; a test must catch each (ARGS="--only NAME", "--list")
	$(TEST_ENV) PYTHONPATH=tests $(BIN)/python -m mutants.run $(ARGS)

attack: .venv/.dev ## hostile input of every kind to every command, each in a fork (ARGS="--kind name --show")
	$(TEST_ENV) PYTHONPATH=tests $(BIN)/python -m attack.run $(ARGS)

models: .venv/.dev ## every causal LM class of transformers, built tiny: writes docs/models.md (slow)
	$(TEST_ENV) $(BIN)/python tests/sweep/run.py --write docs/models.md $(ARGS)

# Oldest, what vLLM pins, the last one with the cache's old names, and the newest.
RELEASES := 5.16.0 5.19.0 5.23.0 5.24.0

compat: $(RELEASES:%=compat-%) compat-triton ## seam tests and fast laws on each tested transformers, in venvs of their own

compat-%: .compat/%/.done
	$(TEST_ENV) .compat/$*/bin/python -m pytest -n 2 -m "not slow" -p no:cacheprovider tests/laws \
		tests/hf/test_seam.py tests/hf/test_hf_names.py tests/hf/test_caches.py \
		tests/hf/test_static_cache.py tests/hf/test_chain_calls.py tests/hf/test_chain_caches.py \
		tests/hf/test_outputs.py tests/hf/test_fallthrough.py tests/unit/test_eagle3.py

# What torch 2.13 for CUDA brings on Linux, in a folder that goes before .venv.
OTHER_TRITON := 3.7.1

compat-triton: .venv/.dev .compat/triton-$(OTHER_TRITON)
	PYTHONPATH=.compat/triton-$(OTHER_TRITON) $(KERNEL_ENV) TRITON_INTERPRET=1 $(BIN)/python \
		$(KERNEL_TESTS) tests/kernels/interpreted
	PYTHONPATH=.compat/triton-$(OTHER_TRITON) $(KERNEL_ENV) $(BIN)/python \
		$(KERNEL_TESTS) tests/kernels/compiled

.compat/triton-%: | .venv/.base
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $@ triton==$*

fuzz: .venv/.dev ## random calls of generate against plain (slow; ARGS="--calls 3000 --jobs 2")
	$(TEST_ENV) $(BIN)/python tests/fuzz/run.py $(ARGS)

check: .venv/.dev ## lint, format, types, import direction and size limits
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest tests/architecture

docs: .venv/.docs ## build the documentation into site/
	$(BIN)/mkdocs build --strict

demo-target: .venv/.base ## train the bundled model again from scratch
	$(BIN)/python -m specdec.demo.build_target

demo-head: .venv/.train ## train the bundled head again, longer than train-demo does, in three parts
	$(TEST_ENV) $(BIN)/specdec data regenerate --input demo --limit 2800 --min-lines 2 --max-lines 10 \
		--max-new-tokens 256 --drop-loops --batch-size 48 --output runs/bundled-data/answers.jsonl
	$(TEST_ENV) $(BIN)/specdec data prepare --input runs/bundled-data/answers.jsonl --draft-vocab 1920 \
		--max-length 512 --held-out 24 --held-out-input demo-held-out --min-lines 4 --max-lines 12 \
		--output runs/bundled-data/prepared --overwrite
	$(TEST_ENV) $(BIN)/specdec train --data runs/bundled-data/prepared --output runs/bundled-head \
		--taps 1 --taps 2 --taps 4 --steps 6000 --eval-every 1000 --eval-prompts 12 \
		--patience 0 --fc-norm --feed-post-norm --threads 1
	$(TEST_ENV) $(BIN)/specdec data regenerate --input demo --limit 4600 --min-lines 1 --max-lines 12 \
		--max-new-tokens 256 --drop-loops --batch-size 48 --output runs/bundled-data/more.jsonl
	$(TEST_ENV) $(BIN)/specdec data prepare --input runs/bundled-data/more.jsonl \
		--draft-vocab-of runs/bundled-head/head --max-length 512 \
		--held-out 24 --held-out-input demo-held-out --min-lines 4 --max-lines 12 \
		--output runs/bundled-data/prepared-more --overwrite
	$(TEST_ENV) $(BIN)/specdec train --data runs/bundled-data/prepared-more --output runs/bundled-head-more \
		--init-from runs/bundled-head/head --steps 5600 --lr 0.0018 --eval-prompts 24 --patience 0 --threads 1
	$(TEST_ENV) $(BIN)/specdec data regenerate --input demo --limit 2800 --seed 1 --min-lines 1 --max-lines 16 \
		--max-new-tokens 224 --temperature 0 --drop-loops --batch-size 48 --output runs/bundled-data/greedy.jsonl
	$(TEST_ENV) $(BIN)/specdec data prepare --input runs/bundled-data/more.jsonl \
		--input runs/bundled-data/greedy.jsonl --draft-vocab-of runs/bundled-head/head --max-length 512 \
		--held-out 24 --held-out-input demo-held-out --min-lines 4 --max-lines 12 \
		--output runs/bundled-data/prepared-both --overwrite
	$(TEST_ENV) $(BIN)/specdec train --data runs/bundled-data/prepared-both --output runs/bundled-head-both \
		--init-from runs/bundled-head-more/head --steps 15200 --lr 0.0014 --eval-prompts 24 --eval-every 1500 \
		--patience 0 --threads 1
	$(BIN)/specdec convert runs/bundled-head-both/head specdec/demo/head --dtype bfloat16 --target demo

clean: ## remove build products and caches (keeps .venv)
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Stamps: one per set of dependencies.
.venv/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

# torch for CUDA brings the one Triton that it works with; torch for CPUs brings none.
.venv/.dev: .venv/.base
	$(BIN)/python -c "import triton" 2> /dev/null || $(PIP) "triton==3.9.0; sys_platform == 'linux'"
	$(PIP) -e ".[dev]"
	@touch $@

.venv/.train: .venv/.base
	$(PIP) -e ".[train]"
	@touch $@

# The tested set but for transformers and what a release of it requires.
.compat/%/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .compat/$*
	grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet)==' constraints.txt > .compat/$*/constraints.txt
	.compat/$*/bin/python -m pip install --no-compile --disable-pip-version-check -q \
		-c .compat/$*/constraints.txt -e . "transformers==$*" pytest pytest-xdist pytest-timeout hypothesis peft
	@touch $@

.venv/.docs: .venv/.base
	$(PIP) -e ".[docs]"
	@touch $@
