"""Promises of data/tokenizer.py, but for tokenizer.json. CPU, no network, about 20 s."""

import argparse
import gzip
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
import requests
import tiktoken

from data.tokenizer import (
    MAX_PRETOKEN,
    META_FILE,
    PATTERN,
    RANKS_FILE,
    SPECIALS,
    Tokenizer,
    bounded_pieces,
    train_bpe,
)

pytestmark = pytest.mark.long

REPO = Path(__file__).resolve().parent.parent.parent
DATA = REPO.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is missing")
has_gpt2 = (DATA / "tokenizers/tiktoken_cache").is_dir()
needs_gpt2 = pytest.mark.skipif(not has_gpt2, reason="no tiktoken cache")

ODD = [
    "", " ", "\x00", "a\x00b", "\r\n\r\n\n \t\r", "\ufeffBOM first", "\ufffd\ufffd",
    "\u2028\u2029\x85\x0b\x0c\x1c",
    # emoji joined by U+200D, a flag
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \u2764\ufe0f \U0001f1e9\U0001f1ea",
    # right to left
    "\u0645\u0631\u062d\u0628\u0627 \u202e\u05e9\u05dc\u05d5\u05dd\u202c \u0645\u06cc\u200c\u062e",
    "e\u0301\u0301\u0301 Z\u0351\u036b\u0343 \u00e9 \u1ebf",  # stacked combining marks
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 \ud55c\uad6d\uc5b4 "
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \U00020000 \U0010ffff \ue000",
    "x" * 70_000 + " " * 70_000 + "\u65e5" * 3_000,
    "don't 'single' we\u2019re I'D 3.14 1234567890 \u00bd\u00b2 \uff11\uff12 snake_case --flag=1 "
    "https://a.b/c?d=e#f",
]


def read_texts(name, n_chars):
    """Documents of one file of the shared corpus, n_chars characters or a little more."""
    texts = []
    with gzip.open(DATA / "corpus" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        while sum(map(len, texts)) < n_chars:
            texts.append(json.loads(next(file))["text"])
    return texts


def random_texts(n, seed):
    """n short texts that mix scripts, symbols and arbitrary code points."""
    rng = random.Random(seed)
    blocks = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x6FF), (0x900, 0x97F),
              (0xE00, 0xE7F), (0x2000, 0x206F), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
              (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x1F300, 0x1FAFF), (0, 0xD7FF)]
    chars = (" " if rng.random() < 0.2 else chr(rng.randint(*rng.choice(blocks)))
             for _ in itertools.count())
    return ["".join(itertools.islice(chars, rng.randint(1, 80))) for _ in range(n)]


def words(tok, text):
    """The words that masking makes of a text, by the rule in Tokenizer's docstring."""
    [ids] = tok.encode([text])
    starts = tok.starts_word[ids].copy()
    starts[1:] &= ~(tok.starts_punct[ids[1:]] & tok.ends_punct[ids[:-1]])
    cuts = [0, *(np.flatnonzero(starts[1:]) + 1), len(ids)]
    return [tok.decode(ids[start:end]) for start, end in itertools.pairwise(cuts)]


@pytest.fixture(scope="module")
def python_texts():
    """Real text that every machine has: some standard library sources, 1 to 2 MB."""
    folder = Path(argparse.__file__).parent
    return [path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(folder.glob("[a-i]*.py"))]


@pytest.fixture(scope="module")
def bpe2k(python_texts):
    return Tokenizer.train(python_texts, 2000)


@pytest.fixture(scope="module")
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tokenizers/tiktoken_cache"))
        return Tokenizer.load("gpt2")


@pytest.fixture(params=["byte", "bpe2k", pytest.param("gpt2", marks=needs_gpt2)])
def tok(request):
    if request.param == "byte":
        return Tokenizer.load("byte")
    return request.getfixturevalue(request.param)


# ---- encode and decode ----------------------------------------------------------------------
def test_every_text_comes_back_and_n_bytes_counts_it(tok):
    rng = np.random.default_rng(0)
    as_text = [rng.integers(0, 256, 2000, dtype=np.uint8).tobytes().decode("latin-1")
               for _ in range(20)]
    texts = ODD + as_text + random_texts(300, seed=1)
    for text, ids in zip(texts, tok.encode(texts), strict=True):
        assert tok.decode(ids) == text
        assert tok.n_bytes[ids].sum() == len(text.encode())
        assert ids.dtype == np.uint32 and ids.ndim == 1


