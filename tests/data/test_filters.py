"""Promises of data/filters.py and of the set in data/duplicates.py, against plain slow loops."""

import collections
import json
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, SHARED

from configurator import read_settings
from data import duplicates, filters
from data.bins import DataError
from data.filters import Filters, MinHash, grams, hashed, words
from data.tokenizer import Tokenizer

DEFAULTS = {name: default for name, (default, _) in read_settings(ROOT / "prepare.py").items()}


def settings(**changes):
    assert changes.keys() <= DEFAULTS.keys()
    return {**DEFAULTS, **changes}


def write_jsonl(path, some_texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts))


def decoded(folder):
    """Sorted documents of both splits."""
    tok, found = Tokenizer.load(str(folder / "tokenizer")), []
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", "<u2")
        ends = np.flatnonzero(ids == tok.eot_id) + 1
        found += [tok.decode(part[:-1]) for part in np.split(ids, ends)[:-1]]
    return sorted(found)


LETTERS = np.random.default_rng(0).integers(0x61, 0x7B, (4000, 6), np.uint8)
WORDS = ["the", "of", "and", "to", "that", *(row.tobytes().decode() for row in LETTERS)]


def prose(n, seed=0, vocabulary=4000):
    """n words that read like no language, with the frequencies of one."""
    ranks = np.random.default_rng(seed).zipf(1.3, n)
    return " ".join(WORDS[rank] for rank in np.minimum(ranks, vocabulary - 1).tolist())


# --------------------------------------------------------------------------------------------------
# hashes


def test_seen_agrees_with_a_set_in_memory_and_on_disk(tmp_path, monkeypatch):
    for name, value in (("IN_MEMORY", 700), ("PAGE", 8), ("BLOCK", 64), ("AT_ONCE", 50)):
        monkeypatch.setattr(duplicates, name, value)
    rng, some = np.random.default_rng(0), duplicates.Seen(tmp_path / "seen")
    truth, n_levels = set(), []
    for _ in range(120):
        batch = rng.integers(0, 30_000, rng.integers(0, 300)).astype(np.uint64) * np.uint64(2**49)
        expected = []
        for x in batch.tolist():
            expected.append(x not in truth)
            truth.add(x)
        assert some.add(batch).tolist() == expected
        n_levels.append(len(some.levels))
    assert sum(len(level.hashes) for level in some.levels) > 5000 and 2 <= max(n_levels) <= 6
    assert not list(tmp_path.iterdir()), "its files have no names, so nothing stays behind"


def test_words_know_composed_decomposed_and_unspaced_text():
    assert words("Don't STOP,  the_end\r\n42") == ["don", "t", "stop", "the_end", "42"]
    accents = "Caf\u00e9 \u00c5"
    assert words(accents) == words(unicodedata.normalize("NFD", accents)) == ["caf\u00e9", "\u00e5"]
    assert words("\u6f22\u5b57ab\u0e44") == ["\u6f22", "\u5b57", "ab", "\u0e44"]


def test_grams_are_equal_where_the_words_are():
    text = "a rose is a rose is a rose".split()
    for n in (1, 2, 3, 5, 8, 9):
        expected = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        found = grams(hashed(text), n).tolist()
        assert len(found) == len(expected) and len(set(found)) == len(set(expected))
        assert all((a == b) == (x == y)
                   for a, x in zip(found, expected) for b, y in zip(found, expected))


def test_minhash_agrees_as_often_as_theory_says():
    """Bands of sets with known Jaccard similarity, 300 pairs each: within 4 standard deviations."""
    rng, minhash, trials = np.random.default_rng(0), MinHash(14, 8, 5), 300
    for similarity in (0.5, 0.7, 0.8, 0.95):
        size = 400
        shared = round(2 * size * similarity / (1 + similarity))
        hits = 0
        for _ in range(trials):
            both = rng.integers(0, 2**64, 2 * size - shared, dtype=np.uint64)
            one, other = (minhash.bands(minhash.signature(part))
                          for part in (both[:size], both[size - shared :]))
            hits += (one == other).any()
        expected = 1 - (1 - (shared / len(both)) ** 8) ** 14
        deviation = (expected * (1 - expected) / trials) ** 0.5
        assert abs(hits / trials - expected) < 4 * deviation + 0.01, similarity


# --------------------------------------------------------------------------------------------------
# quality


