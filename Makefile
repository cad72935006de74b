# `make` alone prints what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Threads that wait for each other sleep: where they spin, another busy process makes them many times slower.
export OMP_WAIT_POLICY ?= PASSIVE
QUICK := tests/adapter tests/families tests/files tests/formats tests/merge tests/apply tests/rewards tests/whole

.PHONY: help setup demo test quick check fix docs gpu bench bench-quick bench-gpu paper campaign fuzz cube mutants old build clean
help: ## print the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps open_clip_torch==3.3.0 # only its vocabulary file is read
	@touch $(READY)

setup: $(READY) ## create .venv and install everything, pinned

demo: $(READY) ## the whole story on the embedded pipeline: compose, table and pictures under demo/
	$(BIN)/texforce-hub demo --output demo
	@echo "Next: . .venv/bin/activate; then train your own adapter: texforce-hub demo --train"

test: $(READY) ## the test suite (ARGS="-k name" for a part of it)
	$(BIN)/pytest -n 2 $(ARGS)

quick: $(READY) ## what one needs while working: under a minute on two cores (ARGS=tests/merge for a room)
	$(BIN)/pytest -n 2 -q -m "not slow" $(or $(ARGS),$(QUICK))

check: $(READY) ## the one gate: format, lint, types, tests, README executed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

fix: $(READY) ## format and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## write the documents that are made from the code: the public surface, the reference, the errors
	$(BIN)/python -m tests.generated

COSMIC_RAY := $(VENV)/.cosmic-ray
$(COSMIC_RAY): $(READY)
	$(BIN)/pip install --quiet cosmic-ray==8.7.0
	@touch $@

mutants: $(COSMIC_RAY) ## change one operator at a time in what must never be wrong, and see that a test notices (a sample)
	$(BIN)/python -m tests.mutants

gpu: $(READY) ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

bench: $(READY) ## measure what BENCHMARKS.md reports
	$(BIN)/python -m benchmarks

bench-quick: $(READY) ## six ratios beside the committed ones, under a minute; fails if one fell by more than a third
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.quick

bench-gpu: $(READY) ## everything on a GPU, once, in six minutes: a table, and gpu.json
	$(BIN)/python -m benchmarks.gpu

paper: $(READY) ## the paper's claims in miniature, from nothing: three training seeds a task, with intervals and a figure
	$(BIN)/python -m benchmarks.paper

campaign: $(READY) ## kills and interrupts: training runs, writers, pushes and pulls, stacks on pipelines
	$(BIN)/pytest -m campaign -s tests/train/test_campaign.py tests/whole/test_kills.py tests/hub/test_kills.py \
	  tests/apply/test_interrupts.py tests/rewards/test_environment.py tests/train/test_team.py

fuzz: $(READY) ## 2,000 damaged and 5,000 made-up files, a folder of 300, every mutation of a base's configuration
	$(BIN)/pytest -m campaign -s tests/files/test_fuzz.py tests/whole/test_structures.py \
	  tests/formats/test_random_names.py tests/hub/test_folder.py tests/pipelines/test_configuration.py

cube: $(READY) ## every tuned U-Net under every text dialect, every foreign listing at true size
	$(BIN)/pytest -m campaign tests/whole/test_every_combination.py tests/apply/test_files.py tests/formats/test_listings.py

OLD := .old-stack
$(OLD)/.ready: $(READY)
	$(BIN)/pip install --quiet --no-deps --target $(OLD) diffusers==0.30.3 transformers==4.44.2 tokenizers==0.19.1 \
	  huggingface_hub==0.25.2 peft==0.12.0 accelerate==0.34.2 numpy==1.26.4
	@touch $@

old: $(OLD)/.ready ## what we write, loaded by diffusers 0.30, transformers 4 and PEFT 0.12
	TEXFORCE_HUB_OLD_STACK=$(OLD) $(BIN)/pytest -m campaign tests/formats/test_old_libraries.py

build: $(READY) ## the wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache dist
