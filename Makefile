# Every target sets up the environment first if it must. `make` lists the targets.
# Variables: MODEL= TEACHER= STUDENT= RECIPE= OUT= DATA= ARGS= (ARGS is passed to the command as it is).
# TORCH=cpu sets up the build of torch without CUDA: 2.0 GB in place of 4.4 on Linux.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS ?= runs
ESPALIER := $(BIN)/espalier
data = $(if $(DATA),--data $(DATA))

.PHONY: help setup pretrain quantize prune distill evaluate pipeline report tensorboard test test-slow lint bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

need-%:
	@[ -n "$($*)" ] || { echo "make: name a folder with $*=, for example $*=$(RUNS)/quickstart" >&2; exit 2; }

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; name a Python >= 3.11: make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python >= 3.11 is needed: make PYTHON=..." >&2; exit 2; }
	@[ -z "$(TORCH)" ] || [ "$(TORCH)" = cpu ] || { echo "make: TORCH may be cpu, not $(TORCH); without it, torch is what the package index gives" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install --no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-deps torchscale==0.3.0 llms-from-scratch==1.0.19
	@touch $@

setup: $(STAMP)  ## create .venv and install Espalier with the versions that were tested: TORCH=cpu for a machine without a GPU

pretrain: $(STAMP)  ## pretrain a model, or go on: RECIPE=recipes/pretrain/quickstart.yaml, OUT=runs/quickstart, DATA=, ARGS=
	$(ESPALIER) fit -c $(or $(RECIPE),recipes/pretrain/quickstart.yaml) $(if $(OUT),--out $(OUT)) --ckpt_path last $(data) $(ARGS)

quantize: need-MODEL $(STAMP)  ## store weights in fewer bits: MODEL=, RECIPE=recipes/quantize/gptq-4.yaml, OUT=, DATA=, ARGS=
	$(ESPALIER) quantize $(MODEL) -c $(or $(RECIPE),recipes/quantize/gptq-4.yaml) --out $(or $(OUT),$(RUNS)/quantized) $(data) $(ARGS)

prune: need-MODEL $(STAMP)  ## take weights or neurons away: MODEL=, RECIPE=recipes/prune/neurons-25.yaml, OUT=, DATA=, ARGS=
	$(ESPALIER) prune $(MODEL) -c $(or $(RECIPE),recipes/prune/neurons-25.yaml) --out $(or $(OUT),$(RUNS)/pruned) $(data) $(ARGS)

distill: need-TEACHER $(STAMP)  ## train a student on a teacher: TEACHER=, STUDENT=, RECIPE=recipes/distill/logit.yaml, OUT=, DATA=, ARGS=
	$(ESPALIER) distill --teacher $(TEACHER) $(if $(STUDENT),--student $(STUDENT)) -c $(or $(RECIPE),recipes/distill/logit.yaml) --out $(or $(OUT),$(RUNS)/student) $(data) $(ARGS)

evaluate: need-MODEL $(STAMP)  ## measure one or more models: MODEL="A B", OUT=FILE.json, DATA=, ARGS=
	$(ESPALIER) evaluate $(MODEL) $(if $(OUT),--out $(OUT)) $(data) $(ARGS)

pipeline: $(STAMP)  ## pretrain, distil, prune, quantize, report: RECIPE=recipes/pipeline/quickstart.yaml, MODEL=, OUT=runs/pipeline
	$(ESPALIER) run $(or $(RECIPE),recipes/pipeline/quickstart.yaml) $(if $(MODEL),--model $(MODEL)) --out $(or $(OUT),$(RUNS)/pipeline) $(ARGS)

report: need-MODEL $(STAMP)  ## one page over many folders: MODEL="A B C", OUT=runs/report
	$(ESPALIER) report $(MODEL) --out $(or $(OUT),$(RUNS)/report) $(ARGS)

tensorboard: $(STAMP)  ## look at the curves of every run under OUT=runs
	$(BIN)/tensorboard --logdir $(or $(OUT),$(RUNS)) $(ARGS)

test: $(STAMP)  ## run the tests that end within 12 minutes on two cores: ARGS=
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(STAMP)  ## run the tests that need more than a minute each, and the rest of the covering cases: ARGS=
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

lint: $(STAMP)  ## style, format, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

bench: $(STAMP)  ## measure speed against transformers: ARGS=
	$(BIN)/python -m tests.benchmarks $(ARGS)

clean:  ## remove the environment and the caches, not the runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
