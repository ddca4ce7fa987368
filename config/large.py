"""About 3B parameters, open bottleneck.

    torchrun --nproc_per_node=4 train.py config/large.py --data_dir=data/mine

3,058,638,536 parameters with a 30,522-word vocabulary, 9,914.7 MFLOP a token.
20 B tokens are 2.0e+20 FLOP. Time, memory and price: tools/bench.py --estimate=1.
Weights, gradients and two AdamW moments take 46 GiB, which parallel=fsdp divides among the
processes: 12 GiB each of four. Evaluations gather the weights, 12 GiB, in each process.
"""
out_dir = "out/large"
data_dir = "data/owt"
bottleneck = "open"
self_attention = True  # not measured at this size; small models do better without
n_layer = 30
n_head = 20
n_concept = 256
concept_dim = 2560
token_dim = 1024
ffn_dim = 6912
block_size = 512
masking_type = "whole_word"
mlm_probability = 0.3
batch_size = 1024
micro_batch = 2  # rows a forward pass of one GPU; lower it when memory runs out
parallel = "fsdp"
learning_rate = 0.0002
min_lr = learning_rate / 100
warmup_steps = 2000
max_steps = 38000  # 20 B tokens
eval_interval = 1000
