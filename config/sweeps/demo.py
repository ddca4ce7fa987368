"""A first sweep: two learning rates for the demo. Six minutes, three a run.

    python data/pydocs/prepare.py
    python tools/sweep.py config/sweeps/demo.py
"""
base = "config/demo.py"
arms = """
slow  --learning_rate=5e-4
fast  --learning_rate=4e-3
"""
seeds = "1"
out_dir = "out/sweep_demo"
