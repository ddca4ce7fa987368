"""Which documents are dropped: quality, language, test data in them, near-duplicates of earlier ones.

    filters = Filters({"quality": "gopher", "minhash_bands": 14, ...})     # settings of prepare.py
    rule, reason, bands = filters.judge(text)                              # rule "": kept so far

`judge` is a pure function of the text, called by the processes that tokenise. Near-duplicates are found by whoever sees
all documents in order (documents.py): one that has a band of an earlier one is dropped.
"""

import functools
import glob
import hashlib
import json
import os
import re

import numpy as np

from data.bins import DataError
from data.ngrams import MinHash, grams, hashed, words
from data.quality import PARAGRAPH, first_broken, read_bounds
from data.reader import mix
from data.tokenizer import mended
from data.workers import PIECE_CHARS, cut

LANGUAGE_CHARS = 1000  # of a document: enough to tell its language
TEST_FILE = re.compile(r"dev|valid|test|diagnostic|^ax\.", re.IGNORECASE)


@functools.cache
def identifier():
    """py3langid's model: 139 languages.

    On 4,543 sentences and 746 paragraphs of 31 languages it was right in 98.6 % and 100 % (lingua 2.1: 97.0 and 99.2 %
    with 1.2 GB of memory, CLD2: 94.2 and 97 %, 15 times as fast), in 0.8 ms for LANGUAGE_CHARS.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # 0.6 s and 90 MB, needed for --language only
    except ImportError:
        raise DataError("--language needs py3langid: pip install -r requirements-extra.txt") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def read_test_texts(places):
    """Comma-separated files, or folders of which the dev, valid, test and diagnostic files count -> yields texts.

    .tsv: each field; .jsonl: each string; .txt: each paragraph.
    """
    for place in filter(None, places.split(",")):
        inside = sorted(glob.glob(os.path.join(glob.escape(place), "**"), recursive=True))
        paths = [path for path in [place, *inside] if path.endswith((".tsv", ".jsonl", ".txt"))
                 and os.path.isfile(path) and (path == place or TEST_FILE.search(os.path.basename(path)))]
        if not paths:
            raise DataError(f"--decontaminate={place}: expected .tsv, .jsonl or .txt files, or a folder of such files "
                            "with dev, valid, test or diagnostic in their names, such as a GLUE folder")
        for path in paths:
            with open(path, encoding="utf-8", errors="replace") as file:
                if path.endswith(".txt"):
                    yield from PARAGRAPH.split(file.read())
                elif path.endswith(".tsv"):
                    yield from (field for line in file for field in line.split("\t"))
                else:
                    for number, line in enumerate(file, 1):
                        try:
                            yield from (value for value in json.loads(line).values() if isinstance(value, str))
                        except (ValueError, AttributeError) as error:
                            raise DataError(f"{path}:{number}: expected a JSON object ({error})") from None


class Filters:
    """The rules that the settings ask for.

    names: of the rules, in the order in which they are tried. settings: what decides, for meta.json.
    """

    def __init__(self, settings):
        self.bounds, self.settings = read_bounds(settings), {}
        self.languages, self.least_p = list(filter(None, settings["language"].split(","))), settings["min_language_p"]
        self.gram_words, self.test_grams, self.minhash = settings["decontaminate_words"], None, None
        self.names = [*self.bounds]
        if self.bounds:
            self.settings["quality"] = {rule: [low, min(high, 1e12)] for rule, (low, high) in self.bounds.items()}
        if self.languages:
            unknown = set(self.languages) - set(identifier().nb_classes)
            if unknown or not 0 <= self.least_p <= 1:
                raise DataError(f"--language={settings['language']} --min_language_p={self.least_p}: expected codes "
                                f"such as en,de and a probability; unknown: {', '.join(sorted(unknown)) or 'none'}")
            self.names.append("language")
            self.settings["language"] = [*self.languages, self.least_p]
        if settings["decontaminate"]:
            self.read_test_data(settings["decontaminate"])
        bands, rows, n_words = (settings[f"minhash_{name}"] for name in ("bands", "rows", "words"))
        if bands:
            if min(bands, rows, n_words) < 1:
                raise DataError(f"minhash_bands = {bands}, minhash_rows = {rows}, minhash_words = {n_words}: expected "
                                "positive numbers, such as 14, 8 and 5")
            self.minhash = MinHash(bands, rows, n_words)
            self.names.append("near_duplicates")
            self.settings["minhash"] = [bands, rows, n_words]

    def read_test_data(self, places):
        """Sets test_grams, sorted, after Brown et al. 2020 (GPT-3), appendix C."""
        if self.gram_words < 5:
            raise DataError(f"--decontaminate_words={self.gram_words}: at least 5 is expected; fewer are in any text")
        found = [hashed(words(mended(text))) for text in read_test_texts(places)]
        n_short = sum(0 < len(hashes) < self.gram_words for hashes in found)
        n_long = sum(len(hashes) >= self.gram_words for hashes in found)
        self.test_grams = np.unique(np.concatenate([grams(hashes, self.gram_words) for hashes in found]))
        print(f"--decontaminate: {len(self.test_grams):,} {self.gram_words}-grams of {n_long:,} texts; {n_short:,} "
              "fields have fewer words and cannot be found", flush=True)
        if not n_long:
            raise DataError(f"--decontaminate={places}: no text of {self.gram_words} words there")
        self.names.append("contaminated")
        digest = hashlib.sha256(self.test_grams.tobytes()).hexdigest()[:16]
        self.settings["decontaminate"] = f"{len(self.test_grams)} {self.gram_words}-grams {digest}"

    def judge(self, text):
        """Text -> (rule that drops it or "", why, its MinHash bands uint64 (bands,) or None)."""
        rule, reason = first_broken(text, self.bounds) if self.bounds else ("", "")
        if not rule and self.languages:
            language, p = identifier().classify(text[:LANGUAGE_CHARS])
            if language not in self.languages or p < self.least_p:
                rule, reason = "language", f"{language} with probability {p:.2f}"
        if rule or self.test_grams is None and not self.minhash:
            return rule, reason, None
        return self.compare(text)

    def compare(self, text):
        """As judge, with hashes of the words, a piece of the text at a time; grams may begin in the piece before."""
        n, before, signature = self.minhash.n_words if self.minhash else 0, [], None
        for piece in cut(text, PIECE_CHARS):
            found = before + words(piece)
            hashes = hashed(found)
            if self.test_grams is not None and len(found) >= self.gram_words:
                keys = grams(hashes, self.gram_words)
                at = np.minimum(np.searchsorted(self.test_grams, keys), len(self.test_grams) - 1)
                if len(same := np.flatnonzero(self.test_grams[at] == keys)):
                    return "contaminated", " ".join(found[same[0] : same[0] + self.gram_words]), None
            if self.minhash and len(found) >= n:
                part = self.minhash.signature(grams(hashes, n))
                signature = part if signature is None else np.minimum(signature, part)
            before = found[-max(n, self.gram_words) :]
        if self.minhash and signature is None:  # shorter than a gram; without words, the text itself is its one word
            signature = self.minhash.signature(mix(hashed([" ".join(before) or text])))
        return "", "", self.minhash.bands(signature) if self.minhash else None
