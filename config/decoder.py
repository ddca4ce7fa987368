"""Makes a decoder of a preset: every next token is predicted, nothing is masked. Comes last.

    python train.py config/ettin_17m.py config/decoder.py --data_dir=data/mine
"""
objective = "clm"
masking_type = "whole_word"  # no mask is drawn: these are the defaults again
mlm_probability = 0.15
mask_replace = "100"
