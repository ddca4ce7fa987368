# make demo    text -> tokens -> training -> filled masks, about five minutes on two cores, no network data
# make test    lint and every test, CPU only
# make bench   speed side by side with a Hugging Face BERT of equal size
PY = .venv/bin/python
DATA = data/pydocs
OUT = out/demo

.PHONY: demo test bench clean

.venv/core: requirements.txt
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/extra: .venv/core requirements-extra.txt
	$(PY) -m pip install -q -r requirements-extra.txt
	touch $@

demo: .venv/core
	$(PY) data/pydocs/prepare.py --out_dir=$(DATA)
	$(PY) train.py config/demo.py --data_dir=$(DATA) --out_dir=$(OUT)
	$(PY) eval.py --out_dir=$(OUT)
	$(PY) sample.py --out_dir=$(OUT) < config/demo_sentences.txt

test: .venv/extra
	.venv/bin/ruff check .
	$(PY) -m pytest

bench: .venv/extra
	$(PY) bench.py --peers=1

clean:
	rm -rf .venv out .pytest_cache .ruff_cache
