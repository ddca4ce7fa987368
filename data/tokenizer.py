"""Text -> token ids -> text.

    tok = Tokenizer.load("byte")                    # one id per byte
    tok = Tokenizer.load("gpt2")                    # or cl100k_base, o200k_base, from tiktoken
    tok = Tokenizer.load("Llama-3/tokenizer.json")  # of Hugging Face: Llama-3, Qwen, Gemma, ...
    tok = Tokenizer.train(texts, 16000)             # BPE, seconds for 50 MB of prose on two cores
    tok.save("data/mine")                           # a folder, for Tokenizer.load("data/mine")
    [ids] = tok.encode(["The capital of France"])
    text = tok.decode(ids)

How it works:

- A vocabulary is a regular expression, which cuts a text into pre-tokens (about words), and ranks
  {bytes: id}. Within a pre-token, BPE joins neighbouring tokens as long as their concatenation is
  in the ranks, the lowest id first. tiktoken does this for encode and decode.
- The `tokenizers` library trains a vocabulary. It cuts by the same regular expression, and its
  merges become ranks.
- A tokenizer.json is turned into ranks where that gives the same ids, because tiktoken is six times
  as fast as the `tokenizers` library; otherwise the library runs it (class Library), as where it
  adds tokens to a text that are not special, such as runs of spaces.
- Special ids ([PAD], [MASK], ...) come after the vocabulary. A text never produces one: "[MASK]" or
  "<|endoftext|>" inside a text is encoded as ordinary characters.
- Tables with one row per id say whether a token begins a word, for masking of whole words.

decode(encode(text)) is exactly `text` for all valid Unicode; a lone surrogate half, which no UTF-8
file can hold, becomes U+FFFD. The exceptions are two published tokenizers that change a text first,
and their ids are kept: Qwen's normalises it to NFC, Gemma's reads U+2581 as a space.
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

from lib.files import read_json, replace_file, write_json

# The `tokenizers` library is imported where it is used: only training, tokenizer.json and NFC need
# it, and the processes that encode texts start faster without it.

SPECIALS = ("[PAD]", "[MASK]", "[CLS]", "[SEP]", "<|endoftext|>")  # follow the vocabulary
TIKTOKEN_NAMES = ("gpt2", "cl100k_base", "o200k_base")
META_FILE, RANKS_FILE, LIBRARY_FILE = "tokenizer_meta.json", "tokenizer.tiktoken", "tokenizer.json"
# Vocabularies of others, by the names of their files: why they are refused and what helps.
CONVERT = ("python -c \"from transformers import AutoTokenizer; AutoTokenizer."
           "from_pretrained('FOLDER').save_pretrained('tok')\" writes tok/tokenizer.json")
FOREIGN = {
    "vocab.txt": "a WordPiece vocabulary (BERT) is not supported, because its ids do not give the "
                 "text back: case, accents and spaces are lost. Leave out --tokenizer to train a "
                 "BPE on the text, or --tokenizer=bpe:30000 for one of about that size",
    "vocab.json": "a vocab.json with its merges.txt is not read, tokenizer.json is: " + CONVERT,
    "merges.txt": "a merges.txt with its vocab.json is not read, tokenizer.json is: " + CONVERT,
    "tokenizer.model": "a SentencePiece model is not read, tokenizer.json is: " + CONVERT,
    "spiece.model": "a SentencePiece model is not read, tokenizer.json is: " + CONVERT,
}
VOCAB_SIZES = range(512, 262_144 + 1)  # that may be trained, specials and bytes included
MIN_PAIR_COUNT = 2  # a pair that occurs once says nothing about other texts
MOST_IDS = 2**24  # 64 times what the largest vocabularies have
MAX_PRETOKEN = 1000  # characters of a piece; longer ones are cut, see bounded_pieces


def check_vocab_size(vocab_size):
    """ValueError for a size of which no vocabulary can be trained."""
    if vocab_size not in VOCAB_SIZES:
        raise ValueError(f"a vocabulary of {vocab_size:,} was asked for, expected {VOCAB_SIZES[0]} "
                         f"to {VOCAB_SIZES[-1]:,}: for example --tokenizer=bpe:16000")


# ---- the class ------------------------------------------------------------------------------


class Tokenizer:
    """A vocabulary: encode, decode, special ids, and tables with one row per id.

    n_vocab: largest id + 1. vocab_size: the same, rounded up to a multiple of 64; it is the number
    of rows of the embedding and of each table. pad_id, mask_id, cls_id, sep_id, eot_id;
    special_names: {id: name}. fingerprint: two tokenizers with the same one give the same ids.
    has_text: False where only ids are known (of_ids); encode() and masking of words are refused.

    Tables:
    is_special    bool   special ids, and ids that stand for nothing: rows from n_vocab on, and gaps
                         in cl100k_base and o200k_base
    n_bytes       int64  bytes of text in the token, 0 where is_special
    starts_word   bool   a word begins with this token whatever came before it: it starts with white
                         space, punctuation, a symbol, a character of a script without spaces, or
                         the first byte of a 3- or 4-byte character. True where is_special. Letters
                         and digits without a space continue a word, and so do 't, 's and the like.
    starts_punct, ends_punct  bool  the first / last character is punctuation or a symbol. Masking
                         keeps "...)" in one piece: a word begins at token i where
                         starts_word[i] and not (starts_punct[i] and ends_punct[i-1])
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int],
                 normalizer: str = "", library: str = ""):
        """normalizer: "" or "NFC". library: a tokenizer.json, in place of pattern and ranks."""
        self.name, self.pattern, self.ranks, self.specials = name, pattern, ranks, specials
        self.normalizer, self.library = normalizer, library
        self.fingerprint = fingerprint_of(pattern, ranks, specials, normalizer, library)
        if library:
            self.bpe = Library(library, specials)
        else:
            self.bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                         special_tokens=specials)
        by_id = sorted(specials.items(), key=lambda item: item[1])
        self.special_names = {i: special for special, i in by_id}
        ids = [specials[special] for special in SPECIALS]
        self.pad_id, self.mask_id, self.cls_id, self.sep_id, self.eot_id = ids
        self.has_text = bool(pattern or library)
        self.is_bytes = ranks == BYTE_RANKS and not normalizer  # then the ids are the UTF-8 itself
        self.n_vocab = self.bpe.max_token_value + 1
        self.vocab_size = -(-self.n_vocab // 64) * 64  # multiples of 64 are faster on a GPU
        self.make_tables()

    def make_tables(self):
        texts = self.bpe.tokens if self.library else {i: token for token, i in self.ranks.items()}
        self.n_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        self.starts_word = np.ones(self.vocab_size, dtype=bool)
        self.starts_punct = np.zeros(self.vocab_size, dtype=bool)
        self.ends_punct = np.zeros(self.vocab_size, dtype=bool)
        self.is_special = np.ones(self.vocab_size, dtype=bool)
        self.is_special[list(texts)] = False
        if not self.has_text:
            return
        for i, token in texts.items():
            self.n_bytes[i] = len(token)
            self.starts_word[i], self.starts_punct[i], self.ends_punct[i] = word_flags(token)

    @classmethod
    def load(cls, dir_or_name: str) -> "Tokenizer":
        """A name, a folder written by save(), a tokenizer.json or a folder with one.

        Names: byte, gpt2, cl100k_base, o200k_base; ids:N:EOT for of_ids(N, EOT). ValueError when
        there is no such thing.
        """
        name, names = str(dir_or_name), ("byte", *TIKTOKEN_NAMES)
        if name == "byte":
            return cls(name, BYTE_PATTERN, dict(BYTE_RANKS), with_specials({}, 256))
        if name in TIKTOKEN_NAMES:
            return cls(name, *published_vocabulary(name))
        if re.fullmatch(r"ids:\d+(:-?\d+)?", name):
            return cls.of_ids(*map(int, name.split(":")[1:]))
        for folder in (name, os.path.join(name, "tokenizer")):  # of a data set or a run
            if os.path.isfile(os.path.join(folder, META_FILE)):
                return cls(*read_folder(folder))
        for path in (name, os.path.join(name, LIBRARY_FILE)):
            if path.endswith(".json") and os.path.isfile(path):
                return cls(*read_tokenizer_json(path))
        if name.startswith("bpe:"):
            raise ValueError(f"{name!r} asks for a vocabulary that must be trained first. Run "
                             f"python prepare.py --input=GLOB --out_dir=DIR --tokenizer={name}, "
                             "then load that DIR")
        if found := next((name for name in FOREIGN if has_file(str(dir_or_name), name)), ""):
            raise ValueError(f"tokenizer {name!r}: {FOREIGN[found]}")
        there = "neither a known name nor a folder"
        if os.path.isdir(name):
            there = f"a folder without {META_FILE} and {LIBRARY_FILE}"
        raise ValueError(f"tokenizer {name!r} is {there}. Expected {', '.join(names)}, a "
                         "tokenizer.json, or a folder written by python prepare.py --input=GLOB "
                         "--out_dir=DIR --tokenizer=bpe:16000")

    @classmethod
    def of_ids(cls, n_ids: int, eot_id: int = -1) -> "Tokenizer":
        """For data whose tokenizer is unknown: ids 0 to n_ids - 1, and eot_id ends a document.

        eot_id = -1: no id does. Token i is decoded as "<i>". Special ids that the data lacks follow
        n_ids. ValueError for numbers that do not fit.
        """
        if not (1 < n_ids <= MOST_IDS and -1 <= eot_id < n_ids):
            raise ValueError(f"vocab_size = {n_ids:,} ids, eot_id = {eot_id:,}: expected 2 to "
                             f"{MOST_IDS:,} ids, eot_id below vocab_size, or -1 where no id ends a "
                             "document")
        ranks = {b"<%d>" % i: i for i in range(n_ids) if i != eot_id}
        known = {SPECIALS[-1]: eot_id} if eot_id >= 0 else {}
        return cls(f"ids:{n_ids}", "", ranks, with_specials(known, n_ids))

    @classmethod
    def train(cls, texts, vocab_size: int, at_most: bool = False) -> "Tokenizer":
        """Iterable of str -> BPE of exactly `vocab_size` ids: 256 bytes, merges, 5 specials.

        The same texts give the same ids. When they are not enough: ValueError, or with at_most
        as many ids as they are enough for.
        """
        check_vocab_size(vocab_size)
        found = train_bpe(texts, vocab_size - len(SPECIALS)).get_vocab()
        reached = len(found) + len(SPECIALS)
        if reached < vocab_size and not at_most:
            raise ValueError(f"the text is enough for a vocabulary of {reached:,}, {vocab_size:,} "
                             "were asked for: give more text, or ask for a smaller one, or use "
                             "--tokenizer=byte")
        ranks = {bytes(BYTE_OF[char] for char in token): i for token, i in found.items()}
        return cls(f"bpe:{reached}", PATTERN, ranks, with_specials({}, len(ranks)))

    def save(self, folder: str):
        """Writes two small files from which load(folder) restores this tokenizer offline."""
        os.makedirs(folder, exist_ok=True)
        name, text = RANKS_FILE, ranks_text(self.ranks)
        meta = {"name": self.name, "pattern": self.pattern, "specials": self.specials,
                "fingerprint": self.fingerprint}
        if self.normalizer:
            meta["normalizer"] = self.normalizer
        if self.library:
            name, text = LIBRARY_FILE, self.library
            meta["file"] = name
        replace_file(os.path.join(folder, name), lambda file: file.write(text.encode()))
        write_json(os.path.join(folder, META_FILE), meta)  # last: it says that the other is there

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Texts -> one uint32 array of ids each; no special ids, nothing added."""
        assert not isinstance(texts, str), "encode takes a list of texts, not one text"
        if not self.has_text:
            raise ValueError(f"tokenizer {self.name} knows ids only, not which text they stand "
                             "for; prepare the data with its tokenizer (--tokenizer=) to read and "
                             "write text")
        if self.is_bytes:
            return [np.frombuffer(mended(text).encode(), np.uint8).astype(np.uint32)
                    for text in texts]
        encoded = []
        for text in texts:
            parts = [self.bpe.encode_ordinary(piece) for piece in self.pieces(mended(text))]
            encoded.append(np.concatenate([np.array(ids, dtype=np.uint32) for ids in parts]))
        return encoded

    def pieces(self, text):
        """A text -> what is encoded, piece by piece."""
        if self.normalizer and not text.isascii():
            text = nfc(text)
        return [text] if self.library else bounded_pieces(text, self.pattern)

    def decode(self, ids) -> str:
        """1-D ids -> text. Special ids become their names, incomplete characters U+FFFD.

        ValueError for an id out of range.
        """
        try:
            data = self.bpe.decode_bytes(np.asarray(ids).tolist())
        except (KeyError, OverflowError) as error:
            raise ValueError(f"{error.args[0]}: tokenizer {self.name} has ids 0 to "
                             f"{self.n_vocab - 1}. If another one wrote these, load it from the "
                             "folder whose meta.json has its fingerprint") from error
        return data.decode("utf-8", errors="replace")

    def __repr__(self):
        return (f"Tokenizer({self.name}, n_vocab={self.n_vocab}, "
                f"fingerprint={self.fingerprint[:12]})")


def has_file(path, name):
    """Whether a path is a file of this name, or a folder that holds one."""
    return (os.path.isfile(path) and os.path.basename(path) == name
            or os.path.isfile(os.path.join(path, name)))


def with_specials(specials, first_free):
    """{name: id} plus those of SPECIALS that it lacks, on the ids from `first_free` on."""
    missing = [name for name in SPECIALS if name not in specials]
    return specials | {name: i for i, name in enumerate(missing, first_free)}


def ranks_text(ranks):
    """{bytes: id} -> tiktoken's file format: one line 'base64 id' per token, by id."""
    return "".join(f"{base64.b64encode(token).decode()} {ranks[token]}\n"
                   for token in sorted(ranks, key=ranks.get))


def fingerprint_of(pattern, ranks, specials, *others):
    """sha256 (hex) over everything that decides ids."""
    by_id = sorted((i, name) for name, i in specials.items())
    head = json.dumps([pattern, by_id, *filter(None, others)])
    return hashlib.sha256(f"{head}\n{ranks_text(ranks)}".encode()).hexdigest()


# ---- text and words -------------------------------------------------------------------------

# The alternatives, in this order: the end of a contraction ('s, 't, 'll) where the word ends there,
# because 'single must not become 's + ingle | a word with the space before it and its accents | up
# to 3 digits | punctuation, symbols, emoji | white space, whose last space goes to the next word.
# No possessive quantifier and no "$": Oniguruma (training) and Rust (tiktoken) differ in these.
PATTERN = ("['\u2019](?:[sdmtSDMT]|ll|ve|re|LL|VE|RE)(?![\\p{L}\\p{M}\\p{N}])"
           "| ?\\p{L}[\\p{L}\\p{M}]*| ?\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+")
BYTE_PATTERN = r"[\s\S]{1,16}"  # bytes are never joined, so any cut will do; 16 is the fastest
BYTE_RANKS = {bytes([byte]): byte for byte in range(256)}
KIND_CHANGE = re.compile(r"\s\S|\S\s")
# Scripts without spaces: Thai, Lao, Tibetan, Myanmar, Khmer, Tai, kana, bopomofo, Han. Not Hangul.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]")


def mended(text):
    """Text -> valid Unicode: a surrogate pair becomes its character, a lone half U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def nfc(text):
    # With the library that Qwen's tokenizer uses: Python's unicodedata, which depends on the
    # version of Python, may follow another version of Unicode.
    from tokenizers import normalizers

    return normalizers.NFC().normalize_str(text)


def bounded_pieces(text, pattern):
    """Text -> [pieces] that join to it, no pre-token longer than MAX_PRETOKEN; usually [text].

    A million spaces overflow tiktoken's stack, and the trainer rewrites whole pre-tokens at every
    merge. Only what is too long is cut: all other text keeps the ids that tiktoken gives it.
    """
    # A pre-token that is too long covers at least one of these windows, and is all white space or
    # all something else there. If no window is, the slow search below is not needed.
    half = MAX_PRETOKEN // 2
    windows = range(0, len(text) - half + 1, half)
    if all(KIND_CHANGE.search(text, start, start + half) for start in windows):
        return [text]
    cuts = [0]
    for match in regex.finditer(pattern, text):
        cuts += range(match.start() + MAX_PRETOKEN, match.end(), MAX_PRETOKEN)
    cuts.append(len(text))
    return [text[start:end] for start, end in zip(cuts, cuts[1:])]


def word_flags(token):
    """Token bytes -> (starts_word, starts_punct, ends_punct); see Tokenizer for what they mean."""
    if not token:  # some vocabularies have an empty one
        return False, False, False
    text = token.decode("utf-8", "surrogateescape")  # bytes of cut characters: U+DC80 to U+DCFF
    first, kind = text[0], unicodedata.category(text[0])
    if "\udc80" <= first <= "\udcff":
        starts = "\udce0" <= first <= "\udcf4"  # of 3 or 4 bytes: dash, quote, Chinese, emoji
    elif first in "'\u2019" and text[1:2].isalpha():
        starts = False  # 't 's 're: "don't" is one word
    else:
        is_unspaced = kind[0] == "L" and bool(UNSPACED.match(first))
        starts = first.isspace() or kind[0] in "PS" or is_unspaced
    return starts, kind[0] in "PS", unicodedata.category(text[-1])[0] in "PS"


# ---- where a vocabulary comes from: training, tiktoken, a folder ----------------------------


def train_bpe(texts, n_tokens):
    """Iterable of str -> byte-level BPE of the `tokenizers` library, of at most n_tokens ids.

    Its ids are the 256 bytes, then the merges, the most frequent pair first.
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainee

    bpe = Trainee(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens, min_frequency=MIN_PAIR_COUNT, show_progress=sys.stderr.isatty(),
        initial_alphabet=to_bytes.alphabet())
    pieces = (piece for text in texts for piece in bounded_pieces(mended(text), PATTERN))
    bpe.train_from_iterator(pieces, trainer)
    return bpe


def published_vocabulary(name):
    """One of TIKTOKEN_NAMES -> (pattern, ranks, specials), from tiktoken's cache or the network.

    ValueError when it is in neither.
    """
    import requests
    from tiktoken_ext import openai_public

    def read_url(url):
        response = requests.get(url, timeout=(5, 60))  # seconds to connect, seconds between packets
        response.raise_for_status()
        return response.content

    tiktoken.load.read_file = read_url  # its own has no timeout and waits behind a firewall
    try:
        found = openai_public.ENCODING_CONSTRUCTORS[name]()
    except (OSError, ValueError) as error:  # requests raises OSErrors; a wrong hash is a ValueError
        cache = os.environ.get("TIKTOKEN_CACHE_DIR")
        raise ValueError(
            f"tokenizer {name} is neither in tiktoken's cache (TIKTOKEN_CACHE_DIR="
            f"{cache or 'not set'}) nor downloadable ({type(error).__name__}). On a machine with "
            "network run TIKTOKEN_CACHE_DIR=tiktoken_cache python -c \"import tiktoken; "
            f"tiktoken.get_encoding('{name}')\", copy that folder here and set TIKTOKEN_CACHE_DIR "
            "to it; or use --tokenizer=byte or bpe:16000, which need no network") from error
    specials = found["special_tokens"]
    specials = with_specials(specials, max(specials.values()) + 1)
    return found["pat_str"], found["mergeable_ranks"], specials


def read_folder(folder):
    """Folder written by save() -> arguments of Tokenizer; ValueError names what is damaged."""
    remedy = "Copy the folder again, or re-run the prepare.py command that wrote it"
    path = os.path.join(folder, META_FILE)
    try:
        meta = read_json(path)
        name, pattern, specials = meta["name"], meta["pattern"], meta["specials"]
        expected, normalizer = meta["fingerprint"], meta.get("normalizer", "")
        ranks, library = {}, ""
        is_library = meta.get("file") == LIBRARY_FILE
        path = os.path.join(folder, LIBRARY_FILE if is_library else RANKS_FILE)
        with open(path, encoding="utf-8") as file:
            if is_library:
                library = file.read()
            else:
                lines = (line.split(" ") for line in file)
                ranks = {base64.b64decode(token, validate=True): int(i) for token, i in lines}
        # Compared before tiktoken sees the ranks: it ends the process on some damaged ones.
        found = fingerprint_of(pattern, ranks, specials, normalizer, library)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__}: {error}). "
                         f"{remedy}") from error
    if found != expected:
        raise ValueError(f"{path} is damaged or belongs to another {META_FILE}: it gives "
                         f"{len(ranks):,} tokens and fingerprint {found[:12]}, expected was "
                         f"{str(expected)[:12]}. {remedy}")
    return name, pattern, ranks, specials, normalizer, library


