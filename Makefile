# make train | test | test-fast | lint | data | clean; the first target that needs it makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DIGITS := data/digits/baselines.json
MASTER_PORT ?= 29500

.PHONY: train test test-fast lint data clean
.DELETE_ON_ERROR:

train: $(DIGITS)
	. $(BIN)/activate && deepspeed --master_port $(MASTER_PORT) launch/train.py --deepspeed_config ds_configs/zero3.json

data: $(DIGITS)

test: $(INSTALLED)
	. $(BIN)/activate && python -m pytest

test-fast: $(INSTALLED)
	. $(BIN)/activate && python -m pytest -m "not dist and not slow and not slurm"

lint: $(INSTALLED)
	. $(BIN)/activate && ruff check . && ruff format --check . && mypy

$(DIGITS): $(INSTALLED)
	. $(BIN)/activate && python launch/shards.py digits

$(INSTALLED): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version) is too old; MegaViT needs 3.11 (make PYTHON=python3.11 ...)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module; install python3-venv"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
		{ echo "error: no C++ compiler; DeepSpeed compiles an op on first use; install g++"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) data/digits
