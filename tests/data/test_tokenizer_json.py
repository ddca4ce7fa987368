"""Promises of data/tokenizer.py about tokenizer.json, on small look-alikes of published ones."""

import argparse
import functools
import json
import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from test_tokenizer import MAX_PRETOKEN, ODD, random_texts
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Reference

from data import tokenizer as tokenizer_json
from data.tokenizer import GPT2_PATTERN, LLAMA3_PATTERN, PATTERNS, QWEN2_PATTERN, Tokenizer
from tools import hub_files

SHORT = [text for text in ODD if len(text) < MAX_PRETOKEN] + ["  \n\n\t na\u00efve x\u2581y"]
TEXTS = SHORT + [path.read_text(encoding="utf-8", errors="replace")[:20_000]
                 for path in sorted(Path(argparse.__file__).parent.glob("[ab]*.py"))][:10]
BYTES = pre_tokenizers.ByteLevel.alphabet()


def byte_level(pattern, normalizer=None, split=True):
    tokenizer = Reference(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if split else to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=1500, show_progress=False,
                                                             initial_alphabet=BYTES))
    return tokenizer


@functools.cache
def llama3():
    """Merges are all ways to cut a token in two known ones, by the rank of the token: so its
    converter writes them."""
    tokenizer = byte_level(LLAMA3_PATTERN)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    data = json.loads(tokenizer.to_str())
    vocab = data["model"]["vocab"]
    cuts = [(token[:i], token[i:])
            for token in sorted(vocab, key=vocab.get) for i in range(1, len(token))]
    merges = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    data["model"] |= {"ignore_merges": True, "merges": merges}
    tokenizer = Reference.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", len(vocab))])
    return tokenizer.to_str()


@functools.cache
def qwen2():
    tokenizer = byte_level(QWEN2_PATTERN, normalizers.NFC())
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer.to_str()


def gpt2():
    data = json.loads(byte_level(GPT2_PATTERN, split=False).to_str())
    del data["pre_tokenizer"]["use_regex"]  # as files of 2020 do
    del data["model"]["byte_fallback"], data["model"]["ignore_merges"]
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    return json.dumps(data)


@functools.cache
def gemma():
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Reference(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=1500, special_tokens=specials + fallback, show_progress=False))
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"]
                            if token["content"] not in fallback]
    tokenizer = Reference.from_str(json.dumps(data))
    tokenizer.add_tokens([AddedToken(content, normalized=False)
                          for content in ("\n\n", "\t\t", "<table>")])
    return tokenizer.to_str()


def unknown_pattern():
    return byte_level(r"\w+|\W+").to_str()


LOOK_ALIKES = {"llama3": llama3, "qwen2": qwen2, "gpt2": gpt2, "gemma": gemma,
               "unknown_pattern": unknown_pattern}


@pytest.fixture(scope="module", params=LOOK_ALIKES)
def case(request, tmp_path_factory):
    """(name, tokenizer.json, our Tokenizer of it, the library's, without special ids in texts)"""
    text = LOOK_ALIKES[request.param]()
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    reference = Reference.from_str(text)
    reference.encode_special_tokens = True
    return request.param, path, Tokenizer.load(str(path)), reference


def as_seen(name, text):
    """What the normaliser of a published tokenizer makes of a text."""
    changed = {"qwen2": unicodedata.normalize("NFC", text), "gemma": text.replace("\u2581", " ")}
    return changed.get(name, text)


def test_ids_are_those_of_the_library_and_give_the_text_back(case):
    name, _, tok, reference = case
    assert bool(tok.library) == (name not in ("llama3", "gpt2"))
    texts = TEXTS + ODD + random_texts(400, seed=11)
    texts += ["a\u0301 e\u0301\u0323 \u1100\u1161", "<eos><unk>"]
    compared = 0
    for text, ids in zip(texts, tok.encode(texts)):
        assert tok.decode(ids) == as_seen(name, text), text[:50]
        assert tok.n_bytes[ids].sum() == len(as_seen(name, text).encode())
        assert not tok.is_special[ids].any()
        if tok.library or max(map(len, regex.findall(r"\s+|\S+", text)), default=0) <= MAX_PRETOKEN:
            compared += 1
            assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids, text[:50]
    assert compared > 400


