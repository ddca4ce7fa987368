# make demo    Python's documentation -> tokens -> training -> filled masks; 5 minutes on two cores,
#              no network data
# make train   trains on your own data, DATA=folder, files or globs (see data/quick.py):
#              make train DATA=texts/ SIZE=tiny ARGS=--max_steps=1000 PREPARE_ARGS=--tokenizer=gpt2
# make phases  three phases of pretraining of SIZE=17m, 32m, ... (config/ettin_*.py), scaled down to
#              minutes on a CPU; ARGS="config/decoder.py" makes decoders
# make sweep-demo   nine small models that spend 3 million parameters in different ways, and a report
#              of them: minutes on two cores
# make test    ruff and all tests, on the CPU
# make faults  kills, full disks, hangs, flipped bits at hundreds of random moments; writes the table
#              of records/faults.md, 25 minutes on two cores
# make fuzz    damaged and random files for everything that reads files, 10 minutes for each
# make bench   speed and memory beside BERT, ModernBERT and Perceiver models of the same size
# make clean   removes .venv, out and caches
PY = .venv/bin/python

.PHONY: demo train phases sweep-demo test faults fuzz bench clean

# Settings of make train: DATA, ARGS, PREPARE_ARGS, EVAL_ARGS and
SIZE = micro
NPROC = 1

# Empty files that say when the packages were installed: make installs again when a list is newer.
.venv/core: requirements.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/extra: .venv/core requirements-extra.txt
	$(PY) -m pip install -q -r requirements-extra.txt
	touch $@

demo: .venv/core
	$(PY) data/pydocs/prepare.py
	$(PY) train.py config/demo.py
	$(PY) tools/eval.py --out_dir=out/demo
	$(PY) tools/sample.py --out_dir=out/demo < config/demo_sentences.txt

train: .venv/core
	$(PY) data/quick.py '--data=$(DATA)' --size=$(SIZE) --nproc=$(NPROC) '--args=$(ARGS)' \
		'--prepare_args=$(PREPARE_ARGS)' '--eval_args=$(EVAL_ARGS)'

phases: SIZE = 17m
phases: .venv/core
	$(PY) data/pydocs/prepare.py
	$(PY) train.py config/ettin_$(SIZE).py config/phase_pretrain.py config/phase_small.py \
		--out_dir=out/phases_$(SIZE)/pretrain $(ARGS)
	$(PY) train.py config/ettin_$(SIZE).py config/phase_extend.py config/phase_small.py \
		--init_from=out/phases_$(SIZE)/pretrain --out_dir=out/phases_$(SIZE)/extend $(ARGS)
	$(PY) train.py config/ettin_$(SIZE).py config/phase_decay.py config/phase_small.py \
		--init_from=out/phases_$(SIZE)/extend --out_dir=out/phases_$(SIZE)/decay $(ARGS)

sweep-demo: .venv/core
	$(PY) data/pydocs/prepare.py
	$(PY) tools/sweep.py config/sweeps/allocation_demo.py
	$(PY) tools/sweep.py report --dir=out/sweep_allocation_demo

test: .venv/extra
	.venv/bin/ruff check .
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

faults: .venv/extra
	$(PY) tests/faults/storm.py

fuzz: .venv/extra
	$(PY) tests/faults/fuzz.py

bench: .venv/extra
	$(PY) data/pydocs/prepare.py
	$(PY) tools/bench.py --peers=1

clean:
	rm -rf .venv out .pytest_cache .ruff_cache
