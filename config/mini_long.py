"""Long rows: sinusoidal positions up to 131,072 tokens; time and memory linear in the row.

    python train.py config/mini_long.py --data_dir=data/mine
    python train.py config/mini_long.py --data_dir=data/mine --block_size=131072

The first trains on rows of 8,192 tokens, whose positions are shifted by a random offset, so that
all positions up to max_length are learned. The second trains on whole rows.
"""
out_dir = "out/mini_long"
data_dir = "data/mine"
block_size = 8192
position = "sinusoidal"
max_length = 131072
n_layer = 1
n_head = 4
n_concept = 64
concept_dim = 256
token_dim = 128
ffn_dim = 512
concept_std = 0.5
masking_type = "span"
mlm_probability = 0.15
batch_size = 4
micro_batch = 1
learning_rate = 2e-3
warmup_steps = 50
max_steps = 500
eval_interval = 100
eval_rows = 16
health_rows = 8
log_interval = 10