def test_specials_come_after_the_vocabulary(case):
    name, _, tok, reference = case
    kept = {"qwen2": {"<|endoftext|>"}}.get(name, set())  # has that name already
    five = ("[PAD]", "[MASK]", "[CLS]", "[SEP]", "<|endoftext|>")
    added = [special for special in five if special not in kept]
    size = reference.get_vocab_size(with_added_tokens=True)
    assert [tok.specials[special] for special in added] == list(range(size, size + len(added)))
    assert tok.n_vocab == size + len(added)
    assert tok.is_special[[tok.pad_id, tok.mask_id, tok.eot_id]].all()
    [left], [right] = tok.encode(["left"]), tok.encode([" right"])
    assert tok.decode([*left, tok.mask_id, *right]) == "left[MASK] right"
    single = [i for token, i in reference.get_vocab().items() if len(token) == 1]
    assert not tok.is_special[single].any()


def test_a_saved_and_a_pickled_one_are_the_same(case, tmp_path):
    name, path, tok, _ = case
    tok.save(tmp_path)
    files = os.listdir(tmp_path)
    assert bool(tok.library) == ("tokenizer.json" in files) != ("tokenizer.tiktoken" in files)
    loaded = [Tokenizer.load(str(tmp_path)), Tokenizer.load(str(path.parent))]
    for again in (*loaded, pickle.loads(pickle.dumps(tok))):
        assert again.fingerprint == tok.fingerprint and again.specials == tok.specials
        assert all(map(np.array_equal, again.encode(SHORT), tok.encode(SHORT)))
        assert np.array_equal(again.starts_word, tok.starts_word)
    names = ("tokenizer.tiktoken", "tokenizer.json")
    damaged = next(tmp_path / name for name in names if (tmp_path / name).exists())
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(str(tmp_path))


def test_an_exported_model_gets_the_same_ids(case):
    _, _, tok, _ = case
    hub = Reference.from_str(hub_files.hub_tokenizer(tok).to_str())
    names = regex.compile("|".join(map(regex.escape, tok.specials)))
    for text in filter(lambda text: not names.search(text), [*SHORT, *random_texts(100, seed=12)]):
        ids = tok.encode([text])[0].tolist()
        assert hub.encode(text).ids == [tok.eot_id, *ids, tok.eot_id], text[:50]
    assert tok.mask_id in hub.encode("a [MASK] b").ids