def test_byte_ids_are_the_bytes():
    tok = Tokenizer.load("byte")
    text = "".join(ODD)
    assert tok.encode([text])[0].tolist() == list(text.encode())
    assert (tok.n_vocab, tok.vocab_size) == (261, 320)
    assert tok.decode([0xE2, 0x82]) == "\ufffd"


def test_special_names_in_a_text_are_ordinary_text(tok):
    text = "a [MASK] b<|endoftext|>[PAD][CLS]x[SEP] <|fim_prefix|>"
    [ids] = tok.encode([text])
    assert not tok.is_special[ids].any()
    assert tok.decode(ids) == text


def test_lone_surrogates_become_the_replacement_character(tok):
    broken = ["\ud800", "a\udfffb", "\ud83d\ude00", "x" * 5000 + "\udc00"]
    mended = ["\ufffd", "a\ufffdb", "\U0001f600"]
    decoded = [tok.decode(ids) for ids in tok.encode(broken)]
    assert decoded == [*mended, "x" * 5000 + "\ufffd"]


def test_a_text_instead_of_a_list_is_refused():
    with pytest.raises(AssertionError, match="list of texts"):
        Tokenizer.load("byte").encode("text")


@needs_gpt2
def test_gpt2_gives_the_ids_that_gpt2_gives(gpt2, python_texts, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(DATA / "tokenizers/tiktoken_cache"))
    reference = tiktoken.get_encoding("gpt2")
    short = [text for text in ODD if len(text) < MAX_PRETOKEN] + python_texts[:40]
    short += random_texts(200, seed=2)
    for text, ids in zip(short, gpt2.encode(short), strict=True):
        assert ids.tolist() == reference.encode_ordinary(text)
    assert (gpt2.eot_id, gpt2.n_vocab, gpt2.vocab_size) == (50256, 50261, 50304)
    assert [gpt2.pad_id, gpt2.mask_id, gpt2.cls_id, gpt2.sep_id] == [50257, 50258, 50259, 50260]


def test_only_pretokens_that_are_too_long_are_cut(bpe2k):
    head, tail = "Some words, then ", " and the end.\n\n  x"
    for run in ["a" * 4321, " " * 4321, "\u65e5" * 4321, "\n" * 4321, "=" * 4321]:
        [ids] = bpe2k.encode([head + run + tail])
        assert bpe2k.decode(ids) == head + run + tail
        prefix, suffix = (bpe2k.encode([part])[0] for part in ("Some words, then", tail.strip(" ")))
        assert ids[: len(prefix)].tolist() == prefix.tolist()
        assert ids[-5:].tolist() == suffix[-5:].tolist()
    unspaced = "ab,cd;" * 3000  # a long run without spaces, but of short pre-tokens: nothing to cut
    assert bpe2k.encode([unspaced])[0].tolist() == bpe2k.bpe.encode_ordinary(unspaced)


