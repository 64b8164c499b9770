# make demo, make train, make test: each makes .venv and installs what is missing by itself.
PYTHON ?= python3
BIN := .venv/bin
# Without the cells that are there to be read. By -c, not from a file: loader workers that are spawned would run it again.
SCRIPT = $$($(BIN)/jupyter nbconvert --log-level=ERROR --to python --stdout --TagRemovePreprocessor.enabled=True \
	--TagRemovePreprocessor.remove_cell_tags=notebook train_S9.ipynb)
QUIET_STOP = import sys; hook = sys.excepthook; \
	sys.excepthook = lambda kind, *rest: print("stopped") if kind is KeyboardInterrupt else hook(kind, *rest)
RUN_NOTEBOOK = code="$(SCRIPT)" && GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-10000} MPLBACKEND=agg \
	$(BIN)/python -u -c "$$(printf '%s\n' '$(QUIET_STOP)' "$$code")"
# PyTorch for Linux comes with 4 GB of CUDA; without NVIDIA's driver they are of no use. Unless PyTorch is there already:
FITTING := $(or $(filter-out Linux,$(shell uname -s)),$(wildcard /proc/driver/nvidia/version),$(wildcard /dev/dxg),\
	$(wildcard .venv/lib/python*/site-packages/torch))

.DEFAULT_GOAL := help
.PHONY: help demo train test

help:  ## what there is
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' $(MAKEFILE_LIST)

demo: .venv/installed  ## train on handwritten digits: under a minute, no download, results in runs/demo-digits
	@export DATASET=digits; $(RUN_NOTEBOOK)
	@echo 'The pictures are in runs/demo-digits. Next: RECIPE=resnet-quick make train (CIFAR-10, 8 epochs)'

train: .venv/installed  ## the notebook in the terminal: 80 epochs on CIFAR-10, results in runs/s9-cifar10
	@$(RUN_NOTEBOOK)

test: .venv/installed-dev  ## the tests: about a minute
	$(BIN)/python -m pytest -q -rs -n 2

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) \
	is older; name another one, such as: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(if $(FITTING),,@echo 'Installing 6 GB into .venv, most of it CUDA, which this machine has no driver for. For less: stop this (Ctrl-C), run'; \
	echo 'the first two commands in the row "Linux without an NVIDIA GPU" of README.md, then make again.')
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@