def slow_top_ngram(text, n):
    found = text.split()
    parts = [tuple(word.lower() for word in found[i : i + n]) for i in range(len(found) - n + 1)]
    counts = collections.Counter(parts)
    if not counts or max(counts.values()) == 1:
        return 0
    top = max(counts.values())
    longest = max(sum(map(len, part)) for part, count in counts.items() if count == top)
    return top * longest / sum(map(len, found))


def slow_duplicate_ngram(text, n):
    found, seen_before, covered = text.split(), set(), set()
    for i in range(len(found) - n + 1):
        part = tuple(word.lower() for word in found[i : i + n])
        covered |= set(range(i, i + n)) if part in seen_before else set()
        seen_before.add(part)
    return sum(len(found[i]) for i in covered) / sum(map(len, found))


def test_repetition_is_what_a_plain_loop_counts():
    cases = [*(prose(300, seed) for seed in range(3)), prose(200, 9, 12),
             "a a a a a a a a a a a a", "one", "x Y " * 40]
    for text in cases:
        measured = filters.Text(text)
        for n in range(2, 5):
            assert measured.top_ngram(n) == pytest.approx(slow_top_ngram(text, n)), (text[:20], n)
        for n in range(5, 11):
            expected = pytest.approx(slow_duplicate_ngram(text, n))
            assert measured.duplicate_ngram(n) == expected, (text[:20], n)


GOOD = "\n".join(f"{prose(12, seed)}, {seed}." for seed in range(20, 30))
BROKEN = {  # rule: the good text made to break it
    "words": "the of and to that " * 9,
    "word_length": "a I of to x y " * 30,
    "symbols": GOOD + " #" * 20,
    "curly_brackets": GOOD + " {",
    "lorem_ipsum": GOOD + " Lorem IPSUM",
    "bullets": "\n".join("- " + line for line in GOOD.split("\n")),
    "ellipses": GOOD.replace(".\n", "...\n"),
    "alphabetic": GOOD + " 12345" * 40,
    "stop_words": " ".join(f"word{i}abc" for i in range(90)),
    "sentences": GOOD.replace(".", ""),
    "duplicate_lines": GOOD + "\nyes" * 8,
    "duplicate_line_chars": GOOD + f"\n{prose(80, 3)}." * 2,
    "duplicate_paragraphs": "\n\n".join([*GOOD.split("\n"), *["x y\nz"] * 8]),
    "duplicate_paragraph_chars": GOOD + f"\n\n{prose(9, 1)}\nover {prose(50, 2)}" * 2,
    "top_2gram": GOOD + " notwithstanding circumstances of" * 12,
    **{f"duplicate_{n}gram": GOOD + f" {prose(25, 4)}" * 2 for n in range(5, 11)},
}


def test_a_good_text_passes_and_each_rule_drops_what_breaks_it():
    both = filters.read_bounds(settings(quality="gopher,c4"))
    assert set(both) == set(filters.MEASURES)
    assert filters.first_broken(GOOD, both) == ("", "")
    for rule, text in BROKEN.items():
        only = {rule: both[rule]}
        found, reason = filters.first_broken(text, only)
        assert found == rule and "expected at" in reason, (rule, reason)
        assert filters.first_broken(GOOD, only)[0] == ""


