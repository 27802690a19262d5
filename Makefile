# make test is what CI runs; make demo is the first command of the README. Both work on a fresh machine with a package index.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := test

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= test,dev,docs,sentence-transformers,trl,notebooks,onnx,openvino,gguf,postgres,report
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where plain pip would fetch gigabytes of CUDA libraries for a machine without a GPU, torch comes from here.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2

.PHONY: env test test-all demo docs notebooks lint clean

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	cuda=no; \
	if ! nvidia-smi -L >/dev/null 2>&1; then \
		$(PIP) install -q --dry-run --ignore-installed --report $(VENV)/torch.json -c constraints.txt torch; \
		if grep -qE '"name": *"(nvidia|cuda)' $(VENV)/torch.json; then cuda=unwanted; fi; \
	fi; \
	if [ $$cuda = unwanted ]; then \
		echo "no GPU here: torch from $(TORCH_CPU_INDEX)"; \
		$(PIP) install -q -c constraints.txt --extra-index-url $(TORCH_CPU_INDEX) torch; \
	else \
		$(PIP) install -q -c constraints.txt torch; \
	fi
	$(PIP) install -q -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" -q

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) -q

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(STAMP)
	cd notebooks && ../$(BIN)/jupyter execute --inplace 0*.ipynb

demo: $(STAMP)
	$(BIN)/python examples/compress_minilm.py $(DEMO_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
