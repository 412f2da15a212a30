# The verbs of Ekiben. CI calls the same ones. `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
WORKERS ?= 2
PLATFORM ?= local
OVERLAY ?= k8s/overlays/dev
IMAGES ?=
KINDS ?=
LOCKS := $(wildcard bentos/*/requirements.in)

.PHONY: help setup demo up down images cluster-up cluster-down e2e test test-all conformance lint lock outdated openapi train examples bench bench-build bench-upload bench-uploads bench-serve bench-models bench-cluster clean

help: ## list the verbs
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# The environment is made once and again whenever a lock moves.
setup: $(VENV)/.ready ## make the project's own environment (.venv) from the lock

$(VENV)/.ready: requirements.lock pyproject.toml client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Ekiben needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if command -v uv >/dev/null; then UV=uv; else test -x $(UV) || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; UV=$(UV); fi; \
	  echo "setting up .venv …"; \
	  $$UV pip sync --quiet --python $(BIN)/python requirements.lock && \
	  $$UV pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e . -e client
	@touch $@

demo: setup ## the whole way of a model, on this machine, in about a minute
	@$(BIN)/python -m scripts.demo

ON_KUBERNETES := $(filter kubernetes,$(PLATFORM))

up: setup ## start the service in the background; PLATFORM=kubernetes: on the cluster of your kubeconfig
	@$(BIN)/$(if $(ON_KUBERNETES),python -m scripts.kubernetes up --overlay $(OVERLAY) $(addprefix --images ,$(IMAGES)) $(ARGS),ekiben up)

down: setup ## stop it (PLATFORM=kubernetes likewise)
	@$(BIN)/$(if $(ON_KUBERNETES),python -m scripts.kubernetes down --overlay $(OVERLAY) $(ARGS),ekiben down)

images: setup ## the images of a cluster's parts (ARGS="--push HOST:PORT"; default: layouts in .images)
	@$(BIN)/python -m scripts.images $(ARGS)

test: setup ## every test that needs no root and no server from outside (WORKERS=2, ARGS=…)
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile $(ARGS)

test-all: setup ## the same and every kind in every place but the cluster (twice as long)
	@$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile -m "not cluster" $(ARGS)

conformance: setup ## every kind in process, under bentoml serve, on the local platform and in the cluster (root, as e2e)
	@$(BIN)/python -m tests.cluster build && \
	  $(BIN)/python -m pytest -m "cluster or not cluster" tests/bentos/test_conformance.py tests/build_service/test_kinds.py tests/cluster/test_kinds.py $(ARGS)

cluster-up: setup ## a real Kubernetes of one node on this machine, from packages only (root; the first time takes long)
	@$(BIN)/python -m tests.cluster up $(ARGS)

cluster-down: setup ## take it away, and all that it made
	@$(BIN)/python -m tests.cluster down $(ARGS)

# KUBECONFIG of the command line only: an exported one may be of a cluster that no test should touch.
e2e: setup ## the tests that need a Kubernetes: that of cluster-up, or KUBECONFIG=…
	@$(if $(filter command line,$(origin KUBECONFIG)),,$(BIN)/python -m tests.cluster build &&) \
	  EKIBEN_E2E_KUBECONFIG='$(if $(filter command line,$(origin KUBECONFIG)),$(KUBECONFIG))' \
	  $(BIN)/python -m pytest -m cluster tests/cluster $(ARGS)

lint: setup ## ruff, mypy, import-linter, and that generated files are current
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m scripts.generated --check

lock: ## resolve every lock again, once a month (needs the package index)
	@$(BIN)/python -m scripts.generated --locks

outdated: setup ## list what is out of date in the locks, and what holds it back (needs the package index)
	@$(BIN)/python -m scripts.outdated

openapi: setup ## write docs/openapi.json
	@$(BIN)/python -m scripts.generated --write

train: setup ## train every task kind and print one table (KINDS="ranker forecast", ARGS="--small --register URL --gate")
	@$(BIN)/python -m scripts.train $(KINDS) -- $(ARGS)

examples: setup ## a small real model in each kind's folder, for `bentoml serve` there
	@for kind in $(patsubst bentos/%/example.py,%,$(wildcard bentos/*/example.py)); do $(BIN)/python -m bentos.$$kind.example bentos/$$kind/model; done

bench: setup ## every figure of the README, into benchmarks/report.json (ARGS=--quick to see that all work)
	@$(BIN)/python -m benchmarks.run $(ARGS)

bench-build: setup ## the figures of builds and images alone
	@$(BIN)/python -m benchmarks.run build $(ARGS)

bench-upload: setup ## the figures of large uploads alone
	@$(BIN)/python -m benchmarks.run upload $(ARGS)

bench-uploads: setup ## the figures of hostile uploads alone
	@$(BIN)/python -m benchmarks.run uploads $(ARGS)

bench-serve: setup ## the figures of version changes alone
	@$(BIN)/python -m benchmarks.run serve $(ARGS)

bench-models: setup ## the figures of every kind: quality, speed, memory, image (not part of `bench`)
	@$(BIN)/python -m benchmarks.run models $(ARGS)

bench-cluster: setup ## the figures of a real Kubernetes, which is brought up for them (root; not part of `bench`)
	@$(BIN)/python -m benchmarks.run cluster $(ARGS)

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
