"""Hypothesis 2: wide and shallow or narrow and deep, at equal parameters (within 1 %).

    python tools/sweep.py config/sweeps/width.py
"""
base = "config/mini.py"
arms = """
deep_d128_L9    --concept_dim=128 --ffn_dim=520 --n_layer=9
d256_L3         --concept_dim=256 --ffn_dim=558 --n_layer=3
wide_d384_L1    --concept_dim=384 --ffn_dim=664 --n_layer=1
"""
out_dir = "out/sweep_width"
