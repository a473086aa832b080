# make demo | test | test-slow | test-fast | lint | bench | lab | lab-centres | lab-down; everything is installed into .venv from constraints.txt.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --constraint constraints.txt

.PHONY: demo test test-slow test-fast lint bench lab lab-centres lab-down clean

demo: $(VENV)/.train
	$(PY) -m flwr_hpc.run

test: $(VENV)/.dev
	$(PY) -m pytest -m "not slow" --numprocesses=4 --dist=worksteal

test-slow: $(VENV)/.dev
	$(PY) -m pytest -m slow --numprocesses=4 --dist=loadfile --no-loadscope-reorder \
	  tests/slurm tests/centres tests/integration  # the longest first

test-fast: $(VENV)/.dev
	$(PY) -m pytest -m "not slow" tests/unit tests/contract

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Everything in benchmarks/, several hours; those on Slurm clusters need root.
bench: $(VENV)/.dev
	for script in benchmarks/[a-z]*.py benchmarks/exchange/*.py benchmarks/clusters/[a-z]*.py \
	  benchmarks/comparison/compare.py; do $(PY) $$script || exit 1; done

# Two throw-away Slurm clusters on this machine; needs root and a few packages, which it names.
lab: $(VENV)/.train
	$(PY) -m tests.lab up lab_a lab_b

# A server and two Slurm centres that share nothing, on a wide-area network; prints what to type at each.
lab-centres: $(VENV)/.train
	$(PY) -m tests.lab up --centres

lab-down: $(VENV)/.train
	$(PY) -m tests.lab down

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flwr-hpc needs Python 3.11 or newer, found " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(PY) pyproject.toml constraints.txt
	$(PIP) --editable '.[train,simulate]'
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) --editable '.[train,simulate,wandb,test,dev]'
	touch $@