# ---- tokenizer.json of Hugging Face ---------------------------------------------------------

# The regular expressions of tokenizers that can become ranks. For each class of characters in them,
# Oniguruma (tokenizers) and Rust (tiktoken) were compared on all code points: equal.
CONTRACTIONS, WORDS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2_PATTERN = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}"
PATTERNS = (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN)

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # stands for a space in vocabularies that come from SentencePiece
PROBE = ("Hello  world,\n\n\tna\u00efve \u6f22\u5b57 \U0001f642 \x00\x7f 12345 don't {x} "
         "\u0e44\u0e17\u0e22\r\n")

# Byte-level vocabularies write each byte as a printable character (GPT-2): bytes that print as
# themselves in Latin-1, the others as the characters from U+0100 on.
PRINTED = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]
OTHERS = sorted(set(range(256)) - set(PRINTED))
BYTE_OF = {chr(byte): byte for byte in PRINTED}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


def read_tokenizer_json(path):
    """tokenizer.json -> arguments of Tokenizer; ValueError says why it cannot be used."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        pattern, ranks, specials, normalizer, library = parse_tokenizer_json(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    ids = [*ranks.values(), *specials.values()]
    if library:
        ids += Library(library, specials).all_tokens
    return path, pattern, ranks, with_specials(specials, max(ids) + 1), normalizer, library


def parse_tokenizer_json(text):
    """Text of a tokenizer.json -> (pattern, ranks, special tokens {name: id}, normalizer, library).

    library is "" where tiktoken gives the same ids, else `text`, and then pattern and ranks are
    empty. ValueError says what is wrong.
    """
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        # The library raises Exception itself, and where its Rust code panics a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"no tokenizer.json that the tokenizers library reads ({error})") from None
    highest = max(library.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= MOST_IDS:  # each id up to it has a row in every table
        raise ValueError(f"its highest id is {highest:,}; expected ids below {MOST_IDS:,}")
    data = json.loads(library.to_str())  # complete: old files leave out fields at their defaults
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    normalizer = (data["normalizer"] or {}).get("type", "")
    pattern = pattern_of(data["pre_tokenizer"] or {})
    # The library finds added tokens that are not special in a text before it cuts the rest.
    adds_to_text = any(not token["special"] for token in data["added_tokens"])
    if normalizer in ("", "NFC") and pattern in PATTERNS and not adds_to_text:
        ranks = ranks_of(library, data["model"], added)
        if ranks is not None:
            return pattern, ranks, added, normalizer, ""

    special = {token["content"]: token["id"] for token in data["added_tokens"]
               if token["special"] and not is_byte(token["content"])}
    back = Library(text, special).round_trip(PROBE)
    if back not in (PROBE, nfc(PROBE)):
        same = len(os.path.commonprefix([PROBE, back]))
        raise ValueError(f"its ids do not give a text back: {PROBE[same : same + 12]!r} became "
                         f"{back[same : same + 12]!r}. Expected byte-level BPE, or BPE with byte "
                         "fallback and no space put before the text, such as those of Llama-3, "
                         "Qwen and Gemma")
    return "", {}, special, "", text


def is_byte(token):
    """Whether a token is written <0xE4> and stands for that byte."""
    return bool(BYTE_TOKEN.fullmatch(token))


def pattern_of(pre_tokenizer):
    """The regular expression by which a byte-level pre-tokenizer cuts a text, "" for any other."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    types = [step.get("type") for step in steps]
    if types == ["ByteLevel"]:
        pattern = GPT2_PATTERN
    elif types == ["Split", "ByteLevel"]:
        split = steps[0]
        keeps_all = split["behavior"] == "Isolated" and not split["invert"]
        pattern = split["pattern"].get("Regex", "") if keeps_all else ""
    else:
        return ""
    level = steps[-1]
    cuts_once = level["use_regex"] == (len(steps) == 1)  # by its own pattern, or by that of Split
    return pattern if cuts_once and not level["add_prefix_space"] else ""


