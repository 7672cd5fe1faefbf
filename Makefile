# Two commands do everything: `make demo` adapts a real model, `make test` passes the tests.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= examples/quickstart.yaml
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all lint types bench clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.installed            ## set up, then adapt a real model on the quick-start data
	$(BIN)/sideroad train $(DEMO)

test: $(VENV)/.installed-dev        ## set up, then run the tests
	$(PYTEST)

test-all: $(VENV)/.installed-dev    ## every law over every combination, and the tests that need the real model
	$(PYTEST) -m "all or not all"

lint: $(VENV)/.installed-dev        ## style
	$(BIN)/ruff check src tests bench

types: $(VENV)/.installed-dev       ## static types
	$(BIN)/mypy

bench: $(VENV)/.installed-dev       ## a training step beside a bare PEFT loop
	$(BIN)/python bench/train.py

clean:           ## remove the environment and caches of the tools (never runs/ or the model cache)
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sideroad needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# A torch that is already in the environment is kept: its pin is left out of the constraints.
$(VENV)/constraints.txt: constraints.txt | $(BIN)/python
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then grep -v '^torch==' $< > $@; else cp $< $@; fi

$(VENV)/.installed: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
