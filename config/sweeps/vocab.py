"""Hypothesis 1, vocabulary: the same text with vocabularies of 4k, 16k and 64k.

Compare bits a byte: a loss in nats a token depends on the vocabulary. The arms with --token_dim=16
test whether tiny embeddings make large vocabularies cheap. Prepare data/mine16k and data/mine64k
like data/mine4k:

    python prepare.py --input='texts/*' --out_dir=data/mine4k --tokenizer=bpe:4000
    python tools/sweep.py config/sweeps/vocab.py
"""
base = "config/mini.py"
arms = """
v4k_t128    --data_dir=data/mine4k  --token_dim=128
v16k_t128   --data_dir=data/mine16k --token_dim=128
v64k_t128   --data_dir=data/mine64k --token_dim=128
v64k_t16    --data_dir=data/mine64k --token_dim=16   # the hypothesis
v16k_t16    --data_dir=data/mine16k --token_dim=16
"""
out_dir = "out/sweep_vocab"