def test_numbers_of_the_papers_and_what_replaces_them():
    gopher = filters.read_bounds(settings(quality="gopher"))
    assert gopher["words"] == (50, 100_000) and gopher["word_length"] == (3, 10)
    assert gopher["stop_words"][0] == 2
    assert [gopher[f"top_{n}gram"][1] for n in (2, 3, 4)] == [0.20, 0.18, 0.16]
    assert [gopher[f"duplicate_{n}gram"][1] for n in range(5, 11)] == [
        0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    assert filters.read_bounds(settings()) == {}
    assert filters.read_bounds(settings(min_words=3)) == {"words": (3, np.inf)}
    replaced = filters.read_bounds(settings(quality="gopher", max_words=9, min_stop_words=0))
    assert replaced["words"] == (50, 9)
    mistakes = ((settings(quality="gofer"), "gopher, c4"),
                (settings(max_top_ngrams="0.1,x"), "--max_top_ngrams"),
                (settings(max_duplicate_ngrams="0.1"), "0.15,0.14"))
    for bad, part in mistakes:
        with pytest.raises(DataError, match=part):
            filters.read_bounds(bad)


def test_c4_counts_sentences_in_the_lines_that_it_keeps():
    lines = ["This line has five words. And two sentences!", "Too short here.",
             "No end mark in this line of words", "Please enable JavaScript to see all of this.",
             "We use cookies on this nice site today.",
             'She said: "This is the end of it."', "This one just goes on and on..."]
    assert filters.Text("\n".join(lines)).c4_sentences() == 3


# --------------------------------------------------------------------------------------------------
# language, test data, all together


def test_language_is_told_and_unknown_codes_are_refused():
    english, german = ("The children were playing in the garden when it began to rain.",
                       "Die Kinder spielten im Garten, als es zu regnen begann.")
    only = Filters(settings(language="en"))
    assert only.judge(english)[0] == ""
    assert only.judge(german)[:2] == ("language", only.judge(german)[1])
    assert only.judge(german)[1].startswith("de ")
    assert Filters(settings(language="en,de")).judge(german)[0] == ""
    with pytest.raises(DataError, match="english"):
        Filters(settings(language="english"))


def test_decontamination_finds_what_sets_of_13_words_find(tmp_path):
    held_out = [prose(60, seed) for seed in range(100, 120)]
    rows = "".join(f"{i}\t{text}\tlabel\n" for i, text in enumerate(held_out[:10]))
    (tmp_path / "dev.tsv").write_text(rows)
    rows = "".join(json.dumps({"q": text, "n": 1}) + "\n" for text in held_out[10:])
    (tmp_path / "test.jsonl").write_text(rows)
    (tmp_path / "train.tsv").write_text(prose(500, 200) + "\n")  # no test data
    known = {tuple(w[i : i + 13]) for w in map(str.split, held_out) for i in range(len(w) - 12)}
    rng, some, found = np.random.default_rng(0), Filters(settings(decontaminate=str(tmp_path))), []
    for seed in range(60):
        text = prose(80, seed + 300).split()
        copied, n = held_out[seed % 20].split(), int(rng.integers(11, 16))
        text[30 : 30 + n] = copied[10 : 10 + n]
        expected = any(tuple(text[i : i + 13]) in known for i in range(len(text) - 12))
        # neither case nor punctuation hides it
        rule, reason, _ = some.judge(", ".join(text).upper())
        assert (rule == "contaminated") == expected, n
        assert not expected or tuple(reason.split()) in known
        found.append(expected)
    assert 20 < sum(found) < 50
    assert Filters(settings(decontaminate=str(tmp_path))).judge(prose(500, 200))[0] == ""
    missing = str(tmp_path / "none")
    for bad, part in (({"decontaminate": missing}, "no such file or folder; expected .tsv"),
                      ({"decontaminate": str(tmp_path), "decontaminate_words": 3}, "at least 5")):
        with pytest.raises(DataError, match=part):
            Filters(settings(**bad))


def test_a_long_document_is_compared_in_pieces_as_if_it_were_whole(monkeypatch, tmp_path):
    text = prose(3000, 7)
    (tmp_path / "dev.txt").write_text(" ".join(text.split()[1500:1513]))
    asked = settings(minhash_bands=14, decontaminate=str(tmp_path))
    whole = Filters(settings(minhash_bands=14)).judge(text)[2]
    monkeypatch.setattr(filters, "PIECE_CHARS", 700)
    assert np.array_equal(Filters(settings(minhash_bands=14)).judge(text)[2], whole)
    assert Filters(asked).judge(text)[0] == "contaminated"


def test_texts_without_words_and_of_few_words_have_bands_of_their_own():
    some = Filters(settings(minhash_bands=4))
    bands = [some.judge(text)[2]
             for text in ("!!!", "???", "one two", "one two three", "One, two!", "\u6f22")]
    assert np.array_equal(bands[2], bands[4])
    assert len({tuple(part.tolist()) for part in bands}) == 5


@pytest.mark.skipif(not (SHARED / "glue").is_dir(), reason="real data is not in the repository")
def test_a_glue_folder_is_read():
    some = Filters(settings(decontaminate=str(SHARED / "glue/RTE")))
    assert len(some.test_grams) > 50_000
    line = (SHARED / "glue/RTE/dev.tsv").read_text().split("\n")[1].split("\t")[1]
    assert some.judge("Some words before. " + line + " And some after.")[0] == "contaminated"
