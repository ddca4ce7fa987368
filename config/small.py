"""About 500M parameters, open bottleneck.

    torchrun --nproc_per_node=4 train.py config/small.py --data_dir=data/mine

513,867,316 parameters with a 30,522-word vocabulary, 1,751.1 MFLOP a token.
20 B tokens are 3.5e+19 FLOP. Time, memory and price: tools/bench.py --estimate=1.
"""
out_dir = "out/small"
data_dir = "data/owt"
bottleneck = "open"
self_attention = True  # not measured at this size; small models do better without
n_layer = 17
n_head = 16
n_concept = 256
concept_dim = 1280
token_dim = 1024
ffn_dim = 3584
block_size = 512
masking_type = "whole_word"
mlm_probability = 0.3
batch_size = 512
micro_batch = 8  # rows a forward pass of one GPU; lower it when memory runs out
learning_rate = 0.0004
min_lr = learning_rate / 100
warmup_steps = 2000
max_steps = 76000  # 20 B tokens
eval_interval = 1000
