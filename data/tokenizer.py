"""Text -> token ids -> text: single bytes, a BPE vocabulary trained on your own text, or a published tiktoken one.

    tok = Tokenizer.load("byte")              # or gpt2, cl100k_base, o200k_base, or a folder written by save()
    tok = Tokenizer.load("Llama-3/tokenizer.json")  # of Hugging Face: Llama-3, Qwen, Gemma; see tokenizer_json.py
    tok = Tokenizer.train(texts, 16000)       # seconds for 50 MB of prose on two cores
    tok.save("data/mine"); [ids] = tok.encode(["The capital of France"]); tok.decode(ids)

The `tokenizers` library trains, tiktoken encodes and decodes; both split text by the same regular expression. A corpus
never produces special ids: "[MASK]" or "<|endoftext|>" inside a text is ordinary text. decode(encode(text)) is exactly
`text` for all valid Unicode; a lone surrogate half, which no UTF-8 file can hold, becomes U+FFFD. But some published
tokenizers change a text before they see it, and theirs are the ids here: Qwen's puts it into NFC, Gemma's reads U+2581
as a space.

tokenizer.json files of Hugging Face: Llama-3, Qwen, Gemma and others whose ids give the text back.

Byte-level BPE with a pre-tokeniser of PATTERNS and a rank for each merge is what tiktoken runs, six times as fast: its
vocabulary becomes ranks. Everything else stays with the `tokenizers` library (Library), and so do exact ids.
Names of special tokens inside a text are ordinary text here, as in tokenizer.py.
"""

import base64
import hashlib
import json
import os
import re
import sys
import unicodedata

import numpy as np
import regex
import tiktoken
import tokenizers
from tokenizers import normalizers

from lib.files import replace_file, write_json

SPECIALS = ("[PAD]", "[MASK]", "[CLS]", "[SEP]", "<|endoftext|>")  # the last five ids, in this order
TIKTOKEN_NAMES = ("gpt2", "cl100k_base", "o200k_base")
META_FILE, RANKS_FILE, LIBRARY_FILE = "tokenizer_meta.json", "tokenizer.tiktoken", "tokenizer.json"
VOCAB_SIZES = range(512, 262_144 + 1)  # what may be trained, specials and bytes included
MIN_PAIR_COUNT = 2  # a pair seen once is memorised, not learned
MAX_PRETOKEN = 1000  # characters; longer ones are cut, see bounded_pieces

# Before BPE, text is cut into: contraction (at the end of a word only, or the quote in 'single would steal an s) | word
# with its space and accents | up to 3 digits | punctuation, symbols, emoji | white space, whose last space goes to the
# next word. No possessive quantifier and no "$": Oniguruma (training) and Rust (tiktoken) read them differently.
PATTERN = ("['\u2019](?:[sdmtSDMT]|ll|ve|re|LL|VE|RE)(?![\\p{L}\\p{M}\\p{N}])"
           "| ?\\p{L}[\\p{L}\\p{M}]*| ?\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+")
BYTE_PATTERN = r"[\s\S]{1,16}"  # nothing merges, so any cut will do; 16 is the fastest
KIND_CHANGE = re.compile(r"\s\S|\S\s")
# Scripts written without spaces: Thai, Lao, Tibetan, Myanmar, Khmer, Tai, kana, bopomofo, Han. Hangul has spaces.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]")


