"""Ettin's encoder of 17M parameters, and its first phase (2507.11412).

    torchrun --nproc_per_node=8 train.py config/ettin_17m.py

16,913,600 parameters with a 50,368-word vocabulary, 55.3 MFLOP a token.
1698.7 B tokens are 9.4e+19 FLOP. Time, memory and price: tools/bench.py --estimate=1.

The shape, learning rate and weight decay are theirs; what differs: tokens are normalised without
parameters after the table, and dropout is on all residual branches. config/README.md, Phases, has
the other two phases and the decoder.
"""
out_dir = "out/ettin_17m"
data_dir = "data/owt"
arch = "transformer"
n_layer = 7
n_head = 4
token_dim = 256
ffn_dim = 384
n_mixer = 0
local_window = 64  # tokens to each side; every third layer sees the whole row
qk_norm = False
bert_head = True
dropout = 0.1
vocab_size = 50368
block_size = 1024
masking_type = "token"
mlm_probability = 0.3
batch_size = 4608
micro_batch = 32  # rows a forward pass of one GPU; lower it when memory runs out
optimizer = "stable_adamw"
learning_rate = 0.003
weight_decay = 0.0003
grad_clip = 0.0  # StableAdamW clips updates
warmup_steps = 848
lr_schedule = "constant"  # config/phase_extend.py and phase_decay.py come down from it
max_steps = 360_000  # 1.7 T tokens
eval_interval = 1000
