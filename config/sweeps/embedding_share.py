"""How much of a small model should be its token table?

10 million parameters and 5 million tokens each. lib/allocation.py finds the shape of each share.

    python tools/sweep.py config/sweeps/embedding_share.py
"""
base = """config/mini.py --arch=transformer --n_mixer=0 --block_size=128 --max_steps=2441
          --warmup_steps=100 --learning_rate=2e-3"""
grid = "embed_share 0.25 0.35 0.45"
budget = 10e6
glu = 2.66
seeds = "1"
out_dir = "out/sweep_embedding_share"
