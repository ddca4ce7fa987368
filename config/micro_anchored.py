"""micro_balanced with one concept for every two tokens, what its concepts' places ask for.

    torchrun --nproc_per_node=4 train.py config/micro_anchored.py --data_dir=data/mine

37,303,808 parameters with a 30,522-word vocabulary, 100.5 MFLOP a token.
10 B tokens are 1.0e+18 FLOP. Time, memory and price: tools/bench.py --estimate=1.

7 of 8 heads are local, and 30 % single tokens are masked, which taught most in records/hypotheses.
Compare records/anchors.
"""
out_dir = "out/micro_anchored"
data_dir = "data/owt"
bottleneck = "strict"
n_layer = 4
n_head = 8
n_concept = 256
local_heads = 0.875
concept_dim = 512
token_dim = 512
ffn_dim = 2048
bias = True
block_size = 512
masking_type = "token"
mlm_probability = 0.3
batch_size = 128
micro_batch = 32  # rows a forward pass of one GPU; lower it when memory runs out
learning_rate = 0.001
min_lr = learning_rate / 100
warmup_steps = 2000
max_steps = 153000  # 10 B tokens
eval_interval = 1000
