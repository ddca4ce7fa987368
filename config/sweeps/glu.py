"""How wide should the gated feed-forward layers be, against the width of the model?

10 million parameters, 35 % of them the token table, and 5 million tokens each.

    python tools/sweep.py config/sweeps/glu.py
"""
base = """config/mini.py --arch=transformer --n_mixer=0 --block_size=128 --max_steps=2441
          --warmup_steps=100 --learning_rate=2e-3"""
grid = "glu 2 2.66 3 4"
budget = 10e6
embed_share = 0.35
seeds = "1"
out_dir = "out/sweep_glu"
