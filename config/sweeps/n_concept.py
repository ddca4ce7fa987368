"""How many concepts does a row of 128 tokens need, with and without places?

    python tools/sweep.py config/sweeps/n_concept.py
"""
base = "config/mini.py"
grid = """
n_concept 8 16 32 64
anchored  false true
"""
out_dir = "out/sweep_n_concept"
