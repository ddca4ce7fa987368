"""Hypothesis 4: is cross-attention more parameter-efficient than self-attention?

Equal parameters and equal training FLOPs, rows of 512.

    python tools/sweep.py config/sweeps/efficiency.py --jobs=2

The Transformer has the local mixers of the open model, and its shape was tuned: one wide layer,
which runs at the predicted positions only, is better than two layers by 0.09 nats. The arm
`mixers` has no attention, only the mixers with a wider FFN. The arm `registers` has as many
extra learned tokens as the open model has concepts.
"""
base = """config/mini.py --block_size=512 --n_concept=64 --concept_dim=128 --n_head=8
          --batch_size=4 --micro_batch=4 --learning_rate=4e-3 --min_lr=5e-5 --warmup_steps=200
          --eval_interval=500 --eval_rows=256 --log_interval=100"""
arms = """
open          --ffn_dim=592
transformer   --arch=transformer --n_layer=1 --ffn_dim=1595
transformer_2 --arch=transformer --n_layer=2 --ffn_dim=712 --learning_rate=2.5e-3
registers     --arch=transformer --n_layer=1 --ffn_dim=1574 --n_register=64
mixers        --arch=transformer --n_layer=0 --ffn_dim=1760
strict        --bottleneck=strict --n_layer=3 --ffn_dim=352 --learning_rate=6e-3 --concept_std=1.0
"""
flops = 3.8e13
out_dir = "out/sweep_efficiency"
