# make train | evaluate | explain | dense | test | test-fast | test-smoke | test-cluster | lint | data | clean; the first target that needs it makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DIGITS := data/digits/baselines.json
DENSE := data/motorcycle/baselines.json data/mosaics/baselines.json data/moving_digits/baselines.json
MASTER_PORT ?= 29500

# Whole clusters, SLURM's limits in minutes, jobs killed again and again, models trained to be explained: tests for
# which `make test` has no time.
MOSAICS := tests/explain/test_mosaics.py
REAL := tests/tasks/test_real.py
LABS := tests/cluster/test_lab.py tests/cluster/test_jobs.py tests/test_faults.py $(MOSAICS) $(REAL)
# One job on each kind of cluster: SLURM, two hosts, mpirun, torchrun.
SMOKE := tests/cluster/test_smoke.py tests/cluster/test_launchers.py
TEST := python -m pytest --ignore=tests/cluster --ignore=tests/test_faults.py --ignore=$(MOSAICS) --ignore=$(REAL)
# Tests of one process, two files at a time. Ranks take a core each: two such tests at once take three times as long.
WORKERS ?= 2
APART := --numprocesses $(WORKERS) --dist loadfile

.PHONY: train evaluate explain dense test test-fast test-smoke test-cluster lint data clean
.DELETE_ON_ERROR:

train: $(DIGITS)
	. $(BIN)/activate && deepspeed --master_port $(MASTER_PORT) launch/train.py --deepspeed_config ds_configs/zero3.json

# The newest run of the demo, which is trained first if there is none. Its matrices are too small for two threads.
evaluate: $(DIGITS)
	@ls -d runs/vit_tiny-*/export >/dev/null 2>&1 || $(MAKE) train
	. $(BIN)/activate && run=$$(ls -td runs/vit_tiny-*/export | head -n 1) && OMP_NUM_THREADS=1 python launch/evaluate.py \
		$${run%/export} --tasks linear,knn,fewshot,calibration,corruption,ood --data data/digits --ood sklearn-photos

# Why it says so of eight test digits: runs/vit_tiny-*/explanation/index.html.
explain: $(DIGITS)
	@ls -d runs/vit_tiny-*/export >/dev/null 2>&1 || $(MAKE) train
	. $(BIN)/activate && run=$$(ls -td runs/vit_tiny-*/export | head -n 1) && OMP_NUM_THREADS=1 python launch/explain.py \
		$${run%/export} --data data/digits --num 8 --train data/digits --methods located,frozen,relevance,occlusion_3x3

# Decoders on real pictures, a minute or two each: depth in a photo; the digits of mosaics, on a trunk of random weights and
# on that of the demo's newest run; where digits move, by one frame and by five. What they see and say is in
# runs/dense-*/*/pictures.
DENSE_RUNS := runs/dense-$(shell date +%Y%m%d-%H%M%S)
DENSE_TRAIN := . $(BIN)/activate && OMP_NUM_THREADS=1 python launch/train.py --deepspeed_config ds_configs/zero3_fp32.json
dense: $(DIGITS) $(DENSE)
	@ls -d runs/vit_tiny-*/export >/dev/null 2>&1 || $(MAKE) train
	$(DENSE_TRAIN) --config launch/recipes/motorcycle.yaml --ds.train_batch_size 16 --run_dir $(DENSE_RUNS)/depth
	$(DENSE_TRAIN) --config launch/recipes/mosaics.yaml --ds.train_batch_size 64 --run_dir $(DENSE_RUNS)/segment-random
	$(DENSE_TRAIN) --config launch/recipes/mosaics.yaml --ds.train_batch_size 64 --run_dir $(DENSE_RUNS)/segment \
		--trunk "$$(ls -td runs/vit_tiny-*/export | head -n 1)"
	$(DENSE_TRAIN) --config launch/recipes/moving_digits.yaml --ds.train_batch_size 32 --ds.optimizer.params.lr 3e-3 \
		--run_dir $(DENSE_RUNS)/video-one-frame --trunk "$$(ls -td runs/vit_tiny-*/export | head -n 1)" \
		--task.head attentive --task.frames 1
	$(DENSE_TRAIN) --config launch/recipes/moving_digits.yaml --ds.train_batch_size 32 --ds.optimizer.params.lr 3e-3 \
		--run_dir $(DENSE_RUNS)/video --trunk "$$(ls -td runs/vit_tiny-*/export | head -n 1)"

data: $(DIGITS)

test: $(INSTALLED)
	. $(BIN)/activate && { $(TEST) -m dist; status=$$?; $(TEST) $(APART) -m "not dist" && exit $$status; }

test-fast: $(INSTALLED)
	. $(BIN)/activate && $(TEST) $(APART) -m "not dist and not slow and not slurm"

# What fails is run once more, since daemons and networks may have a bad moment. Only 1 means that tests failed;
# whatever else ends pytest (an interruption, an error of its own, no tests) is final. The second run is of
# exactly what failed, and is an error if that is nothing.
test-smoke: $(INSTALLED)
	. $(BIN)/activate && { python -m pytest $(SMOKE); status=$$?; } ; test $$status = 0 || { test $$status = 1 && \
		echo "RETRIED: the tests that failed above run once more" && \
		python -m pytest --last-failed --last-failed-no-failures none $(SMOKE) && \
		echo "RETRIED: the tests that failed at first have passed now"; }

test-cluster: $(INSTALLED)
	. $(BIN)/activate && python -m pytest $(LABS)

lint: $(INSTALLED)
	. $(BIN)/activate && ruff check . && ruff format --check . && mypy

$(DIGITS): $(INSTALLED)
	. $(BIN)/activate && python launch/shards.py digits

$(DENSE): data/%/baselines.json: $(INSTALLED)
	. $(BIN)/activate && python launch/shards.py $* --out $(@D)

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
	rm -rf $(VENV) data/digits $(dir $(DENSE))
