"""How wide should the gated feed-forward layers be, against the width of the model?

10 million parameters, 35 % of them the token table. All train on 5 million tokens, the best goes on
to 50 million.

    python tools/sweep.py config/sweeps/glu.py
"""
base = """config/mini.py --arch=transformer --n_mixer=0 --block_size=128 --lr_schedule=wsd
          --warmup_steps=100 --learning_rate=2e-3"""
grid = "glu 2 2.66 3 4"
budget = 10e6
embed_share = 0.35
rungs = "5e6,50e6"
promote = 1
kill_margin = 0.5  # less than two seeds differ by (records/sweeps); 0 trains all arms to the rung
kill_unit = "ppl"
seeds = "1"
out_dir = "out/sweep_glu"