def ranks_of(library, model, added):
    """{bytes: id} for tiktoken, or None where tiktoken would give other ids.

    tiktoken joins the pair with the lowest id first and takes a piece that is a token as it is. So
    the merges must stand in the order of their ids, and the library must do the same with a piece.
    """
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model["type"] != "BPE" or any(model[name] for name in odd):
        return None
    vocab = {token: i for token, i in model["vocab"].items() if token not in added}
    merged = [vocab.get("".join(pair), -1) for pair in model["merges"]]
    longer = {i for token, i in vocab.items() if len(token) > 1}
    if merged != sorted(merged) or set(merged) != longer:
        return None
    if not all(char in BYTE_OF for token in vocab for char in token):
        return None
    if any(len(library.model.tokenize(token)) > 1 for token in vocab):
        return None
    ranks = {bytes(BYTE_OF[char] for char in token): i for token, i in vocab.items()}
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    return ranks if has_all_bytes and len(ranks) == len(vocab) else None


class Library:
    """Runs a tokenizer.json with the `tokenizers` library, in place of a tiktoken.Encoding.

    tokens: {id: bytes of text}, without special tokens; all_tokens: with them.
    """

    def __init__(self, text, specials):
        import tokenizers

        self.text, self.specials = text, specials
        self.library = tokenizers.Tokenizer.from_str(text)
        self.library.encode_special_tokens = True  # their names in a text are ordinary text
        self.library.no_truncation()
        self.library.no_padding()
        is_byte_level = '"ByteLevel"' in text
        added = {token.content for token in self.library.get_added_tokens_decoder().values()}
        self.tokens = {}
        for token, i in self.library.get_vocab(with_added_tokens=True).items():
            if token in specials:
                continue
            if is_byte_level and token in added:
                self.tokens[i] = token.encode()
            elif is_byte_level:  # "?" for a character that is none: then PROBE does not come back
                self.tokens[i] = bytes(BYTE_OF.get(char, ord("?")) for char in token)
            elif is_byte(token):
                self.tokens[i] = bytes([int(token[3:5], 16)])
            else:
                self.tokens[i] = token.replace(SPACE, " ").encode()
        self.all_tokens = self.tokens | {i: name.encode() for name, i in specials.items()}
        self.max_token_value = max(self.all_tokens)

    def __reduce__(self):  # the library's object forgets encode_special_tokens when it is pickled
        return Library, (self.text, self.specials)

    def encode_ordinary(self, text):
        return self.library.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids):
        return b"".join(self.all_tokens[i] for i in ids)

    def round_trip(self, text):
        return self.decode_bytes(self.encode_ordinary(text)).decode("utf-8", "replace")
