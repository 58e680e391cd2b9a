# The two commands: `make demo` and `make test`. Both make .venv if it is not there.
# constraints.txt pins torch to a version whose CPU build installs as it is. On a CUDA machine:
#     make .venv CONSTRAINTS=          (takes the newest torch that pyproject.toml allows, with CUDA)

PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin

.PHONY: .venv demo test test-slow check format docs clean

.venv: .venv/installed

# The mark is written last, so that an installation that failed is made again.
.venv/installed: pyproject.toml constraints.txt
	@echo "Making .venv and installing lrt with its tools. torch is the large part."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(CONSTRAINTS) -e '.[dev]'
	@touch .venv/installed
	@echo "Installed. Next: make demo, or $(BIN)/lrt --help"

demo: .venv/installed
	$(BIN)/lrt demo

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile --durations=15

test-slow: .venv/installed
	$(BIN)/pytest -m slow -n 2 --dist loadfile --timeout 1200 --durations=15

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/installed
	$(BIN)/mkdocs build --strict --site-dir site

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info
