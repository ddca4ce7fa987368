"""Hypothesis 3: larger masking rates and other strategies teach the concepts better.

Every arm is evaluated on the masks of all six strategies.

    python tools/sweep.py config/sweeps/masking.py
"""
base = "config/mini.py"
arms = """
token_15       --masking_type=token      --mlm_probability=0.15
token_30       --masking_type=token      --mlm_probability=0.3
token_50       --masking_type=token      --mlm_probability=0.5
whole_word_15  --masking_type=whole_word --mlm_probability=0.15
whole_word_30  --masking_type=whole_word --mlm_probability=0.3
whole_word_50  --masking_type=whole_word --mlm_probability=0.5
concepts_30    --masking_type=concepts   --mlm_probability=0.3
span_30        --masking_type=span       --mlm_probability=0.3
diffusion      --masking_type=diffusion  --mlm_probability=1
importance_30  --masking_type=importance --mlm_probability=0.3
"""
evaluate = 1
out_dir = "out/sweep_masking"