# ---------------------------------------------------------------------------------------------------- text and pieces
def mended(text):
    """Text -> valid Unicode: a surrogate pair becomes its character, a lone half U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def bounded_pieces(text, pattern):
    """Text -> [pieces] that join to it, no pre-token longer than MAX_PRETOKEN; almost always [text] itself.

    A million spaces overflow tiktoken's stack, and every merge of the trainer rewrites whole pre-tokens. Only what is
    too long is cut: all other text keeps the ids that tiktoken alone would give it.
    """
    half = MAX_PRETOKEN // 2  # a run longer than MAX_PRETOKEN covers at least one of these windows
    if all(KIND_CHANGE.search(text, start, start + half) for start in range(0, len(text) - half + 1, half)):
        return [text]
    spans = (match.span() for match in regex.finditer(pattern, text))
    cuts = [0, *(cut for start, end in spans for cut in range(start + MAX_PRETOKEN, end, MAX_PRETOKEN)), len(text)]
    return [text[start:end] for start, end in zip(cuts, cuts[1:])]


def word_flags(token):
    """Token bytes -> (starts_word, starts_punct, ends_punct); see Tokenizer for what they mean."""
    text = token.decode("utf-8", "surrogateescape")  # a byte of an incomplete character becomes U+DC80..U+DCFF
    first, kind = text[0], unicodedata.category(text[0])
    if "\udc80" <= first <= "\udcff":
        starts = "\udce0" <= first <= "\udcf4"  # lead of a 3- or 4-byte character: dash, quote, CJK, emoji
    elif first in "'\u2019" and text[1:2].isalpha():
        starts = False  # 't 's 're: "don't" is one word
    else:
        starts = first.isspace() or kind[0] in "PS" or (kind[0] == "L" and bool(UNSPACED.match(first)))
    return starts, kind[0] in "PS", unicodedata.category(text[-1])[0] in "PS"


# ------------------------------------------------------------------------------------------------------- vocabularies
def train_bpe(texts, n_tokens):
    """Iterable of str -> a `tokenizers` byte-level BPE of at most n_tokens ids: 256 bytes, then merges by frequency."""
    from tokenizers import Regex, models, pre_tokenizers, trainers  # only training needs it
    from tokenizers import Tokenizer as Trainee

    bpe = Trainee(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), to_bytes])
    trainer = trainers.BpeTrainer(vocab_size=n_tokens, min_frequency=MIN_PAIR_COUNT, show_progress=sys.stderr.isatty(),
                                  initial_alphabet=to_bytes.alphabet())
    bpe.train_from_iterator((piece for text in map(mended, texts) for piece in bounded_pieces(text, PATTERN)),
                            trainer)
    return bpe


def with_specials(specials, first_free):
    """{name: id} plus those of SPECIALS it lacks, on the ids from `first_free` on."""
    return specials | {name: i for i, name in enumerate((s for s in SPECIALS if s not in specials), first_free)}


def published_vocabulary(name):
    """One of TIKTOKEN_NAMES -> (pattern, ranks, specials), from tiktoken's cache or the network, else ValueError."""
    import requests
    from tiktoken_ext import openai_public

    def read_url(url):  # tiktoken's own reader has no timeout: behind a silent firewall it waits for minutes
        response = requests.get(url, timeout=(5, 60))  # seconds to connect, seconds between packets
        response.raise_for_status()
        return response.content

    tiktoken.load.read_file = read_url
    try:
        found = openai_public.ENCODING_CONSTRUCTORS[name]()
    except (OSError, ValueError) as error:  # requests' exceptions are OSErrors; ValueError is a wrong hash
        cache = os.environ.get("TIKTOKEN_CACHE_DIR")
        raise ValueError(
            f"tokenizer {name} is neither in tiktoken's cache (TIKTOKEN_CACHE_DIR={cache or 'not set'}) nor "
            f"downloadable ({type(error).__name__}). On a machine with network run TIKTOKEN_CACHE_DIR=tiktoken_cache "
            f"python -c \"import tiktoken; tiktoken.get_encoding('{name}')\", copy that folder here and set "
            "TIKTOKEN_CACHE_DIR to it; or use --tokenizer=byte or bpe:16000, which need no network") from error
    specials = with_specials(found["special_tokens"], max(found["special_tokens"].values()) + 1)
    return found["pat_str"], found["mergeable_ranks"], specials


def ranks_text(ranks):
    """{bytes: id} -> tiktoken's file format: one 'base64 id' line per token, by id."""
    return "".join(f"{base64.b64encode(token).decode()} {ranks[token]}\n" for token in sorted(ranks, key=ranks.get))


def fingerprint_of(pattern, ranks, specials, *others):
    """sha256 (hex) over everything that decides ids."""
    head = json.dumps([pattern, sorted((i, name) for name, i in specials.items()), *filter(None, others)])
    return hashlib.sha256(f"{head}\n{ranks_text(ranks)}".encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- folders
def read_folder(folder):
    """Folder written by save() -> arguments of Tokenizer; ValueError naming what is damaged."""
    remedy = "Copy the folder again, or re-run the prepare.py command that wrote it"
    path = os.path.join(folder, META_FILE)
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        name, pattern, specials, expected = (meta[key] for key in ("name", "pattern", "specials", "fingerprint"))
        ranks, others, is_library = {}, [meta.get("normalizer", ""), ""], meta.get("file") == LIBRARY_FILE
        path = os.path.join(folder, LIBRARY_FILE if is_library else RANKS_FILE)
        with open(path, encoding="utf-8") as file:
            if is_library:
                others[1] = file.read()
            else:
                rows = (row.split(" ") for row in file)
                ranks = {base64.b64decode(token, validate=True): int(i) for token, i in rows}
        found = fingerprint_of(pattern, ranks, specials, *others)  # before tiktoken sees them: it panics on nonsense
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__}: {error}). {remedy}") from error
    if found != expected:
        raise ValueError(f"{path} is damaged or belongs to another {META_FILE}: it gives {len(ranks):,} tokens and "
                         f"fingerprint {found[:12]}, expected was {str(expected)[:12]}. {remedy}")
    return name, pattern, ranks, specials, *others


