"""About 100M parameters, open bottleneck.

    torchrun --nproc_per_node=4 train.py config/tiny.py --data_dir=data/mine

104,487,352 parameters with a 30,522-word vocabulary, 245.3 MFLOP a token.
20 B tokens are 4.9e+18 FLOP. Time, memory and price: tools/bench.py --estimate=1.
"""
out_dir = "out/tiny"
data_dir = "data/owt"
bottleneck = "open"
self_attention = True  # not measured at this size; small models do better without
n_layer = 7
n_head = 12
n_concept = 128
concept_dim = 768
token_dim = 768
ffn_dim = 2048
block_size = 512
masking_type = "whole_word"
mlm_probability = 0.3
batch_size = 512
micro_batch = 32  # rows a forward pass of one GPU; lower it when memory runs out
learning_rate = 0.0008
min_lr = learning_rate / 100
warmup_steps = 2000
max_steps = 76000  # 20 B tokens
eval_interval = 1000