@pytest.mark.parametrize("char", ["a", " ", "\u65e5", "\n", "="])
@pytest.mark.parametrize("offset", [0, 1, 499, 500, 777])
def test_pretokens_are_cut_where_they_reach_the_limit_and_never_before(char, offset):
    # pre-tokens of one character around the run
    head = "w." * (offset // 2) + "," * (offset % 2) + "0"
    for length in (MAX_PRETOKEN, MAX_PRETOKEN + 1, 3 * MAX_PRETOKEN + 5):
        text = head + char * length + "0"
        run = length - (char in " \n")  # the last white space is a pre-token of its own
        lengths = [len(head) + MAX_PRETOKEN] + [MAX_PRETOKEN] * ((run - 1) // MAX_PRETOKEN)
        lengths[-1] = len(text) - sum(lengths[:-1])
        pieces = bounded_pieces(text, PATTERN)
        assert "".join(pieces) == text and list(map(len, pieces)) == lengths


@pytest.mark.parametrize("unit", ["a", " ", "random"])
def test_megabytes_without_a_break_neither_crash_nor_stall(tok, unit):
    rng = np.random.default_rng(0)
    text = unit * 1_500_000
    if unit == "random":
        text = rng.integers(97, 123, 1_500_000, dtype=np.uint8).tobytes().decode()
    # a trailing letter makes tiktoken look back over a million spaces and overflow
    [ids] = tok.encode([text + "x"])
    assert tok.decode(ids) == text + "x"


# ---- special ids ----------------------------------------------------------------------------
def test_specials_have_names_and_tables_know_them(tok):
    five = [tok.pad_id, tok.mask_id, tok.cls_id, tok.sep_id, tok.eot_id]
    assert [tok.special_names[i] for i in five] == list(SPECIALS) == [tok.decode([i]) for i in five]
    assert sorted(five) == list(range(tok.n_vocab - 5, tok.n_vocab))
    assert np.flatnonzero(tok.is_special).tolist() == list(range(tok.n_vocab - 5, tok.vocab_size))
    assert tok.starts_word[tok.is_special].all() and not tok.starts_punct[tok.is_special].any()
    assert tok.vocab_size % 64 == 0 and 0 <= tok.vocab_size - tok.n_vocab < 64
    for table in (tok.is_special, tok.n_bytes, tok.starts_word, tok.starts_punct, tok.ends_punct):
        assert table.shape == (tok.vocab_size,)
    assert tok.n_bytes.dtype == np.int64 and tok.starts_word.dtype == bool
    [a, b] = tok.encode(["left", " right"])
    assert tok.decode([*a, tok.mask_id, *b]) == "left[MASK] right"


def test_ids_out_of_range_are_refused(tok):
    for bad in (-1, tok.n_vocab, tok.vocab_size - 1, 2**32, 2**40):
        with pytest.raises(ValueError, match=f"has ids 0 to {tok.n_vocab - 1}"):
            tok.decode([0, bad])
    assert tok.decode([]) == tok.decode(np.array([], dtype=np.uint32)) == ""


def test_published_specials_keep_their_ids_and_gaps_are_special(monkeypatch):
    ranks = {bytes([byte]): byte for byte in range(256)}
    found = {"pat_str": PATTERN, "mergeable_ranks": ranks,
             "special_tokens": {"<|endoftext|>": 257, "<|fim|>": 260}}
    from tiktoken_ext import openai_public
    monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, "cl100k_base", lambda: found)
    tok = Tokenizer.load("cl100k_base")
    assert (tok.eot_id, tok.pad_id, tok.sep_id, tok.n_vocab) == (257, 261, 264, 265)
    assert tok.is_special[256:].all() and tok.decode([260]) == "<|fim|>"
    with pytest.raises(ValueError, match="256"):
        tok.decode([256])


# ---- words ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bpe2k", pytest.param("gpt2", marks=needs_gpt2)])
@pytest.mark.parametrize("text, expected", [
    ("I don't know", ["I", " don't", " know"]),
    ("in 1234567890 and x86", ["in", " 1234567890", " and", " x86"]),
    ("(well...) and [so]", ["(well", "...)", " and", " [so", "]"]),
    ("na\u00efve \u041c\u043e\u0441\u043a\u0432\u0430 \u03bb\u03cc\u03b3\u03bf\u03c2",
     ["na\u00efve", " \u041c\u043e\u0441\u043a\u0432\u0430", " \u03bb\u03cc\u03b3\u03bf\u03c2"]),
    ("one\ntwo\tthree", ["one", "\ntwo", "\tthree"]),
    ("antidisestablishmentarianism zzqqxxjj", ["antidisestablishmentarianism", " zzqqxxjj"]),
])
def test_words_are_what_a_reader_calls_words(name, text, expected, request):
    assert words(request.getfixturevalue(name), text) == expected


def test_bytes_of_a_word_stay_together_and_characters_of_unspaced_scripts_do_not():
    byte = Tokenizer.load("byte")
    text = "\u65e5\u672c \u0e44\u0e17\u0e22 \u00e9t\u00e9 ok"
    assert words(byte, text) == ["\u65e5", "\u672c", " ", "\u0e44", "\u0e17", "\u0e22",
                                 " \u00e9t\u00e9", " ok"]
    leads = [byte_value for byte_value in range(128, 256) if byte.starts_word[byte_value]]
    assert leads == list(range(0xE0, 0xF5))


def test_flags_of_single_tokens():
    yes, no = True, False
    expected = {  # token: (starts_word, starts_punct, ends_punct)
        " a": (yes, no, no), "\n": (yes, no, no), "\u3000": (yes, no, no), "\u00a0x": (yes, no, no),
        "a": (no, no, no), "7": (no, no, no), "\u0661": (no, no, no), "ing": (no, no, no),
        "\u00e9": (no, no, no),
        ".": (yes, yes, yes), "(x": (yes, yes, no), "a.": (no, no, yes), " (": (yes, no, yes),
        "_": (yes, yes, yes),
        "'t": (no, yes, no), "\u2019s": (no, yes, no), "'": (yes, yes, yes), "'.": (yes, yes, yes),
        "\u65e5": (yes, no, no), "\u3042": (yes, no, no), "\u30a2b": (yes, no, no),
        "\ud55c": (no, no, no),
        "\u0e44": (yes, no, no), "\u0ea5": (yes, no, no), "\u1780": (yes, no, no),
        "\u1000": (yes, no, no),
        "\u0e31": (no, no, no), "\u0301": (no, no, no), "\u0928": (no, no, no),
        "\u200d": (no, no, no),
        "\u0e51": (no, no, no), "\U0001f600": (yes, yes, yes), "\u2014": (yes, yes, yes),
        "\u3002": (yes, yes, yes),
        "\u20ac": (yes, yes, yes),
    }
    fragments = {b"\xe2\x80": yes, b"\xf0\x9f\x98": yes, b"\xe6": yes, b"\xc3": no, b"\x94": no,
                 b"\x80a": no, b" \xe2\x80": yes, b"\x94.": no, b"\xff": no, b"\xf5": no}
    tokens = [text.encode() for text in expected] + list(fragments)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(token for token in tokens if len(token) > 1)}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    tok = Tokenizer("flags", PATTERN, ranks, specials)
    for text, flags in expected.items():
        i = ranks[text.encode()]
        assert (tok.starts_word[i], tok.starts_punct[i], tok.ends_punct[i]) == flags, repr(text)
    for token, starts in fragments.items():
        assert tok.starts_word[ranks[token]] == starts and not tok.starts_punct[ranks[token]], token


