"""Short rows: open with 64 concepts for 128 tokens against a Transformer with the same mixers, equal tokens.

    python tools/sweep.py config/sweeps/short.py
"""
base = "config/mini.py --n_concept=64 --concept_dim=128 --n_head=8 --max_steps=1000"
arms = """
open          --ffn_dim=592
transformer   --arch=transformer --n_layer=1 --ffn_dim=1595
"""
out_dir = "out/sweep_short"
