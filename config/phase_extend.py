"""Second phase: rows of 8,192 tokens, the learning rate falls to half its peak.

    python train.py config/ettin_17m.py config/phase_extend.py --init_from=out/pretrain \
        --data_dir=data/better,data/long --data_weights=0.7,0.3 --out_dir=out/extend

Weights, optimizer state and token count come from the first phase. A larger theta makes the rotary
positions turn more slowly, so that distances beyond 1,024 tokens look like known ones. Steps hold
as many tokens as before.
"""
carry_optimizer = True
block_size = 8192
rope_theta = 160_000.0
mlm_probability = 0.3
batch_size = batch_size // 8
micro_batch = -(-micro_batch // 8)  # rounded up
lr_schedule = "wsd"
decay_fraction = 1.0  # 1-sqrt over the whole phase
min_lr = learning_rate / 2
warmup_steps = 0
max_steps = 53_000  # 250 B tokens
