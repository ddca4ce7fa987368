"""A small open model on the prose of the Python installation: three minutes, any machine.

No GPU and no network needed.

    python data/pydocs/prepare.py
    python train.py config/demo.py

4.9 M parameters. It ends after three minutes, or after 2,000 steps (4.1 M tokens) where a machine
takes less for them; the learning rate falls to its end in both cases. Two cores that multiply bf16
made 971 steps, 2.0 M tokens, in that time: the validation loss fell from 9.3 to 4.0 nats, where
word frequencies alone give 6.8 (records/demo). With fewer steps it ends higher.
"""
out_dir = "out/demo"
data_dir = "data/pydocs"
block_size = 128
n_layer = 2
n_head = 4
n_concept = 16
concept_dim = 256
token_dim = 256
ffn_dim = 512
concept_std = 0.5
masking_type = "token"  # single tokens are the easiest to predict: sensible sentences soonest
mlm_probability = 0.3
batch_size = 16
micro_batch = 16
learning_rate = 5e-3
warmup_steps = 50
max_steps = 2000  # of these two, what comes first
max_minutes = 3.0
eval_interval = 100
eval_rows = 128
log_interval = 20
