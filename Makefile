# make train, make demo, make test: each makes .venv and installs what is missing by itself.
PYTHON ?= python3
BIN := .venv/bin
# By -c, not from a file: loader workers that are spawned would run a file again.
RUN_NOTEBOOK = code="$$($(BIN)/jupyter nbconvert --log-level=ERROR --to python --stdout train_S9.ipynb)" && \
	MPLBACKEND=agg $(BIN)/python -u -c "$$code"

.DEFAULT_GOAL := demo
.PHONY: train demo test

train: .venv/installed  ## the notebook in the terminal: 80 epochs on CIFAR-10, results in runs/s9-cifar10
	@$(RUN_NOTEBOOK)

demo: .venv/installed  ## the same on scikit-learn's digits: about a minute, no download, results in runs/s9-digits
	@export DATASET=digits; $(RUN_NOTEBOOK)

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -rs

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, and $(PYTHON) \
	is older; name another one, such as: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@
