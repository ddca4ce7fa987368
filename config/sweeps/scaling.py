"""The law of the gap: how do concept models and Transformers compare as training FLOPs grow?

    python tools/sweep.py config/sweeps/scaling.py
    python tools/sweep.py config/sweeps/scaling_512.py
    python tools/sweep.py config/sweeps/scaling_2048.py

Rows of 128 tokens; the other files have rows of 512 and 2,048. All arms have about 2.9 M
parameters and the best shape and learning rate that were found at 3.8e13 FLOPs. `copy` is the
Transformer with the open model's lexicon on top: the control for what the open model's memory of
words is worth.

A single budget: --budgets=1e13. A sweep that was stopped goes on. 1e14 FLOPs take some 20 to 60
minutes on one CPU core.
"""
base = """config/mini.py --token_dim=128 --concept_dim=128 --n_head=8 --concept_std=1.0
          --learning_rate=4e-3 --min_lr=5e-5 --warmup_steps=200
          --eval_interval=500 --log_interval=100"""
arms = """
strict      --bottleneck=strict --n_layer=3 --ffn_dim=352 --n_concept=64 --learning_rate=8e-3
open        --n_layer=1 --ffn_dim=592 --n_concept=16
mixers      --arch=transformer --n_layer=0 --ffn_dim=1760
copy        --arch=transformer --n_layer=1 --ffn_dim=1585 --copy_head=true
transformer --arch=transformer --n_layer=1 --ffn_dim=1595
"""
seeds = "1"
budgets = "1e13,3.8e13,1.1e14"
out_dir = "out/sweep_scaling"
