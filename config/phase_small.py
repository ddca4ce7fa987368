"""Scales a phase down to minutes on a CPU: rows an eighth as long, a thousandth of the steps.

    make phases SIZE=17m
"""
data_dir = "data/pydocs"
vocab_size = 0
block_size = block_size // 8
batch_size = 4096 // block_size
micro_batch = batch_size
dropout = 0.0  # few tokens are seen twice
warmup_steps = warmup_steps // 40
max_steps = 2 * (15 + max_steps // 2000)
eval_interval = max_steps // 2
eval_rows = 8192 // block_size
log_interval = 10
health_rows = 0
