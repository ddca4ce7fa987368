"""Five minutes on two cores, no GPU, no network: the embedded corpus, a small open model.

    python data/pydocs/prepare.py && python train.py config/demo.py
"""
out_dir = "out/demo"
data_dir = "data/pydocs"
block_size = 128
n_layer = 3
n_head = 4
n_concept = 32
concept_dim = 256
token_dim = 256
ffn_dim = 512
masking_type = "whole_word"
batch_size = 32
micro_batch = 32
learning_rate = 3e-3
warmup_steps = 50
max_steps = 2000
max_minutes = 2.5  # the schedule ends in time on slower machines too
eval_interval = 200
eval_rows = 128
log_interval = 20
