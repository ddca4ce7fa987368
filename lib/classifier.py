"""What turns a pretrained encoder into a classifier: a head on the rows that lib/heads.py makes.

The rows are [CLS] a [SEP] b [SEP] for two texts, [CLS] a [SEP] for one. A learned vector for
the segment ([CLS], first text, second text) is added to each token. The head is one linear layer on
two features:
- The state of the pretrained decoder at the place of [CLS]. [CLS] starts as a copy of [MASK], so
  the decoder starts with what it knows: predicting a masked token from the concepts. Of a causal
  model it is the state of the last token, the only one that has seen the row.
- For a pair, a comparison. The encoder reads each text in a row of its own, which gives states u
  and v: of concepts, or of tokens where there are no concepts. Each u is compared with what it is
  like in the other text, alike = softmax(u v^T / sqrt(D)) v, by GELU(W [u, alike, |u - alike|,
  u * alike]) with the same W for all; then the mean over all u, and the same from the other side
  (sections 2.2 and 3.2 of the decomposable attention model, 1606.01933).

[SEP] starts as a copy of the end-of-document token, the other token that pretraining has seen
between texts. A sentence has fewer words than a pretrained model has concepts, so comparing with a
part of the concepts is better and faster than with all (records/glue has what else was tried).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# tools/export.py copies this file and what it imports into exported models.
from model import gather_rows


class Classifier(nn.Module):
    """An encoder with a head: n_out numbers a row of n_texts (1 or 2) texts.

    The encoder is one of model.py or lib/baselines.py. n_out is the number of labels, or 1 for a
    score. aligned: pairs are compared by what is alike, see above; False: each concept with itself,
    or the means of the token states, as models without anchors once did.
    """
    def __init__(self, encoder, n_out, n_texts, dropout=0.1, aligned=True):
        super().__init__()
        self.aligned = aligned
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
        return self.answer(concepts, tokens, ids, segments, real)

    def answer(self, concepts, tokens, ids, segments, real, vectors_BTd=None):
        """What encode returned with the segments added, and its input -> (B,n_out)."""
        place_B1 = torch.zeros(ids.shape[0], 1, dtype=torch.int64, device=ids.device)
        if getattr(self.encoder.cfg, "causal", False):  # only the last token has seen the row
            place_B1 = (real.sum(1, keepdim=True) - 1).clamp(min=0)
        documents = self.encoder.documents(ids, real)
        states_B1D = self.encoder.decode(concepts, tokens, place_B1, documents, real)
        features_BF = states_B1D[:, 0].float()
        if self.compare is not None:
            # both texts of each row as one batch (2B,T): all first texts, then all second ones
            chosen = torch.cat((real & (segments == 1), real & (segments == 2)))
            twice_BTd = None if vectors_BTd is None else torch.cat((vectors_BTd, vectors_BTd))
            both = self.read_part(torch.cat((ids, ids)), chosen, twice_BTd)
            (u_BCD, v_BCD), (has_u_BC1, has_v_BC1) = (
                t.unflatten(0, (2, ids.shape[0])) for t in both)
            if self.aligned:
                compared_BD = (self.comparison(u_BCD, alike(u_BCD, v_BCD, has_v_BC1), has_u_BC1)
                               + self.comparison(v_BCD, alike(v_BCD, u_BCD, has_u_BC1), has_v_BC1))
            else:
                compared_BD = self.comparison(u_BCD, v_BCD, has_u_BC1)
            features_BF = torch.cat((features_BF, compared_BD), dim=-1)
        # fp32 under autocast; an exported model may have been loaded in bf16
        return self.out(self.drop(features_BF).to(self.out.weight.dtype))

    def comparison(self, u_BCD, v_BCD, counts_BC1):
        """Mean over the u that count of what W says to u and v. -> (B,D) float32."""
        # the features of InferSent (1705.02364, figure 1) and the comparison of the
        # decomposable attention model (1606.01933, section 3.2)
        pair_BCF = torch.cat((u_BCD, v_BCD, (u_BCD - v_BCD).abs(), u_BCD * v_BCD), dim=-1)
        pair_BCF = self.drop(pair_BCF).to(self.compare.weight.dtype)
        compared_BCD = F.gelu(self.compare(pair_BCF)).float()
        return (compared_BCD * counts_BC1).sum(1) / counts_BC1.sum(1).clamp(min=1)

    def read_part(self, ids, chosen, vectors_BTd=None):
        """Encodes a part of each row, the tokens where chosen (B,T) is True, as a row of its own.

        -> concepts (B,C,D) float32, or without concepts the token states (B,T,d), if not aligned
        their mean (B,1,d); zeros where no token is chosen; and (B,C,1) bool: which of them stand in
        that row. The chosen tokens must follow each other.
        """
        first_B1 = chosen.int().argmax(1, keepdim=True)
        n_B1 = chosen.sum(1, keepdim=True)
        # An exported graph has one shape for all values, so there the rows keep their length.
        longest = ids.shape[1] if torch.compiler.is_exporting() else max(1, int(n_B1.max()))
        place_T = torch.arange(longest, device=ids.device)
        real = place_T < n_B1
        place_BT = (first_B1 + place_T).clamp(max=ids.shape[1] - 1)
        ids = ids.gather(1, place_BT)
        if vectors_BTd is not None:
            vectors_BTd = gather_rows(vectors_BTd, place_BT)
        concepts, tokens = self.encoder.encode(ids, real, vectors_BTd=vectors_BTd)
        if self.encoder.arch == "concept":
            n_standing = self.encoder.n_standing(ids.shape[1])  # the others do not count
            standing_BC1 = self.encoder.standing(ids, real)[:, :n_standing, None]
            return concepts[:, :n_standing].float() * (n_B1 > 0)[..., None], standing_BC1
        # a pre-norm Transformer ends without a norm, and its states differ in length
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:]) * real[..., None]
        if self.aligned:
            return tokens, real[..., None]
        mean_B1d = tokens.sum(1, keepdim=True) / n_B1.clamp(min=1)[..., None]
        return mean_B1d, torch.ones_like(real[:, :1, None])


def alike(u_BCD, v_BCD, counts_BC1):
    """For each u the mean of the v that count, by how like it they are. -> (B,C,D)."""
    scores_BCC = u_BCD @ v_BCD.mT * u_BCD.shape[-1] ** -0.5
    scores_BCC = scores_BCC.masked_fill(~counts_BC1.mT, torch.finfo(scores_BCC.dtype).min)
    return scores_BCC.softmax(-1) @ v_BCD
