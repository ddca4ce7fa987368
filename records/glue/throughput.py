"""Fine-tuning examples a second on MRPC: micro_balanced, strict and open, beside BertForSequenceClassification.

    python records/glue/throughput.py --glue_dir=glue

BERT is of equal parameters and pads every row to 128 tokens, as run_glue.py does by default; ours as finetune_glue.py does it:
rows of similar length together. Forward, backward, clipping, AdamW; batches of 32, in turns, medians, two cores.
"""
import statistics
import sys
import time

sys.path.insert(0, ".")
import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

import glue
from common import build_model, model_state
from hardware import autocast, choose_dtype, find_machine
from heads import Classifier, encode_texts, keep_concepts, padded
from model import ConceptEncoder
from peers import OURS, PEERS, VOCABULARY
from tokenizer import Tokenizer
from tuning import in_batches

glue_dir = next((a.split("=")[1] for a in sys.argv[1:] if a.startswith("--glue_dir=")), "glue")
machine = find_machine("cpu")
dtype, _ = choose_dtype("auto", machine.device)
splits, _ = glue.read_task(glue.TASKS["mrpc"], glue_dir)
texts, labels = splits["train"]
tok = Tokenizer.train((t for pair in texts for t in pair), 8000)  # the same rows for all; ids only have to exist
rows, segments, _ = encode_texts(texts, tok, 128)
answers = torch.as_tensor(labels, dtype=torch.int64)
batches = in_batches(rows, 32, np.random.default_rng(0))
torch.manual_seed(0)
models = {name: Classifier(build_model(keep_concepts(*model_state(OURS[name](512)), glue.TASKS["mrpc"].n_concept)[0]), 2, 2)
          for name in ("strict", "open")}
bert = PEERS["hf_bert"](512).config
models["hf_bert"] = BertForSequenceClassification(BertConfig(**bert.to_dict() | dict(num_labels=2)))


def step(name, index):
    ids, kinds, real = padded([rows[i] for i in index], [segments[i] for i in index], tok.pad_id)
    model, optimizer = models[name], optimizers[name]
    if name == "hf_bert":
        ids, real = F.pad(ids, (0, 128 - ids.shape[1]), value=tok.pad_id), F.pad(real, (0, 128 - real.shape[1]))
        kinds = F.pad(kinds, (0, 128 - kinds.shape[1])).clamp(max=1)
    start = time.perf_counter()
    with autocast(machine.device, dtype):
        outputs = model(input_ids=ids, attention_mask=real.long(), token_type_ids=kinds).logits if name == "hf_bert" \
            else model(ids, kinds, real)
        loss = F.cross_entropy(outputs.float(), answers[index])
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return len(index) / (time.perf_counter() - start)


optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, model in models.items()}
speed = {name: [] for name in models}
for n, index in enumerate(batches[:14]):
    for name in models:
        found = step(name, index)
        if n > 1:
            speed[name].append(found)
print(f"{dtype}, mean row {np.mean([len(r) for r in rows]):.0f} tokens, {len(batches[0])} rows a batch")
for name, found in speed.items():
    print(f"{name:<8} {sum(p.numel() for p in models[name].parameters()):>12,} parameters {statistics.median(found):8.1f} examples/s  "
          f"{statistics.median(found) / statistics.median(speed['hf_bert']):.2f} x hf_bert")
