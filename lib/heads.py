"""What turns a pretrained encoder into a classifier: rows of ids from texts, and a head.

Two texts become the row [CLS] a [SEP] b [SEP], one text becomes [CLS] a [SEP]. A learned vector for
the segment ([CLS], first text, second text) is added to each token. The head is one linear layer on
two features:
- The state of the pretrained decoder at the place of [CLS]. [CLS] starts as a copy of [MASK], so
  the decoder starts with what it knows: predicting a masked token from the concepts.
- For a pair, a comparison. The encoder reads each text in a row of its own, which gives concept
  states u and v. Every concept is compared with itself, GELU(W [u, v, |u - v|, u * v]) with the
  same W for all, and the mean over concepts is taken. This works because concept c is responsible
  for the ids with id % n_concept == c: u and v of one concept are about the same words.

[SEP] starts as a copy of the end-of-document token, the other token that pretraining has seen
between texts. A sentence has fewer words than a pretrained model has concepts, so comparing with a
part of the concepts is better and faster than with all (records/glue has what else was tried).
A Transformer has no concepts; the mean of its token states stands for them.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.machine import autocast


# tools/export.py copies the source of this class into exported models, and nothing else of this
# file. It may use torch and the names of model.py only.
class Classifier(nn.Module):
    """An encoder (any MaskedEncoder) with a head: n_out numbers a row of n_texts (1 or 2) texts.

    n_out is the number of labels, or 1 for a score.
    """
    def __init__(self, encoder, n_out, n_texts, dropout=0.1):
        super().__init__()
        self.encoder = encoder
        self.n_texts = n_texts
        self.segments = nn.Parameter(torch.zeros(3, encoder.cfg.token_width))  # see `forward`
        self.drop = nn.Dropout(dropout)
        width = encoder.cfg.concept_dim if encoder.arch == "concept" else encoder.cfg.token_dim
        # one matrix for all concepts: a fine-tuning set is too small for one each
        self.compare = nn.Linear(4 * width, width) if n_texts == 2 else None
        self.out = nn.Linear(n_texts * width, n_out)
        # small, so that the first answers are near even and the loss starts at log(n_out)
        nn.init.normal_(self.out.weight, 0, 0.02)
        nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def init_special_tokens(self, tok):
        """Gives [CLS] and [SEP], which pretraining never showed, the embeddings of known tokens."""
        self.encoder.wte[tok.cls_id] = self.encoder.wte[tok.mask_id]
        self.encoder.wte[tok.sep_id] = self.encoder.wte[tok.eot_id]

    def forward(self, ids, segments, real):
        """ids (B,T) int64, segments (B,T) int64, real (B,T) bool -> (B,n_out) float32.

        segments: 0 for [CLS], 1 and 2 for the texts. real: False for padding.
        """
        segment_BTd = F.embedding(segments, self.segments)
        concepts, tokens = self.encoder.encode(ids, real, added=segment_BTd)
        cls_B1 = torch.zeros(ids.shape[0], 1, dtype=torch.int64, device=ids.device)
        documents = self.encoder.documents(ids)
        states_B1D = self.encoder.decode(concepts, tokens, cls_B1, documents, real)
        features_BF = states_B1D[:, 0].float()
        if self.compare is not None:
            # both texts of each row as one batch (2B,T): all first texts, then all second ones
            chosen = torch.cat((real & (segments == 1), real & (segments == 2)))
            both = self.read(torch.cat((ids, ids)), chosen)
            u_BCD, v_BCD = both.unflatten(0, (2, ids.shape[0]))
            # the features of InferSent (1705.02364, figure 1) and the comparison of the
            # decomposable attention model (1606.01933, section 3.2)
            pair_BCF = torch.cat((u_BCD, v_BCD, (u_BCD - v_BCD).abs(), u_BCD * v_BCD), dim=-1)
            compared_BCD = F.gelu(self.compare(self.drop(pair_BCF)))
            features_BF = torch.cat((features_BF, compared_BCD.float().mean(1)), dim=-1)
        return self.out(self.drop(features_BF))

    def read(self, ids, chosen):
        """Encodes a part of each row, the tokens where chosen (B,T) is True, as a row of its own.

        -> concepts (B,C,D) float32, or without concepts the mean token state (B,1,d) float32; zeros
        where no token is chosen. The chosen tokens must follow each other.
        """
        first_B1 = chosen.int().argmax(1, keepdim=True)
        n_B1 = chosen.sum(1, keepdim=True)
        # An exported graph has one shape for all values, so there the rows keep their length.
        longest = ids.shape[1] if torch.compiler.is_exporting() else max(1, int(n_B1.max()))
        place_T = torch.arange(longest, device=ids.device)
        real = place_T < n_B1
        ids = ids.gather(1, (first_B1 + place_T).clamp(max=ids.shape[1] - 1))
        if self.encoder.cfg.isolate_documents:  # what follows must not count as further documents
            ids = ids.masked_fill(~real, self.encoder.cfg.eot_id)
        concepts, tokens = self.encoder.encode(ids, real)
        if self.encoder.arch == "concept":
            return concepts.float() * (n_B1 > 0)[..., None]
        # a pre-norm Transformer ends without a norm, and its states differ in length
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:]) * real[..., None]
        return tokens.sum(1, keepdim=True) / n_B1.clamp(min=1)[..., None]


def keep_concepts(settings, weights, n):
    """Settings and weights of an encoder -> the same with its first n concepts only; 0: with all.

    Nothing changes where it has no more than n. Words are assigned by id % n_concept, so where n
    divides the old number, each concept keeps its words and takes over some of the dropped ones.
    """
    if settings.get("arch") == "transformer" or not 0 < n < settings["n_concept"]:
        return settings, weights
    return settings | dict(n_concept=n), weights | dict(concepts=weights["concepts"][:n])


# ---- texts to batches --------------------------------------------------------

def encode_texts(texts, tok, longest):
    """[(a,) or (a, b)] -> (rows, segments of each row, how many rows were cut), int64 arrays.

    A row has `longest` ids at most; the longer text of a pair is cut first.
    """
    # Inside a text a word has a space before it, and most tokenizers give it another id without.
    # Pretraining has mostly seen the one with it. Bytes are the same in both places.
    space = "" if tok.name == "byte" else " "
    columns = [tok.encode([space + text.strip() for text in column]) for column in zip(*texts)]
    rows, segments, n_cut = [], [], 0
    for parts in zip(*columns):
        # a row is [CLS], then each part with a [SEP] behind it that counts to its segment
        lengths = [len(part) for part in parts]
        kept = cut_lengths(lengths, longest - 1 - len(parts))  # [CLS], and a [SEP] for each text
        n_cut += kept != lengths
        row, segment = [np.array([tok.cls_id])], [np.array([0])]
        for number, (part, n) in enumerate(zip(parts, kept), 1):
            row += [part[:n].astype(np.int64), [tok.sep_id]]
            segment.append(np.full(n + 1, number))
        rows.append(np.concatenate(row))
        segments.append(np.concatenate(segment))
    return rows, segments, n_cut


def cut_lengths(lengths, room):
    """Lengths of one or two texts -> the same cut to `room` tokens together, the longest first."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    short = min(min(lengths), room // 2)
    return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


