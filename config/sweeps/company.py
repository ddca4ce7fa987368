"""Strong company: concept models, a Transformer encoder, resonance and FNet under one budget.

    python tools/sweep.py config/sweeps/company.py

Equal parameters (2.9 million with 16,000 words) and equal training FLOPs, rows of 128 tokens.
records/company/convert.py trains the decoders that become encoders, and the other way round.
"""
base = """config/mini.py --token_dim=128 --concept_dim=128 --n_head=8 --concept_std=1.0
          --learning_rate=4e-3 --min_lr=5e-5 --warmup_steps=200
          --eval_interval=500 --log_interval=100"""
arms = """
open          --n_layer=1 --ffn_dim=592 --n_concept=16
strict        --bottleneck=strict --n_layer=3 --ffn_dim=352 --n_concept=64 --learning_rate=8e-3
transformer   --arch=transformer --n_layer=1 --ffn_dim=1595
resonance     --arch=resonance --n_layer=1 --ffn_dim=1550 --n_frequency=32
open_resonant --n_layer=1 --ffn_dim=544 --n_concept=16 --resonant_mixers=true --n_frequency=32
fnet          --arch=resonance --mixer=fnet --n_layer=1 --ffn_dim=1766
"""
seeds = "1,2,3"
flops = 1e13
out_dir = "out/sweep_company"
