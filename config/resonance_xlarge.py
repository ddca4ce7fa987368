"""A language model of 1 billion parameters on rows of 32,768 tokens, without attention.

    torchrun --nproc_per_node=4 train.py config/resonance_xlarge.py --data_dir=data/mine

1,002,988,288 parameters with a 50,304-word vocabulary, 6,045.9 MFLOP a token.
21.0 B tokens are 1.3e+20 FLOP. Time, memory and price: tools/bench.py --estimate=1.

Long convolutions mix the tokens (lib/resonance.py); config/README.md, Rows of 32k, has the data.
"""
out_dir = "out/resonance_xlarge"
data_dir = "data/mine"
arch = "resonance"
objective = "clm"
n_layer = 26
n_head = 24
token_dim = 1536
ffn_dim = 5632
n_mixer = 0
mixer = "resonance"
mixers = "r"
n_frequency = 64
vocab_size = 50304
block_size = 32768
batch_size = 16
micro_batch = 1
learning_rate = 0.0002
min_lr = learning_rate / 10
beta2 = 0.95
weight_decay = 0.1
warmup_steps = 1000
max_steps = 40000  # 21.0 B tokens
eval_interval = 1000  # and a checkpoint
eval_rows = 64
