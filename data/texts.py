"""A file -> the texts in it. All commands that read text read it here.

    reader = Reader(settings)                       # of prepare.py: text_key, on_bad_line, ...
    for text in reader.texts(path, kind(path)): ... # documents; None for a bad line that is skipped
    for text, replaced in read_lines(path): ...     # a text a line, for tools

The name of a file says how it is read: .txt and .md are text, .jsonl and .ndjson hold one JSON
object a line, .json the same, or one object, or one list of objects; .parquet, .arrow and .feather
are tables. Text and JSON may be packed: .gz or .zst. Text is kept as it is: NUL bytes, Windows line
ends, decomposed accents. Only a byte order mark is removed.
"""

import codecs
import contextlib
import functools
import gzip
import io
import json
import re
import sys
import zlib

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

from data.bins import DataError
from data.documents import BAD_FILE
from data.workers import cut

PLAIN = (".txt", ".md")
JSON = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow", ".feather")  # of Arrow
SUFFIXES = (*PLAIN, *JSON)  # these may be packed
PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet"}  # first bytes
MAX_LINE = 32_000_000  # bytes; a longer line is a bad line, because memory is bounded
STDIN = "standard input"  # in place of a path
HEAD_BYTES = 50_000_000  # of standard input that are kept; a shorter text can be read again
MOST_CUT = 1_000_000  # characters of a document of a text file, unless cut_chars says less
PROBED = 1000  # bytes that are looked at to recognise UTF-16
BETWEEN = re.compile(r"[\s,\ufeff]*")  # what stands between the items of a JSON list


class BadFile(DataError):
    """Damage in a file, which on_bad_file may skip."""


def kind(path):
    """The suffix that says how a file is read, without .gz or .zst; "" where it is no text."""
    path = path.lower()
    if path.endswith(TABLES):
        return next(suffix for suffix in TABLES if path.endswith(suffix))
    stem = path.removesuffix(".gz").removesuffix(".zst")
    return next((suffix for suffix in SUFFIXES if stem.endswith(suffix)), "")


# --------------------------------------------------------------------------------------------------
# a file -> bytes, lines, columns


def open_binary(path):
    """A file, or STDIN, for reading; .gz and .zst are unpacked on the way."""
    if path == STDIN:
        head, is_whole = head_of_stdin()
        return io.BufferedReader(Joined(head, None if is_whole else sys.stdin.buffer), 2**20)
    if path.lower().endswith(".gz"):
        return io.BufferedReader(Unpacked(gzip.open(path)), 2**20)
    if path.lower().endswith(".zst"):
        return io.BufferedReader(Unpacked(zstd.open(path)), 2**20)
    file = open(path, "rb")
    if (packed := packed_as(file.peek(4))) and kind(path) not in TABLES:
        file.close()
        raise BadFile(f"{path} is {packed}, and its name says text: rename it (.gz, .zst or "
                      ".parquet)")
    return file


def packed_as(data):
    """Bytes at the beginning of a file -> how it is packed, "" if it is not."""
    return next((name for magic, name in PACKED.items() if data.startswith(magic)), "")


def head_of_stdin():
    """-> (the first HEAD_BYTES of standard input, whether that is all of it)."""
    return read_head(sys.stdin.buffer)


@functools.lru_cache(maxsize=1)  # a pipe is read once, and a short one may be asked for again
def read_head(stdin):
    head = stdin.read(HEAD_BYTES)
    if packed := packed_as(head):
        raise DataError(f"{STDIN} is {packed}, expected text: unpack it on the way (zcat, "
                        "zstdcat), or give --input=FILE")
    return head, len(head) < HEAD_BYTES


class Joined(io.RawIOBase):
    """Some bytes, and then what a file holds, if there is one."""

    def __init__(self, head, file):
        self.head, self.file = io.BytesIO(head), file

    def readable(self):
        return True

    def readinto(self, buffer):
        n = self.head.readinto(buffer)
        return n or self.file is not None and self.file.readinto(buffer) or 0