def padded(rows, segments, pad_id):
    """Rows of any lengths -> ids, segments, real: (B,T) tensors, T the longest of them."""
    ids = torch.full((len(rows), max(map(len, rows))), pad_id)
    padded_segments = torch.zeros_like(ids)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, segment) in enumerate(zip(rows, segments)):
        ids[i, :len(row)] = torch.from_numpy(row)
        padded_segments[i, :len(row)] = torch.from_numpy(segment)
        real[i, :len(row)] = True
    return ids, padded_segments, real


def in_batches(rows, size, rng):
    """Splits rows into batches of `size` for one epoch -> list of index arrays, in random order.

    Rows of similar length share a batch, so that there is little padding. To keep batches random,
    rows are sorted by length inside pools of 64 batches only, and the pools are drawn anew.
    """
    lengths = np.array([len(row) for row in rows])
    order = rng.permutation(len(rows))
    pools = np.split(order, range(64 * size, len(order), 64 * size))
    pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    batches = np.split(np.concatenate(pools), range(size, len(order), size))
    return [batches[i] for i in rng.permutation(len(batches))]


@torch.no_grad()
def predict(model, encoded, pad_id, machine, dtype, eval_tokens=16384):
    """Outputs of a Classifier for (rows, segments) -> (N,n_out) float64, in the order of the rows.

    A batch holds rows of similar length: up to 256 of them and eval_tokens tokens.
    """
    rows, segments = encoded
    model.eval()
    # Sorted by length, a batch has little padding, and padding does not change an answer.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    outputs = [None] * len(rows)
    while order:
        longest = len(rows[order[:256][-1]])
        size = min(256, max(1, eval_tokens // longest))
        part, order = order[:size], order[size:]
        batch = padded([rows[i] for i in part], [segments[i] for i in part], pad_id)
        batch = machine.take(batch)
        with autocast(machine.device, dtype):
            found = model(*batch).double().cpu().numpy()
        for i, output in zip(part, found):
            outputs[i] = output
    return np.array(outputs)
