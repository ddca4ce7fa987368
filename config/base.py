"""About 1B parameters, open bottleneck.

    torchrun --nproc_per_node=4 train.py config/base.py --data_dir=data/mine

1,029,280,852 parameters with a 30,522-word vocabulary, 3,442.1 MFLOP a token.
20 B tokens are 6.9e+19 FLOP. Time, memory and price: tools/bench.py --estimate=1.
Weights, gradients and two AdamW moments take 15 GiB in each process, which on a 24 GB card leaves
little for activations; --parallel=fsdp divides them among the processes.
"""
out_dir = "out/base"
data_dir = "data/owt"
bottleneck = "open"
self_attention = True  # not measured at this size; small models do better without
n_layer = 22
n_head = 16
n_concept = 256
concept_dim = 1664
token_dim = 1024
ffn_dim = 4608
block_size = 512
masking_type = "whole_word"
mlm_probability = 0.3
batch_size = 1024
micro_batch = 4  # rows a forward pass of one GPU; lower it when memory runs out
learning_rate = 0.0003
min_lr = learning_rate / 100
warmup_steps = 2000
max_steps = 38000  # 20 B tokens
eval_interval = 1000
