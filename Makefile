# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install demo demo-pretrained test test-slow lint benchmark benchmark-goals gpu-check clean

install: $(STAMP)

# torch is installed first and by its exact pin, so that no other requirement can choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/openmm-regflow demo --output demo --overwrite

demo-pretrained: $(STAMP)
	$(BIN)/openmm-regflow demo --pretrained --output demo-pretrained --overwrite

test: $(STAMP)
	$(BIN)/python -m ruff check openmm_regflow tests examples
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/python -m ruff check openmm_regflow tests examples
	$(BIN)/python -m mypy

# Measures, and writes docs/speed.md and docs/results/speed-cpu.json; install the extra "peers" to compare with others.
benchmark: $(STAMP)
	$(BIN)/python tests/benchmarks/make_page.py

# The goals of the benchmarks as pass or fail; of couplings limits, since their goals are not all met (docs/speed.md).
benchmark-goals: $(STAMP)
	$(BIN)/python -m pytest tests/benchmarks -o addopts="" --benchmark-only

# Major version of the CUDA that torch was built for; nothing for a build for CPUs.
CUDA = $(shell $(BIN)/python -c 'import torch; print((torch.version.cuda or "").partition(".")[0])')

# Tests and measurements on a GPU, with the CUDA platform of OpenMM that goes with torch; says so and stops without one.
gpu-check: $(STAMP)
	$(if $(CUDA),$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda$(CUDA)]')
	$(BIN)/python tests/benchmarks/gpu.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info
