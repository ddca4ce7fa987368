"""What the sweeps start from: minutes a run on one CPU core, rows of 128 tokens, a 16k vocabulary.

    python prepare.py --input='texts/*' --out_dir=data/mine --tokenizer=bpe:16000
    python train.py config/mini.py --data_dir=data/mine

1 M tokens. High rates and learning rates, as small budgets want them: see records/architecture.
"""
out_dir = "out/mini"
data_dir = "data/mine"
block_size = 128
n_layer = 2
n_head = 4
n_concept = 32
concept_dim = 256
token_dim = 128
ffn_dim = 512
masking_type = "token"
mlm_probability = 0.3
batch_size = 32
micro_batch = 32
learning_rate = 6e-3
warmup_steps = 50
max_steps = 250
eval_interval = 50
eval_rows = 512
log_interval = 10
