# The two commands of the README are `make quickstart` and `make test`; both set up the environment if it is not there.
# `make test MEGATRON=0.19.2` tests with that version of Megatron-Core, in an environment of its own; lint and types go
# by the version that constraints.txt names. `make test JOBS=2` shares the tests among processes; each takes some 3 GiB.

VENV ?= .venv$(if $(MEGATRON),-megatron-$(MEGATRON))
MINOR := $(if $(filter-out 0.16.%,$(MEGATRON)),12,11)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, $(MINOR)))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHARED := $(if $(JOBS),-n $(JOBS) --dist loadfile)
# A process of the GPU tests takes a core and up to 2 GiB of a GPU.
GPU_JOBS := $(or $(JOBS),$(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 16 ? 12 : (3 * n + 3) / 4))))

.PHONY: quickstart test test-all test-gpu lint bench clean

quickstart: $(READY)
	$(BIN)/python tools/quickstart.py

test: $(if $(MEGATRON),$(READY),lint)
	$(BIN)/python -m pytest $(SHARED)

# The slow part too.
test-all: $(if $(MEGATRON),$(READY),lint)
	$(BIN)/python -m pytest -m "not gpu" $(SHARED)

# On GPUs, in the environment that holds Transformer Engine (PYTHON); tests of two GPUs are skipped where there is one.
test-gpu:
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m pytest -v -m gpu \
		-n $(GPU_JOBS) --dist loadgroup tests/gpu tests/kernels tests/memory tests/training

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tools/bench_kernels.py

$(READY): setup.py constraints.txt $(wildcard kernels/*/__init__.py)
	@test -n "$(PYTHON)" || { echo "Python 3.$(MINOR) or newer is needed; name it: make PYTHON=/path/to/python3 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed 's/^megatron-core==.*/$(if $(MEGATRON),megatron-core==$(MEGATRON),&)/' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-megatron-* runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
