"""Scores for masking_type="importance": which tokens are masked more often.

    frequency   -log of the token's share of the training text; never changes
    ema         the running mean of the loss of each token id
    shuffled    the scores of ema, which masking.py hands to other words of the row: a control
    model       a small network that reads the clean row and predicts what each token would cost

`ema` and `model` learn from the losses of the predictions while the model trains. Nothing flows
back: the losses have no gradient, and masks are drawn, so the two networks never see each other's
gradient. Training a masker on the model's own loss would make it hide what is easy.

One step of train.py:   scores(ids) -> masking.mask_batch -> the model's losses -> learn(...)
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import spearmanr

from lib.evaluation import predict, token_frequency
from lib.health import probe_rows
from lib.machine import autocast
from model import LocalMixer

KEPT = 0.99  # of a running mean, when a token id is seen once more
FIXED_POINT = 2**20  # losses are summed up in steps of 1 / FIXED_POINT nats
NEW_IDS = 1e-7  # added to frequencies, for ids that the training text does not hold


class LossEstimator(nn.Module):
    """Predicts from a clean row the loss of each token, should it be masked. ids (B,T) -> (B,T).

    Two local mixers over narrow embeddings, added to the -log frequency of the token. It starts as
    that. rate: share of the row that is masked.
    """
    WIDTH, EMBEDDING = 64, 32

    def __init__(self, prior_V):
        super().__init__()
        self.register_buffer("prior_V", prior_V.float())
        cfg = SimpleNamespace(token_width=self.WIDTH, mixer_kernel=7, bias=False, dropout=0.0)
        self.table = nn.Parameter(torch.randn(len(prior_V), self.EMBEDDING))
        self.enter = nn.Linear(self.EMBEDDING + 2, self.WIDTH)
        self.mixers = nn.ModuleList(LocalMixer(cfg) for _ in range(2))
        self.out = nn.Linear(self.WIDTH, 1)
        for name, p in self.mixers.named_parameters():
            if name.endswith("taps"):
                nn.init.normal_(p, 0, cfg.mixer_kernel**-0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, ids, rate):
        prior_BT = self.prior_V[ids]
        known = [F.embedding(ids, self.table), prior_BT[..., None] / 10,
                 torch.full((*ids.shape, 1), rate, device=ids.device)]
        x_BTw = self.enter(torch.cat(known, dim=-1))
        for mixer in self.mixers:
            x_BTw = mixer(x_BTw)
        return prior_BT + self.out(x_BTw)[..., 0]


class Importance:
    """Scores of one run, and what they are learned from.

    kind: one of SCORES. data: the training rows. rate: the run's mlm_probability.
    """

    def __init__(self, kind, data, tok, rate, machine, learning_rate=1e-3):
        self.kind, self.tok, self.rate, self.machine = kind, tok, rate, machine
        self.prior_V = -(token_frequency(data, tok) + NEW_IDS).log().to(machine.device)
        self.mean_V = self.prior_V.double()
        if kind == "model":
            with torch.random.fork_rng([]):  # the same weights in every process
                torch.manual_seed(0)
                self.estimator = LossEstimator(self.prior_V).to(machine.device)
            self.optimizer = torch.optim.AdamW(self.estimator.parameters(), lr=learning_rate,
                                               weight_decay=0.0)

    def scores(self, ids):
        """Training rows, ids (B,T), of which learn() gets the losses -> scores (B,T) on the CPU."""
        self.latest_BT = self.of(ids)
        return self.latest_BT.detach().cpu()

    def of(self, ids):
        """ids (B,T) -> scores (B,T), with the graph of the estimator."""
        ids = ids.to(self.machine.device)
        return self.estimator(ids, self.rate) if self.kind == "model" else self.mean_V[ids]

    def learn(self, batch, nats_BK):
        """From the losses (B,K) of the predictions of a MaskedBatch; all processes together."""
        if self.kind == "frequency":
            return
        used_BK = batch.used & nats_BK.isfinite()
        if self.kind == "model":
            self.fit(batch, nats_BK, used_BK)
        else:
            self.average(batch.targets[used_BK], nats_BK[used_BK])

    def average(self, ids_N, nats_N):
        # Whole numbers: their sum does not depend on the order, nor on how many processes add up.
        sum_V = torch.zeros(len(self.mean_V), dtype=torch.int64, device=self.mean_V.device)
        count_V = torch.zeros_like(sum_V)
        sum_V.index_add_(0, ids_N, (nats_N.double() * FIXED_POINT).round().long())
        count_V.index_add_(0, ids_N, torch.ones_like(ids_N))
        if self.machine.world_size > 1:
            dist.all_reduce(sum_V)
            dist.all_reduce(count_V)
        mean_V = sum_V / FIXED_POINT / count_V.clamp(min=1)
        self.mean_V += (1 - KEPT**count_V.double()) * (mean_V - self.mean_V)

    def fit(self, batch, nats_BK, used_BK):
        # The weights make up for tokens that were chosen more often.
        weights_BK = batch.weights * used_BK
        guess_BK = self.latest_BT.gather(1, batch.positions)
        nats_BK = torch.where(used_BK, nats_BK.float(), guess_BK.detach())
        loss = (F.huber_loss(guess_BK, nats_BK, reduction="none") * weights_BK).sum()
        self.optimizer.zero_grad()
        loss.backward()
        total = weights_BK.sum()
        if self.machine.world_size > 1:
            for tensor in (total, *(p.grad for p in self.estimator.parameters())):
                dist.all_reduce(tensor)
        for p in self.estimator.parameters():
            p.grad /= total.clamp(min=1e-9)
        self.optimizer.step()

    # ---- checkpoints and log ---------------------------------------------------------------

    def state(self):
        """For a checkpoint: tensors and plain Python."""
        found = dict(kind=self.kind, mean_V=self.mean_V)
        if self.kind == "model":
            found |= dict(estimator=self.estimator.state_dict(),
                          optimizer=self.optimizer.state_dict())
        return found

    def load(self, state):
        """Takes what state() gave. Raises ValueError for scores of another kind or vocabulary."""
        if state["kind"] != self.kind:
            raise ValueError(f"importance={self.kind}, but the checkpoint has the scores of "
                             f"importance={state['kind']}; give that, or another --out_dir")
        if len(state["mean_V"]) != len(self.mean_V):
            raise ValueError(f"the checkpoint has scores of {len(state['mean_V']):,} token ids, "
                             f"the tokenizer has {len(self.mean_V):,}: it is another vocabulary")
        self.mean_V = state["mean_V"].to(self.mean_V)
        if self.kind == "model":
            self.estimator.load_state_dict(state["estimator"])
            self.optimizer.load_state_dict(state["optimizer"])

    def begin_with(self, state):
        """Takes the scores of another run, where they are of the same kind -> a line that says so.
        """
        if self.kind == "frequency":
            return "scores of importance=frequency are those of this run's data"
        if state and state["kind"] == self.kind:
            self.load(state)
            return f"scores of importance={self.kind} go on from those of that run"
        there = f"it has those of importance={state['kind']}" if state else "it has none"
        return f"scores of importance={self.kind} begin afresh: {there}"

    @torch.no_grad()
    def measure(self, model, data, dtype, rows=64, micro_batch=32):
        """How well the scores tell what is hard, on validation rows with uniform masks -> dict.

        importance_rank_correlation, frequency_rank_correlation: Spearman's, of the losses with the
        scores and with -log frequency. importance_quantiles: of the scores, 11 numbers from the
        lowest to the highest. importance_examples: words with low, medium and high scores.
        """
        was_training = model.training
        model.eval()
        ids, batch = probe_rows(data, self.tok, rows)
        nats = []
        for part in zip(*(tensor.split(micro_batch) for tensor in batch)):
            inputs, positions, targets, *_ = self.machine.take(part)
            real = inputs != self.tok.pad_id if data.padded else None
            with autocast(self.machine.device, dtype):
                nats.append(predict(model, inputs, positions, targets, real,
                                    self.tok.vocab_size)[0].float().cpu())
        model.train(was_training)
        nats, used = torch.cat(nats), batch.used
        if not nats[used].isfinite().all():
            return {}
        scores = self.of_rows(ids, micro_batch)
        at_mask = scores.gather(1, batch.positions)[used]
        prior = self.prior_V.cpu()[batch.targets][used]
        steps = torch.linspace(0, 1, 11, dtype=torch.float64)
        return dict(
            importance_rank_correlation=float(spearmanr(at_mask, nats[used]).statistic),
            frequency_rank_correlation=float(spearmanr(prior, nats[used]).statistic),
            importance_quantiles=[round(q, 3) for q in at_mask.quantile(steps).tolist()],
            importance_examples=self.examples(ids, scores))

    @torch.no_grad()
    def of_rows(self, ids, micro_batch=32):
        """ids (N,T) of any number of rows -> scores (N,T) float64 on the CPU."""
        return torch.cat([self.of(part).cpu().double() for part in ids.split(micro_batch)])

    def by_id(self, ids, scores):
        """The ordinary ids in these rows -> ids, their mean scores, how often they occur.

        In ascending order of the scores.
        """
        ordinary = ~torch.from_numpy(self.tok.is_special)[ids]
        found, place = ids[ordinary].unique(return_inverse=True)
        total = torch.zeros(len(found), dtype=torch.float64).index_add_(0, place, scores[ordinary])
        count = place.bincount()
        order = (total / count).argsort()
        return found[order], (total / count)[order], count[order]

    def examples(self, ids, scores, n=8):
        """-> {"easy", "medium", "hard": words} by the mean score of each id in these rows."""
        ordered = self.by_id(ids, scores)[0].tolist()
        middle = max(0, len(ordered) // 2 - n // 2)
        parts = dict(easy=ordered[:n], medium=ordered[middle:middle + n], hard=ordered[-n:])
        return {name: [self.word(i) for i in part] for name, part in parts.items()}

    def word(self, i):
        """The text of an id without the spaces around it; white space alone in quotes, as '\\n'."""
        text = self.tok.decode([i])
        return text.strip() or repr(text)


def describe_importance(values):
    """`measure` as two lines to print."""
    examples = "; ".join(f"{name} {' '.join(words)}"
                         for name, words in values["importance_examples"].items())
    return (f"importance: rank correlation with the losses of uniformly masked tokens "
            f"{values['importance_rank_correlation']:.3f}, of -log frequency "
            f"{values['frequency_rank_correlation']:.3f}\n  {examples}")
