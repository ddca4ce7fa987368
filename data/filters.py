"""Which documents are dropped: quality, language, test data in them; and MinHash signatures.

    filters = Filters({"quality": "gopher", "minhash_bands": 14, ...})  # settings of prepare.py
    rule, reason, bands = filters.judge(text)                           # rule "": kept so far

`judge` is a pure function of the text, called by the processes that tokenise (data/workers.py). So
it can compare a document with fixed test data, but not with other documents. For near-duplicates it
returns the bands of the MinHash signature; data/duplicates.py, which sees all documents in order,
drops one that shares a band with an earlier one.
"""

import functools
import glob
import hashlib
import os
import re
import unicodedata
import zlib

import numpy as np

from data.bins import DataError
from data.reader import mix
from data.texts import PLAIN, kind, read_lines, read_strings
from data.tokenizer import UNSPACED, mended
from data.workers import PIECE_CHARS, cut

# --------------------------------------------------------------------------------------------------
# words and n-grams of a text, as hashes
#
# Finding and hashing the words takes three quarters of the 0.2 s per MB and core that MinHash takes
# on English (datasketch 2.0: twice as long).

WORD = re.compile(r"\w+")
# In scripts without spaces, each character is a word.
WORD_OR_CHARACTER = re.compile(rf"{UNSPACED.pattern}|[^\W{UNSPACED.pattern[1:-1]}]+")


