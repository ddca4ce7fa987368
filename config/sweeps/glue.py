"""Pretraining for fine-tuning on sentences: short rows against long ones, equal training FLOPs.

    python tools/sweep.py config/sweeps/glue.py --jobs=2

Each concept is responsible for a share of the vocabulary. In rows of 512 tokens, each of 64
concepts finds words of its share. In a sentence of a dozen words most find none, a case that
pretraining never showed them. Rows of 128 with 16 concepts are closer to such sentences;
records/glue fine-tunes these models.
"""
base = """config/mini.py --concept_dim=128 --n_head=8 --ffn_dim=592
          --learning_rate=4e-3 --min_lr=5e-5 --warmup_steps=200
          --eval_interval=1000 --eval_rows=1024 --log_interval=100"""
arms = """
open        --n_concept=16
transformer --arch=transformer --n_layer=1 --ffn_dim=1595
open_512    --n_concept=64 --block_size=512 --batch_size=4 --micro_batch=4 --eval_rows=256
"""
seeds = "1"
flops = 3.42e14
out_dir = "out/sweep_glue"
