"""From a pretrained encoder to an answer: how texts become a row, and the head that classifies or scores it.

    [CLS] a [SEP]   or   [CLS] a [SEP] b [SEP]        each token with the learned vector of its segment on top
    the pretrained decoder asks the row at [CLS], as it would at a [MASK]                           -> what it says
    of a pair, each text is read by itself too: states u and v of one concept
      -> GELU(W [u, v, |u - v|, u v]), the same W for all concepts, their mean                      -> how they compare
    all of this --dropout--> one linear layer

[CLS] starts as a copy of [MASK] and [SEP] as one of the end-of-document mark: pretraining has seen those in these
places. Two texts are compared concept by concept because each concept owns its share of the words; a sentence has fewer
words than a pretrained model has concepts, so a part of the concepts does that better and faster than all of them
(records/glue has what else was tried). Works for every architecture; where there are no concepts, the mean token state
stands for them.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class Classifier(nn.Module):
    """encoder (any MaskedEncoder) with a head of n_out numbers a row of n_texts texts, 1 or 2.

    A number for each label, or one score.
    """
    def __init__(self, encoder, n_out, n_texts, dropout=0.1):
        super().__init__()
        self.encoder, self.n_texts = encoder, n_texts
        self.segments = nn.Parameter(torch.zeros(3, encoder.cfg.token_width))  # [CLS], first text, second text
        self.drop = nn.Dropout(dropout)
        width = encoder.cfg.concept_dim if encoder.arch == "concept" else encoder.cfg.token_dim
        self.compare = nn.Linear(4 * width, width) if n_texts == 2 else None
        self.out = nn.Linear(n_texts * width, n_out)
        nn.init.normal_(self.out.weight, 0, 0.02)
        nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def start_marks(self, tok):
        """For an encoder that comes straight from pretraining, which has never seen [CLS] and [SEP]."""
        self.encoder.wte[tok.cls_id] = self.encoder.wte[tok.mask_id]
        self.encoder.wte[tok.sep_id] = self.encoder.wte[tok.eot_id]

    def forward(self, ids, segments, real):
        """ids (B,T) int64, segments (B,T) of 0 ([CLS]), 1, 2, real (B,T) True = no padding -> (B,n_out) float32."""
        concepts, tokens = self.encoder.encode(ids, real, added=F.embedding(segments, self.segments))
        asked = torch.zeros(ids.shape[0], 1, dtype=torch.int64, device=ids.device)
        states_B1D = self.encoder.decode(concepts, tokens, asked, self.encoder.documents(ids), real)
        found_BF = states_B1D[:, 0].float()
        if self.compare is not None:
            one, other = (real & (segments == n) for n in (1, 2))
            both = self.read(torch.cat((ids, ids)), torch.cat((one, other)))
            u_BCD, v_BCD = both.unflatten(0, (2, ids.shape[0]))
            pair_BCF = torch.cat((u_BCD, v_BCD, (u_BCD - v_BCD).abs(), u_BCD * v_BCD), dim=-1)  # 1705.02364, figure 1
            compared_BCD = F.gelu(self.compare(self.drop(pair_BCF)))  # 1606.01933, section 3.2
            found_BF = torch.cat((found_BF, compared_BCD.float().mean(1)), dim=-1)
        return self.out(self.drop(found_BF))

    def read(self, ids, chosen):
        """The chosen (B,T) tokens of each row, moved to its beginning and read as a row of their own.

        -> concepts (B,C,D), or where there are none the mean token state (B,1,d); float32, zeros for no token at all.
        """
        first_B1, n_B1 = chosen.int().argmax(1, keepdim=True), chosen.sum(1, keepdim=True)
        longest = ids.shape[1] if torch.compiler.is_exporting() else max(1, int(n_B1.max()))  # a graph knows no max
        place_T = torch.arange(longest, device=ids.device)
        ids, real = ids.gather(1, (first_B1 + place_T).clamp(max=ids.shape[1] - 1)), place_T < n_B1
        if self.encoder.cfg.isolate_documents:  # what follows is no document of its own
            ids = ids.masked_fill(~real, self.encoder.cfg.eot_id)
        concepts, tokens = self.encoder.encode(ids, real)
        if self.encoder.arch == "concept":
            return concepts.float() * (n_B1 > 0)[..., None]
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:]) * real[..., None]
        return tokens.sum(1, keepdim=True) / n_B1.clamp(min=1)[..., None]


def keep_concepts(settings, weights, n):
    """Settings and weights of an encoder -> those with its first n concepts only (0: all), where it has more.

    The others' words fall to the concepts that are left; where n divides their number, each keeps its own.
    """
    if settings.get("arch") == "transformer" or not 0 < n < settings["n_concept"]:
        return settings, weights
    return settings | dict(n_concept=n), weights | dict(concepts=weights["concepts"][:n])


def encode_texts(texts, tok, longest):
    """[(a,) or (a, b)] -> (rows, the segments of each, how many were cut). Rows of up to `longest` ids.

    Words look as they do inside a text: with the space before them. The longer text of a pair is cut first.
    """
    space = "" if tok.name == "byte" else " "
    columns = [tok.encode([space + text.strip() for text in column]) for column in zip(*texts)]
    rows, segments, cut = [], [], 0
    for parts in zip(*columns):
        room = longest - 1 - len(parts)
        lengths = cut_lengths([len(part) for part in parts], room)
        cut += sum(lengths) < sum(map(len, parts))
        row, segment = [np.array([tok.cls_id])], [np.array([0])]
        for i, (part, n) in enumerate(zip(parts, lengths), 1):
            row += [part[:n].astype(np.int64), [tok.sep_id]]
            segment.append(np.full(n + 1, i))
        rows.append(np.concatenate(row))
        segments.append(np.concatenate(segment))
    return rows, segments, cut


def cut_lengths(lengths, room):
    """One or two lengths -> what is left of them in `room` when the longest is cut first."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    short = min(min(lengths), room // 2)
    return [short, room - short] if lengths[0] <= lengths[1] else [room - short, short]


def padded(rows, segments, pad_id):
    """Rows of any lengths -> ids, segments, real (B,T), T the longest of them."""
    ids = torch.full((len(rows), max(map(len, rows))), pad_id)
    kinds, real = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, segment) in enumerate(zip(rows, segments)):
        ids[i, :len(row)], kinds[i, :len(row)] = torch.from_numpy(row), torch.from_numpy(segment)
        real[i, :len(row)] = True
    return ids, kinds, real
