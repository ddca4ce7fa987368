"""Rules of Gopher and C4 for a document: what they measure and the numbers of their papers.

Rae et al. 2021 (Gopher), A1.1 and table A1: length, symbols, lines, stop words, repetition. Raffel et al. 2020 (C4),
2.2: curly brackets, lorem ipsum, sentences in lines that end like one; C4 also removes the other lines from the pages
it keeps, here a document is kept whole or dropped. Both are made for English: in other languages set min_stop_words=0.
"""

import functools
import re

import numpy as np

from data.bins import DataError
from data.ngrams import WORD, grams, hashed

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
