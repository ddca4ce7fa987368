"""Three minutes on two cores, no GPU, no network: the prose of the Python installation, a small open model.

    python data/pydocs/prepare.py
    python train.py config/demo.py

4.9 M parameters, about 2 M tokens seen; the validation loss falls from 9.3 to about 4.0 nats, 6.8 is word frequencies.
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
masking_type = "token"  # single tokens are the easiest to fill in: the fastest way to sensible sentences
mlm_probability = 0.3
batch_size = 16
micro_batch = 16
learning_rate = 5e-3
warmup_steps = 50
max_steps = 2000
max_minutes = 3.0  # the schedule ends in time on slower machines too
eval_interval = 100
eval_rows = 128
log_interval = 20
