"""How wide should concepts be? Token tables of one width, equal tokens.

    python tools/sweep.py config/sweeps/concept_dim.py
"""
base = "config/mini.py --token_dim=64"
grid = "concept_dim 128 256 384 512"
out_dir = "out/sweep_concept_dim"