class Unpacked(io.RawIOBase):
    """What a packed file holds. Of a damaged one all is given that stands before the damage."""

    def __init__(self, file):
        self.file = file

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.file.readinto1(buffer)  # readinto would drop what it has when damage follows

    def close(self):
        self.file.close()
        super().close()


@contextlib.contextmanager
def damage_named(path):
    """Damage that is met while a file is read becomes a BadFile with its name."""
    try:
        yield
    except (EOFError, zlib.error, zstd.ZstdError, OSError) as error:
        raise BadFile(f"{path}: damaged or cut short ({error}); get it again") from None


def not_utf8(path, offset):
    """The DataError for a byte that is no UTF-8."""
    return DataError(f"{path}: not UTF-8 at byte {offset:,}; convert the file, or give "
                     "--on_bad_utf8=replace")


def refuse_utf16(path, data, offset):
    """Raises BadFile for UTF-16: read as UTF-8 it would give thousands of U+FFFD or NULs."""
    if offset:
        return
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Without a mark: every second byte of most alphabets is 0, and in UTF-8 hardly any is.
    probe = data[: PROBED // 2 * 2]
    halves = [half.count(0) for half in (probe[::2], probe[1::2])]
    if marked or len(probe) > 20 and max(halves) > 0.4 * len(probe) > 100 * min(halves):
        raise BadFile(f"{path}: UTF-16, expected UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")


def decoded_lines(path, errors):
    """Yields (number from 1, text with its line end, whether bytes became U+FFFD) of each line.

    Only \\n ends a line: str.splitlines would also cut at characters that belong to a text. The
    text of a line above MAX_LINE is None. errors: of Python's decoders.
    """
    offset = number = 0
    in_long_line = False  # a line of more than MAX_LINE comes in several reads
    with open_binary(path) as file:
        for line in iter(lambda: file.readline(MAX_LINE), b""):
            refuse_utf16(path, line, offset)
            is_rest = in_long_line
            in_long_line = len(line) == MAX_LINE and not line.endswith(b"\n")
            begin, offset, number = offset, offset + len(line), number + (not is_rest)
            if is_rest or in_long_line:
                if not is_rest:
                    yield number, None, False
                continue
            if not begin:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode("utf-8", errors)
            except UnicodeDecodeError as error:
                raise not_utf8(f"{path}:{number}", begin + error.start) from None
            # A text may hold U+FFFD itself; only where bytes were replaced do both differ.
            yield number, text, "\ufffd" in text and text.encode() != line


def read_lines(path):
    """Yields (text, whether bytes that are not UTF-8 became U+FFFD) of a file, for tools.

    A text is a line of a text file, also an empty one, or the field "text" of a line of JSON or a
    row of a table. Raises DataError for damage and for what has no text.
    """
    reader = Reader()
    if kind(path) in TABLES:
        yield from ((text, False) for text in reader.texts(path, kind(path)))
        return
    with damage_named(path):
        if kind(path) in JSON:
            for where, value, replaced in reader.values(path):
                yield reader.text_at(where, value), replaced
            return
        for number, text, replaced in decoded_lines(path, "replace"):
            if text is None:
                raise DataError(f"{path}:{number}: a line of more than {MAX_LINE:,} bytes, "
                                "expected a text a line")
            yield text.rstrip("\r\n"), replaced


def read_strings(path):
    """Yields every string in the objects of a JSON file or in the columns of a table."""
    if kind(path) in TABLES:
        with open_table(path) as (schema, _):
            names = [field.name for field in schema if is_text(field.type)]
        for name in names:
            with open_table(path) as (_, read):
                for array in read(name):
                    values = texts_of_column(array, []).to_pylist()
                    yield from (value.decode("utf-8", "replace") for value in values if value)
        return
    reader = Reader()
    with damage_named(path):
        for where, value, _ in reader.values(path):
            if not isinstance(value, dict):
                raise DataError(f"{where}: expected a JSON object, found {described(value)}")
            yield from strings_of(value)


def strings_of(value):
    """Yields the strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_of(part)


def arrow_batches(file):
    """An open Arrow file -> (schema, iterable of record batches)."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_file(file)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    except pyarrow.ArrowInvalid:  # the `datasets` library writes streams, which have no footer
        file.seek(0)
        reader = pyarrow.ipc.open_stream(file)
        return reader.schema, reader


@contextlib.contextmanager
def open_table(path, n_rows=256):
    """Opens a table -> (schema, function: column name -> its arrays, of a few rows each).

    n_rows: of an array, where the file leaves the choice. Raises BadFile.
    """
    import pyarrow.parquet  # takes half a second, and no other format needs it

    try:
        with pyarrow.OSFile(path) as file:
            if path.lower().endswith(".parquet"):
                # Read by pages: without these, a whole row group, often 1 GB, is read at once.
                parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)

                def read(column):
                    for batch in parquet.iter_batches(n_rows, columns=[column], use_threads=False):
                        yield batch.column(0)

                yield parquet.schema_arrow, read
            else:
                schema, batches = arrow_batches(file)
                yield schema, lambda column: (batch.column(column) for batch in batches)
    except (pyarrow.ArrowException, OSError) as error:
        suffix = kind(path)
        raise BadFile(f"{path}: damaged or cut short (not a whole {suffix} file: {error}); get it "
                      "again") from None


