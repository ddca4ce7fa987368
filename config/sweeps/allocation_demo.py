"""Nine ways to spend 3 million parameters: a first sweep with its report, minutes on two cores.

    make sweep-demo

On Python's documentation, 300,000 tokens each, two runs at a time.
"""
base = """config/mini.py --data_dir=data/pydocs --arch=transformer --n_mixer=0 --max_steps=150
          --warmup_steps=20 --learning_rate=2e-3 --lr_schedule=wsd --eval_interval=50
          --eval_rows=128"""
grid = """
embed_share 0.3 0.35 0.4
glu         2 3 4
"""
budget = 3e6
seeds = "1"
jobs = 2
out_dir = "out/sweep_allocation_demo"