def read_tokenizer_json(path):
    """A tokenizer.json of Hugging Face -> arguments of Tokenizer; ValueError says why it cannot be used."""
    from data.tokenizer import read_json

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        pattern, ranks, specials, *others = read_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    ids = [*ranks.values(), *specials.values(), *(others[1] and library_of(others[1], specials).all_tokens)]
    return path, pattern, ranks, with_specials(specials, max(ids) + 1), *others


def library_of(text, specials):
    """tokenizer.json -> what stands in for tiktoken.Encoding."""
    from data.tokenizer import Library  # only such tokenizers need the library

    return Library(text, specials)


# ---------------------------------------------------------------------------------------------------------- the class
class Tokenizer:
    """A vocabulary: encode, decode, special ids, and tables with one row per id.

    n_vocab: largest id + 1. vocab_size: that, rounded up to a multiple of 64: rows of the embedding and of the tables.
    special_names {id: name}; pad_id, mask_id, cls_id, sep_id, eot_id. fingerprint: where it is equal, so are all ids.
    is_special    bool   specials, and ids that stand for nothing: rows past n_vocab, gaps in cl100k_base and o200k_base
    n_bytes       int64  bytes of text in the token, 0 where is_special
    starts_word   bool   a word begins here whatever came before: white space, punctuation, a symbol, a character of a
                         script without spaces, or the lead byte of a 3- or 4-byte character comes first; True where
                         is_special. Letters and digits without a space continue a word, so do 't and other fragments.
    has_text      False where only ids are known (`of_ids`): no bytes, no words; encode() and masks of words are refused
    starts_punct, ends_punct  bool  the first / last character is punctuation or a symbol. Masking keeps "...)" whole:
                         a word starts at i where starts_word[i] and not (starts_punct[i] and ends_punct[i-1]).
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], normalizer: str = "",
                 library: str = ""):
        self.name, self.pattern, self.ranks, self.specials = name, pattern, ranks, specials
        self.normalizer, self.library = normalizer, library  # "NFC"; a tokenizer.json instead of pattern and ranks
        self.fingerprint = fingerprint_of(pattern, ranks, specials, normalizer, library)
        if library:
            self.bpe = library_of(library, specials)
        else:
            self.bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.special_names = {i: special for special, i in sorted(specials.items(), key=lambda x: x[1])}
        self.pad_id, self.mask_id, self.cls_id, self.sep_id, self.eot_id = (specials[special] for special in SPECIALS)
        self.has_text, self.n_vocab = bool(pattern or library), self.bpe.max_token_value + 1
        self.vocab_size = -(-self.n_vocab // 64) * 64  # tensor cores want it (nanoGPT pads 50257 to 50304)

        self.n_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        self.starts_word = np.ones(self.vocab_size, dtype=bool)
        self.starts_punct, self.ends_punct = np.zeros((2, self.vocab_size), dtype=bool)
        self.is_special = np.ones(self.vocab_size, dtype=bool)
        texts = self.bpe.tokens if library else {i: token for token, i in ranks.items()}
        self.is_special[list(texts)] = False
        for i, token in texts.items() if self.has_text else ():
            self.n_bytes[i] = len(token)
            self.starts_word[i], self.starts_punct[i], self.ends_punct[i] = word_flags(token)

    @classmethod
    def load(cls, dir_or_name: str) -> "Tokenizer":
        """byte, gpt2, cl100k_base, o200k_base, a folder written by save(), a tokenizer.json or a folder with one.

        ids:N:EOT stands for of_ids(N, EOT). ValueError if there is no such thing.
        """
        name, names = str(dir_or_name), ("byte", *TIKTOKEN_NAMES)
        if name == "byte":
            return cls(name, BYTE_PATTERN, {bytes([byte]): byte for byte in range(256)}, with_specials({}, 256))
        if name in TIKTOKEN_NAMES:
            return cls(name, *published_vocabulary(name))
        if re.fullmatch(r"ids:\d+(:-?\d+)?", name):
            return cls.of_ids(*map(int, name.split(":")[1:]))
        if os.path.isfile(os.path.join(name, META_FILE)):
            return cls(*read_folder(name))
        for path in (name, os.path.join(name, LIBRARY_FILE)):
            if path.endswith(".json") and os.path.isfile(path):
                return cls(*read_tokenizer_json(path))
        if name.startswith("bpe:"):
            raise ValueError(f"{name!r} asks for a vocabulary that must be trained first. Run python prepare.py "
                             f"--input=GLOB --out_dir=DIR --tokenizer={name}, then load that DIR")
        there = (f"a folder without {META_FILE} and {LIBRARY_FILE}" if os.path.isdir(name)
                 else "neither a known name nor a folder")
        raise ValueError(f"tokenizer {name!r} is {there}. Expected {', '.join(names)}, a tokenizer.json, or a folder "
                         "written by python prepare.py --input=GLOB --out_dir=DIR --tokenizer=bpe:16000")

    @classmethod
    def of_ids(cls, n_ids: int, eot_id: int = -1) -> "Tokenizer":
        """For data of unknown origin: ids 0 to n_ids - 1, of which eot_id ends a document (-1: none does).

        Token i reads "<i>". Special ids that the data lacks follow n_ids. ValueError for numbers that do not fit.
        """
        if not (1 < n_ids <= 2**24 and -1 <= eot_id < n_ids):
            raise ValueError(f"vocab_size = {n_ids:,} ids, eot_id = {eot_id:,}: expected 2 to {2**24:,} ids, eot_id "
                             "below vocab_size, or -1 where no id ends a document")
        ranks = {b"<%d>" % i: i for i in range(n_ids) if i != eot_id}
        return cls(f"ids:{n_ids}", "", ranks, with_specials({SPECIALS[-1]: eot_id} if eot_id >= 0 else {}, n_ids))

    @classmethod
    def train(cls, texts, vocab_size: int) -> "Tokenizer":
        """Iterable of str -> BPE of exactly `vocab_size` ids (256 bytes, 5 specials, merges); same texts, same ids."""
        if vocab_size not in VOCAB_SIZES:
            raise ValueError(f"a vocabulary of {vocab_size:,} was asked for, expected {VOCAB_SIZES[0]} to "
                             f"{VOCAB_SIZES[-1]:,}: for example --tokenizer=bpe:16000")
        ranks = train_bpe(texts, vocab_size - len(SPECIALS)).get_vocab()
        reached = len(ranks) + len(SPECIALS)
        if reached < vocab_size:
            raise ValueError(f"the text is enough for a vocabulary of {reached:,}, {vocab_size:,} were asked for: give "
                             "more text, or ask for a smaller one, or use --tokenizer=byte")
        # The trainer's first 256 ids: bytes that print as themselves, then the others under borrowed characters.
        byte_order = sorted(range(256), key=lambda byte: byte == 32 or not chr(byte).isprintable())
        to_byte = {char: byte_order[i] for char, i in ranks.items() if i < 256}
        ranks = {bytes(to_byte[char] for char in token): i for token, i in ranks.items()}
        return cls(f"bpe:{vocab_size}", PATTERN, ranks, with_specials({}, len(ranks)))

    def save(self, folder: str):
        """Writes two small files from which load(folder) restores this tokenizer without network."""
        os.makedirs(folder, exist_ok=True)
        name, text = (LIBRARY_FILE, self.library) if self.library else (RANKS_FILE, ranks_text(self.ranks))
        replace_file(os.path.join(folder, name), lambda file: file.write(text.encode()))
        meta = {key: getattr(self, key) for key in ("name", "pattern", "specials", "fingerprint")}
        meta |= {"normalizer": self.normalizer} if self.normalizer else {}
        meta |= {"file": name} if self.library else {}
        write_json(os.path.join(folder, META_FILE), meta)  # last: it vouches for the ranks

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Texts -> one uint32 array of ids each; no special ids, nothing added."""
        assert not isinstance(texts, str), "encode takes a list of texts, not one text"
        if not self.has_text:
            raise ValueError(f"tokenizer {self.name} knows ids only, not which text they stand for; prepare the data "
                             "with its tokenizer (--tokenizer=) to read and write text")
        per_text = ([self.bpe.encode_ordinary(piece) for piece in self.pieces(mended(text))] for text in texts)
        return [np.concatenate([np.array(ids, dtype=np.uint32) for ids in pieces]) for pieces in per_text]

    def pieces(self, text):
        """Text -> what is encoded, piece by piece."""
        if self.normalizer and not text.isascii():
            from tokenizers import normalizers

            text = normalizers.NFC().normalize_str(text)
        return [text] if self.library else bounded_pieces(text, self.pattern)

    def decode(self, ids) -> str:
        """1-D ids -> text: specials by name, incomplete characters as U+FFFD; ValueError for an id out of range."""
        try:
            return self.bpe.decode_bytes(np.asarray(ids).tolist()).decode("utf-8", errors="replace")
        except (KeyError, OverflowError) as error:
            raise ValueError(f"{error.args[0]}: tokenizer {self.name} has ids 0 to {self.n_vocab - 1}. If another one "
                             "wrote these, load it from the folder whose meta.json has its fingerprint") from error

    def __repr__(self):
        return f"Tokenizer({self.name}, n_vocab={self.n_vocab}, fingerprint={self.fingerprint[:12]})"


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
