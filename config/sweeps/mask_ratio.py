"""Which share of the tokens should be predicted?

    python tools/sweep.py config/sweeps/mask_ratio.py
"""
base = "config/mini.py --masking_type=token"
grid = "mlm_probability 0.15 0.3 0.4 0.5 0.7"
out_dir = "out/sweep_mask_ratio"
