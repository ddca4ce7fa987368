"""tokenizer.json files of Hugging Face: Llama-3, Qwen, Gemma and others whose ids give the text back.

Byte-level BPE with a pre-tokeniser of PATTERNS and a rank for each merge is what tiktoken runs, six times as fast: its
vocabulary becomes ranks. Everything else stays with the `tokenizers` library (Library), and so do exact ids.
Names of special tokens inside a text are ordinary text here, as in tokenizer.py.
"""

import json
import re

import tokenizers
from tokenizers import normalizers

# Oniguruma (tokenizers) and Rust (tiktoken) were compared on all code points, for each class in these: equal.
CONTRACTIONS, WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2_PATTERN = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"
PATTERNS = (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # stands for a space in vocabularies that come from SentencePiece
PROBE = "Hello  world,\n\n\tna\u00efve \u6f22\u5b57 \U0001f642 \x00\x7f 12345 don't {x} \u0e44\u0e17\u0e22\r\n"

PRINTED = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]  # GPT-2's characters for the bytes
OTHERS = sorted(set(range(256)) - set(PRINTED))
BYTE_OF = dict(zip(map(chr, [*PRINTED, *range(256, 256 + len(OTHERS))]), PRINTED + OTHERS))


def read_json(text):
    """tokenizer.json -> (pattern, ranks, names of special tokens {name: id}, normalizer, library).

    library is "" where ranks do it, else `text`, and then pattern and ranks are empty. ValueError says what is wrong.
    """
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"no tokenizer.json that the tokenizers library reads ({error})") from None
    data = json.loads(library.to_str())  # old files leave out what is the default
    model, added = data["model"], data["added_tokens"]
    all_added = {token["content"]: token["id"] for token in added}
    normalizer = (data["normalizer"] or {}).get("type", "")
    if normalizer in ("", "NFC") and (pattern := pattern_of(data["pre_tokenizer"])) in PATTERNS:
        if (ranks := ranks_of(library, model, all_added)) is not None:
            return pattern, ranks, all_added, normalizer, ""
    special = {token["content"]: token["id"] for token in added if token["special"] and not is_byte(token["content"])}
    back = Library(text, special).round_trip(PROBE)
    if back not in (PROBE, normalizers.NFC().normalize_str(PROBE)):
        at = next((i for i, (a, b) in enumerate(zip(PROBE, back)) if a != b), min(len(PROBE), len(back)))
        raise ValueError(f"its ids do not give a text back: {PROBE[at : at + 12]!r} became {back[at : at + 12]!r}. "
                         "Expected byte-level BPE, or BPE with byte fallback and no space put before the text, such as "
                         "those of Llama-3, Qwen and Gemma")
    return "", {}, special, "", text


def is_byte(token):
    return bool(BYTE_TOKEN.fullmatch(token))


def pattern_of(pre_tokenizer):
    """The regular expression that a byte-level pre-tokeniser splits by, "" for any other."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        [level], pattern, regex = steps, GPT2_PATTERN, True
    elif [step.get("type") for step in steps] == ["Split", "ByteLevel"]:
        [split, level], regex = steps, False
        pattern = split["pattern"].get("Regex", "") if split["behavior"] == "Isolated" and not split["invert"] else ""
    else:
        return ""
    return pattern if not level["add_prefix_space"] and level["use_regex"] == regex else ""


def ranks_of(library, model, added):
    """{bytes: id} when tiktoken, which joins the pair with the lowest id, gives the ids of these merges; else None."""
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model[name] for name in odd):
        return None
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    merged = [vocab.get("".join(pair), -1) for pair in model["merges"]]
    in_order = merged == sorted(merged) and set(merged) == {i for token, i in vocab.items() if len(token) > 1}
    if not in_order or not all(char in BYTE_OF for token in vocab for char in token):
        return None
    if any(len(library.model.tokenize(token)) > 1 for token in vocab):  # tiktoken takes a whole word that it knows
        return None
    ranks = {bytes(map(BYTE_OF.get, token)): i for token, i in vocab.items()}
    return ranks if len(ranks) == len(vocab) and all(bytes([byte]) in ranks for byte in range(256)) else None


class Library:
    """Runs a tokenizer.json with the methods of a tiktoken.Encoding that tokenizer.py uses.

    tokens: {id: bytes of text}, without special tokens.
    """

    def __init__(self, text, specials):
        self.text, self.specials = text, specials
        self.library = tokenizers.Tokenizer.from_str(text)
        self.library.encode_special_tokens = True  # names of special tokens in a text are text
        self.library.no_truncation()
        self.library.no_padding()
        byte_level, vocab = '"ByteLevel"' in text, self.library.get_vocab(with_added_tokens=True)
        added = {token.content for token in self.library.get_added_tokens_decoder().values()}
        self.tokens = {}
        for token, i in vocab.items():
            if token in specials:
                continue
            if is_byte(token) and not byte_level:
                self.tokens[i] = bytes([int(token[3:5], 16)])
            elif byte_level and token not in added:
                self.tokens[i] = bytes(BYTE_OF.get(char, 63) for char in token)  # 63 is "?": the probe will tell
            else:
                self.tokens[i] = (token if byte_level else token.replace(SPACE, " ")).encode()
        self.all_tokens = self.tokens | {i: name.encode() for name, i in specials.items()}
        self.max_token_value = max(self.all_tokens)

    def __reduce__(self):  # pickled without the library's object, which forgets encode_special_tokens
        return Library, (self.text, self.specials)

    def encode_ordinary(self, text):
        return self.library.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids):
        return b"".join(self.all_tokens[i] for i in ids)

    def round_trip(self, text):
        return self.decode_bytes(self.encode_ordinary(text)).decode("utf-8", "replace")
