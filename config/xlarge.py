"""About 7B parameters, open bottleneck.

    torchrun --nproc_per_node=4 train.py config/xlarge.py --data_dir=data/mine

6,928,710,692 parameters with a 30,522-word vocabulary, 22,022.8 MFLOP a token.
20 B tokens are 4.4e+20 FLOP. Time, memory and price: tools/bench.py --estimate=1.
Weights, gradients and two AdamW moments take 103 GiB, which parallel=fsdp divides among the
processes: 26 GiB each of four, 13 of eight. Evaluations gather the weights, 26 GiB, in each.
"""
out_dir = "out/xlarge"
data_dir = "data/owt"
bottleneck = "open"
self_attention = True  # not measured at this size; small models do better without
n_layer = 32
n_head = 32
n_concept = 256
concept_dim = 4096
token_dim = 1024
ffn_dim = 8192
block_size = 512
masking_type = "whole_word"
mlm_probability = 0.3
batch_size = 1024
micro_batch = 1  # rows a forward pass of one GPU; lower it when memory runs out
parallel = "fsdp"
checkpoint_every = 1  # activations are computed twice instead of kept
learning_rate = 0.00015
min_lr = learning_rate / 100
warmup_steps = 2000
max_steps = 38000  # 20 B tokens
eval_interval = 1000
