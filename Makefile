# Every target makes its environment first: .venv out of pyproject.toml and constraints.txt.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP_INSTALL := -m pip install --disable-pip-version-check

# What other versions of the dependencies may break: tracing, derivatives, every way of compiling.
TELLING := tests/test_bad_input.py tests/test_cells.py tests/test_demo.py tests/test_graphs.py tests/test_import.py \
  tests/compat tests/nn tests/test_info.py tests/test_jit.py tests/test_private_torch.py tests/test_readme.py \
  tests/test_sequences.py tests/test_vanilla.py

# Triton's interpreter, in place of its compiler, is chosen when a process starts.
INTERPRETED := tests/kernels/test_triton.py tests/test_operators.py tests/test_layer.py tests/test_stepper.py \
  tests/nn/test_fused_layers.py tests/test_random_cells.py

# What tests/compat/test_clients.py is written for.
CLIENTS := xlstm==2.0.6 tirex-ts==1.4.2 tirex-2==0.4.0

# A clone of the upstream package's repository, which alone has its tests. It is made where there is none.
UPSTREAM ?= build/upstream
UPSTREAM_AT := https://github.com/NX-AI/flashrnn
UPSTREAM_TAG := v1.0.5

.DEFAULT_GOAL := help
.PHONY: help demo bench test test-all test-clients test-models test-newest test-oldest test-upstream check gpu-test \
  gpu-stress clean .venv-newest

help:
	@echo 'make demo          train a small network on the CPU or the GPU; ARGS="--task text" for another task'
	@echo 'make bench         measure speed beside other RNNs; ARGS="head-dim --quick" for less than everything'
	@echo 'make test          run the quick tests; those that need a GPU are skipped where there is none'
	@echo 'make test-all      run all tests, the slow ones too'
	@echo 'make gpu-test      run the tests that need a GPU, and only those'
	@echo 'make gpu-stress    random calls, foreign kernels, full memory and more; ARGS="fuzz --seconds 600"'
	@echo 'make test-clients  run the tests with xlstm, TiRex and TiRex-2, in an environment that has them'
	@echo 'make test-newest   run the telling part of the tests with the newest version of every dependency'
	@echo 'make test-oldest   the same with the oldest version that pyproject.toml allows (Python 3.10 or 3.11)'
	@echo 'make test-models   compare models of other packages, their layers replaced by ours, with themselves'
	@echo 'make test-upstream run the tests of the upstream package with this one; UPSTREAM=folder names a clone'
	@echo 'make check         lint, format and types, all without changing a file'
	@echo 'make clean         remove the environments and what building and testing left behind'
	@echo
	@echo 'PYTHON=python3.12 names the Python that an environment is made with (3.10 to 3.13).'

demo: $(INSTALLED)
	$(BIN)/python -m flashrnn demo $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m flashrnn bench $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto -m 'not slow' $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -m 'not slow' $(INTERPRETED) $(ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto $(INTERPRETED) $(ARGS)

gpu-test: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)

test-clients: .venv-clients/installed
	.venv-clients/bin/python -m pytest -rs -m clients tests/compat $(ARGS)

test-newest: .venv-newest
test-oldest: .venv-oldest/installed
test-newest test-oldest: test-%:
	.venv-$*/bin/python -m pip list --disable-pip-version-check
	.venv-$*/bin/python -m pytest -n auto -m 'not slow' $(TELLING) $(ARGS)
	.venv-$*/bin/python -m pytest -n auto -k 'compiles' tests/kernels $(ARGS)
	TRITON_INTERPRET=1 .venv-$*/bin/python -m pytest -n auto $(INTERPRETED) $(ARGS)

test-models: .venv-models/installed
	.venv-models/bin/python -m pytest -m models -rs $(ARGS) tests/nn/test_models.py

test-upstream: $(INSTALLED) $(UPSTREAM)
	$(BIN)/python -m pytest -p tests.compat.upstream --clone $(UPSTREAM) -c $(UPSTREAM)/pyproject.toml \
	  -p no:cacheprovider -q $(ARGS) $(UPSTREAM)/flashrnn/tests

$(UPSTREAM):
	git clone --quiet --depth 1 --branch $(UPSTREAM_TAG) $(UPSTREAM_AT) $@

gpu-stress: $(INSTALLED)
	$(BIN)/python -m tests.stress $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@! git grep -nE '^(<{7}|>{7}) ' || { echo 'these files hold marks of a merge'; exit 1; }

clean:
	rm -rf .venv .venv-clients .venv-models .venv-newest .venv-oldest
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,FOLDER,OPTIONS) makes an environment. setuptools comes first, and the package is built
# with it: pip's isolated build would fetch one that no constraint pins. It is upgraded, since Python 3.10
# and 3.11 bring one with each environment that is older than pyproject.toml asks for.
define install
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo 'No $(PYTHON) found. Install Python 3.10 to 3.13, or name one: make PYTHON=/path/to/python3' >&2; \
	  exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "FlashRNN needs Python 3.10 to 3.13; $(PYTHON) is $$('$(PYTHON)' -V 2>&1)." >&2; \
	  echo 'Name another: make PYTHON=python3.12' >&2; \
	  exit 1; }
	'$(PYTHON)' -m venv $(1)
	$(1)/bin/python $(PIP_INSTALL) $(2) --upgrade setuptools
	$(1)/bin/python $(PIP_INSTALL) $(2) --no-build-isolation -e '.[dev]'
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,$(VENV),-c constraints.txt)
	@touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(call install,.venv-oldest,-c constraints-oldest.txt)
	@touch $@

# The name flashrnn comes first: TiRex-2 asks for flashrnn>=1.0.8.
.venv-clients/installed: pyproject.toml constraints.txt packaging/flashrnn/pyproject.toml
	$(call install,.venv-clients,-c constraints.txt)
	.venv-clients/bin/python $(PIP_INSTALL) --no-build-isolation ./packaging/flashrnn
	.venv-clients/bin/python $(PIP_INSTALL) -c constraints.txt $(CLIENTS)
	@touch $@

# What models of other packages are made with may be at odds with what constraints.txt pins.
.venv-models/installed: pyproject.toml
	$(call install,.venv-models,)
	.venv-models/bin/python $(PIP_INSTALL) --no-build-isolation -e '.[models]'
	@touch $@

# Whenever it is asked for: what is newest changes.
.venv-newest:
	$(call install,.venv-newest,--upgrade --upgrade-strategy eager)