# ---- training -------------------------------------------------------------------------------
def assert_same_ids_as_trainer(tok, bpe, texts):
    for text, ids, reference in zip(texts, tok.encode(texts), bpe.encode_batch(texts), strict=True):
        assert ids.tolist() == reference.ids
        assert tok.decode(ids) == text


def test_trained_vocabulary_is_exact_deterministic_and_the_trainers_own(bpe2k, python_texts):
    assert bpe2k.n_vocab == 2000 == len(bpe2k.ranks) + 5 and bpe2k.vocab_size == 2048
    assert sorted(bpe2k.ranks.values()) == list(range(1995))
    assert Tokenizer.train(iter(python_texts), 2000).fingerprint == bpe2k.fingerprint
    assert Tokenizer.train(python_texts[1:], 2000).fingerprint != bpe2k.fingerprint
    texts = python_texts + [text for text in ODD if len(text) < MAX_PRETOKEN]
    texts += random_texts(500, seed=3)
    assert_same_ids_as_trainer(bpe2k, train_bpe(python_texts, 1995), texts)


@needs_data
def test_trained_ids_are_the_trainers_own_on_books_and_wikipedia():
    train = read_texts("wikipedia_en.train", 700_000) + read_texts("books_en.train", 700_000)
    held_out = read_texts("wikipedia_en.valid", 250_000) + read_texts("books_en.valid", 250_000)
    tok = Tokenizer.train(train, 8000)
    assert (tok.n_vocab, tok.vocab_size) == (8000, 8000)
    assert_same_ids_as_trainer(tok, train_bpe(train, 7995), held_out)
    ids = np.concatenate(tok.encode(held_out))
    assert tok.n_bytes[ids].sum() == sum(len(text.encode()) for text in held_out)
    # bytes per token of English at 8k; far off means broken merges
    assert 3.4 < tok.n_bytes[ids].mean() < 4.2


