# The project's commands. `make run` and `make test` set everything up by themselves; `make help` lists the rest.
#   PYTHON=/path/to/python3.13   another Python than the one that scripts/find_python.sh finds (its own environment)
#   PROMPT="..."                 what `make run` continues
#   ARGS="..."                   further arguments of pytest, of `make paper` or of `make lock`
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?=
ARGS ?=
PROMPT ?= It was a fine morning, and
VENV := $(if $(PYTHON),.venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'),.venv)
# Programs that XLA compiled for the fast tests stay from one check to the next.
CHECK_CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.xla-cache
PYTEST := -m pytest -n 2 --dist worksteal
# Compiling is what the meshes cost, and each program runs for a second: machine code is made without optimisation. What
# XLA itself does, partitioning and fusion, stays as it is; `make test` serves from meshes with optimised code.
PLAIN_CODE := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"

.PHONY: help
help:  ## lists the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

.PHONY: run
run: $(VENV)/.ready  ## generates text from the shipped checkpoint
	$(VENV)/bin/python main.py generate --prompt "$(PROMPT)" --max_tokens 250 --temperature 0.7 --top_p 0.9 --seed 7

.PHONY: test
test: $(VENV)/.ready  ## everything that needs no torch and no GPU, but for the longest tests of kernels and meshes
	$(VENV)/bin/python $(PYTEST) -m "not kernels and not parallel" $(ARGS)

.PHONY: test-kernels
test-kernels: $(VENV)/.ready  ## interprets and lowers every kernel on every case, and through the engine
	$(VENV)/bin/python $(PYTEST) -m kernels $(ARGS)

.PHONY: test-kernels-ci
test-kernels-ci: $(VENV)/.ready  ## the same with a fifth of the random batches, of every kind
	$(VENV)/bin/python $(PYTEST) -m "kernels and not more_batches" $(ARGS)

.PHONY: test-parallel
test-parallel: $(VENV)/.ready  ## serves models of every family from 2, 4 and 8 virtual devices
	$(PLAIN_CODE) $(VENV)/bin/python $(PYTEST) -m parallel $(ARGS)

.PHONY: test-oracle
test-oracle: $(VENV)/.ready .venv-oracle/.ready  ## compares live with Hugging Face transformers on CPU torch
	SARATHI_ORACLE_PYTHON=$(CURDIR)/.venv-oracle/bin/python $(VENV)/bin/python $(PYTEST) tests/oracle $(ARGS)

.PHONY: test-devices
test-devices: .venv-devices/.ready  ## compiles kernels and model steps for GPUs and TPUs, which need not be there
	.venv-devices/bin/python -m pytest tests/devices --timeout=600 $(ARGS)

.PHONY: golden
golden: $(VENV)/.ready .venv-oracle/.ready  ## makes the golden values of tests/golden anew
	SARATHI_ORACLE_PYTHON=$(CURDIR)/.venv-oracle/bin/python $(VENV)/bin/python -m tests.oracle.make_golden

.PHONY: test-jax
test-jax:  ## the tests on another JAX: make test-jax JAX=0.11.2
	@[ -n "$(JAX)" ] || { echo "which JAX? for example: make test-jax JAX=0.11.2" >&2; exit 2; }
	$(MAKE) --no-print-directory $(VENV)-jax-$(JAX)/.ready
	$(VENV)-jax-$(JAX)/bin/python $(PYTEST) -m "not kernels and not parallel" $(ARGS)

.PHONY: paper
paper: $(VENV)/.ready-dev  ## repeats the paper's experiments into docs/paper; ARGS=--quick: small ones into build/paper
	$(VENV)/bin/python -m sarathi_jax.bench.paper $(ARGS)

.PHONY: check
check: $(VENV)/.ready-dev  ## lint, types, import order, fast tests: before every commit
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(CHECK_CACHE) $(VENV)/bin/python $(PYTEST) -q -m "not slow" $(ARGS)

.PHONY: format
format: $(VENV)/.ready-dev  ## rewrites the code as `make check` wants it
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: hooks
hooks: $(VENV)/.ready-dev  ## runs the lint before every git commit
	$(VENV)/bin/pre-commit install

.PHONY: lock
lock:  ## writes the lock files anew; ARGS=--upgrade takes newer versions
	scripts/lock.sh $(ARGS)

.PHONY: clean
clean:  ## removes the environments and caches
	rm -rf .venv .venv-* build dist .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: requirements.lock pyproject.toml scripts/make_venv.sh
	@scripts/make_venv.sh $(VENV) requirements.lock $(PYTHON)
	@touch $@

$(VENV)/.ready-dev: requirements-dev.lock $(VENV)/.ready
	@scripts/make_venv.sh $(VENV) requirements-dev.lock $(PYTHON)
	@touch $@

$(VENV)-jax-%/.ready: requirements.lock pyproject.toml scripts/make_venv.sh
	@scripts/make_venv.sh $(@D) requirements.lock $(PYTHON)
	scripts/retry.sh $(@D)/bin/python -m pip install -qq --disable-pip-version-check "jax==$*" "jaxlib==$*"
	@touch $@

.venv-devices/.ready: requirements.lock pyproject.toml scripts/make_venv.sh scripts/make_devices_venv.sh
	@scripts/make_devices_venv.sh .venv-devices
	@touch $@

.venv-oracle/.ready: scripts/make_oracle_venv.sh
	@scripts/make_oracle_venv.sh .venv-oracle
	@touch $@