def items_begin(path):
    """-> (bytes before the list or the first item, whether it is a list) of a .json file whose
    items are not one a line, but a list or objects over several lines; None for lines."""
    with open_binary(path) as file:
        start = file.read(PROBED)
    refuse_utf16(path, start, 0)
    rest = start.removeprefix(codecs.BOM_UTF8).lstrip()
    before = len(start) - len(rest)
    if rest.startswith(b"["):
        return before, True
    return (before, False) if re.match(rb"\{\s*\n", rest) else None


# --------------------------------------------------------------------------------------------------
# the text in a JSON object, in a row of a table
#
# A key is a name, or names with dots between: meta.text is the field text of the field meta.


def text_of(record, key):
    """The text under `key` of a JSON value; ValueError says what is there instead."""
    value = record
    if not isinstance(record, dict):
        raise ValueError(f"no text under {key!r} (there is: {type(record).__name__})")
    if key in record:
        value = record[key]
    else:
        for name in key.split("."):
            if not isinstance(value, dict) or name not in value:
                there = ", ".join(keys_of(record)) or "an empty object"
                raise ValueError(f"no text under {key!r} (there is: {there[:200]})")
            value = value[name]
    if not isinstance(value, str):
        raise ValueError(f"no text under {key!r} (there is: {described(value)})")
    return value


def parsed(line):
    """A line of JSON, None for one too long -> its value, or a ValueError with what is wrong."""
    if line is None:
        return ValueError(f"a line of more than {MAX_LINE:,} bytes")
    try:
        # Files that were joined have a byte order mark in the middle.
        return json.loads(line.removeprefix("\ufeff"))
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return ValueError(f"no JSON ({error})")


def keys_of(record, before=""):
    """Keys of a JSON object, of the objects in it with dots between."""
    for name, value in record.items():
        if isinstance(value, dict) and value:
            yield from keys_of(value, f"{before}{name}.")
        else:
            yield before + name


def described(value):
    """A JSON value that is no text, in words."""
    if value is None:
        return "null"
    if isinstance(value, ValueError):
        return str(value)
    names = {list: "a list", dict: "an object", bool: "a boolean", str: "a string"}
    return names.get(type(value), f"the number {value!r:.20}")


