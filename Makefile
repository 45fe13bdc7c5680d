# Both commands a newcomer needs make their own environment: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
SUPPLY_STAMP := $(VENV)/.installed-supply
WORKERS ?= 2
KILLS ?= 100
SOAK_SECONDS ?= 1200

.PHONY: demo test test-all kill-test fault-test soak fuzz lint format docs docs-pages requirements sbom audit bench clean

demo: $(STAMP)
	$(BIN)/finetune demo

# A process for each of two cores, with one thread: nearly every test is of one thread, and threads of two processes
# that share a core wait for each other. A file's tests stay together, since they share what they prepare.
IN_PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

test: $(STAMP)
	$(IN_PARALLEL) -m "not slow"

test-all: $(STAMP)
	$(IN_PARALLEL)

# `make test` kills a run at four moments; this kills runs, sweeps and exports at a hundred, and goes on where it was.
kill-test: $(STAMP)
	$(BIN)/python tests/kills.py --kills $(KILLS)

# A disk that is full from each kind of operation of a run on; `make test` tries the writes.
fault-test: $(STAMP)
	$(BIN)/python -m pytest tests/test_faults.py

# Small runs in one process for twenty minutes: memory, open files and threads have to stay flat.
soak: $(STAMP)
	$(BIN)/python tests/soak.py --seconds $(SOAK_SECONDS)

# `make test` reads a few damaged files of each kind; this goes on for FUZZ_SECONDS, and from where the last one ended.
FUZZ_SECONDS ?= 600
fuzz: $(STAMP)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/mypy .ci/supply

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site; a link that leads nowhere ends it. Nothing is fetched while it is built or read.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml

# The pages of the commands, from the commands themselves.
docs-pages: $(STAMP)
	$(BIN)/python docs/make_cli.py

# The versions that are installed here, with hashes and without addresses (docs/supply.md).
requirements: $(STAMP)
	$(BIN)/python .ci/supply/requirements.py --output requirements.txt

sbom: $(SUPPLY_STAMP)
	$(BIN)/python .ci/supply/sbom.py --output build/sbom.json

audit: $(SUPPLY_STAMP)
	$(BIN)/python .ci/supply/audit.py

# Takes long, and the machine should have nothing else to do; results are written to benchmarks/results.
bench: $(STAMP)
	$(BIN)/python benchmarks/run_vs_script.py --output
	$(BIN)/python benchmarks/utilisation.py --output

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamp is made last: an installation that broke off is tried again.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[docs]'
	@touch $@

$(SUPPLY_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[supply]'
	@touch $@
