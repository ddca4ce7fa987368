"""How narrow may the token table be? Concepts of one width, equal tokens.

    python tools/sweep.py config/sweeps/token_dim.py
"""
base = "config/mini.py --concept_dim=256"
grid = "token_dim 4 16 64 128 256"
out_dir = "out/sweep_token_dim"
