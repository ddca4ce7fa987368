# make demo    text -> tokens -> training -> filled masks, about five minutes on two cores, no network data
# make train   your own: DATA=folder, files or globs; SIZE=micro, tiny, small; ARGS="--max_steps=1000" PREPARE_ARGS="--tokenizer=gpt2": README
# make test    lint and every test, CPU only
# make bench   speed and memory side by side with BERT, ModernBERT and Perceiver of equal size
PY = .venv/bin/python

.PHONY: demo train test bench clean

SIZE = micro
NPROC = 1

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

test: .venv/extra
	.venv/bin/ruff check .
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

bench: .venv/extra
	$(PY) data/pydocs/prepare.py
	$(PY) tools/bench.py --peers=1

clean:
	rm -rf .venv out .pytest_cache .ruff_cache
