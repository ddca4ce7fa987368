"""Hypothesis 1: tiny token embeddings with large concepts.

Token width against concept width, at equal tokens.

    python tools/sweep.py config/sweeps/dims.py
"""
base = "config/mini.py"
arms = """
t4_c256     --token_dim=4   --concept_dim=256
t16_c256    --token_dim=16  --concept_dim=256
t64_c256    --token_dim=64  --concept_dim=256
t128_c256   --token_dim=128 --concept_dim=256
t256_c256   --token_dim=256 --concept_dim=256
t128_c128   --token_dim=128 --concept_dim=128
t16_c512    --token_dim=16  --concept_dim=512
"""
out_dir = "out/sweep_dims"
