"""What do places in the row bring a strict model? Equal training FLOPs, rows of 128 tokens.

    python tools/sweep.py config/sweeps/anchors.py --jobs=2
    python tools/sweep.py config/sweeps/anchors.py --base="config/mini.py --block_size=512 ..."

The second line stands for rows of 512 tokens, see records/anchors. All arms have the same
parameters: anchors have none.
"""
base = """config/mini.py --bottleneck=strict --n_layer=3 --ffn_dim=352 --concept_dim=128 --n_head=8
          --concept_std=1.0 --n_concept=64 --learning_rate=8e-3 --min_lr=5e-5 --warmup_steps=200
          --hide_masked=false --eval_interval=500 --log_interval=100"""
arms = """
anchored     --anchored=true
half_local   --local_heads=0.5
all_local    --local_heads=1.0
masks_hidden --hide_masked=true
unanchored   --anchored=false
"""
flops = 3.8e13
out_dir = "out/sweep_anchors"
