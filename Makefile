# What a person types. Every target sets up the virtual environment first if that is needed.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

# torch's own index has a CPU build, a tenth of the download, for machines without an NVIDIA GPU.
TORCH_CPU := https://download.pytorch.org/whl/cpu

.PHONY: help setup distil test test-slurm faults soak gpu lint format check clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	index=; \
	if ! nvidia-smi -L >/dev/null 2>&1 && curl -fsIo /dev/null --max-time 5 $(TORCH_CPU)/torch/; then \
	    index="--extra-index-url $(TORCH_CPU)"; \
	fi; \
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt $$index torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[synthetic,sweeps,remote,export,dev]'
	touch $@

setup: $(READY) ## Make the virtual environment with the pinned dependencies

distil: $(READY) ## The whole job on synthetic data: corpus, shards, teacher, students, scores
	$(RUN) -m mvat_dist.quickstart

test: $(READY) ## Run the tests that need no cluster
	$(RUN) -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test-slurm: $(READY) ## Start a real four-node Slurm on this machine, run the cluster tests, stop it
	slurm/devcluster.sh run -- $(RUN) -m pytest -m slurm tests/slurm

faults: $(READY) ## The whole fault matrix, on this machine and on a real Slurm; writes docs/reliability.md
	slurm/devcluster.sh run -- $(RUN) -m tests.faults --write docs/reliability.md

soak: $(READY) ## A run restarted at N=30 random moments ends as the undisturbed one
	$(RUN) -m tests.faults.soak --restarts $(or $(N),30) --seed $(or $(SEED),0)

gpu: $(READY) ## Measure the students on a GPU: exactness, speed, memory, profile; writes docs/results
	$(RUN) -m benchmarks.gpu

lint: $(READY) ## Style, types and shell scripts
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/shellcheck slurm/*.sh .ci/run

format: $(READY) ## Rewrite the code in the house's style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

check: test lint test-slurm ## All that CI runs

clean: ## Remove the virtual environment and caches (runs and shards stay)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
