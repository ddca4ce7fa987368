"""The protocol's baseline: 4 strict layers, 64 concepts.

    torchrun --nproc_per_node=4 train.py config/micro_balanced.py --data_dir=data/mine

37,205,504 parameters with a 30,522-word vocabulary, 42.9 MFLOP a token.
10 B tokens are 4.3e+17 FLOP. Time, memory and price: tools/bench.py --estimate=1.
"""
out_dir = "out/micro_balanced"
data_dir = "data/owt"
bottleneck = "strict"
n_layer = 4
n_head = 8
n_concept = 64
concept_dim = 512
token_dim = 512
ffn_dim = 2048
bias = True
block_size = 512
masking_type = "whole_word"
mlm_probability = 0.15
batch_size = 128
micro_batch = 32  # rows a forward pass of one GPU; lower it when memory runs out
learning_rate = 0.001
min_lr = learning_rate / 100
warmup_steps = 2000
max_steps = 153000  # 10 B tokens
eval_interval = 1000
