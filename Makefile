# `make ticket` and `make test` set everything up by themselves; `make help` lists the rest.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
# A file to a worker: what its tests share is made once.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -q
# Else each of some hundred processes of the tests compiles the sources of jax.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help ticket compare structured edge language zeros test test-slow lint types notebooks docs benchmarks release-check clean

help:
	@echo "make ticket      find a lottery ticket on the digits (a minute or two)"
	@echo "make compare     compare all pruning methods on the digits (a few minutes)"
	@echo "make structured  cut channels and layers out of networks (some ten minutes)"
	@echo "make edge        from a trained network to files in int8 (some ten minutes)"
	@echo "make language    prune a toy language model in one pass (less than a minute)"
	@echo "make zeros       which kind of zero is worth it (some fifteen minutes)"
	@echo "make test        lint, types, doctests and the fast tests"
	@echo "make test-slow   all tests, the slow ones too"
	@echo "make notebooks   execute the notebooks whose results are at hand"
	@echo "make docs        the site, in docs/_build/html (some minutes: all of its code runs)"
	@echo "make benchmarks  ratios against what you would use instead (some minutes)"
	@echo "make release-check  build, install and use the wheel, with each extra and with the oldest jax (an hour)"
	@echo "make clean       remove the environment, caches and results"

ticket: $(VENV)/ready
	$(BIN)/python -m experiments.lottery_ticket

compare: $(VENV)/ready
	$(BIN)/python -m experiments.compare_methods

structured: $(VENV)/ready
	$(BIN)/python -m experiments.structured

edge: $(VENV)/ready
	$(BIN)/python -m experiments.edge_deployment

language: $(VENV)/ready
	$(BIN)/python -m experiments.language_model --model toy

zeros: $(VENV)/ready
	$(BIN)/python -m experiments.fast_zeros

test: lint types
	$(PYTEST)

test-slow: lint types
	$(PYTEST) -m "slow or not slow"

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

notebooks: $(VENV)/ready
	@mkdir -p results
	@cd notebooks && for n in *.py; do \
		case $$n in language_model.py) data=smollm2;; *) data=digits;; esac; \
		run=results/$${n%.py}_$$data; \
		if [ $$n != quickstart.py ] && [ -z "$$JAXPRUNE_RESULTS" ] && [ ! -f ../$$run/summary.json ]; then \
			echo "skipped notebooks/$$n: no finished run in $$run; python -m experiments.$${n%.py} makes it"; \
			continue; \
		fi; \
		../$(BIN)/jupytext --to ipynb --execute --output ../results/$${n%.py}.ipynb $$n || exit 1; \
	done

benchmarks: $(VENV)/ready
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.step_overhead
	$(BIN)/python -m benchmarks.events
	$(BIN)/python -m benchmarks.structure
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.parallel_seeds
	$(BIN)/python -m benchmarks.restart
	$(BIN)/python -m benchmarks.training_speed
	$(BIN)/python -m benchmarks.compile
	$(BIN)/python -m benchmarks.layout
	$(BIN)/python -m benchmarks.tpu
	$(BIN)/python -m benchmarks.tpu_blocks
	$(BIN)/python -m benchmarks.post_training
	$(BIN)/python -m benchmarks.compact
	$(BIN)/python -m benchmarks.fpga
	$(BIN)/python -m benchmarks.zeros
	$(BIN)/python -m benchmarks.tflite
	$(BIN)/python -m benchmarks.import_time

# RELEASE=--light leaves out the extras that take gigabytes.
release-check: $(VENV)/ready
	.ci/wheel
	.ci/extras $(RELEASE)
	.ci/oldest
	$(MAKE) docs
	$(PYTEST) -m "slow or not slow" tests/test_docs.py tests/test_libraries.py

# Every page's code runs in it, and the first warning ends it. Pages are dealt out beforehand and take
# from 5 to 40 seconds: four shares are more even than two.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx --jobs 4 --fail-on-warning --fresh-env docs docs/_build/html
	@echo "open docs/_build/html/index.html"

$(VENV)/docs: $(VENV)/ready
	$(BIN)/uv sync --quiet --frozen --inexact --extra dev --extra docs \
		|| $(BIN)/python -m pip install --quiet -e '.[dev,docs]'
	@touch $@

# The lock names the public package index; where that is not reachable, take what there is.
$(VENV)/ready: pyproject.toml uv.lock
	@test -n "$(PYTHON)" || { echo "jaxprune needs Python >= 3.11: make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv sync --quiet --frozen --inexact --extra dev \
		|| $(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-latest docs/_build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis results
