# The two commands of the README are `make quickstart` and `make test`; both set up the environment if it is not there.
# `make test MEGATRON=0.19.2` tests with that version of Megatron-Core, in an environment of its own; lint and types go
# by the version that constraints.txt names; `make test-gpu` takes MEGATRON too. `make test JOBS=2` shares the tests among processes; each takes some 3 GiB.

VENV ?= .venv$(if $(MEGATRON),-megatron-$(MEGATRON))
MINOR := $(if $(filter-out 0.16.%,$(MEGATRON)),12,11)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, $(MINOR)))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHARED := $(if $(JOBS),-n $(JOBS) --dist loadfile)
# With another Megatron-Core, the GPU tests find it in a folder of its own before the one that is installed.
GPU_MEGATRON := $(if $(MEGATRON),.megatron-$(MEGATRON))
GPU_PATH = $(if $(GPU_MEGATRON),$(CURDIR)/$(GPU_MEGATRON):)$(CURDIR):$(CURDIR)/kernels
# -vv: names of tests in spite of pyproject.toml's -q.
GPU_PYTEST = PYTHONUNBUFFERED=1 PYTHONPATH="$(GPU_PATH)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m pytest -vv --tb=short \
	tests/gpu tests/kernels tests/memory tests/training
# A process of the GPU tests takes a core and up to 2 GiB of a GPU.
GPU_JOBS := $(or $(JOBS),$(shell n=$$(getconf _NPROCESSORS_ONLN); n=$$(((3 * n + 3) / 4)); echo $$((n > 24 ? 24 : n))))

.PHONY: quickstart test test-all test-gpu lint bench clean

quickstart: $(READY)
	$(BIN)/python tools/quickstart.py

test: $(if $(MEGATRON),$(READY),lint)
	$(BIN)/python -m pytest $(SHARED)

# The slow part too.
test-all: $(if $(MEGATRON),$(READY),lint)
	$(BIN)/python -m pytest -m "not gpu" $(SHARED)

# On GPUs, in the environment that holds Transformer Engine (PYTHON). First the tests of two GPUs, where there are two: in
# two processes with nothing beside them, because collectives wait for the time slices of others. 2: interrupted.
test-gpu: $(GPU_MEGATRON)
	@failed=0; \
	if $(PYTHON) -c 'import sys, torch; sys.exit(torch.cuda.device_count() < 2)'; then \
		$(GPU_PYTEST) -m "gpu and two_gpus" -n 2 --dist loadgroup || { failed=$$?; [ $$failed -ne 2 ] || exit 2; }; \
	else echo "fewer than two GPUs: tests of two are left out"; fi; \
	$(GPU_PYTEST) -m "gpu and not two_gpus" -n $(GPU_JOBS) --dist loadgroup || failed=$$?; \
	exit $$failed

.megatron-%:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $@ megatron-core==$*

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
	rm -rf $(VENV) .venv-megatron-* .megatron-* runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
