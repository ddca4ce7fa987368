"""The open model of width 512 as a masked diffusion model: each row hides from one token to all.

    torchrun --nproc_per_node=4 train.py config/micro_diffusion.py --data_dir=data/mine
    python tools/sample.py --out_dir=out/micro_diffusion --generate=1

40,193,068 parameters with a 30,522-word vocabulary, 103.3 MFLOP a token.
10 B tokens are 1.0e+18 FLOP. Time, memory and price: tools/bench.py --estimate=1.
"""
out_dir = "out/micro_diffusion"
data_dir = "data/owt"
bottleneck = "open"
n_layer = 4
n_head = 8
n_concept = 64
concept_dim = 512
token_dim = 512
ffn_dim = 2048
block_size = 512
masking_type = "diffusion"
mlm_probability = 1.0  # all shares of a row
diffusion_schedule = "bell"  # its bound is 0.15 nats better than that of linear: records/importance
batch_size = 128
micro_batch = 32  # rows a forward pass of one GPU; lower it when memory runs out
learning_rate = 0.001
min_lr = learning_rate / 100
warmup_steps = 2000
max_steps = 153000  # 10 B tokens
eval_interval = 1000
