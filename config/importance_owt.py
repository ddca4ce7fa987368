"""Joint importance training at the size of BERT-base: a Transformer and its loss estimator.

    python data/owt/prepare.py
    torchrun --nproc_per_node=4 train.py config/importance_owt.py

123,587,472 parameters with a 50,304-word vocabulary, 619.6 MFLOP a token.
16.4 B tokens are 1.0e+19 FLOP. Time, memory and price: tools/bench.py --estimate=1.

Words with low predicted losses are masked first, then medium, then high ones.
"""
out_dir = "out/importance_owt"
data_dir = "data/owt"
arch = "transformer"
n_layer = 12
n_head = 12
token_dim = 768
ffn_dim = 2048
n_mixer = 0
vocab_size = 50304
block_size = 1024
masking_type = "importance"
importance = "model"
curriculum = "easy_to_hard"
stage_1_end = 0.33
stage_2_end = 0.66
mlm_probability = 0.15
batch_size = 32
micro_batch = 8  # rows a forward pass of one GPU; lower it when memory runs out
learning_rate = 1e-4
min_lr = 1e-6
warmup_steps = 10_000
max_steps = 500_000  # 16.4 B tokens
weight_decay = 0.01
eval_interval = 5000
dtype = "bf16"
