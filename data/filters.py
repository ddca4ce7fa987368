"""Words and n-grams of a text as 64-bit hashes, and MinHash signatures of them.

Sources: Broder 1997 (MinHash), Indyk and Motwani 1998 (bands). Measured on 10 MB of English: 0.2 s per MB and core,
three quarters of it to find and hash the words; datasketch 2.0 needs twice as long.

Rules of Gopher and C4 for a document: what they measure and the numbers of their papers.

Rae et al. 2021 (Gopher), A1.1 and table A1: length, symbols, lines, stop words, repetition. Raffel et al. 2020 (C4),
2.2: curly brackets, lorem ipsum, sentences in lines that end like one; C4 also removes the other lines from the pages
it keeps, here a document is kept whole or dropped. Both are made for English: in other languages set min_stop_words=0.

Which documents are dropped: quality, language, test data in them, near-duplicates of earlier ones.

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
import unicodedata
import zlib

import numpy as np

from data.bins import DataError
from data.reader import mix
from data.tokenizer import UNSPACED, mended
from data.workers import PIECE_CHARS, cut

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


JUDGED_CHARS = 1_000_000  # of a document: its quality is that of its beginning, so that memory is bounded
GOPHER = {"min_words": 50, "max_words": 100_000, "min_word_length": 3, "max_word_length": 10, "max_symbols": 0.1,
          "max_bullets": 0.9, "max_ellipses": 0.3, "min_alphabetic": 0.8, "min_stop_words": 2,
          "max_duplicate_lines": 0.3, "max_duplicate_line_chars": 0.2, "max_duplicate_paragraphs": 0.3,
          "max_duplicate_paragraph_chars": 0.2, "max_top_ngrams": "0.20,0.18,0.16",
          "max_duplicate_ngrams": "0.15,0.14,0.13,0.12,0.11,0.10"}
C4 = {"max_curly_brackets": 0, "max_lorem_ipsum": 0, "min_sentences": 3}
PRESETS = {"gopher": GOPHER, "c4": C4}
NGRAMS = {"max_top_ngrams": ("top_{}gram", 2), "max_duplicate_ngrams": ("duplicate_{}gram", 5)}  # their rules, first n

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("\u2022", "\u2023", "\u25aa", "\u25cf", "\u25e6", "- ", "* ", "\u2013 ")
LETTER = re.compile(r"[^\W\d_]")
PARAGRAPH = re.compile(r"\n\s*\n")
SENTENCE = re.compile(r"[.!?][\"'\u201d\u2019)\]]*(?=\s|$)")
C4_END = (".", "!", "?", '"', "\u201d")
C4_LINE = re.compile("javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies")


class Text:
    """A text and what the rules measure of it, each computed when it is asked for."""

    def __init__(self, text):
        self.text = text[:JUDGED_CHARS]

    @functools.cached_property
    def words(self):  # what white space separates, as in Gopher
        return self.text.split()

    @functools.cached_property
    def lengths(self):  # of the words, int64 (n,)
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @functools.cached_property
    def hashes(self):
        return hashed([word.lower() for word in self.words])

    @functools.cached_property
    def lines(self):
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @functools.cached_property
    def paragraphs(self):
        return [part for part in map(str.strip, PARAGRAPH.split(self.text.replace("\r\n", "\n"))) if part]

    def per_word(self, n):
        return n / max(1, len(self.words))

    def share_of_lines(self, belongs):
        return sum(map(belongs, self.lines)) / max(1, len(self.lines))

    def repeated(self, parts, size):
        """Share of the parts, by size, that are equal to an earlier one."""
        return 1 - sum(map(size, dict.fromkeys(parts))) / max(1, sum(map(size, parts)))

    def top_ngram(self, n):
        """Share of the characters of words in the most frequent n-gram; 0 when none occurs twice."""
        _, first, counts = np.unique(grams(self.hashes, n), return_index=True, return_counts=True)
        if not len(counts) or counts.max() == 1:
            return 0.0
        ends, first = np.cumsum(np.append(0, self.lengths)), first[counts == counts.max()]
        return counts.max() * (ends[first + n] - ends[first]).max() / ends[-1]

    def duplicate_ngram(self, n):
        """Share of the characters of words in n-grams that occurred before, each character counted once."""
        if len(self.words) < n:
            return 0.0
        found = grams(self.hashes, n)
        again = np.ones(len(found), np.int64)
        again[np.unique(found, return_index=True)[1]] = 0
        covered = np.cumsum(np.pad(again, (0, n - 1)) - np.pad(again, (n, 0))[:-1]) > 0  # n words from each start
        return self.lengths[covered].sum() / self.lengths.sum()

    def c4_sentences(self):
        """Sentences in the lines that C4 keeps."""
        kept = (line for line in self.lines if line.endswith(C4_END) and not line.endswith("...")
                and len(line.split()) >= 5 and not C4_LINE.search(line.lower()))
        return sum(len(SENTENCE.findall(line)) for line in kept)


MEASURES = {  # rule: what it measures; cheap ones first
    "words": lambda t: len(t.words),
    "word_length": lambda t: t.per_word(t.lengths.sum()),
    "symbols": lambda t: t.per_word(max(t.text.count("#"), t.text.count("...") + t.text.count("\u2026"))),
    "curly_brackets": lambda t: t.text.count("{"),
    "lorem_ipsum": lambda t: t.text.lower().count("lorem ipsum"),
    "bullets": lambda t: t.share_of_lines(lambda line: line.startswith(BULLETS)),
    "ellipses": lambda t: t.share_of_lines(lambda line: line.endswith(("...", "\u2026"))),
    "alphabetic": lambda t: t.per_word(sum(word.isalpha() or bool(LETTER.search(word)) for word in t.words)),
    "stop_words": lambda t: len(STOP_WORDS.intersection(WORD.findall(t.text.lower()))),
    "sentences": Text.c4_sentences,
    "duplicate_lines": lambda t: t.repeated(t.lines, lambda line: 1),
    "duplicate_line_chars": lambda t: t.repeated(t.lines, len),
    "duplicate_paragraphs": lambda t: t.repeated(t.paragraphs, lambda part: 1),
    "duplicate_paragraph_chars": lambda t: t.repeated(t.paragraphs, len),
    **{f"top_{n}gram": lambda t, n=n: t.top_ngram(n) for n in range(2, 5)},
    **{f"duplicate_{n}gram": lambda t, n=n: t.duplicate_ngram(n) for n in range(5, 11)},
}


def read_bounds(settings):
    """Settings -> {rule: (lowest, highest)} in the order of MEASURES: the presets, then what replaces their numbers."""
    chosen, bounds = {}, {}
    for name in filter(None, settings["quality"].split(",")):
        if name not in PRESETS:
            raise DataError(f"--quality={settings['quality']}: expected gopher, c4 or gopher,c4")
        chosen |= PRESETS[name]
    chosen |= {name: settings[name] for name in (*GOPHER, *C4) if settings[name] not in (-1, "")}
    for name, value in chosen.items():
        if name in NGRAMS:
            rule, first = NGRAMS[name]
            try:
                limits = [float(part) for part in value.split(",")]
            except ValueError:
                limits = []
            if len(limits) != GOPHER[name].count(",") + 1:
                raise DataError(f"--{name}={value}: expected numbers such as {GOPHER[name]}, of {first}-grams and up")
            bounds |= {rule.format(first + i): (0, limit) for i, limit in enumerate(limits)}
        else:
            low, high = bounds.get(name[4:], (0, np.inf))
            bounds[name[4:]] = (value, high) if name.startswith("min_") else (low, value)
    return {rule: bounds[rule] for rule in MEASURES if rule in bounds}


def first_broken(text, bounds):
    """Text, {rule: (lowest, highest)} -> (the first rule it breaks or "", what was found and expected)."""
    measured = Text(text)
    for rule, (low, high) in bounds.items():
        value = MEASURES[rule](measured)
        if not low <= value <= high:
            return rule, f"{value:.4g}, expected at {f'least {low:g}' if value < low else f'most {high:g}'}"
    return "", ""


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
