"""Hypothesis 4: does cross-attention buy parameter efficiency? Equal parameters and equal training FLOPs, rows of 512.

    python sweep.py config/sweep_efficiency.py

The Transformer has the open model's local mixers; mixers is those mixers alone, deepened to the same parameters.
"""
base = "config/mini.py --block_size=512 --batch_size=8 --micro_batch=8 --eval_rows=256"
arms = """
open          --bottleneck=open   --n_concept=64
strict        --bottleneck=strict --n_concept=64 --n_layer=3 --ffn_dim=485
transformer   --arch=transformer --token_dim=192 --ffn_dim=460 --n_layer=3
mixers        --arch=transformer --token_dim=192 --ffn_dim=592 --n_layer=0 --n_mixer=6
"""
flops = 2e13
out_dir = "out/sweep_efficiency"
