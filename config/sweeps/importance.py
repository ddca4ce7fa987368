"""Does it help to mask important words more often? Learned scores against all their controls.

    python tools/sweep.py config/sweeps/importance.py

All arms are judged on the same fixed uniform masks. `longer` has the time of the estimator as
further steps, 15 % of them. The learning rate is to be tuned for each arm: --arms with others.
"""
base = "config/mini.py --mlm_probability=0.3"
arms = """
uniform             --masking_type=whole_word
rate_40             --masking_type=whole_word --mlm_probability=0.4
longer              --masking_type=whole_word --max_steps=575
shuffled            --masking_type=importance --importance=shuffled
frequency           --masking_type=importance --importance=frequency
ema                 --masking_type=importance --importance=ema
model               --masking_type=importance --importance=model --importance_weights=false
model_weighted      --masking_type=importance --importance=model
curriculum          --masking_type=importance --importance=model --curriculum=easy_to_hard
curriculum_shuffled --masking_type=importance --importance=shuffled --curriculum=easy_to_hard
reversed            --masking_type=importance --importance=model --curriculum=hard_to_easy
"""
out_dir = "out/sweep_importance"
