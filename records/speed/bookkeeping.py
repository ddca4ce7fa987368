"""What a training step does besides arithmetic: train.py as it is, with a clock around its pieces.

    python data/pydocs/prepare.py
    python records/speed/bookkeeping.py --bottleneck=open
"""
import os
import shutil
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.getcwd())
import torch

STEPS, spent = 30, {}


def clocked(name, call):
    def timed(*args, **kwargs):
        start = time.perf_counter()
        result = call(*args, **kwargs)
        spent.setdefault(name, []).append(time.perf_counter() - start)
        return result
    return timed


torch.nn.utils.clip_grad_norm_ = clocked("clip", torch.nn.utils.clip_grad_norm_)
torch.optim.AdamW.step = clocked("adamw", torch.optim.AdamW.step)
source, out = open("train.py").read(), tempfile.mkdtemp()
marks = [("# ---- the loop", 'masked_batch, forward_backward, update, log = (clocked(f.__name__, f) for f in ('
                            'masked_batch, forward_backward, update, log))\n'),
         ("    lr = learning_rate_at(step, progress_at(step))\n", '    spent.setdefault("at", []).append(time.perf_counter())\n')]
for mark, line in marks:
    assert source.count(mark) == 1, mark
    source = source.replace(mark, line + mark)
sys.argv = ["train.py", "config/micro_balanced.py", "--data_dir=data/pydocs", f"--out_dir={out}", "--batch_size=8",
            f"--max_steps={STEPS}", "--eval_interval=1000", "--eval_rows=8", "--health_rows=0", "--log_interval=1",
            "--init_table=random", *sys.argv[1:]]
exec(compile(source, "train.py", "exec"), dict(__name__="__main__", __file__=os.path.abspath("train.py"), clocked=clocked,
                                                spent=spent, time=time))
shutil.rmtree(out)
at = spent.pop("at")
step = statistics.median(b - a for a, b in zip(at[3:-1], at[4:]))
median = {name: statistics.median(values[3:]) for name, values in spent.items()}
median["update"] -= median["clip"] + median["adamw"]
rest = step - sum(median.values())
print(f"{step * 1e3:9.1f} ms a step")
for name, value in [*median.items(), ("loop: signals, schedule, text", rest)]:
    print(f"{value * 1e3:9.2f} ms {value / step:8.2%}  {name}")
share = 1 - (median["forward_backward"] + median["clip"] + median["adamw"]) / step
print(f"{share:.2%} besides forward, backward, clipping and AdamW's arithmetic; a line is logged each step")
