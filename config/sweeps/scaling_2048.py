"""config/sweeps/scaling.py with rows of 2,048 tokens: strict has 1,024 concepts, open 256.

Learning rates are those of the shorter rows. 2.5e-3 and 6e-3 were worse for open, copy and
transformer; strict was not tuned (records/anchors). `copy` is the control that scaling.py explains.

    python tools/sweep.py config/sweeps/scaling_2048.py
"""
base = """config/mini.py --token_dim=128 --concept_dim=128 --n_head=8 --concept_std=1.0
          --block_size=2048 --batch_size=1 --micro_batch=1 --eval_rows=64
          --learning_rate=4e-3 --min_lr=5e-5 --warmup_steps=200
          --eval_interval=500 --log_interval=100"""
arms = """
strict      --bottleneck=strict --n_layer=3 --ffn_dim=352 --n_concept=1024 --learning_rate=6e-3
open        --n_layer=1 --ffn_dim=592 --n_concept=256
copy        --arch=transformer --n_layer=1 --ffn_dim=1585 --copy_head=true
transformer --arch=transformer --n_layer=1 --ffn_dim=1595
"""
seeds = "1"
budgets = "1e13,3.8e13,1.1e14"
out_dir = "out/sweep_scaling_2048"
