# make help lists what there is. Everything runs in .venv, which the first target that needs it makes.

PYTHON ?= python3
ARGS ?=
SCORECARD ?= print
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests start hundreds of processes, which would otherwise compile every module again where bytecode may not be written.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --max-worker-restart=0

.DEFAULT_GOAL := help
.PHONY: help train test check house oldest lane portable faults scorecard fuzz hf faults-full replay bench gpu gpu-bundle quality golden golden-checkpoint format site clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 19

train: $(INSTALLED) ## Train the default model, about 5 minutes; make train ARGS="steps=20 model.moe.top_k=1"
	$(BIN)/tokenyard train $(ARGS)

test: $(INSTALLED) ## Run all tests; make test ARGS="tests/launch -k sweep"
	$(PYTEST) --ignore=tests/faults $(ARGS)

OLDEST := .venv-oldest
oldest: $(OLDEST)/.installed ## Run some of the tests with the oldest torch that is allowed, 2.11.0: 3 GB are downloaded first
	$(OLDEST)/bin/python -c 'import torch; print("torch", torch.__version__)'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 @tests/oldest.txt $(ARGS)

lane: $(INSTALLED) ## Run the steps of single ranks on fake tensors, every model with every exchange; CI has a quarter of them
	TOKENYARD_LANE=all $(PYTEST) tests/cuda_lane $(ARGS)

portable: $(INSTALLED) ## Run all tests as on processors with fewer instructions, on 1 and 2 threads, an hour and more
	for isa in avx2 default; do for threads in 1 2; do \
		TOKENYARD_TESTS=all ATEN_CPU_CAPABILITY=$$isa ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest -n 2 --ignore=tests/faults $(ARGS) || exit 1; \
	done; done

faults: $(INSTALLED) ## Run the faults of docs/faults.md and print the scorecard, 15 minutes
	TOKENYARD_SCORECARD=$(SCORECARD) $(PYTEST) -m fault $(ARGS)

scorecard: ## The same, and write the tables of docs/faults.md
	SCORECARD=write $(MAKE) --no-print-directory faults

fuzz: $(INSTALLED) ## Mutate small files and open them: read, or refused in a line; make fuzz ARGS="--minutes 10 --seed 3"
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(ARGS)

hf: $(INSTALLED) ## Compare random models of each Hugging Face family with transformers', 15 minutes; make hf ARGS="--seed 7"
	OMP_NUM_THREADS=1 $(BIN)/python tests/interop/random_models.py $(ARGS)

replay: $(INSTALLED) ## Kill ranks of a run of 30 minutes, print the productive share; make replay ARGS="--mean 10 --seed 3"
	OMP_NUM_THREADS=1 PYTHONPATH=tests/distributed $(BIN)/python tests/faults/replay.py $(ARGS)

faults-full: ## The same with 200 random kills, half an hour
	TOKENYARD_KILLS=200 $(MAKE) --no-print-directory faults

check: $(INSTALLED) ## Format, lint, types, tests: what CI runs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(MAKE) --no-print-directory test

PEERS = tokenyard "transformers grouped_mm" torchtitan Megatron-Core
bench: $(INSTALLED) ## Run the benchmarks and print their tables, 20 minutes on a machine that does nothing else
	$(BIN)/python -m tokenyard.bench.memory
	$(BIN)/python -m tokenyard.bench.kept_bytes
	$(BIN)/python -m tokenyard.bench.layer --rounds 5
	$(BIN)/python -m tokenyard.bench.peers --rounds 5 --warmup 1 --cases 8x2-fp32
	$(BIN)/python -m tokenyard.bench.peers --rounds 5 --warmup 1 --cases 8x2-bf16 --sides $(PEERS) DeepSpeed "DeepSpeed, drops"
	$(BIN)/python -m tokenyard.bench.peers --rounds 5 --warmup 1 --cases 64x8-bf16 --sides $(PEERS)
	$(BIN)/python -m tokenyard.bench.ranks --rounds 5 --layouts data expert tensor
	$(BIN)/python -m tokenyard.bench.long_sequence

gpu-bundle: ## With a network: wheels that a machine with GPUs may lack, into .gpu/, 10 MB
	@$(PYTHON) bench/gpu/bundle.py

gpu: ## All that GPUs can tell, in 8 minutes, with the python3 that has torch; make gpu ARGS="--part layers --out gpu-1"
	@$(PYTHON) -P bench/gpu/start.py $(ARGS)

quality: $(INSTALLED) ## Train dense models and MoE variants of equal active size, and compare their losses, an hour and more
	$(BIN)/python -m tokenyard.bench.quality --processes 2 $(ARGS)

house: $(INSTALLED) ## How the code is laid out, and what a step passes through; make house ARGS=--trace prints its files
	$(BIN)/python tests/house.py $(ARGS)

SITE := .venv-site
site: $(SITE)/.installed ## Build the documentation as a site in build/site, which needs no network and has a search
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet

golden: $(INSTALLED) ## Write tests/golden/*.txt anew, after a change that is meant to change the numbers
	OMP_NUM_THREADS=1 TOKENYARD_GOLDEN=write $(BIN)/python -m pytest tests/test_golden.py

golden-checkpoint: $(INSTALLED) ## Write tests/golden/checkpoint anew, after a change of the format that is meant
	OMP_NUM_THREADS=1 TOKENYARD_GOLDEN=write $(BIN)/python -m pytest tests/faults/test_09_golden.py

format: $(INSTALLED) ## Format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv, caches and builds; runs/ stays
	rm -rf .venv .venv-oldest .venv-site build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: machines without a GPU offer a CPU build under the same version, and pip takes what it finds.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "tokenyard needs Python >= 3.11, and $(PYTHON) is not; name another: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(SITE)/.installed: Makefile
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check "mkdocs-material>=9.6,<10"
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0
	grep -v '^torch==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		-e . "transformers>=5.3" "pytest>=9" "pytest-timeout>=2.4" "pytest-xdist>=3.8"
	@touch $@
