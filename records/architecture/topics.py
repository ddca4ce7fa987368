"""64 topics of equally many words: splits along the first principal direction of their co-occurrence vectors.

    python records/architecture/topics.py data/mine        writes classes.pt for lexicon_pilots.patch, TREE=1
"""
import sys

sys.path.insert(0, ".")
import torch

from cooccurrence import token_vectors
from shards import TokenData
from tokenizer import Tokenizer

data = TokenData(sys.argv[1], "train", 512, 0)
tok = Tokenizer.load(f"{sys.argv[1]}/tokenizer")
vectors = token_vectors(data, 16_000, 128, seed=1)
unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-6)


def split(ids, n):
    if n == 1:
        return [ids.sort().values]
    centred = unit[ids] - unit[ids].mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False)[2][0]
    ids = ids[(centred @ direction).argsort()]
    return split(ids[:len(ids) // 2], n // 2) + split(ids[len(ids) // 2:], n // 2)


topics = split(torch.arange(16_000), 64)
for topic in topics[::8]:
    print([tok.decode([int(i)]) for i in topic[:200:16]])
torch.save(topics, "classes.pt")
