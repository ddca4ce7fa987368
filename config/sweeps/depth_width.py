"""Deep and narrow or wide and shallow? The parameters of one budget, equal tokens.

    python tools/sweep.py config/sweeps/depth_width.py
"""
base = """config/mini.py --arch=transformer --n_mixer=0 --block_size=128 --max_steps=2441
          --warmup_steps=100 --learning_rate=2e-3"""
grid = """
embed_share 0.2 0.3 0.4 0.5
glu 2.66 4
"""
budget = 10e6
seeds = "1"
out_dir = "out/sweep_depth_width"
