# Every target does all the set-up it needs, in .venv; but gpu-check uses what is there. `make help`
# lists them.

PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
DETECTRON2 ?=
ARGS ?=

VENV := .venv
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo study-quick gpu-check gpu-wheels test lint docs wheel clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "PYTHON=/path/to/python3 chooses the Python; a Detectron2 installed there is used."
	@echo "REQUIREMENTS=requirements-oldest.txt installs PyTorch 2.1; DETECTRON2=SOURCE, a folder or a"
	@echo "URL for pip, compiles that Detectron2."
	@echo "ARGS='...' is passed on: make test ARGS='-k insertion'."

setup: $(READY) ## Install everything into .venv

demo: $(READY) ## Train a small model with non-local blocks; show what it learnt in a page
	$(VENV)/bin/python tools/quick_start.py $(ARGS)

study-quick: $(READY) ## Compare the block with a baseline and a local control, in minutes
	$(VENV)/bin/python tools/study.py lab/studies/quick.yaml $(ARGS)

# Where there is a GPU there may be no network: what is not installed is left out of the report.
gpu-check: ## Test and measure all on this machine's GPU, and write docs/gpu/<device>.md
	$(if $(wildcard $(READY)),$(VENV)/bin/python,$(PYTHON)) -m lab.benchmarks.gpu $(ARGS)

gpu-wheels: $(READY) ## Gather in build/wheels what gpu-check needs besides PyTorch
	$(VENV)/bin/python tools/build_detectron2.py --output build/wheels
	grep -vE '^(#|torch|unearth|import-linter|mypy|onnx|ruff|selenium)' requirements.txt >build/wheels/list
	$(VENV)/bin/python -m pip wheel --quiet --wheel-dir build/wheels --requirement build/wheels/list
	$(VENV)/bin/python -m pip wheel --quiet --wheel-dir build/wheels --no-deps -r requirements-peers.txt

test: $(READY) ## Run the tests, a process for each core
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto $(ARGS)

lint: $(READY) ## Check style, types, and that imports go in one direction
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/lint-imports --no-logo

docs: $(VENV)/.docs ## Build the site in build/docs, warnings as errors; this runs the tutorial
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo build/docs/index.html

wheel: $(READY) ## Build the wheel in dist, and run what it holds outside this folder
	rm -rf dist build/lib build/wheel
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)/bin/python -m pip install --quiet --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH=. ../../$(VENV)/bin/python -P -m nl_detectron

clean: ## Remove .venv and all that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The stamp comes last: an interrupted set-up leaves none, and the next call starts again.
$(READY): $(REQUIREMENTS) requirements-peers.txt setup.py tools/setup_environment.py tools/build_detectron2.py
	$(PYTHON) tools/setup_environment.py $(VENV) --requirements $(REQUIREMENTS) \
	    $(if $(DETECTRON2),--detectron2 $(DETECTRON2))
	@touch $@

$(VENV)/.docs: $(READY) requirements-docs.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.txt
	@touch $@