def column_of(schema, key, path):
    """-> (name of the column, names of the fields in it that lead to the text). Raises BadFile."""
    from pyarrow import types

    names, inner = schema.names, []
    column = key
    if key not in names:
        column, *inner = key.split(".")
    if names.count(column) > 1:
        raise DataError(f"{path} has {names.count(column)} columns named {column!r}, expected one: "
                        "rename the others")
    found = schema.field(column).type if column in names else None
    for name in inner:
        is_there = found is not None and types.is_struct(found) and found.get_field_index(name) >= 0
        found = found.field(name).type if is_there else None
    if found is None or not (is_text(found) or types.is_null(found)):
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise BadFile(f"{path}: no column of strings {key!r} (there is: {there}), set --text_key; "
                      "or, for token ids, --token_key")
    return column, inner


def is_text(type):
    """Whether an Arrow type is one of strings, or of bytes, which may be UTF-8."""
    from pyarrow import types

    type = type.value_type if types.is_dictionary(type) else type
    return str(type).removeprefix("large_") in ("string", "binary", "string_view", "binary_view")


def texts_of_column(array, inner):
    """Arrow array -> bytes of its texts, None for a missing one."""
    import pyarrow.compute

    if inner:
        array = pyarrow.compute.struct_field(array, inner)
    if pyarrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pyarrow.large_binary())


def refuse_all_null(path, column, inner):
    """Raises BadFile where no row of a table has a text."""
    with open_table(path) as (_, read):
        arrays = (texts_of_column(array, inner) for array in read(column))
        if all(array.null_count == len(array) for array in arrays):
            raise BadFile(f"{path}: all its texts are null")


# --------------------------------------------------------------------------------------------------
# a file -> texts


