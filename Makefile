# make demo   from raw text to a chat, on a CPU, in minutes
# make test   the test suite            make check   formatter, linter, types, import floors
# make bench  speed of training beside a plain implementation
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo gpu test test-slow test-gpu check bench bench-http bench-loader bench-serving docs clean

demo: $(VENV)/.demo
	$(BIN)/nanoworks demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/train.py

# Everything that needs an accelerator, in one command.
gpu: test-gpu
	$(BIN)/python -m pytest tests/nn/test_triton.py
	$(BIN)/python benchmarks/gpu_serving.py
	$(BIN)/nanoworks demo --out runs/demo-gpu
	$(BIN)/python benchmarks/gpu.py

bench-loader: $(VENV)/.dev
	$(BIN)/python benchmarks/loader.py

# Beside vLLM, llama.cpp, OpenVINO and transformers, on an idle machine; an hour and more. A piece at a time:
# make bench-serving ARGS="--sizes 120m --precisions int8 --rows decode,mixed16 --rounds 5"; one that was cut: ARGS=--resume
bench-serving: $(VENV)/.dev
	$(BIN)/python scripts/peers.py
	$(BIN)/python benchmarks/serving/run.py --write-docs --profile $(ARGS)
	$(BIN)/python benchmarks/serving/single.py
	$(BIN)/python benchmarks/structured.py

# `nanoworks serve` over HTTP beside its engine without it, on an idle machine; some minutes.
bench-http: $(VENV)/.dev
	$(BIN)/python benchmarks/serving/over_http.py --write-docs $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python scripts/config_reference.py
	$(BIN)/python scripts/scaling_tables.py

# uv installs ten times faster than pip but does not read pip's find-links, so they are handed over when set.
export_links = $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)",)
install = $(export_links) $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nanoworks needs Python 3.10 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

$(VENV)/.demo: $(BIN)/uv pyproject.toml constraints.txt
	$(install) -e .
	touch $@

$(VENV)/.dev: $(BIN)/uv pyproject.toml constraints.txt
	$(install) -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
