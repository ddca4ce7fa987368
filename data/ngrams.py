"""Words and n-grams of a text as 64-bit hashes, and MinHash signatures of them.

Sources: Broder 1997 (MinHash), Indyk and Motwani 1998 (bands). Measured on 10 MB of English: 0.2 s per MB and core,
three quarters of it to find and hash the words; datasketch 2.0 needs twice as long.
"""

import re
import unicodedata
import zlib

import numpy as np

from data.reader import mix
from data.tokenizer import UNSPACED

BLOCK = 512  # shingles hashed at once, so that the products stay in the processor's cache
WORD = re.compile(r"\w+")
WORD_OR_CHARACTER = re.compile(rf"{UNSPACED.pattern}|[^\W{UNSPACED.pattern[1:-1]}]+")  # a character is a word there


def words(text):
    """Text -> its words in lower case without punctuation, in NFC: composed and decomposed accents are equal."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return (WORD_OR_CHARACTER if UNSPACED.search(text) else WORD).findall(text.lower())


def hashed(some_words):
    """Words -> uint64 (n,): 32 bits, since n-grams are what is compared, and those get 64."""
    return np.fromiter(map(zlib.crc32, map(str.encode, some_words)), np.uint64, len(some_words))


def grams(hashes, n):
    """Hashes of words -> one hash of each n consecutive ones, uint64 (len - n + 1,); empty when there are fewer."""
    out = np.zeros(max(0, len(hashes) - n + 1), np.uint64)
    for i in range(n if len(out) else 0):
        out = out * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(out)]
    return mix(out)


class MinHash:
    """Hashes of words -> signature -> a hash of each of its bands.

    Two texts whose sets of `n_words`-grams have Jaccard similarity s agree in a band with probability
    1 - (1 - s**rows)**bands. A text of fewer words is one gram.
    """

    def __init__(self, bands, rows, n_words):
        self.shape, self.n_words = (bands, rows), n_words
        self.factors = mix(np.arange(bands * rows, dtype=np.uint64)) | np.uint64(1)  # odd: a bijection of 64-bit words

    def signature(self, shingles):
        """uint64 (n,) -> uint64 (bands * rows,): for each factor the smallest product. Of a union it is the minimum."""
        smallest = np.full(len(self.factors), 2**64 - 1, np.uint64)
        for start in range(0, len(shingles), BLOCK):
            np.minimum(smallest, (shingles[start : start + BLOCK] * self.factors[:, None]).min(1), out=smallest)
        return smallest

    def bands(self, signature):
        """-> uint64 (bands,); the same hashes in another band are no match."""
        summed = (signature.reshape(self.shape) * self.factors[: self.shape[1]]).sum(1)
        return mix(summed + np.arange(self.shape[0], dtype=np.uint64))