class Reader:
    """Reads the texts of files as the settings of prepare.py say. Raises DataError for bad ones.

    settings: None for tools, which have none of them: bytes that are no UTF-8 are replaced, all
    else that is bad is refused.
    """

    def __init__(self, settings=None):
        self.has_settings = settings is not None
        settings = settings or {"text_key": "text", "cut_chars": MOST_CUT, "on_bad_line": "refuse",
                                "on_bad_file": "refuse", "on_bad_utf8": "replace"}
        self.text_key, self.cut_chars = settings["text_key"], settings["cut_chars"] or MOST_CUT
        bad_utf8, self.bad_line = settings["on_bad_utf8"], settings["on_bad_line"]
        self.bad_file = settings["on_bad_file"]
        self.cut_all = settings.get("cut_all", False)  # documents of JSON and tables too
        if (bad_utf8 not in ("replace", "refuse") or self.bad_line not in ("refuse", "skip")
                or self.bad_file not in ("refuse", "skip") or self.cut_chars < 100):
            raise DataError("expected --on_bad_utf8=replace or refuse, --on_bad_line and "
                            "--on_bad_file=refuse or skip, --cut_chars=100 or more; there is: "
                            f"{bad_utf8}, {self.bad_line}, {self.bad_file}, {self.cut_chars}")
        self.errors = "strict" if bad_utf8 == "refuse" else "replace"  # of Python's decoders

    def texts(self, path, suffix):
        """Yields the texts of a file, None for a bad line that is skipped.

        After damage that is skipped, BAD_FILE is the last.
        """
        read = self.table if suffix in TABLES else self.json if suffix in JSON else self.plain
        try:
            with damage_named(path):
                for text in read(path):
                    if self.cut_all and text:
                        yield from cut(text, self.cut_chars)
                    else:
                        yield text
        except BadFile as error:
            if self.bad_file == "refuse":
                cure = ", or go on without the rest of it by --on_bad_file=skip"
                raise DataError(f"{error}{cure * self.has_settings}") from None
            print(f"{error}. The rest of it is skipped", file=sys.stderr, flush=True)
            yield BAD_FILE

    def refused(self, where, error):
        """The DataError for a line or a row without a text."""
        cure = "mend it, or give --on_bad_line=skip, or name another field with --text_key"
        return DataError(f"{where}: {error}; {cure if self.has_settings else 'mend or remove it'}")

    def plain(self, path):
        """Yields the documents of a text file: all of it, or pieces of at most cut_chars."""
        decoder = codecs.getincrementaldecoder("utf-8")(self.errors)
        rest, offset, block = "", 0, b"\0"
        with open_binary(path) as file:
            while block:
                block = file.read1(2**20)  # read would drop what it has when damage follows
                refuse_utf16(path, block, offset)
                pending = len(decoder.getstate()[0])  # bytes of a character cut by the last block
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise not_utf8(path, offset - pending + error.start) from None
                if not offset:
                    text = text.removeprefix("\ufeff")  # a byte order mark is not text
                rest += text
                offset += len(block)
                *pieces, rest = cut(rest, self.cut_chars)
                yield from pieces
        yield rest

    def json(self, path):
        """Yields the text of each JSON object, None for a bad one that is skipped."""
        for where, value, _ in self.values(path):
            yield self.text_at(where, value)

    def text_at(self, where, value):
        """A JSON value -> its text, or None for a bad one that is skipped."""
        try:
            if isinstance(value, ValueError):
                raise value
            return text_of(value, self.text_key)
        except ValueError as error:
            if self.bad_line == "refuse":
                raise self.refused(where, error) from None
            return None

    def values(self, path):
        """Yields (where it is, JSON value, whether bytes became U+FFFD) of each line that is not
        blank, or of each item of a list, where the last is not known.

        In place of a line that is no JSON comes a ValueError that says what is wrong.
        """
        found = items_begin(path) if kind(path) == ".json" else None
        if found:
            yield from self.items(path, *found)
            return
        for number, line, replaced in decoded_lines(path, self.errors):
            if line is None or not line.isspace():
                yield f"{path}:{number}", parsed(line), replaced

    def items(self, path, before, is_list):
        """The same for the items of one JSON file, which is never in memory whole."""
        scanner, decoder = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")(self.errors)
        text, at, n, at_end, inside = "", 0, 0, False, False
        with open_binary(path) as file:
            file.read(before)
            while True:
                at = BETWEEN.match(text, at).end()
                begins, where = text[at:at + 1], f"{path}: item {n + 1:,}"
                if is_list and begins == ("]" if inside else "["):
                    at, inside = at + 1, not inside  # a file may hold several lists, if joined
                    continue
                if at_end and not begins and not inside:
                    return
                if is_list and begins and not inside:
                    raise BadFile(f"{where}: found {begins!r} after a list, expected another list "
                                  "or the end of the file")
                try:
                    value, at = scanner.raw_decode(text, at)
                except RecursionError:
                    raise BadFile(f"{where}: nested too deeply") from None
                except ValueError as error:  # an item that goes on in the next block, or no JSON
                    if at_end or len(text) - at > MAX_LINE:
                        raise BadFile(f"{where}: no JSON ({error})") from None
                    # twice as much each time: an item is not parsed again for every block
                    block = file.read(max(2**20, len(text) - at))
                    at_end = not block
                    try:
                        text, at = text[at:] + decoder.decode(block, final=at_end), 0
                    except UnicodeDecodeError as error:
                        raise not_utf8(where, error.start) from None
                else:
                    n += 1
                    yield where, value, False

    def table(self, path):
        """Yields the texts of the text_key column, None for a missing one that is skipped."""
        with open_table(path, 64) as (schema, read):
            column, inner = column_of(schema, self.text_key, path)
            # A parquet file gives one field of a structure without reading the others.
            wanted = self.text_key if path.lower().endswith(".parquet") else column
            n = 0
            for array in read(wanted):
                for value in texts_of_column(array, inner):
                    n += 1
                    if n == 1 and self.bad_line == "refuse" and not value.is_valid:
                        refuse_all_null(path, wanted, inner)
                    yield self.text_of_cell(value.as_py(), f"{path}: row {n:,}")

    def text_of_cell(self, data, where):
        """The bytes of a cell, or None -> its text, or None where a missing one is skipped."""
        if data is None:
            if self.bad_line == "refuse":
                raise self.refused(where, "no text, it is null")
            return None
        try:
            return data.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise not_utf8(where, error.start) from None
