# Each target makes .venv by itself where it is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup quickstart test test-fast test-slow kill-test test-distributed bench lint docs clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	@touch $(INSTALLED)

quickstart: setup
	$(BIN)/python cli.py fit --config configs/quickstart.yaml

test: test-fast test-slow

test-fast: setup
	$(BIN)/python -m pytest -m 'not slow' --numprocesses 2

# one after the other: they measure memory, or need both cores
test-slow: setup
	$(BIN)/python -m pytest -m slow

# a run that saves every step, killed at random moments: each time it goes on to the same final weights
kill-test: setup
	KILLS=200 $(BIN)/python -m pytest -s tests/test_kills.py

# all of it once more, by itself; two hosts in network namespaces need root and iproute2
test-distributed: setup
	$(BIN)/python -m pytest tests/distributed

# every benchmark, with its tables in benchmarks/results: under an hour, and only an idle machine tells the truth
bench: setup
	$(BIN)/python benchmarks/run_all.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the documentation as a site in site/; a warning, such as a broken link, is an error
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # what is switched off speaks of another generator

clean:
	rm -rf .venv build dist runs site