def words(text):
    """Text -> its words in lower case without punctuation.

    They are in NFC, so that composed and decomposed accents are equal.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    pattern = WORD_OR_CHARACTER if UNSPACED.search(text) else WORD
    return pattern.findall(text.lower())


def hashed(some_words):
    """Words -> uint64 (n,) of 32-bit hashes; that is enough, since only n-grams are compared."""
    return np.fromiter(map(zlib.crc32, map(str.encode, some_words)), np.uint64, len(some_words))


def grams(hashes, n):
    """Hashes of words -> a 64-bit hash of each n consecutive ones, uint64 (len - n + 1,).

    Empty when there are fewer than n.
    """
    n_grams = len(hashes) - n + 1
    if n_grams < 1:
        return np.zeros(0, np.uint64)
    out = np.zeros(n_grams, np.uint64)
    for i in range(n):
        out = out * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + n_grams]
    return mix(out)


# --------------------------------------------------------------------------------------------------
# quality: the rules of Gopher and C4
#
# Rae et al. 2021 (Gopher), A1.1 and table A1: length, symbols, lines, stop words, repetition.
# Raffel et al. 2020 (C4), 2.2: curly brackets, lorem ipsum, sentences in lines that end like one.
# C4 also removes the other lines from the pages it keeps; here a document is kept whole or dropped.
# Both are made for English: in other languages set min_stop_words=0.

GOPHER = {"min_words": 50, "max_words": 100_000, "min_word_length": 3, "max_word_length": 10,
          "max_symbols": 0.1, "max_bullets": 0.9, "max_ellipses": 0.3, "min_alphabetic": 0.8,
          "min_stop_words": 2, "max_duplicate_lines": 0.3, "max_duplicate_line_chars": 0.2,
          "max_duplicate_paragraphs": 0.3, "max_duplicate_paragraph_chars": 0.2,
          "max_top_ngrams": "0.20,0.18,0.16",
          "max_duplicate_ngrams": "0.15,0.14,0.13,0.12,0.11,0.10"}
C4 = {"max_curly_brackets": 0, "max_lorem_ipsum": 0, "min_sentences": 3}
PRESETS = {"gopher": GOPHER, "c4": C4}
# Settings that hold a list of limits: names of their rules, n of the first one.
NGRAMS = {"max_top_ngrams": ("top_{}gram", 2), "max_duplicate_ngrams": ("duplicate_{}gram", 5)}

JUDGED_CHARS = 1_000_000  # rules look at the beginning of a document, so that memory is bounded
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("\u2022", "\u2023", "\u25aa", "\u25cf", "\u25e6", "- ", "* ", "\u2013 ")
LETTER = re.compile(r"[^\W\d_]")
PARAGRAPH = re.compile(r"\n\s*\n")
SENTENCE = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(?=\s|$)")
C4_END = (".", "!", "?", '"', "\u201d")
C4_LINE = re.compile("javascript|terms of use|privacy policy|cookie policy|uses cookies|"
                     "use of cookies|use cookies")


class Text:
    """A text and what the rules measure of it; each measure is computed when it is asked for."""

    def __init__(self, text):
        self.text = text[:JUDGED_CHARS]

    @functools.cached_property
    def words(self):  # separated by white space, as in Gopher
        return self.text.split()

    @functools.cached_property
    def lengths(self):  # of the words, int64 (n,)
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @functools.cached_property
    def hashes(self):  # of the words
        return hashed([word.lower() for word in self.words])

    @functools.cached_property
    def lines(self):  # without empty ones
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @functools.cached_property
    def paragraphs(self):
        parts = PARAGRAPH.split(self.text.replace("\r\n", "\n"))
        return [part for part in map(str.strip, parts) if part]

    def per_word(self, n):
        return n / max(1, len(self.words))

    def share_of_lines(self, belongs):
        return sum(map(belongs, self.lines)) / max(1, len(self.lines))

    def repeated(self, parts, size):
        """Share of the parts, weighted by size(part), that are equal to an earlier one."""
        return 1 - sum(map(size, dict.fromkeys(parts))) / max(1, sum(map(size, parts)))

    def top_ngram(self, n):
        """Share of the characters of words in the most frequent n-gram; 0 when none repeats.

        Of several most frequent ones the longest counts.
        """
        _, first, counts = np.unique(grams(self.hashes, n), return_index=True, return_counts=True)
        if not len(counts) or counts.max() == 1:
            return 0.0
        ends = np.cumsum(np.append(0, self.lengths))  # characters before each word
        first = first[counts == counts.max()]
        return counts.max() * (ends[first + n] - ends[first]).max() / ends[-1]

    def duplicate_ngram(self, n):
        """Share of the characters of words in n-grams that occurred before, each counted once."""
        if len(self.words) < n:
            return 0.0
        found = grams(self.hashes, n)
        again = np.ones(len(found), np.int64)
        again[np.unique(found, return_index=True)[1]] = 0
        # The number of repeated n-grams over each word: +1 where one starts, -1 n words later.
        starts, ends = np.pad(again, (0, n - 1)), np.pad(again, (n, 0))[:-1]
        covered = np.cumsum(starts - ends) > 0
        return self.lengths[covered].sum() / self.lengths.sum()

    def c4_sentences(self):
        """Number of sentences in the lines that C4 keeps."""
        n = 0
        for line in self.lines:
            if (line.endswith(C4_END) and not line.endswith("...") and len(line.split()) >= 5
                    and not C4_LINE.search(line.lower())):
                n += len(SENTENCE.findall(line))
        return n


MEASURES = {  # rule: what it measures of a Text; cheap ones first
    "words": lambda t: len(t.words),
    "word_length": lambda t: t.per_word(t.lengths.sum()),
    "symbols": lambda t: t.per_word(
        max(t.text.count("#"), t.text.count("...") + t.text.count("\u2026"))),
    "curly_brackets": lambda t: t.text.count("{"),
    "lorem_ipsum": lambda t: t.text.lower().count("lorem ipsum"),
    "bullets": lambda t: t.share_of_lines(lambda line: line.startswith(BULLETS)),
    "ellipses": lambda t: t.share_of_lines(lambda line: line.endswith(("...", "\u2026"))),
    "alphabetic": lambda t: t.per_word(
        sum(word.isalpha() or bool(LETTER.search(word)) for word in t.words)),
    "stop_words": lambda t: len(STOP_WORDS.intersection(WORD.findall(t.text.lower()))),
    "sentences": Text.c4_sentences,
    "duplicate_lines": lambda t: t.repeated(t.lines, lambda line: 1),
    "duplicate_line_chars": lambda t: t.repeated(t.lines, len),
    "duplicate_paragraphs": lambda t: t.repeated(t.paragraphs, lambda part: 1),
    "duplicate_paragraph_chars": lambda t: t.repeated(t.paragraphs, len),
}
for n in range(2, 5):
    MEASURES[f"top_{n}gram"] = functools.partial(Text.top_ngram, n=n)
for n in range(5, 11):
    MEASURES[f"duplicate_{n}gram"] = functools.partial(Text.duplicate_ngram, n=n)


def read_bounds(settings):
    """Settings -> {rule: (lowest, highest)} in the order of MEASURES; raises DataError.

    The numbers are those of the presets; a setting for a single rule replaces them.
    """
    chosen = {}
    for preset in filter(None, settings["quality"].split(",")):
        if preset not in PRESETS:
            raise DataError(f"--quality={settings['quality']}: expected gopher, c4 or gopher,c4")
        chosen |= PRESETS[preset]
    chosen |= {name: settings[name] for name in (*GOPHER, *C4) if settings[name] not in (-1, "")}
    bounds = {}
    for name, value in chosen.items():
        if name in NGRAMS:
            rule, first_n = NGRAMS[name]
            for n, limit in enumerate(read_limits(name, value, first_n), first_n):
                bounds[rule.format(n)] = (0, limit)
        else:
            rule = name.removeprefix("min_").removeprefix("max_")
            low, high = bounds.get(rule, (0, np.inf))
            bounds[rule] = (value, high) if name.startswith("min_") else (low, value)
    return {rule: bounds[rule] for rule in MEASURES if rule in bounds}


def read_limits(name, value, first_n):
    """A setting such as "0.20,0.18,0.16" -> its numbers, as many as Gopher has; else DataError."""
    try:
        limits = [float(part) for part in value.split(",")]
    except ValueError:
        limits = []
    if len(limits) != len(GOPHER[name].split(",")):
        raise DataError(f"--{name}={value}: expected numbers such as {GOPHER[name]}, of "
                        f"{first_n}-grams and up")
    return limits


def first_broken(text, bounds):
    """Text, {rule: (lowest, highest)} -> (the first rule it breaks or "", found and expected)."""
    measured = Text(text)
    for rule, (low, high) in bounds.items():
        value = MEASURES[rule](measured)
        if not low <= value <= high:
            expected = f"least {low:g}" if value < low else f"most {high:g}"
            return rule, f"{value:.4g}, expected at {expected}"
    return "", ""


# --------------------------------------------------------------------------------------------------
# language

LANGUAGE_CHARS = 1000  # of a document: enough to find its language


@functools.cache
def identifier():
    """py3langid's model of 139 languages.

    On 4,543 sentences and 746 paragraphs of 31 languages it was right in 98.6 % and 100 %, in
    0.8 ms for LANGUAGE_CHARS. Others: lingua 2.1 97.0 and 99.2 % with 1.2 GB of memory; CLD2 94.2
    and 97 %, 15 times as fast.
    """
    try:  # 0.6 s and 90 MB, needed for --language only
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DataError("--language needs py3langid: pip install -r "
                        "requirements-extra.txt") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


# --------------------------------------------------------------------------------------------------
# test data: n-grams that a training document must not contain (Brown et al. 2020, appendix C)

TEST_FILE = re.compile(r"dev|valid|test|diagnostic|^ax\.", re.IGNORECASE)


def find_test_files(place):
    """A file, or a folder of which the dev, valid, test and diagnostic files count -> paths."""
    there = sorted(glob.glob(os.path.join(glob.escape(place), "**"), recursive=True))
    paths = [path for path in [place, *there]
             if os.path.isfile(path) and (kind(path) or is_tsv(path))
             and (path == place or TEST_FILE.search(os.path.basename(path)))]
    if not paths:
        missing = "" if os.path.exists(place) else "no such file or folder; "
        raise DataError(f"--decontaminate={place}: {missing}expected .tsv, .jsonl, .parquet or "
                        ".txt files, or a folder of such files with dev, valid, test or diagnostic "
                        "in their names. For GLUE: hf download nyu-mll/glue --repo-type=dataset "
                        "--local-dir=glue, or unpack its official files there")
    return paths


def is_tsv(path):
    return path.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv")


def read_test_texts(places):
    """Comma-separated files and folders -> yields the texts in their test files.

    Of .tsv each field, of JSON and tables each string, of .txt each paragraph. Raises DataError.
    """
    for place in filter(None, places.split(",")):
        for path in find_test_files(place):
            if is_tsv(path):
                for line, _ in read_lines(path):
                    yield from line.split("\t")
            elif kind(path) in PLAIN:
                lines = (line for line, _ in read_lines(path))
                yield from PARAGRAPH.split("\n".join(lines))
            else:
                yield from read_strings(path)


# --------------------------------------------------------------------------------------------------
# near-duplicates: MinHash (Broder 1997) with bands (Indyk and Motwani 1998)

SHINGLES_AT_ONCE = 512  # hashed at a time, so that the products stay in the processor's cache


class MinHash:
    """Hashes of the n-grams of a text (its shingles) -> signature -> a hash of each of its bands.

    The signature is the minimum of rows * bands different hash functions over the shingles. Two
    texts whose sets of shingles have Jaccard similarity s agree in one function with probability
    s, so in a band of `rows` with s**rows, so in at least one band with 1 - (1 - s**rows)**bands.
    """

    def __init__(self, bands, rows, n_words):
        self.shape, self.n_words = (bands, rows), n_words
        numbers = np.arange(bands * rows, dtype=np.uint64)
        # Odd, so that a product modulo 2**64 is a permutation of the 64-bit numbers.
        self.factors = mix(numbers) | np.uint64(1)

    def signature(self, shingles):
        """uint64 (n,) -> uint64 (bands * rows,): the smallest product for each factor.

        The signature of a union is the minimum of both, so a text can be hashed in pieces.
        """
        smallest = np.full(len(self.factors), 2**64 - 1, np.uint64)
        for start in range(0, len(shingles), SHINGLES_AT_ONCE):
            products = shingles[start : start + SHINGLES_AT_ONCE] * self.factors[:, None]
            np.minimum(smallest, products.min(1), out=smallest)
        return smallest

    def bands(self, signature):
        """-> uint64 (bands,). The number of the band is part of its hash."""
        bands, rows = self.shape
        summed = (signature.reshape(self.shape) * self.factors[:rows]).sum(1)
        return mix(summed + np.arange(bands, dtype=np.uint64))


# --------------------------------------------------------------------------------------------------
# all of them


class Filters:
    """The rules that the settings ask for. Raises DataError for settings that make no sense.

    names: of the rules, in the order in which they are tried. settings: what decides which
    documents are dropped, for meta.json.
    """

    def __init__(self, settings):
        self.bounds, self.settings = read_bounds(settings), {}
        self.names = list(self.bounds)
        if self.bounds:
            self.settings["quality"] = {  # JSON has no infinity
                rule: [low, min(high, 1e12)] for rule, (low, high) in self.bounds.items()}
        self.languages = list(filter(None, settings["language"].split(",")))
        self.least_p = settings["min_language_p"]
        if self.languages:
            self.check_languages(settings["language"])
            self.names.append("language")
            self.settings["language"] = [*self.languages, self.least_p]
        self.gram_words, self.test_grams = settings["decontaminate_words"], None
        if settings["decontaminate"]:
            self.read_test_data(settings["decontaminate"])
            self.names.append("contaminated")
        bands, rows = settings["minhash_bands"], settings["minhash_rows"]
        n_words, self.minhash = settings["minhash_words"], None
        if bands:
            if min(bands, rows, n_words) < 1:
                raise DataError(f"minhash_bands = {bands}, minhash_rows = {rows}, minhash_words = "
                                f"{n_words}: expected positive numbers, such as 14, 8 and 5")
            self.minhash = MinHash(bands, rows, n_words)
            self.names.append("near_duplicates")
            self.settings["minhash"] = [bands, rows, n_words]

    def check_languages(self, asked):
        unknown = set(self.languages) - set(identifier().nb_classes)
        if unknown or not 0 <= self.least_p <= 1:
            raise DataError(f"--language={asked} --min_language_p={self.least_p}: expected codes "
                            "such as en,de and a probability; unknown: "
                            f"{', '.join(sorted(unknown)) or 'none'}")

    def read_test_data(self, places):
        """Sets test_grams to the sorted hashes of all runs of gram_words words in the test data."""
        n = self.gram_words
        if n < 5:
            raise DataError(f"--decontaminate_words={n}: at least 5 is expected; fewer are in any "
                            "text")
        found = [hashed(words(mended(text))) for text in read_test_texts(places)]
        n_short = sum(0 < len(hashes) < n for hashes in found)
        n_long = sum(len(hashes) >= n for hashes in found)
        found_grams = [np.zeros(0, np.uint64), *(grams(hashes, n) for hashes in found)]
        self.test_grams = np.unique(np.concatenate(found_grams))
        print(f"--decontaminate: {len(self.test_grams):,} {n}-grams of {n_long:,} texts; "
              f"{n_short:,} fields have fewer words and cannot be found", flush=True)
        if not n_long:
            raise DataError(f"--decontaminate={places}: no text of {n} words there")
        digest = hashlib.sha256(self.test_grams.tobytes()).hexdigest()[:16]
        self.settings["decontaminate"] = f"{len(self.test_grams)} {n}-grams {digest}"

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
        """As judge, by the n-grams of the text: test data in it, and its MinHash bands.

        Long texts are hashed in pieces, so that memory is bounded. Each piece starts with the last
        words of the piece before, because n-grams go over the border.
        """
        n = self.minhash.n_words if self.minhash else 0
        before, signature = [], None
        for piece in cut(text, PIECE_CHARS):
            found = before + words(piece)
            hashes = hashed(found)
            if self.test_grams is not None and len(found) >= self.gram_words:
                keys = grams(hashes, self.gram_words)
                at = np.searchsorted(self.test_grams, keys)
                at = np.minimum(at, len(self.test_grams) - 1)
                same = np.flatnonzero(self.test_grams[at] == keys)
                if len(same):
                    run = found[same[0] : same[0] + self.gram_words]
                    return "contaminated", " ".join(run), None
            if self.minhash and len(found) >= n:
                part = self.minhash.signature(grams(hashes, n))
                signature = part if signature is None else np.minimum(signature, part)
            before = found[-max(n, self.gram_words) :]
        if not self.minhash:
            return "", "", None
        if signature is None:  # fewer than n words are one shingle; without words, the text is
            signature = self.minhash.signature(mix(hashed([" ".join(before) or text])))
        return "", "", self.minhash.bands(signature)
