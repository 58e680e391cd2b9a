# The two commands: `make demo` and `make test`. Both make .venv if it is not there.
# Versions and hashes are the tested set's (constraints.txt, *.lock; `make lock` makes them). torch comes in builds: the
# one that your index offers is taken, at the version of constraints.txt. Others:
#     make .venv TORCH='--require-hashes --no-deps -r requirements-torch.lock'   (the default build, with CUDA on Linux)
#     make .venv TORCH='torch>=2.11'                                             (the newest)

PYTHON ?= python3
TORCH ?= -c constraints.txt torch
BIN := .venv/bin
# What pip builds from source is built with the tested set's setuptools; the second is read by pip 25.3 and newer.
BUILDS := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt

.PHONY: .venv demo test test-slow lowest check lock format docs clean

.venv: .venv/installed

# The mark is written last, so that an installation that failed is made again.
.venv/installed: pyproject.toml constraints.txt requirements.lock
	@echo "Making .venv and installing lrt with its tools. torch is the large part."
	$(PYTHON) -m venv .venv
	$(BUILDS) $(BIN)/python -m pip install --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch .venv/installed
	@echo "Installed. Next: make demo, or $(BIN)/lrt --help"

demo: .venv/installed
	$(BIN)/lrt demo

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile --durations=15

test-slow: .venv/installed
	$(BIN)/pytest -m slow -n 2 --dist loadfile --timeout 1200 --durations=15

# What pyproject.toml allows must work: every direct dependency at its lowest version, on the lowest Python. torch is
# its build for CPUs, from torch's own index (0.2 GB). Without that index: `make lowest LOWEST_TORCH=` takes what yours
# offers, on Linux 2.6 GB with CUDA. uv looks for Python 3.10 on the PATH first, then fetches it.
# Old releases call newer ones by names that are deprecated by now, so that such a warning is no error here.
LOWEST_TORCH ?= --torch-backend cpu
lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -W default::DeprecationWarning

.venv-lowest/installed: pyproject.toml | .venv/installed
	$(BIN)/uv venv --clear --python 3.10 .venv-lowest
	$(BIN)/uv pip install --python .venv-lowest --resolution lowest-direct $(LOWEST_TORCH) -e '.[dev]'
	@touch .venv-lowest/installed

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/installed
	$(BIN)/mkdocs build --strict --site-dir site

lock: .venv/installed
	$(BIN)/python tools/lock.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest build dist *.egg-info
