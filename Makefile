# `make PYTHON=python3.12 TARGET` makes the virtual environment with another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: .venv/.installed ## Make .venv with the package and everything to develop it
.venv/.installed: requirements-dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON). Name a Python of 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Pronghorn needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	    "Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

.PHONY: demo
demo: install ## Walk through the API with a server of its own, with curl and with the OpenAI SDK
	@$(BIN)/python examples/demo.py

.PHONY: serve
serve: install ## Start the server on http://127.0.0.1:8080
	@$(BIN)/pronghorn serve

.PHONY: test
test: install ## Run the tests, two files at a time: most of them wait
	$(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: test-compat
test-compat: install ## Run the tests of the official OpenAI client with the one of a year ago
	tests/compat/run

.PHONY: faults-tools
faults-tools: ## Install the Debian packages that the test beds of tests/faults need (root)
	@for tool in faketime mkfs.ext4; do command -v $$tool >/dev/null || missing=$$tool; done; \
	  [ -z "$$missing" ] || { apt-get update -q && apt-get install -y -q faketime e2fsprogs; }

# SCALE=long takes many hours; BEDS="power storm" runs only these; SEED=N repeats a run that printed N.
.PHONY: faults
faults: install faults-tools ## Run the test beds of tests/faults, for about an hour (root)
	CI=true $(BIN)/python -m pytest -s $(if $(BEDS),$(BEDS:%=tests/faults/test_%.py),tests/faults) --timeout 7200 \
	  --scale $(or $(SCALE),ci) $(if $(SEED),--seed $(SEED))

.PHONY: lint
lint: install ## Check style, types and layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

.PHONY: bench-tools
bench-tools: ## Install the Debian packages that the benchmarks need (root)
	@for tool in nginx wrk; do PATH="$$PATH:/usr/sbin" command -v $$tool >/dev/null || missing=$$tool; done; \
	  [ -z "$$missing" ] || { apt-get update -q && apt-get install -y -q nginx-light wrk; }

# make bench SCALE=smoke shows in two minutes that it works, SCALE=quick measures less; both only print.
.PHONY: bench
bench: install bench-tools ## Run the benchmarks, in a quarter of an hour; the page and its picture go to docs
	$(BIN)/python -m bench.suite $(if $(SCALE),--scale $(SCALE),--to docs)

.PHONY: bench-peers
bench-peers: install bench-tools ## Do the same work through other batch servers; installs them first (Python 3.12 or newer)
	$(BIN)/python -m bench.peers --to docs

.PHONY: bench-dispatch
bench-dispatch: install bench-tools ## Measure how fast lines go through one worker on one core, in half a minute
	$(BIN)/python -m bench.dispatch

.PHONY: bench-stages
bench-stages: install bench-tools ## Show where the microseconds of a line go, stage by stage
	$(BIN)/python -m bench.stages

.PHONY: bench-embedded
bench-embedded: install ## Compare the whole pipeline with a bare client on the embedded engine
	$(BIN)/python -m bench.embedded --lines 500

.PHONY: clean
clean: ## Delete caches, build results and the demo's data; .venv stays
	rm -rf .demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} +
