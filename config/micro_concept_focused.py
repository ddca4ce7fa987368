"""More and narrower concepts than micro_balanced: 128 of width 480.

    torchrun --nproc_per_node=4 train.py config/micro_concept_focused.py --data_dir=data/mine

33,666,720 parameters with a 30,522-word vocabulary, 51.6 MFLOP a token.
10 B tokens are 5.2e+17 FLOP. Time, memory and price: tools/bench.py --estimate=1.
"""
out_dir = "out/micro_concept_focused"
data_dir = "data/owt"
bottleneck = "strict"
n_layer = 4
n_head = 12
n_concept = 128
concept_dim = 480
token_dim = 480
ffn_dim = 1920
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
