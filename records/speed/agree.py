"""Do two versions of this repository compute the same? The largest difference between the losses of 50 fp32 steps.

    git worktree add ../old 21f3bb6
    python records/speed/agree.py ../old .
"""
import json
import subprocess
import sys

STEPS = """
import json, torch
from baselines import Transformer, TransformerConfig
from model import ConceptConfig, ConceptEncoder
torch.set_num_threads(1)
shape = dict(vocab_size=4096, block_size=256, n_layer=2, n_head=4, token_dim=128, ffn_dim=256, mask_id=3)
models = dict(transformer=lambda: Transformer(TransformerConfig(**shape)))
for name in ("strict", "open"):
    models[name] = lambda name=name: ConceptEncoder(ConceptConfig(bottleneck=name, n_concept=32, concept_dim=128, **shape))
losses = {}
for name, build in models.items():
    torch.manual_seed(0)
    model, g = build(), torch.Generator().manual_seed(1)
    optimizer, losses[name] = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True), []
    for _ in range(50):
        ids = (torch.randint(4, 4096, (4, 1), generator=g) + torch.randint(0, 9, (4, 256), generator=g)).clamp(max=4095)
        positions = torch.rand(4, 256, generator=g).argsort(1)[:, :40].sort(1).values
        loss = model(ids.scatter(1, positions, 3), positions, ids.gather(1, positions), torch.ones(4, 40))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses[name].append(loss.item())
print(json.dumps(losses))
"""
old, new = (json.loads(subprocess.run([sys.executable, "-c", STEPS], cwd=path, check=True, capture_output=True,
                                      text=True).stdout) for path in sys.argv[1:])
for name in old:
    print(f"{name:<12} {old[name][0]:.4f} -> {old[name][-1]:.4f}, at most {max(abs(a - b) for a, b in zip(old[name], new[name])):.1e} apart")
