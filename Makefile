# Two commands matter: `make demo` and `make test`. Both make .venv first, from the exact versions
# in constraints.txt.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

WITH_RAY := tests/cluster tests/faults tests/jobs tests/benchmarks
PURE := tests $(WITH_RAY:%=--ignore=%)

.PHONY: demo test quick check soak bench install lock clean

demo: install
	$(BIN)/python jobs/demo.py --output demo

# What needs no cluster runs on both of two cores; the rest shares one Ray.
test: install check
	$(BIN)/python -m pytest --numprocesses 2 $(PURE)
	$(BIN)/python -m pytest $(WITH_RAY)

# The fast loop while writing: no Ray, no servers, about a minute.
quick: install
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow and not s3 and not soak" $(PURE)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The promises of the classify and train jobs at full size; two hours on two cores.
soak: install
	$(BIN)/python -m pytest -m soak
	$(BIN)/python tests/faults/order_soak.py
	$(BIN)/python tests/faults/soak.py all

# The short forms of all benchmarks; benchmarks/README.md has the full ones.
BENCHMARKS := classify_pipeline agreement classify_compute classify_gpu train_tutorial train_photos growth step_overhead

bench: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --short || exit; done

install: $(VENV)/installed

# torch comes first and from pip's own settings: it is by far the largest download, and a machine
# may hold a copy of it.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# After a change of the dependencies: choose the newest versions that fit, and write them down.
lock: install
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip compile --quiet --upgrade --python-version 3.11 --extra dev --extra bench \
	  --no-header --no-annotate pyproject.toml --output-file constraints.txt

clean:
	rm -rf .venv demo .mypy_cache .pytest_cache .ruff_cache
