# Every target makes .venv first, out of pyproject.toml and constraints.txt.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo bench test check gpu-test gpu-stress clean

help:
	@echo 'make demo      train a small network on the CPU or the GPU; ARGS="--task text" for another task'
	@echo 'make bench     measure speed beside other RNNs; ARGS="head-dim --quick" for less than everything'
	@echo 'make test      run the tests; those that need a GPU are skipped where there is none'
	@echo 'make gpu-test  run the tests that need a GPU, and only those'
	@echo 'make gpu-stress  random calls, foreign kernels, full memory and more; ARGS="fuzz --seconds 600"'
	@echo 'make check     lint, format and types, all without changing a file'
	@echo 'make clean     remove .venv and what building and testing left behind'
	@echo
	@echo 'PYTHON=python3.12 names the Python that .venv is made with (3.10 to 3.13).'

demo: $(INSTALLED)
	$(BIN)/python -m flashrnn demo $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m flashrnn bench $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/test_triton.py tests/test_operators.py $(ARGS)

gpu-test: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)

gpu-stress: $(INSTALLED)
	$(BIN)/python -m tests.stress $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools comes first, and the package is built with it: pip's isolated build would fetch
# one that constraints.txt does not pin.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo 'No $(PYTHON) found. Install Python 3.10 to 3.13, or name one: make PYTHON=/path/to/python3' >&2; \
	  exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "FlashRNN needs Python 3.10 to 3.13; $(PYTHON) is $$('$(PYTHON)' -V 2>&1)." >&2; \
	  echo 'Name another: make PYTHON=python3.12' >&2; \
	  exit 1; }
	'$(PYTHON)' -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
	  --no-build-isolation -e '.[dev]'
	@touch $@
