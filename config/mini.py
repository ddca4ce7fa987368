"""The base of the sweeps: minutes a run on one CPU core, rows of 128 tokens, 16k vocabulary.

    python prepare.py --input=input.txt --out_dir=data/mine
    python train.py config/mini.py --data_dir=data/mine

5,444,492 parameters with a 30,522-word vocabulary, 1 M tokens. The masking and learning rates are
high because that is better for small budgets: see records/architecture.
"""
out_dir = "out/mini"
data_dir = "data/mine"
block_size = 128
n_layer = 1
n_head = 4
n_concept = 32
concept_dim = 256
token_dim = 128
ffn_dim = 512
concept_std = 0.5
masking_type = "token"
mlm_probability = 0.3
batch_size = 16
micro_batch = 16
learning_rate = 4e-3
warmup_steps = 50
max_steps = 500
eval_interval = 100
eval_rows = 512
log_interval = 10
save_minutes = 60.0
