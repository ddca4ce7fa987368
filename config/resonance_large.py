"""A language model of 500 million parameters on rows of 32,768 tokens, without attention.

    torchrun --nproc_per_node=4 train.py config/resonance_large.py --data_dir=data/mine

498,876,160 parameters with a 50,304-word vocabulary, 3,011.2 MFLOP a token.
10.5 B tokens are 3.2e+19 FLOP. Time, memory and price: tools/bench.py --estimate=1.

Long convolutions mix the tokens (lib/resonance.py); config/README.md, Rows of 32k, has the data.
"""
out_dir = "out/resonance_large"
data_dir = "data/mine"
arch = "resonance"
objective = "clm"
n_layer = 20
n_head = 20
token_dim = 1280
ffn_dim = 3904
n_mixer = 0
mixer = "resonance"
mixers = "r"
n_frequency = 64
vocab_size = 50304
block_size = 32768
batch_size = 16
micro_batch = 1
learning_rate = 0.0003
min_lr = learning_rate / 10
beta2 = 0.95
weight_decay = 0.1
warmup_steps = 1000
max_steps = 20000  # 10.5 B tokens
eval_interval = 1000  # and a checkpoint
eval_rows = 64
