# The commands of the project. `make help` lists them; on a fresh machine each makes what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PEERS := .venv-peers
KRONFLUENCE := .venv-kronfluence
BIN := $(VENV)/bin
# The stamps say which environments are complete; they are redone when what they install changes.
READY := $(VENV)/.ready
PEERS_READY := $(PEERS)/.ready
KRONFLUENCE_READY := $(KRONFLUENCE)/.ready
# Two processes, a file at a time, so that each real cluster of the tests is started once; one
# thread each, because torch's threads spin against those of the workers.
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: help
help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): minutes the first time"
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[demo,deploy,lint,test]'
	@# for its schemas alone: what it needs to run is no part of the tested set
	$(BIN)/python -m pip install -qq --constraint constraints.txt --no-deps dask-kubernetes
	touch $@

$(PEERS_READY): tests/benchmarks/peers-requirements.txt tests/benchmarks/peers-constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@echo "installing into $(PEERS): minutes the first time"
	$(PEERS)/bin/python -m pip install -qq --constraint tests/benchmarks/peers-constraints.txt \
	    --requirement tests/benchmarks/peers-requirements.txt
	touch $@

$(KRONFLUENCE_READY): tests/benchmarks/kronfluence-requirements.txt tests/benchmarks/kronfluence-constraints.txt
	test -x $(KRONFLUENCE)/bin/python || $(PYTHON) -m venv $(KRONFLUENCE)
	@echo "installing into $(KRONFLUENCE): minutes the first time"
	$(KRONFLUENCE)/bin/python -m pip install -qq --constraint tests/benchmarks/kronfluence-constraints.txt \
	    --requirement tests/benchmarks/kronfluence-requirements.txt
	touch $@

.PHONY: demo
demo: $(READY) ## train on digits, score on a local Dask cluster, draw what was found (demo-output/)
	$(BIN)/python examples/digits_demo.py

.PHONY: test
test: lint ## style, types, layers, doctests and tests: what has to pass before a change lands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

.PHONY: test-s3
test-s3: $(READY) ## runs to an S3 server that enforces credentials, goes away and comes back
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[s3,test]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/s3/suite.py

.PHONY: test-deploy
test-deploy: $(READY) ## build the image and run the manifests' pods as containers, with faults (root; Debian)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[s3,test]'
	@command -v dockerd mmdebstrap iptables > /dev/null \
	    || { apt-get update -qq && apt-get install -qq --yes --no-install-recommends docker.io mmdebstrap iptables; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s --timeout 1800 tests/deploy/suite.py

.PHONY: test-report
test-report: $(READY) ## look at reports in a real headless browser: light, dark, wide, narrow, by keyboard (root; Debian)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[browser,report,test]'
	@{ command -v chromium && command -v chromedriver; } > /dev/null || { apt-get update -qq \
	    && apt-get install -qq --yes --no-install-recommends chromium chromium-driver fonts-liberation; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/report/suite.py

.PHONY: test-faults
test-faults: $(READY) ## kill, cut, fill and damage what a run stands on, at random, and see that nothing is lost (as root: all of it)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[s3,test]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.suite --scenarios $(or $(SCENARIOS),100) --seed $(or $(SEED),0)

.PHONY: docs
docs: $(READY) ## the reference from README and docstrings, every link checked (build/docs/html/index.html)
	$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python .ci/docs/build.py build/docs

.PHONY: lint
lint: $(READY) ## style, types and layers alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

.PHONY: format
format: $(READY) ## put the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(READY) $(PEERS_READY) $(KRONFLUENCE_READY) ## everything that has a target beside its peer or floor, one table (25 minutes; goes on where it was; BENCH=--quick)
	$(BIN)/python tests/benchmarks/bench.py --pydvl-python $(PEERS)/bin/python \
	    --kronfluence-python $(KRONFLUENCE)/bin/python $(BENCH)

.PHONY: bench-estimators
bench-estimators: $(READY) $(PEERS_READY) $(KRONFLUENCE_READY) ## time every estimator beside pyDVL and kronfluence (half an hour)
	$(BIN)/python tests/benchmarks/estimators.py --pydvl-python $(PEERS)/bin/python \
	    --kronfluence-python $(KRONFLUENCE)/bin/python

.PHONY: bench-cluster
bench-cluster: $(READY) ## bytes through the scheduler and memory of workers, of a fit and a run
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/cluster_costs.py

.PHONY: bench-memory
bench-memory: $(READY) ## peak memory of workers, client and scheduler against the plan (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/worker_memory.py

.PHONY: bench-report
bench-report: $(READY) ## size, time and memory of a report about 10,000 × 1,000,000 scores
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/report_size.py

.PHONY: accuracy
accuracy: $(READY) ## compare scores on digits with the effect of training again (minutes; again: it goes on where it was)
	$(BIN)/dask-influence validate examples/digits_logistic.yaml
	$(BIN)/dask-influence validate examples/digits_network.yaml

.PHONY: clean
clean: ## remove caches and outputs, not the environments
	rm -rf demo-output example-output build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
	find dask_influence tests examples -name __pycache__ -prune -exec rm -rf {} +
