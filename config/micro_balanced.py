bottleneck = "strict"
n_layer = 4
n_head = 8
n_concept = 64
concept_dim = 512
token_dim = 512
ffn_dim = 2048
bias = True
