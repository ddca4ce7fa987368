"""First of three phases, on top of any Transformer: rows of 1,024 tokens at a constant rate.

    python train.py config/ettin_17m.py config/phase_pretrain.py --out_dir=out/pretrain

The batch grows in three steps. The learning rate stays at its peak after the warm-up; the other two
phases come down from it. Recipe: Ettin (2507.11412), after ModernBERT (2412.13663).
"""
block_size = 1024
rope_theta = 10_000.0
mlm_probability = 0.3
lr_schedule = "constant"
batch_schedule = "0.125:0.03,0.5:0.04,1.0:0.93"
max_steps = 360_000  # 1.6 T tokens in batches of 4,608 rows
