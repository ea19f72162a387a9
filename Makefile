# Two commands do everything, set-up included: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test bench clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'petl needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## train three methods on the bundled backbone and real digits, and show the results
	$(BIN)/python recipes/demo.py --random

test: $(VENV)/.installed  ## lint, types, and every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy petl
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

bench: $(VENV)/.installed  ## write BENCHMARKS.md
	$(BIN)/python recipes/bench_sparse_tuning.py --out BENCHMARKS.md
	$(BIN)/python recipes/bench_grounding.py --out BENCHMARKS.md
	$(BIN)/python recipes/bench_explain.py --out BENCHMARKS.md
	$(BIN)/python recipes/bench_methods.py --out BENCHMARKS.md
	$(BIN)/python recipes/bench.py --out BENCHMARKS.md

clean:
	rm -rf $(VENV) runs build dist
