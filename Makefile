# Each target makes .venv by itself where it is missing.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS ?= dev,docs
INSTALLED := .venv/.installed

.PHONY: help setup quickstart test test-slow test-project test-pages test-part lowest newest kill-test test-distributed \
	bench docs dist lint clean

# .venv with the package and EXTRAS
setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is not Python 3.11 to 3.13: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv, which takes some minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $(INSTALLED)

# what make can do
help:
	@awk '/^# /{text=substr($$0, 3)} /^[a-z-]+:/{if (text) {sub(":.*", ""); printf "%-18s %s\n", $$0, text}; text=""}' Makefile

# fine-tunes the tiny Phi-3 that comes with the package
quickstart: setup
	$(BIN)/python cli.py fit --config configs/quickstart.yaml

# without tests/project (documentation, examples, benchmarks, releases, the full size), which runs each week
TESTS := $(BIN)/python -m pytest --ignore=tests/project

# the tests, some minutes
test: setup
	$(TESTS) -m 'not slow' --numprocesses 2 --dist loadfile --no-loadscope-reorder

# launchers, hosts and kills, real models, real widths, compilation; three at once, since many wait for processes
test-slow: setup
	$(TESTS) -m slow --numprocesses 3 --dist worksteal

# documentation, examples, benchmarks and releases
test-project: setup
	$(BIN)/python -m pytest tests/project --numprocesses 2

# the notebook, the tutorial and the search as their readers run them; needs EXTRAS=dev,docs,notebook,search
test-pages: setup
	$(BIN)/python -m pytest tests/project/test_notebook.py tests/project/test_tutorial.py tests/project/test_examples.py

# what leans most on other packages and on the interpreter, a few minutes on one core
PART := tests/adapters tests/data tests/export tests/invariants tests/metrics tests/model \
  tests/test_module.py tests/test_module_training.py tests/test_module_checkpoints.py tests/test_accumulation.py \
  tests/test_public_names.py tests/cli/test_quickstart.py tests/cli/test_run.py

test-part: setup
	$(BIN)/python -m pytest -m 'not slow' $(PART)

# the oldest release of every direct dependency that pyproject.toml admits
lowest:
	test -x .venv-lowest/bin/uv || { $(PYTHON) -m venv .venv-lowest && .venv-lowest/bin/python -m pip install --quiet uv; }
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev,qlora]'
	.venv-lowest/bin/python -m pytest -m 'not slow' $(PART)

# the newest release of everything, also of what pyproject.toml has an upper bound for
newest:
	test -x .venv-newest/bin/uv || { $(PYTHON) -m venv .venv-newest && .venv-newest/bin/python -m pip install --quiet uv; }
	sed -n 's/^  "\([^"]*\),<[^"]*".*/\1/p' pyproject.toml > .venv-newest/unbounded.txt
	.venv-newest/bin/uv pip install --python .venv-newest/bin/python --upgrade --override .venv-newest/unbounded.txt \
		--editable '.[dev,qlora]'
	.venv-newest/bin/python -m pytest -m 'not slow' $(PART)

# a run that saves every step, killed at random moments: each time it goes on to the same final weights
kill-test: setup
	KILLS=200 $(BIN)/python -m pytest -s tests/test_kills.py

# all of it once more, by itself; two hosts in network namespaces need root and iproute2
test-distributed: setup
	$(BIN)/python -m pytest tests/distributed

# every benchmark, with its tables in benchmarks/results: an hour or more, and only an idle machine tells the truth
bench: setup
	$(BIN)/python benchmarks/run_all.py

# wheel and sdist in dist/, as the package index takes them, each installed where nothing else is and used there
dist: setup
	rm -rf dist
	$(BIN)/pyproject-build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_dist.py dist

# style and types
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the documentation as a site in site/; a warning, such as a broken link, is an error
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # what is switched off speaks of another generator
	@echo "the site: site/index.html; .venv/bin/mkdocs serve shows it with its search at http://localhost:8000"

# removes what make made
clean:
	rm -rf .venv .venv-lowest .venv-newest build dist runs site
