"""The parts of the open model, one changed at a time: 2 M tokens, rows of 512.

    python tools/sweep.py config/sweeps/architecture.py --jobs=2

Variants that were worse are not in the model; records/architecture/variants.py has them as patches.
"""
base = """config/mini.py --block_size=512 --n_concept=64 --concept_dim=128 --n_head=8
          --batch_size=4 --micro_batch=4 --learning_rate=4e-3 --min_lr=5e-5 --warmup_steps=200
          --max_steps=1000 --ffn_dim=592 --eval_interval=500 --eval_rows=256 --log_interval=100"""
arms = """
open
self_attention  --self_attention=true
concepts_002    --concept_std=0.02
concepts_1      --concept_std=1.0
masks_read      --hide_masked=false
random_table    --init_table=random
no_lexicon      --lexicon=false
layers_2        --n_layer=2
decoders_2      --n_decoder=2
mixers_0        --n_mixer=0
concepts_32     --n_concept=32
concepts_128    --n_concept=128
concepts_256    --n_concept=256
token_4         --token_dim=4
token_16        --token_dim=16
token_64        --token_dim=64
muon            --optimizer=muon
muon_low        --optimizer=muon --learning_rate=1e-3
muon_high       --optimizer=muon --learning_rate=8e-3
masked_15       --mlm_probability=0.15
masked_50       --mlm_probability=0.5
whole_words     --masking_type=whole_word
spans           --masking_type=span
long_spans      --masking_type=span --span_length_distribution=poisson(10)
transformer     --arch=transformer --n_layer=1 --ffn_dim=1595
"""
seeds = "1"
out_dir = "out/sweep_architecture"
