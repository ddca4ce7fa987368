"""How much of a small model should be its token table?

10 million parameters. lib/allocation.py finds the shape of each share. All train on 5 million
tokens, the best goes on to 50 million.

    python tools/sweep.py config/sweeps/embedding_share.py
"""
base = """config/mini.py --arch=transformer --n_mixer=0 --block_size=128 --lr_schedule=wsd
          --warmup_steps=100 --learning_rate=2e-3"""
grid = "embed_share 0.25 0.35 0.45"
budget = 10e6
glu = 2.66
rungs = "5e6,50e6"
promote = 1
kill_margin = 0.5  # less than two seeds differ by (records/sweeps); 0 trains all arms to the rung
kill_unit = "ppl"
seeds = "1"
out_dir = "out/sweep_embedding_share"
