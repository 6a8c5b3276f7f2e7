# What there is to do here. `make` alone lists it; CI calls the same verbs.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The newest Python of 3.11 to 3.13 that starts (a name on the PATH may be a shim for a version that is not there).
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3 python; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$name && break; done)
# Extra arguments of `run`, `demo`, `test` and `docker-steps`.
ARGS ?=
# quick: about half an hour; full: every shape, more repeats.
BENCH ?= quick
CODE := kvcore server loadgen client/kvserve tests scripts
PROTOS := $(wildcard protos/kvserve/v1/*.proto)
# Stubs that no client gets: a second copy of the protocol could not be loaded beside a client's own.
SERVER_PROTOS := $(wildcard protos/server/rpc/oip/*.proto)

.PHONY: help
help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP)  ## make .venv and install everything into it (PYTHON=... picks the interpreter)

$(STAMP): pyproject.toml client/pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo 'Python 3.11, 3.12 or 3.13 is needed and none was found; name one with PYTHON=...' >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./client -e '.[dev]'
	@touch $@

.PHONY: run
run: install  ## start the server on the built-in model (ARGS='--port 50052 ...')
	$(BIN)/kvserve serve $(ARGS)

.PHONY: demo
demo: install  ## in another terminal: three prompts with one shared system prompt, streamed
	$(BIN)/python scripts/demo.py $(ARGS)

# Two files at a time, in the order of the folders: the long ones, which start servers, come first.
TEST_WORKERS := $(if $(findstring no:xdist,$(ARGS)),,-n 2 --dist loadfile --no-loadscope-reorder)

.PHONY: test
test: install  ## run the tests, two files at a time (ARGS='-k tree'; ARGS='-n 0': one after another)
	$(BIN)/python -m pytest $(TEST_WORKERS) $(ARGS)

.PHONY: lint
lint: install  ## check style, types, and that the generated stubs are what protoc makes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)
	$(BIN)/python -m pytest -q tests/unit/test_stubs.py

.PHONY: format
format: install  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: protos
protos: install  ## make the generated stubs anew
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=client --pyi_out=client --grpc_python_out=client $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. --grpc_python_out=. $(SERVER_PROTOS)

.PHONY: bench
bench: install  ## measure against peers and limits, into reports/ (BENCH=full: everything; ARGS="--only ...": a part)
	$(BIN)/python -m loadgen.bench --$(BENCH) $(ARGS)

.PHONY: model
model: install  ## train the built-in model anew (about half an hour)
	$(BIN)/python scripts/train_builtin.py --out server/worker/builtin

.PHONY: docker-steps
docker-steps:  ## run the Dockerfile's steps in a temporary folder, without a container engine
	$(PYTHON) scripts/docker_steps.py $(ARGS)

.PHONY: clean
clean:  ## remove what was built, measured and cached here, .venv included
	rm -rf $(VENV) build dist reports .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -print0 | xargs -0 rm -rf
