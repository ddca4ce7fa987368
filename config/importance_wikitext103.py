"""config/importance_owt.py on WikiText-103, which takes a fifth of the time.

    python data/wikitext103/prepare.py
    torchrun --nproc_per_node=4 train.py config/importance_wikitext103.py

123,587,472 parameters with a 50,304-word vocabulary, 619.6 MFLOP a token.
3.28 B tokens are 2.0e+18 FLOP. Time, memory and price: tools/bench.py --estimate=1.
"""
out_dir = "out/importance_wikitext103"
data_dir = "data/wikitext103"
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
max_steps = 100_000  # 3.28 B tokens
weight_decay = 0.01
eval_interval = 5000
dtype = "bf16"
