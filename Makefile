# Everything runs in an environment of its own, .venv, made on first use and again when pyproject.toml changes.

PYTHON ?= python3
# Where torch comes from; empty is pip's default. On Linux without a GPU, PyTorch's CPU wheel index saves gigabytes.
TORCH_INDEX ?=
# More arguments for train, test and bench: make train ARGS="--set train.steps=50"
ARGS ?=
# Test files that run at the same time; each may start several processes of its own.
WORKERS ?= 2

VENV := .venv
INSTALLED := $(VENV)/.installed
# -P keeps the current folder off sys.path: our folders are not packages of their own.
RUN := $(VENV)/bin/python -P

# With PYTHON given, what is for GPUs runs in that Python as it is: a machine with a GPU may have torch and no network.
# The package is found through a link, and wheels in build/wheels are unpacked first (tests/gpu/requirements.txt).
ifeq ($(origin PYTHON),command line)
GPU_NEEDS := build/link/counterflow
GPU_RUN := PYTHONPATH=$(CURDIR)/build/link:$(CURDIR)/build/site $(PYTHON) -P
else
GPU_NEEDS = $(INSTALLED)
GPU_RUN = $(RUN)
endif
# Where prove-gpu leaves its results; REHEARSE=1 runs it on the CPU at toy sizes.
OUT ?= prove
REHEARSE ?=

.DEFAULT_GOAL := help
.PHONY: help train test test-long test-all test-gpu prove-gpu layouts audit lint bench floors claims docs clean

# An environment that was made when the clone lay elsewhere points to the old place.
$(shell [ "$$(cat $(INSTALLED) 2>/dev/null)" = "$(CURDIR)" ] || rm -f $(INSTALLED))

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

train: $(INSTALLED) ## train the smoke model on four local processes
	$(RUN) -m counterflow train smoke --nproc 4 $(ARGS)

test: $(INSTALLED) ## run the tests, all but the long ones: minutes
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -n $(WORKERS) --dist loadfile -m "not long" $(ARGS)

test-long: $(INSTALLED) ## run the long tests, which make test leaves out
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -n $(WORKERS) --dist loadfile -m long $(ARGS)

test-all: $(INSTALLED) ## run every test, the long ones too
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(RUN) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-gpu: $(GPU_NEEDS) ## run the tests that need an NVIDIA GPU
	@$(GPU_RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make test-gpu needs an NVIDIA GPU and a torch built for it: there is none here. All that can be tested without is in make test.")'
	$(GPU_RUN) -m pytest tests/gpu -rs -p no:cacheprovider $(ARGS)

prove-gpu: $(GPU_NEEDS) ## prove the path of GPUs on one GPU in 8 minutes, into prove/
	$(GPU_RUN) tests/gpu/prove/run.py --out $(OUT) $(if $(REHEARSE),--rehearse) $(ARGS)

layouts: $(INSTALLED) ## compare every schedule and layout with one process over twenty steps
	COUNTERFLOW_TEST_STEPS=20 OMP_NUM_THREADS=1 $(RUN) -m pytest tests/training/test_pipelines.py -rP $(ARGS)

audit: $(INSTALLED) ## train a small model in FP8 and in BF16 for 1,000 steps and compare them
	@mkdir -p runs
	$(RUN) -m counterflow audit audit --bound 0.25 --html runs/audit.html $(ARGS)

lint: $(INSTALLED) ## check style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@mkdir -p $(VENV)/typecheck && ln -sfn ../.. $(VENV)/typecheck/counterflow
	MYPYPATH=$(VENV)/typecheck $(RUN) -m mypy -p counterflow

bench: $(INSTALLED) ## measure a training step against other implementations
	$(RUN) benchmarks/step.py $(ARGS)

floors: $(INSTALLED) ## draw the floors of the package from its imports into docs/floors.svg
	$(RUN) tests/house/floors.py

claims: $(INSTALLED) ## write which test proves which claim of the README into docs/claims.md
	$(RUN) tests/house/claims.py

docs: $(VENV)/.docs-installed ## build the documents and the API's pages into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build
	@echo "open build/site/index.html"

clean: ## remove the environment and caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without a GPU torch is pinned, and first, before a dependency's wider range can choose a build with CUDA in it.
$(INSTALLED): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. Counterflow needs Python 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit("Counterflow needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another one: make PYTHON=/path/to/python" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	"$(PYTHON)" -m venv $(VENV)
	@set -e; \
	if nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ]; then \
	  echo "NVIDIA GPU found: installing torch with CUDA"; torch=torch; \
	else \
	  echo "no NVIDIA GPU found: installing the tested torch"; torch=torch==2.13.0; \
	fi; \
	if [ "$$torch" != torch ] || [ -n "$(TORCH_INDEX)" ]; then \
	  $(RUN) -m pip install --quiet $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$$torch"; \
	fi
	$(RUN) -m pip install --quiet -e '.[dev]'
	@echo "$(CURDIR)" >$@

build/link/counterflow: $(wildcard build/wheels/*.whl)
	@mkdir -p build/link && ln -sfn "$(CURDIR)" $@
	@set -e; for wheel in $^; do "$(PYTHON)" -m pip install --quiet --no-index --no-deps --upgrade --target build/site "$$wheel"; done

# The documents' packages are no part of the environment that trains and tests.
$(VENV)/.docs-installed: $(INSTALLED)
	$(RUN) -m pip install --quiet -e '.[docs]'
	@touch $@
