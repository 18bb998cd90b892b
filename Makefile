# make demo | test | test-full | backbones | bench | check | clean      (PYTHON=python3.12 make demo picks another interpreter)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ORGANISM := .cache/organism
RECIPE   := recipes/organism/rasa.yaml

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full backbones bench check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP)  ## make .venv and install the tested versions into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "constraints.txt was tested on Python >= 3.11, found $$($(PYTHON) --version 2>&1); try PYTHON=python3.11 make" >&2; exit 2; }
	@test -x $(BIN)/python || { echo "== making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== installing the tested versions into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## train the organism, repair it, write the report (minutes, on a CPU)
	@echo "== the organism: a small MoE with a planted flaw"
	@$(BIN)/python -m data_prep.organism --out $(ORGANISM) --seed 0
	@echo "== the repair: $(RECIPE)"
	@$(BIN)/python -m trainer run $(RECIPE)
	@echo "== done; open $$(ls -t runs/*/report.html | head -n 1)"

# One thread each: tests on small models gain more from a second test than from a second thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: $(STAMP)  ## the fast tests
	@$(PYTEST) -m "not slow" --durations 20

test-full: $(STAMP)  ## every test, the slow ones too
	@$(PYTEST)

backbones: $(STAMP)  ## test every backbone and write the tables of README.md and docs/backbones.md from the results
	@$(BIN)/python -m pytest -q tests/moe/test_families.py -k "not the_table"
	@$(BIN)/python -m tests.moe.backbone_table

bench: $(STAMP)  ## time and memory of a training step, ours beside the alternatives (10 minutes on two quiet cores)
	@$(BIN)/python -m benchmarks

check: $(STAMP)  ## lint, format, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:  ## remove caches and builds; runs/ and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find trainer data_prep tests -name __pycache__ -type d -prune -exec rm -rf {} +
