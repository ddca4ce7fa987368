"""Third phase: the best text, fewer masks, the learning rate falls to a fiftieth of its peak.

    python train.py config/ettin_17m.py config/phase_decay.py --init_from=out/extend \
        --data_dir=data/best --out_dir=out/decay
"""
carry_optimizer = True
block_size = 8192
rope_theta = 160_000.0
mlm_probability = 0.15
batch_size = batch_size // 8
micro_batch = -(-micro_batch // 8)  # rounded up
lr_schedule = "wsd"
decay_fraction = 1.0
min_lr = learning_rate / 50
learning_rate = learning_rate / 2  # where the second phase ended
warmup_steps = 0
max_steps = 10_600  # 50 B tokens
