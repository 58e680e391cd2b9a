# The two commands: `make demo` and `make test`. Both make .venv if it is not there.
# constraints.txt pins torch to a version whose CPU build installs as it is. On a CUDA machine:
#     make .venv CONSTRAINTS=          (takes the newest torch that pyproject.toml allows, with CUDA)

PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin

.PHONY: demo test test-slow check format clean

.venv: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	touch .venv

demo: .venv
	$(BIN)/lrt demo

test: .venv
	$(BIN)/pytest -n 2 --dist loadfile --durations=15

test-slow: .venv
	$(BIN)/pytest -m slow --timeout 1200 --durations=15

check: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info
