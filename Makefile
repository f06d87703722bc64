# Two commands are the whole setup: `make demo` and `make test`. Both need Python 3.11+ and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

.PHONY: demo demo-soak test test-all chaos mutants check bench lock clean

demo: $(VENV)/.installed
	@$(BIN)/python -m examples.glam

# Ten runs in a row; the first that fails ends it.
demo-soak: $(VENV)/.installed
	@for run in 1 2 3 4 5 6 7 8 9 10; do echo "run $$run"; $(BIN)/python -m examples.glam || exit 1; done

test: $(VENV)/.installed
	@$(PYTEST) -q -n 2 --dist loadgroup -m "not long"

test-all: $(VENV)/.installed
	@$(PYTEST) -q -n 2 --dist loadgroup

# All faults at once, then every invariant: MINUTES=5, SEED=… (random when not given).
MINUTES ?= 5
chaos: $(VENV)/.installed
	@$(BIN)/python -m tests.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# Deliberately broken builds: the checker must catch each.
mutants: $(VENV)/.installed
	@$(BIN)/python -m tests.mutants

check: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/basedpyright
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/outbox contracts --import outbox.contracts check outbox/contracts/schemas.json

# Each prints its figure and what is wanted; one that misses does not keep the others from running.
bench: $(VENV)/.installed
	-@$(BIN)/python benchmarks/add.py
	-@$(BIN)/python benchmarks/drain.py
	-@$(BIN)/python benchmarks/latency.py
	-@$(BIN)/python -m benchmarks.verify
	-@$(BIN)/python -m benchmarks.blockage

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "outbox needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "Python's venv module is missing; on Debian: apt install python3-venv" >&2; exit 1; }
	@# Wheels only, so that no compiler is needed; nkeys is pure Python and has no wheel.
	@echo "installing into $(VENV) (once; about a minute)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: --no-binary nkeys -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Needs uv; writes no index address.
lock:
	uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --no-emit-index-url --no-emit-find-links --extra embedded --extra cli --extra nkeys --extra metrics --extra otel --group dev pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
