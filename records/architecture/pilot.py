"""The pilot of records/architecture: one network per layout string, every idea a switch. Kept as it ran, not maintained.

    git worktree add ../pilot 850adc3 && cd ../pilot && OMP_NUM_THREADS=1 python PATH/pilot.py name=sp_mix layout=MMF ...

Layout: M local mixer, A Transformer layer, R concepts read, C read + self-attention + FFN, S self-attention + FFN, U tokens
read concepts, G averages of windows around the masked token, F FFN and D decoder block at masked tokens, L lexicon.
"""
import sys, os, math, json, time
sys.path.insert(0, os.getcwd())
os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
from types import SimpleNamespace
import torch.optim._muon as _mu
def ns32(grad, ns_coefficients, ns_steps, eps):
    a, b, c = ns_coefficients
    x = grad.T if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        g = x @ x.T
        x = torch.addmm(x, torch.addmm(g, g, g, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x
_mu._zeropower_via_newtonschulz = ns32
from model import LocalMixer, GatedFFN, sinusoids, table_std
from masking import mask_batch
from shards import TokenData
from tokenizer import Tokenizer

S = dict(name="x", layout="MMCCCCD", d=128, D=128, C=64, T=512, tokens=8e6, lr=2e-3, wd=0.05, opt="adamw", bs=16, mask="token", p=0.15,
         kernel=7, heads=8, ffn=0, std=1.0, rope=0, ov=0, gain=0.0, hide=0, pos="learned", query="token", qknorm=1, seed=0, evalrows=256, evals=8, warm=100, b2=0.98,
         data="data/corpus", span="poisson(3)", ortho=0, out="out/pilot", aset=1.0, cdrop=0.0, drop_tok=0.0, lrc=1.0, save=0, gate=0, sched="cosine", anc="", adec="", stop=0.0, rgain=0.0, rn=0, dn=0, spec=0.0, freeze=0, bagw="24,96,512", qk=0.0, cinit=0, dgain=0.0, load="", dscale=1.0, ls=2.0, lb=-4.0, comp=0, speak=0)
for a in sys.argv[1:]:
    k, v = a.split("=", 1)
    assert k in S, k
    S[k] = type(S[k])(float(v)) if isinstance(S[k], (int, float)) else v
s = SimpleNamespace(**S)
H = s.heads
def cfg(w, ffn): return SimpleNamespace(concept_dim=w, ffn_dim=ffn, bias=False, token_width=s.d, mixer_kernel=s.kernel, dropout=0.0)

def rope(x, pos):  # x B,h,N,e ; pos N or B,N float
    e = x.shape[-1]; half = e // 2
    freq = 10000.0 ** (-torch.arange(half) / half)
    ang = pos[..., None].float() * freq
    if ang.ndim == 3: ang = ang[:, None]
    c, sn = ang.cos().to(x.dtype), ang.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:2 * half]
    return torch.cat((a * c - b * sn, a * sn + b * c), -1)

class Attn(nn.Module):
    def __init__(self, qd, kvd, w, rope_on, gain=0, rn=0, comp=0, speak=0):
        super().__init__(); self.rn = rn; self.comp = comp
        self.q = nn.Linear(qd, w, bias=False); self.k = nn.Linear(kvd, w, bias=False); self.v = nn.Linear(kvd, w, bias=False); self.o = nn.Linear(w, qd, bias=False)
        self.rope = rope_on
        g = gain or s.gain; self.g = nn.Parameter(torch.full((H, 1, 1), g)) if g else None
    def forward(self, x, y, mask=None, qpos=None, kpos=None):
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (self.q(x), self.k(y), self.v(y)))
        if s.qknorm: q, k = (F.rms_norm(t, t.shape[-1:]).to(v.dtype) for t in (q, k))
        if self.g is not None: q = q * self.g.to(q.dtype)
        if self.rope: q, k = rope(q, qpos), rope(k, kpos)
        if self.comp:
            sc = q @ k.mT * q.shape[-1] ** -.5
            w = sc.softmax(-2)
            if mask is not None: w = w * mask
            z = (w / w.sum(-1, keepdim=True).clamp(min=1e-6)) @ v
        else: z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.rn: z = F.rms_norm(z, z.shape[-1:])
        return self.o(z.transpose(1, 2).flatten(2))