@pytest.mark.parametrize("part", [r"\p{L}", r"\p{N}", r"\s", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"])
def test_both_regular_expression_engines_mean_the_same_characters(part):
    """On assigned code points, what tiktoken's engine matches is what the library's removes.

    tiktoken drops the rest of a text, the library keeps the rest.
    """
    assert all(part.strip("(?i:)") in pattern for pattern in PATTERNS)
    codes = range(0x33000 if "'" not in part else 0x2200)
    chars = [chr(c) for c in codes if not 0xD800 <= c < 0xE000]
    text = "".join(f"'{char}" if "'" in part else char for char in chars)
    ranks = {bytes([i]): i for i in range(256)}
    by_rust = tiktoken.Encoding("x", pat_str=part, mergeable_ranks=ranks, special_tokens={})
    matched = by_rust.decode(by_rust.encode_ordinary(text))
    pieces = pre_tokenizers.Split(Regex(part), "removed").pre_tokenize_str(text)
    left = "".join(piece for piece, _ in pieces)
    assert 10 < len(matched) and len(matched) + len(left) == len(text)
    assert not set(matched) & set(left) - {"'"}


def with_added(*tokens):
    """A byte-level BPE with tokens that are added to the text, not special ones."""
    tokenizer = byte_level(LLAMA3_PATTERN)
    tokenizer.add_tokens(list(tokens))
    return tokenizer.to_str()


RUNS = [AddedToken(" " * n, normalized=False) for n in range(2, 9)]


@pytest.mark.parametrize("tokens", [
    [*RUNS, AddedToken("<tool_call>", normalized=False)],
    [AddedToken("word", single_word=True)], [AddedToken("<x>", lstrip=True, rstrip=True)],
    [AddedToken("na\u00efve", normalized=True), AddedToken("na")]],
    ids=["runs of spaces", "single word", "strips", "overlap"])
def test_added_tokens_that_are_not_special_are_those_of_the_library(tokens, tmp_path):
    (tmp_path / "tokenizer.json").write_text(with_added(*tokens), encoding="utf-8")
    tok = Tokenizer.load(str(tmp_path))
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["a  b   c        d", "<tool_call>  x", "a word, words sword word", " <x> y<x>z",
             "na\u00efve nave na", *TEXTS]
    hub = Reference.from_str(hub_files.hub_tokenizer(tok).to_str())
    for text, ids in zip(texts, tok.encode(texts)):
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids, text[:50]
        assert hub.encode(text).ids == [tok.eot_id, *ids, tok.eot_id], text[:50]
        assert tokens[0].lstrip or tok.decode(ids) == text


@pytest.mark.parametrize("name, message", [
    ("vocab.txt", "WordPiece .* not supported.*--tokenizer=bpe:30000"),
    ("merges.txt", "tokenizer.json is: python -c"), ("tokenizer.model", "SentencePiece")])
def test_vocabularies_of_others_are_named_with_what_helps(name, message, tmp_path):
    (tmp_path / name).write_text("[PAD]\n[UNK]\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(str(path))


def wordpiece():
    return Reference(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).to_str()


def with_prefix_space():
    data = json.loads(gemma())
    steps = [{"type": "Prepend", "prepend": "\u2581"}, data["normalizer"]]
    return json.dumps({**data, "normalizer": {"type": "Sequence", "normalizers": steps}})


def lower_case():
    return byte_level(QWEN2_PATTERN, normalizers.Lowercase()).to_str()


def huge_id():
    data = json.loads(gpt2())
    data["model"]["vocab"]["huge"] = 2**31
    return json.dumps(data)


def panic():
    """The library cuts off a prefix that is longer than the token."""
    data = json.loads(Reference(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())
    data["model"]["continuing_subword_prefix"] = "####"
    return json.dumps(data)


@pytest.mark.parametrize("make, message", [
    (lambda: "{", "no tokenizer.json that the tokenizers library reads"),
    (lambda: "[1]", "no tokenizer.json"),
    (wordpiece, "do not give a text back"), (with_prefix_space, "do not give a text back: 'Hello"),
    (lower_case, "'Hello  world' became 'hello"),
    (huge_id, "its highest id is 2,147,483,648; expected ids below 16,777,216"),
    (panic, "no tokenizer.json that the tokenizers library reads"),
])
def test_what_does_not_give_the_text_back_is_refused(make, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(make())
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(str(tmp_path))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_an_empty_token_changes_no_ids(tmp_path):
    data = json.loads(gpt2())
    expected = Reference.from_str(json.dumps(data))
    data["model"]["vocab"][""] = len(data["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tok = Tokenizer.load(str(tmp_path))
    for text, ids in zip(TEXTS, tok.encode(TEXTS)):
        assert ids.tolist() == expected.encode(text, add_special_tokens=False).ids
        assert tok.decode(ids) == text


def test_merges_that_ranks_cannot_say_stay_with_the_library(tmp_path):
    """The same vocabulary with two merges swapped: tiktoken would give other ids."""
    whole = byte_level(QWEN2_PATTERN).to_str()
    data = json.loads(whole)
    merges = data["model"]["merges"]
    merges[3], merges[9] = merges[9], merges[3]
    swapped = Reference.from_str(json.dumps(data))
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tok = Tokenizer.load(str(tmp_path))
    assert tok.library and tokenizer_json.parse_tokenizer_json(whole)[4] == ""
    swapped.encode_special_tokens = True
    for text, ids in zip(TEXTS, tok.encode(TEXTS)):
        assert ids.tolist() == swapped.encode(text, add_special_tokens=False).ids
