# Two commands do all the set-up: `make pretrain` and `make test`.  PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: pretrain test gpu lint clean

# Without OMP_NUM_THREADS accelerate sets it to the same number, and says so at length; without --quiet it puts a traceback
# of its own below an error of the recipe.
pretrain: export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
pretrain: .venv/.installed
	$(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml recipes/pretrain.py $(ARGS)

# A file of tests stays on one core, so that its fixtures are made once; files with slow tests come first (conftest.py),
# which are few tests each: xdist would begin with the files that have most.
test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

# On a machine with a CUDA card: the tests marked gpu and the GPU rows of the benchmarks, in ten minutes.
gpu: .venv/.installed
	$(BIN)/python benchmarks/gpu.py $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Exact tested versions come from constraints.txt; the stamp makes a second call start at once.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf .venv outputs build dist *.egg-info