LN = lambda w: nn.LayerNorm(w, bias=False)
class Block(nn.Module):
    def __init__(self, ch, last=False):
        super().__init__(); self.ch = ch; d, D = s.d, s.D
        fd = s.ffn or 4
        if ch == "M": self.m = LocalMixer(cfg(d, 0))
        if ch == "A": self.n1, self.n2, self.a, self.f = LN(d), LN(d), Attn(d, d, d, 1), GatedFFN(cfg(d, int(8 * d / 3 // 32 * 32)))
        if ch == "C": self.n1, self.n2, self.n3, self.r, self.a, self.f = LN(D), LN(D), LN(D), Attn(D, d, D, s.rope, s.rgain, s.rn, s.comp), Attn(D, D, D, s.rope), GatedFFN(cfg(D, fd * D))
        if ch == "S": self.n2, self.n3, self.a, self.f = LN(D), LN(D), Attn(D, D, D, s.rope), GatedFFN(cfg(D, fd * D))
        if ch == "R": self.n1, self.r = LN(D), Attn(D, d, D, s.rope, s.rgain, s.rn, s.comp)
        if ch == "U": self.n1, self.r = LN(d), Attn(d, D, d, s.rope)
        if ch == "L":
            self.tov = nn.Linear(D, d, bias=False); self.s = nn.Parameter(torch.tensor(s.ls)); self.b = nn.Parameter(torch.tensor(s.lb)); self.gate = nn.Linear(d, 1)
        if ch == "F": self.n1, self.f = LN(d), GatedFFN(cfg(d, int(8 * d / 3 // 32 * 32)))
        if ch == "G": nb = len(s.bagw.split(',')); self.n1 = LN(nb * d); self.g = nn.Linear(nb * d, 4 * d, bias=False); self.out = nn.Linear(4 * d, d, bias=False)
        if ch == "D": self.n1, self.n2, self.r, self.f = LN(D), LN(D), Attn(D, D, D, s.rope, s.dgain, s.dn), GatedFFN(cfg(D, fd * D))

class Net(nn.Module):
    def __init__(self, V, mask_id):
        super().__init__(); d, D = s.d, s.D; self.mask_id = mask_id
        self.wte = nn.Parameter(torch.empty(V, d))
        self.uses_wpe = s.pos == "learned"
        self.wpe = nn.Parameter(torch.empty(s.T, d))
        self.has_c = any(c in s.layout for c in "CSRUDL")
        if self.has_c: self.concepts = nn.Parameter(torch.empty(s.C, D))
        self.blocks = nn.ModuleList(Block(c) for c in s.layout)
        self.qp = nn.Linear(d, D, bias=False) if d != D and "D" in s.layout else nn.Identity()
        self.np = nn.Linear(D, d, bias=False) if d != D and "D" in s.layout else nn.Identity()
        self.norm = LN(D if "D" in s.layout else d); self.cn = LN(D)
        n_res = 2 * max(4, len(s.layout))
        for name, p in self.named_parameters():
            with torch.no_grad():
                if name == "wte" or name == "wpe": p.normal_(0, table_std(d))
                elif name == "concepts":
                    if s.ortho: nn.init.orthogonal_(p); p *= D ** .5 * s.std
                    else: p.normal_(0, s.std)
                elif name.endswith("taps"): p.normal_(0, p.shape[1] ** -.5)
                elif p.ndim == 2:
                    br = name.endswith("out.weight") or (name.endswith(".o.weight") and not (s.rn and ".r." in name))
                    p.normal_(0, p.shape[1] ** -.5 * (n_res ** -.5 if br else 1))
        if s.ov:
            for b in self.blocks:
                for k in ("r",):
                    if hasattr(b, k):
                        with torch.no_grad():
                            a = getattr(b, k)
                            if s.qk: a.q.weight.mul_(s.qk).add_(torch.eye(*a.q.weight.shape)); a.k.weight.mul_(s.qk).add_(torch.eye(*a.k.weight.shape))
                            a.v.weight.mul_(.3).add_(torch.eye(*a.v.weight.shape)); a.o.weight.mul_(.3).add_(torch.eye(*a.o.weight.shape) * s.ov)
    def bias(self, slopes, q, k):  # q (...,Q), k (N) positions -> (...,H,Q,N)
        sl = torch.tensor([float(z) for z in slopes.split(",")])
        assert len(sl) == H
        return -sl[:, None, None] * (q[..., None, :, None] - k).abs() / (s.T / s.C)
    def run(self, ids, positions, swap=None):
        B, T = ids.shape
        x = F.embedding(ids, self.wte)
        if self.uses_wpe: x = x + self.wpe[:T]
        x = F.layer_norm(x, x.shape[-1:])
        tp = torch.arange(T).float()
        cp = (torch.arange(s.C) + .5) * T / s.C
        c = None
        if self.has_c:
            c = self.concepts.expand(B, -1, -1)
            mask = None
            if s.anc: mask = self.bias(s.anc, cp, tp)[None]
            if s.hide:
                vis = ids != self.mask_id; vis = vis | ~vis.any(1, keepdim=True); mask = vis[:, None, None] if mask is None else mask.masked_fill(~vis[:, None, None], -1e9)
        swapped = None; y = None; ypos = positions.float()
        for b in self.blocks:
            ch = b.ch
            if ch == "D" and swapped is None:
                swapped = self.cn(c) if swap is None else swap(self.cn(c))
                self.z = swapped
                if y is None: y = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
                if s.query == "pos": y = F.layer_norm(self.wpe[positions], (s.d,))
                if self.training and s.drop_tok:
                    keep = (torch.rand(positions.shape) > s.drop_tok)[..., None]
                    y = torch.where(keep, y, self.wte[self.mask_id] + self.wpe[positions])
                y = self.qp(y)
            dmask = self.bias(s.adec, ypos, cp) if s.adec and ch == 'D' else None
            if ch == "F" and y is None: y = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
            if ch == "M": x = b.m(x)
            if ch == "A":
                h = b.n1(x); x = x + b.a(h, h, None, tp, tp); x = x + b.f(b.n2(x))
            if ch in "CR":
                c = c + b.r(b.n1(c), F.layer_norm(x, x.shape[-1:]), mask, cp, tp)
            if ch in "CS":
                h = b.n2(c); c = c + b.a(h, h, None, cp, cp); c = c + b.f(b.n3(c))
            if ch == "U":
                zc = self.cn(c)
                if swap is not None: zc = swap(zc)
                self.z = zc
                x = x + b.r(b.n1(x), zc, self.bias(s.adec, tp, cp)[None] if s.adec else None, tp, cp)
            if ch == "G":
                if y is None: y = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
                cs = F.pad(F.layer_norm(x, (s.d,)).cumsum(1), (0, 0, 1, 0)); parts = []
                for w in [int(z) for z in s.bagw.split(',')]:
                    lo, hi = (positions - w).clamp(min=0), (positions + w + 1).clamp(max=T)
                    ex = lambda p: cs.gather(1, p[..., None].expand(-1, -1, s.d))
                    parts.append((ex(hi) - ex(lo)) / (hi - lo)[..., None] ** .5)
                y = y + b.out(F.gelu(b.g(b.n1(torch.cat(parts, -1)))))
            if ch == "L":
                cc = swapped if swapped is not None else (self.cn(c) if swap is None else swap(self.cn(c)))
                self.z = cc
                z = F.layer_norm(b.tov(cc[:, :s.speak] if s.speak else cc), (s.d,)) * b.s
                self.boost = F.softplus(torch.logsumexp(F.linear(z, self.wte), 1) + b.b)  # B,V
                self.lg = b
            if ch == "F": y = y + b.f(b.n1(y))
            if ch == "D":
                y = y + b.r(b.n1(y), swapped, dmask, ypos, cp); y = y + b.f(b.n2(y))
        if y is None: y = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
        y = self.np(self.norm(y))
        self.gates = 2 * torch.sigmoid(self.lg.gate(y)) if "L" in s.layout else None
        return y
    def nats(self, ids, positions, targets, swap=None):
        lg = F.linear(self.run(ids, positions, swap), self.wte)
        if self.gates is not None: lg = lg + self.gates * self.boost[:, None]
        return F.cross_entropy(lg.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)

tok = Tokenizer.load(s.data + "/tokenizer"); train = TokenData(s.data, "train", s.T, s.seed); val = TokenData(s.data, "val", s.T, 0)
torch.manual_seed(s.seed)
net = Net(tok.vocab_size, tok.mask_id)
if s.spec:
    U = torch.load("out/pilot/spectral.pt")[:, :s.d]
    with torch.no_grad():
        U = U * U.norm(dim=1, keepdim=True).clamp(min=1e-3) ** (s.spec - 1)
        net.wte.copy_(U / U.std() * table_std(s.d))
if s.load: print(net.load_state_dict({k: v for k, v in torch.load(s.load).items() if k in net.state_dict() and v.shape == net.state_dict()[k].shape}, strict=False).missing_keys)
if "L" in s.layout and s.ov:
    with torch.no_grad(): net.blocks[s.layout.index("L")].tov.weight.mul_(.3).add_(torch.eye(s.d))
if "L" in s.layout:
    with torch.no_grad(): net.blocks[s.layout.index("L")].gate.weight.zero_(); net.blocks[s.layout.index("L")].gate.bias.zero_()
if s.cinit:
    tr0 = torch.as_tensor(train.batch(0, 2000, 0, 1)[0]).reshape(-1); fq = torch.bincount(tr0, minlength=tok.vocab_size).float(); fq = fq / fq.sum()
    pick = torch.multinomial(fq ** .5 * (fq < 5e-4), s.C)
    with torch.no_grad(): net.concepts.copy_(F.layer_norm(net.wte[pick], (s.d,)) * s.std)
P = sum(p.numel() for p in net.parameters())
nonemb = P - net.wte.numel() - net.wpe.numel()
# MAC count by hooks: torch flop counter
from torch.utils.flop_counter import FlopCounterMode
from torch.nn.attention import sdpa_kernel, SDPBackend
K = math.ceil(s.p * s.T)
def flops():
    ids = torch.zeros(1, s.T, dtype=torch.long); pos = torch.zeros(1, K, dtype=torch.long)
    with FlopCounterMode(net, display=False, depth=1) as f, sdpa_kernel(SDPBackend.MATH): net.nats(ids, pos, pos)
    return 3 * f.get_total_flops() / s.T
FT = flops()
steps = int(s.tokens / (s.bs * s.T))
mats = [p for n, p in net.named_parameters() if p.ndim == 2 and n not in ("wte", "wpe", "concepts") and not n.endswith("taps")]
isc = lambda n: n == "concepts"
ids_m = {id(p) for p in mats}
rest = [p for p in net.parameters() if id(p) not in ids_m]
if s.opt == "muon":
    opts = [torch.optim.Muon(mats, lr=s.lr, weight_decay=s.wd, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr=s.lr * s.aset, betas=(.9, s.b2), weight_decay=0, fused=True)]
else:
    opts = [torch.optim.AdamW([dict(params=mats, weight_decay=s.wd), dict(params=rest, weight_decay=0.)], lr=s.lr, betas=(.9, s.b2), fused=True)]
base = [[g["lr"] for g in o.param_groups] for o in opts]
def sched(i):
    if i < s.warm: return (i + 1) / s.warm
    if s.sched == "wsd":
        x = i / steps
        return 1.0 if x < .75 else max(0.01, 1 - (x - .75) / .25)
    x = (i - s.warm) / max(1, steps - s.warm); return .02 + .98 * .5 * (1 + math.cos(math.pi * x))

freq = torch.bincount(torch.from_numpy(np.concatenate([val.block(np.arange(min(val.n_blocks, 800)))]).reshape(-1).astype(np.int64)), minlength=tok.vocab_size)
tr = train.batch(0, 2000, 0, 1)[0].reshape(-1); freq = torch.bincount(torch.as_tensor(tr), minlength=tok.vocab_size).float(); freq = freq / freq.sum()

@torch.no_grad()
def evaluate(full=False):
    net.eval(); out = {}
    tot = dict(); n = dict(); sh = ze = 0.0; N = 0; zs = []
    for idx in torch.arange(min(s.evalrows, val.n_blocks)).split(32):
        b = mask_batch(torch.as_tensor(val.block(idx.numpy())), idx, "token", .15, tok, seed=1234)
        nats = net.nats(b.inputs, b.positions, b.targets)
        w = b.weights
        if net.has_c:
            zs.append(net.z.float())
            if 1:
                sh += (net.nats(b.inputs, b.positions, b.targets, lambda z: z.roll(16, 0)) * w).sum().item()
                ze += (net.nats(b.inputs, b.positions, b.targets, lambda z: z * 0) * w).sum().item()
        same = b.inputs[:, None, :] == b.targets[:, :, None]  # B,K,T
        dist = (torch.arange(s.T)[None, None] - b.positions[..., None]).abs().float().masked_fill(~same, 1e9).amin(-1)
        f = freq[b.targets]
        groups = dict(all=w > 0, seen=(dist < 1e9), new=(dist >= 1e9), rare_seen=(dist < 1e9) & (f < 1e-4), rare_new=(dist >= 1e9) & (f < 1e-4), mid_seen=(dist < 1e9) & (f >= 1e-4) & (f < 1e-3), mid_new=(dist >= 1e9) & (f >= 1e-4) & (f < 1e-3),
                      far_seen=(dist < 1e9) & (dist > 32) & (f < 1e-3))
        for k, g in groups.items():
            g = g & (w > 0); tot[k] = tot.get(k, 0) + nats[g].sum().item(); n[k] = n.get(k, 0) + int(g.sum())
    out = {k: round(tot[k] / max(1, n[k]), 4) for k in tot}
    if full: out["share"] = {k: round(n[k] / n["all"], 3) for k in n}
    if net.has_c:
        out["shuffle"] = round(sh / n["all"] - out["all"], 4); out["zero"] = round(ze / n["all"] - out["all"], 4)
        Z = torch.cat(zs); Zc = Z - Z.mean(1, keepdim=True); sv = torch.linalg.svdvals(Zc[:64]); pr = sv / sv.sum(-1, keepdim=True)
        out["rank"] = round((-(pr * (pr + 1e-12).log()).sum(-1)).exp().mean().item(), 2)
        out["indep"] = round((Z.var(0).sum(-1) / (Z.var(0).sum(-1) + Z.mean(0).sub(Z.mean((0, 1))).pow(2).sum(-1))).mean().item(), 3)
        cs = F.normalize(Zc, dim=-1); cs = cs @ cs.transpose(1, 2); off = ~torch.eye(s.C, dtype=bool)
        out["dup"] = round((cs[:, off] > .95).float().mean().item(), 4)
    net.train(); return out

os.makedirs(s.out, exist_ok=True); log = open(f"{s.out}/{s.name}.jsonl", "w")
def emit(r): log.write(json.dumps(r) + "\n"); log.flush(); print(json.dumps(r), flush=True)
emit(dict(S, params=P, nonemb=nonemb, mflop_token=round(FT / 1e6, 2), steps=steps))
t0 = time.time(); every = max(1, steps // s.evals); run = 0.0
for i in range(steps):
    ids, sid = train.batch(i, s.bs, 0, 1)
    b = mask_batch(torch.as_tensor(ids), torch.as_tensor(sid), s.mask, s.p, tok, seed=s.seed, span_length_distribution=s.span)
    nats = net.nats(b.inputs, b.positions, b.targets)
    loss = (nats * b.weights).sum() / b.weights.sum(); loss.backward()
    gn = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    for o, bl in zip(opts, base):
        for g, l in zip(o.param_groups, bl): g["lr"] = l * sched(i)
        o.step(); o.zero_grad()
    run = loss.item() if i == 0 else .98 * run + .02 * loss.item()
    done = s.stop and (i + 1) * s.bs * s.T >= s.stop
    if (i + 1) % every == 0 or i + 1 == steps or done:
        el = time.time() - t0
        emit(dict(step=i + 1, tokens=(i + 1) * s.bs * s.T, train=round(run, 4), tps=round((i + 1) * s.bs * s.T / el), gflop=round((i + 1) * s.bs * s.T * FT / 1e9), **evaluate(i + 1 == steps)))
        if done: break
if s.save: torch.save(net.state_dict(), f"{s.out}/{s.name}.pt")