def test_both_libraries_split_text_alike_and_keep_words_whole():
    text = "I'd l'sud 'single we\u2019re  cafe\u0301s, 12345 x=y!!\n\n  end "
    pieces = ["I", "'d", " l", "'", "sud", " '", "single", " we", "\u2019re", " ", " cafe\u0301s",
              ",", " 123", "45", " x", "=", "y", "!!", "\n\n ", " end", " "]
    assert regex.findall(PATTERN, text) == pieces
    bpe = train_bpe([text], 256)
    spans = [span for _, span in bpe.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


def test_too_little_text_says_how_far_it_goes():
    with pytest.raises(ValueError, match=r"enough for a vocabulary of 263, 1,000 were asked for"):
        Tokenizer.train(["abc abc"], 1000)  # two merges: a+b, ab+c (" abc" is seen once)
    with pytest.raises(ValueError, match="a vocabulary of 261, "):
        Tokenizer.train([], 512)


@pytest.mark.parametrize("size", [0, 511, 262_145])
def test_sizes_that_cannot_be_trained_are_refused_before_the_text_is_read(size):
    def texts():
        raise AssertionError("the text was read")
        yield

    with pytest.raises(ValueError, match="expected 512 to 262,144"):
        Tokenizer.train(texts(), size)


def test_training_survives_a_megabyte_without_spaces_and_lone_surrogates():
    rng = np.random.default_rng(0)
    text = rng.integers(97, 123, 1_000_000, dtype=np.uint8).tobytes().decode()
    tok = Tokenizer.train([text, "\ud800 " * 10, " " * 2_000_000], 600)
    assert tok.decode(tok.encode([text])[0]) == text


# ---- save, load, copy -----------------------------------------------------------------------
def test_a_saved_tokenizer_is_the_same_without_network(tok, tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: pytest.fail("network"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    tok.save(tmp_path / "deep" / "folder")
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == sorted([META_FILE, RANKS_FILE])
    again = Tokenizer.load(str(tmp_path / "deep" / "folder"))
    texts = ODD + random_texts(50, seed=4)
    assert all(map(np.array_equal, again.encode(texts), tok.encode(texts)))
    assert again.fingerprint == tok.fingerprint and again.special_names == tok.special_names
    assert repr(again) == repr(tok)
    assert np.array_equal(again.starts_word, tok.starts_word)
    again.save(tmp_path / "deep" / "folder")  # saving over itself changes nothing
    assert Tokenizer.load(tmp_path / "deep" / "folder").fingerprint == tok.fingerprint


def test_a_crash_during_save_keeps_the_tokenizer_that_was_there(bpe2k, tmp_path, monkeypatch):
    bpe2k.save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (META_FILE, RANKS_FILE)}
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Tokenizer.load("byte").save(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_pickled_copies_are_equal(tok):
    copy = pickle.loads(pickle.dumps(tok))
    assert copy.fingerprint == tok.fingerprint
    assert all(map(np.array_equal, copy.encode(ODD), tok.encode(ODD)))


def test_fingerprint_is_of_the_content_only(bpe2k):
    shuffled = dict(random.Random(0).sample(list(bpe2k.ranks.items()), len(bpe2k.ranks)))
    specials = dict(reversed(bpe2k.specials.items()))
    other_name = Tokenizer("another name", bpe2k.pattern, shuffled, specials)
    assert other_name.fingerprint == bpe2k.fingerprint
    a, b, *_ = bpe2k.ranks
    swapped = bpe2k.ranks | {a: bpe2k.ranks[b], b: bpe2k.ranks[a]}
    renamed = bpe2k.specials | {"[PAD]": bpe2k.mask_id, "[MASK]": bpe2k.pad_id}
    others = [(PATTERN + "|x", bpe2k.ranks, bpe2k.specials), (PATTERN, swapped, bpe2k.specials),
              (PATTERN, bpe2k.ranks, renamed)]
    prints = {Tokenizer("other", *other).fingerprint for other in others} | {bpe2k.fingerprint}
    assert len(prints) == 4 and all(len(digest) == 64 for digest in prints)


def test_fingerprint_does_not_depend_on_the_hash_seed():
    code = ("from data.tokenizer import Tokenizer; "
            "print(Tokenizer.train(['to be or not ' * 9, *map(str, range(5000))], 600))")
    runs = [subprocess.check_output([sys.executable, "-c", code], cwd=REPO, text=True,
                                    env=os.environ | {"PYTHONHASHSEED": seed})
            for seed in ("1", "2")]
    assert runs[0] == runs[1] and runs[0].startswith("Tokenizer(bpe:600, n_vocab=600, fingerprint=")


# ---- bad input ------------------------------------------------------------------------------
@pytest.mark.parametrize("name, message", [
    ("bpe:16000", "must be trained first. Run python prepare.py --input=GLOB --out_dir=DIR "
                  "--tokenizer=bpe:16000"),
    ("gtp2", "neither a known name nor a folder. Expected byte, gpt2, cl100k_base, o200k_base"),
    ("tests", f"a folder without {META_FILE}"),
])
def test_names_that_do_not_load_say_what_does(name, message, monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(name)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-7])


def replace_in(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


def swap_two_ranks(path):
    lines = path.read_text().splitlines()
    (a, x), (b, y) = lines[0].split(), lines[1].split()
    path.write_text("\n".join([f"{a} {y}", f"{b} {x}", *lines[2:]]) + "\n")


@pytest.mark.parametrize("file, damage, message", [
    (META_FILE, lambda path: path.write_text('{"name": "bpe'),
     "missing or damaged .JSONDecodeError"),
    (META_FILE, lambda path: path.write_text("[]"), "missing or damaged .TypeError"),
    (META_FILE, lambda path: path.write_text('{"name": "x"}'),
     "missing or damaged .KeyError: 'pattern'"),
    (META_FILE, lambda path: path.write_bytes(b"\xff\xfe"),
     "missing or damaged .UnicodeDecodeError"),
    (META_FILE, lambda path: replace_in(path, "L}", "N}"), "fingerprint"),
    (META_FILE, lambda path: replace_in(path, '"[CLS]": 1997', '"[CLS]": 7'), "fingerprint"),
    (RANKS_FILE, lambda path: path.unlink(), "missing or damaged .FileNotFoundError"),
    (RANKS_FILE, lambda path: path.write_text(""), "gives 0 tokens"),
    (RANKS_FILE, lambda path: path.write_text("AA== 0\n!!!! 1\n"), "missing or damaged .Error"),
    (RANKS_FILE, lambda path: path.write_text("AA==\n"), "missing or damaged .ValueError"),
    (RANKS_FILE, cut_short, "damaged"),
    (RANKS_FILE, swap_two_ranks, "gives 1,995 tokens and fingerprint"),
])
def test_a_damaged_folder_is_refused_by_file_name_with_a_remedy(
        bpe2k, tmp_path, file, damage, message):
    bpe2k.save(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(tmp_path)
    said = str(caught.value)
    assert str(tmp_path) in said and file in said and "prepare.py" in said


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_offline_message_names_the_cache_and_nothing_waits_for_ever(name, tmp_path, monkeypatch):
    timeouts = []

    def no_network(url, timeout=None, **kwargs):
        timeouts.append(timeout)
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR=") as caught:
        Tokenizer.load(name)
    assert str(tmp_path) in str(caught.value) and f"get_encoding('{name}')" in str(caught.value)
    assert len(timeouts) == 1 and max(timeouts[0]) <= 60


def test_a_download_that_is_not_the_vocabulary_is_refused(tmp_path, monkeypatch):
    class LoginPage:
        content = b"<html>please log in</html>"
        raise_for_status = staticmethod(lambda: None)

    monkeypatch.setattr(requests, "get", lambda url, timeout: LoginPage)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.load("cl100k_base")
    assert not os.listdir(tmp_path)


def test_ids_without_text_have_a_place_for_specials_and_no_words(tmp_path):
    tok = Tokenizer.load("ids:100:7")
    assert (tok.eot_id, tok.pad_id, tok.mask_id) == (7, 100, 101)
    assert (tok.n_vocab, tok.vocab_size) == (104, 128)
    assert tok.is_special[7] and tok.is_special[100:].all()
    assert not tok.is_special[[*range(7), *range(8, 100)]].any()
    assert tok.decode([5, 99, 7, 101]) == "<5><99><|endoftext|>[MASK]"
    assert not tok.n_bytes.any() and not tok.has_text
    tok.save(str(tmp_path))
    again = Tokenizer.load(str(tmp_path))
    assert again.fingerprint == tok.fingerprint and not again.has_text and again.eot_id == 7
    with pytest.raises(ValueError, match="knows ids only"):
        again.encode(["5"])
    assert Tokenizer.load("ids:100").eot_id == 104 and Tokenizer.load("byte").has_text
    for wrong in ("ids:100:100", "ids:1:0", "ids:100:-2"):
        with pytest.raises(ValueError, match="eot_id below vocab_size"):
            Tokenizer.load(wrong)
