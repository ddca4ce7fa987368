"""Rows of 128 tokens: open with 64 concepts against a Transformer with the same mixers.

Equal tokens.

    python tools/sweep.py config/sweeps/short.py
"""
base = "config/mini.py --n_concept=64 --concept_dim=128 --n_head=8 --max_steps=1000"
arms = """
open          --ffn_dim=592
transformer   --arch=transformer --n_layer=1 --ffn_dim=1595
"""
out_dir = "out/sweep_short"
