# make demo | test | test-slow | lint | bench | manifests | lock | ui; every target sets up .venv first, if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: setup demo test test-slow lint bench manifests lock ui clean

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

# The versions that the image installs, ray's as the manifests have it. Versions that are there stay while they can:
# newer ones by make lock ARGS=--upgrade. For an image of another architecture: PLATFORM=aarch64-unknown-linux-gnu.
PLATFORM ?= x86_64-unknown-linux-gnu
lock: setup
	sed -n 's/^  rayVersion: /ray==/p' cluster/ray/gpu-pool/raycluster.yaml \
	  | $(BIN)/uv pip compile --quiet pyproject.toml --extra cluster --constraints - --python-version 3.11 \
	    --python-platform $(PLATFORM) --no-header --no-annotate --output-file requirements.lock $(ARGS)

# Shows the runs of ./runs; another folder: make ui RUNS=…
RUNS ?= runs
ui: setup
	$(BIN)/mlflow ui --backend-store-uri "sqlite:///$(RUNS)/mlflow.db"

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
