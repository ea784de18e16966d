# make train   set up, prepare the data and train (ARGS="KEY=VALUE ..." are Hydra overrides)
# make fleet   set up and train with NPROC workers that may come and go (scripts/fleet.py)
# make verify  set up and check what the README promises, on this machine (NPROC=workers)
# make study   run what is missing of results/shakespeare (hours; safe to stop and start)
# make gpu     set up and run what a GPU has to show (ARGS="--minutes 9"; see results/gpu)
# make figures redraw figures and tables of results/ from their logs
# make test    set up and run the test suite, two files at a time (ARGS go to pytest; FRESH=1
#              starts every process of a launch anew: see tests/support/preloaded.py)
# make mutants set up and put faults into copies of the code, one at a time: which tests notice which
#              (an hour; ARGS="--only TEXT --suite --processes 2"; results in runs/mutants)
# make lint    ruff, check and format, mypy, and the links in Markdown

PYTHON ?= python3
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c GPU)
NPROC ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)
# One thread per worker: what torchrun would choose too, without its warning.
export OMP_NUM_THREADS ?= 1

.PHONY: train fleet verify study gpu figures test mutants lint setup data

train: setup data
	.venv/bin/torchrun --standalone --nproc_per_node=$(NPROC) train.py $(ARGS)

fleet: setup data
	.venv/bin/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[fleet]'
	.venv/bin/python scripts/fleet.py start --workers $(NPROC) optimizer=local batch.global_size=$$((6 * $(NPROC))) $(ARGS)

verify: setup
	.venv/bin/torchrun --standalone --nproc_per_node=$(NPROC) scripts/verify.py

study: setup data
	.venv/bin/python scripts/shakespeare/run.py $(ARGS)

gpu: setup data
	$(if $(filter-out 0,$(GPUS)),.venv/bin/python data/shakespeare.py --gpt2)
	.venv/bin/python scripts/gpu/run.py $(ARGS)

figures: setup
	.venv/bin/python scripts/shakespeare/figures.py
	.venv/bin/python scripts/probes/run.py --redraw
	.venv/bin/python scripts/codec/run.py --redraw
	.venv/bin/python scripts/network/run.py --redraw
	.venv/bin/python scripts/theory/run.py --redraw
	.venv/bin/python scripts/digits/run.py --redraw
	.venv/bin/python scripts/soak/run.py --redraw
	.venv/bin/python scripts/chaos/run.py --redraw
	.venv/bin/python scripts/step124m/run.py --redraw
	.venv/bin/python scripts/step124m/run.py --sharded --redraw
	.venv/bin/python scripts/gpu/run.py --redraw

test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

mutants: setup
	.venv/bin/python -m tests.mutants $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m mypy ef21_muon tests/typed_user.py
	.venv/bin/python tests/support/check_links.py

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python %d.%d was found, 3.11 or newer is needed: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable '.[train,test]'
	touch $@

data: setup
	.venv/bin/python data/shakespeare.py
