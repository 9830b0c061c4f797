# make demo   train a small ∞-MoE model, sweep its dials, write a report
# make test   the tests, in the same environment
# make lint   ruff and mypy

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint test-hf clean

demo: $(READY)
	$(BIN)/infmoe demo $(DEMO_ARGS)

test: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile $(TEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# transformers' own test suite for models, fetched with its source distribution
test-hf: $(READY)
	$(BIN)/python tests/hf_suite/run.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
