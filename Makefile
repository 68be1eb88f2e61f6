# Every target sets up .venv by itself, once. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAB := $(BIN)/rodimus-lab
EXTRAS := data,kernels,train,figures,hf,eval,posttrain,sweep,dev
MODEL ?= rodimus
MODELS ?= rodimus transformer++
MQAR_FLAGS := $(if $(filter-out file,$(origin MODEL)),--model $(MODEL)) $(if $(FIGURE),--figure $(FIGURE)) $(if $(LENGTH),--length $(LENGTH)) $(if $(WIDTH),--width $(WIDTH)) $(if $(LR),--lr $(LR)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(SEED),--seed $(SEED))
RUN_FLAGS := $(if $(BUDGET),--budget $(BUDGET)) $(if $(CORPUS),--corpus $(CORPUS)) $(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED))
SCALING_FLAGS := $(if $(filter-out file,$(origin MODEL)),--model $(MODEL)) $(if $(SIZE),--size $(SIZE)) $(if $(RATIO),--ratio $(RATIO)) $(if $(BUDGET),--budget $(BUDGET)) $(if $(CORPUS),--corpus $(CORPUS)) $(if $(SEED),--seed $(SEED))

.DEFAULT_GOAL := help
.PHONY: help setup setup-opencompass test test-gpu lint wikitext103 ablate memory-ppl gates mqar scaling-laws needle needlebench sweep tables figures site zoo reproducing bench doctor clean

help: ## list the targets
	@echo "Targets (options in capitals, such as MODEL=rodimus BUDGET=short CORPUS=enwiki-25k):"
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | awk -F '\t' '{printf "  %-18s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make .venv with everything that the other targets need

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; give another with PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@$(BIN)/python -c 'from evals.announce import announce; announce()'
	@touch $@
	@echo "$(VENV) is ready; 'source $(BIN)/activate' puts rodimus-lab on the path"

setup-opencompass: ## make .venv-opencompass, in which OpenCompass runs this project's models
	$(PYTHON) -m venv .venv-opencompass
	.venv-opencompass/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 opencompass==0.5.4 pyarrow==23.0.0
	.venv-opencompass/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .

test: setup ## run every test on as many cores as there are, at most 8 (those that need a GPU are skipped without one) [JOBS]
	@# Dozens of processes import the project: compiled once, whatever the environment says of bytecode.
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses $(or $(JOBS),$$($(BIN)/python -c 'import os; print(min(8, os.cpu_count() or 1))')) --dist worksteal

test-gpu: setup ## run only the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wikitext103: setup ## train MODEL at Table 1's configuration and rebuild Table 1 [MODEL BUDGET CORPUS STEPS SEED]
	$(LAB) wikitext103 --model $(MODEL) $(RUN_FLAGS)

sweep: setup ## the same for several MODELS, side by side where there is room [MODELS JOBS BUDGET CORPUS STEPS SEED]
	$(LAB) wikitext103 $(MODELS:%=--model %) $(if $(JOBS),--jobs $(JOBS)) $(RUN_FLAGS)

ablate: setup ## train the runs of TABLE (12 to 18) and rebuild the tables [TABLE LAYERS BUDGET CORPUS STEPS SEED]
	$(LAB) ablate $(if $(TABLE),--table $(TABLE)) $(if $(LAYERS),--layers $(LAYERS)) $(RUN_FLAGS)

memory-ppl: setup ## train the points of Figure 1a, or with ARTEFACT=table7 those of Table 7 [ARTEFACT BUDGET CORPUS STEPS SEED]
	$(LAB) memory-ppl $(if $(ARTEFACT),--artefact $(ARTEFACT)) $(RUN_FLAGS)

gates: setup ## draw the gates of a trained RUN over TEXT, and with RECORD=1 keep them for Figure 8 [RUN TEXT BESIDE RECORD]
	$(LAB) gates $(RUN) --text "$(TEXT)" $(if $(BESIDE),--beside $(BESIDE)) $(if $(RECORD),--record)

mqar: setup ## train on associative recall, all of FIGURE (6 or 1b) or a part, and rebuild its tables [FIGURE MODEL LENGTH WIDTH LR BUDGET SEED]
	$(LAB) mqar $(MQAR_FLAGS)

scaling-laws: setup ## train models of several sizes and fit how their loss falls with compute [MODEL SIZE RATIO BUDGET CORPUS SEED]
	$(LAB) scaling-laws $(SCALING_FLAGS)

needle: setup ## teach MODEL to find a needle in 2k tokens [MODEL BUDGET CORPUS STEPS SEED]
	$(LAB) needle --model $(MODEL) $(RUN_FLAGS)

needlebench: setup ## score a trained RUN on NeedleBench and draw its heat maps [RUN PRESET]
	$(LAB) needlebench $(RUN) $(if $(PRESET),--preset $(PRESET))

tables: setup ## rebuild every table from the run records
	$(LAB) report --no-site

site: setup ## the same, and the pages in results/site that show everything
	$(LAB) report

figures: setup ## redraw every figure as SVG, PDF and PNG, its numbers beside it
	$(LAB) figures

zoo: setup ## rewrite docs/zoo.md: Table 4 and the rest of the zoo, from the code
	$(BIN)/python -c 'from experiments.zoo import write_page; write_page()'

reproducing: setup ## rewrite docs/reproducing.md: runs, GPU-hours and the command of every table and figure
	$(BIN)/python -c 'from experiments.reproducing import write_page; write_page()'

bench: setup ## measure this machine: data, loss, operators, training, decoding, beside the peers that are installed
	$(LAB) bench data
	$(LAB) bench loss
	$(LAB) bench ops
	$(LAB) bench train --peers
	$(LAB) bench decode --peers

doctor: setup ## say what is installed and what each operator would run on
	$(LAB) doctor

clean: ## remove the environment, caches and token shards; records and checkpoints stay
	rm -rf $(VENV) data_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
