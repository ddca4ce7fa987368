"""Fewer and wider layers than micro_balanced: 3, with 96 concepts of width 640.

    torchrun --nproc_per_node=4 train.py config/micro_wide.py --data_dir=data/mine

44,956,160 parameters with a 30,522-word vocabulary, 60.5 MFLOP a token.
10 B tokens are 6.0e+17 FLOP. Time, memory and price: tools/bench.py --estimate=1.
"""
out_dir = "out/micro_wide"
data_dir = "data/owt"
bottleneck = "strict"
n_layer = 3
n_head = 10
n_concept = 96
concept_dim = 640
token_dim = 640
ffn_dim = 2560
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
