# make demo | test | test-slow | lint | bench | manifests | ui; every target sets up .venv first (a no-op when that is done).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: setup demo test test-slow lint bench manifests ui clean

setup: $(VENV)/.installed

# Bytecode is compiled at installation: every Ray worker imports thousands of modules when it starts.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "uv>=0.8"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m tdiff.train $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/phase_overhead.py

# The jobs as plain files, from what jobs/source and cluster/ray say. Needs kubectl (Debian: kubernetes-client).
manifests: setup
	$(BIN)/python jobs/write.py

# Shows the runs of ./runs; another folder: make ui RUNS=…
RUNS ?= runs
ui: setup
	$(BIN)/mlflow ui --backend-store-uri "sqlite:///$(RUNS)/mlflow.db"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
