# `make demo` and `make test` set themselves up: a virtual environment with the tested versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= -c constraints.txt
BIN := $(VENV)/bin

.PHONY: help demo test test-slow test-gpu works lint format benchmarks bench-gpu pretrain clean

help:
	@echo "make demo        fine-tune, evaluate and report with AdamW and IVON on a small pretrained base"
	@echo "make test        the default test suite (no network, no GPU)"
	@echo "make test-slow   the tests that take minutes"
	@echo "make test-gpu    the tests that need a CUDA device"
	@echo "make works       the table of docs/works_everywhere.md again, from the tests that it stands for"
	@echo "make lint        ruff and the type checker"
	@echo "make format      let ruff rewrite what it can"
	@echo "make benchmarks  all benchmarks but pruning.py; results go to benchmarks/results"
	@echo "make bench-gpu   the optimizer and its overhead at the shape of Llama-2-7B, on a CUDA device"
	@echo "make pretrain    pretrain the demo's base again, in build/demo, and compare its scores with the committed base's"

$(VENV)/.installed: pyproject.toml constraints.txt src/varlora/optim/native.c src/varlora/optim/native_tiles.h
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/varlora demo

# Two processes with one thread each: models this small gain nothing from threads, and wait for each other's. Each takes
# its half in order, so that what a file's tests share is made once, and from the other's when it is done.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.installed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

works: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/everywhere/test_cells.py --works-table docs/works_everywhere.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The long ones, quality, demo and evidence, go on where they were stopped: make benchmarks again.
benchmarks: $(VENV)/.installed
	$(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/training_profile.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/serve_load.py
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/evidence/run.py
	$(BIN)/python benchmarks/evidence/document.py
	$(BIN)/python benchmarks/evidence/auto.py
	$(BIN)/python benchmarks/evidence/scale.py
	$(BIN)/python benchmarks/evidence/along.py --document
	$(BIN)/python benchmarks/inference.py --document
	$(BIN)/python benchmarks/beginnings.py --document
	$(BIN)/python benchmarks/draws.py --document $$(echo runs/auto/demo-*00/auto/*/ivon/seed0)
	$(BIN)/python benchmarks/temperatures.py --document $$(echo runs/auto/demo-400/auto/*/ivon/seed? runs/auto/sst2_*-tinyllama-3m-800/auto/*/ivon/seed?)

# Needs a CUDA device that holds Llama-2-7B in 16 bit.
bench-gpu: $(VENV)/.installed
	$(BIN)/python benchmarks/optimizer.py --device cuda --rounds 300 --out benchmarks/results/optimizer_gpu.json
	$(BIN)/python benchmarks/gpu/llama2_7b_shape.py
	$(BIN)/python benchmarks/inference.py --device cuda --llama2-7b --budget-minutes 8 --out benchmarks/results/inference_gpu.json

# Goes on where it was stopped; `pretraining/pretrain.py` without options replaces the committed base.
pretrain: $(VENV)/.installed
	$(BIN)/python pretraining/pretrain.py --out build/demo --check

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
