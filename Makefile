# Works with GNU make 3.81 and newer. All tools run in .venv, which scripts/setup.py creates and keeps up to date.

ifndef PYTHON
PYTHON := $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$python"; break; fi; done)
ifeq ($(PYTHON),)
PYTHON := python3
endif
endif

ifeq ($(OS),Windows_NT)
VENV_PYTHON := .venv/Scripts/python.exe
else
VENV_PYTHON := .venv/bin/python
endif

# The prompt reaches the demo through the environment, so that neither make nor the shell expands it. The PROMPT
# variable of Windows' command interpreter is ignored.
ifneq ($(OS)/$(origin PROMPT),Windows_NT/environment)
override PROMPT := $(value PROMPT)
export PROMPT
else
override PROMPT :=
endif

.DEFAULT_GOAL := help
.PHONY: help setup run-setup lock-setup demo check test test-all test-grpcio soak lint protos lock build bench bench-check clean

help:  ## list the targets
	@echo "engine-plugin: a local AI engine under an orchestrator's control"
	@echo
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup:  ## create .venv with everything that development needs (PYTHON=python3.12 selects the Python)
	@"$(PYTHON)" scripts/setup.py dev

run-setup:
	@"$(PYTHON)" scripts/setup.py run

lock-setup:
	@"$(PYTHON)" scripts/setup.py lock

demo: run-setup  ## show all services at work (PROMPT="Tell me a story" changes the question)
	@$(VENV_PYTHON) scripts/demo.py $${PROMPT:+"$$PROMPT"}

# Fast tests with wide coverage; few of them start processes.
FAST := tests/services tests/manifest tests/server tests/models tests/transport tests/openai_api tests/system tests/engines/test_*.py \
	tests/engines/openvino/models tests/test_*.py --ignore-glob 'tests/models/test_hub*.py' --ignore tests/models/discovery

check: lint  ## check style and types, and run the fast tests, within a minute (ARGS="tests/cli" selects others)
	@$(VENV_PYTHON) -m pytest -q -n auto --dist loadfile -m "not slow and not thorough" $(or $(ARGS),$(FAST))

# tests/conftest.py says how many workers there are, and which files come first.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

test: setup  ## run all tests but the thorough ones (ARGS="tests/goplugin -k handshake" selects)
	@$(VENV_PYTHON) -m pytest $(or $(ARGS),$(PARALLEL) -m "not thorough")

test-all: export EXAMPLES := 150
test-all: setup  ## run all tests, with three times as many generated examples
	@$(VENV_PYTHON) -m pytest $(PARALLEL)

# What speaks gRPC.
RPC := tests/server tests/goplugin tests/host tests/rpc tests/abuse/test_rpc.py

test-grpcio: export ENGINE_PLUGIN_GRPC := grpcio
test-grpcio: setup  ## run the tests of gRPC over grpcio, in place of the native implementation
	@$(VENV_PYTHON) -m pytest $(PARALLEL) $(RPC)

soak: setup  ## run the plugin under load with failing engines for three minutes (ARGS="--engine ollama --minutes 60")
	@$(VENV_PYTHON) -m tests.soak $(ARGS)

lint: setup  ## check style and types
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

protos: setup  ## regenerate the protobuf stubs, Go's too where Go is installed
	@$(VENV_PYTHON) scripts/protos.py $$(command -v go >/dev/null 2>&1 && echo --go)

lock: lock-setup  ## pin the dependencies of pyproject.toml in constraints.txt (ARGS=--upgrade takes the newest)
	@$(VENV_PYTHON) scripts/lock.py $(ARGS)

build: setup  ## write the plugin directories for a host to dist/plugins/
	@$(VENV_PYTHON) scripts/build.py $(ARGS)

bench: setup  ## run the benchmarks (ARGS="--peer DIRECTORY" measures another plugin for Ollama beside ours)
	@$(VENV_PYTHON) -m benchmarks $(ARGS)

bench-check: setup  ## fail when the plugin is far slower, compared with the engine, than in benchmarks/baseline.json
	@$(VENV_PYTHON) -m benchmarks --check --rounds 4 $(ARGS)

clean:  ## remove all generated files, .venv included
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
