"""Files of token ids that others made: what their headers say, as Sources. pretokenised.py reads the ids.

    .npy .pt                   integers (N,) or (N, T): rows; no Python objects, which could run code
    .bin                       a shard of llm.c or modded-nanogpt (its header says so), Megatron-LM's where its .idx
                               lies beside it, else nanoGPT's: ids alone, of type token_dtype
    .arrow .feather .parquet   a column of lists of integers, `input_ids` if not told

All but Arrow hold their ids as they are from some byte on, so a reader needs no library and a split no copy.
Formats: numpy.lib.format; the zip archives of torch.save; llm.c, dev/data/data_common.py and llmc/dataloader.h;
Megatron-LM, megatron/core/datasets/indexed_dataset.py.

Token ids that others made -> documents for write_dataset, and blocks for a report or a split.

No file is held in memory whole. A document ends in eot_id, which a reader takes away and write_dataset puts back, and
where the format says: at the end of a row, a list, a Megatron document, a file. formats.py says what the files are.
"""

import contextlib
import functools
import glob
import os
import pickle
import re
import struct
import zipfile
from typing import NamedTuple

import numpy as np

from data.bins import DataError, inside
from data.documents import call_tokenizer
from data.tokenizer import Tokenizer
from data.workers import Ids

ID_SUFFIXES = (".npy", ".pt", ".bin", ".arrow", ".feather")  # and .parquet, when it has no text
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: (version, dtype), in a header of 256 int32
MEGATRON = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # code in the .idx: dtype; 6 and 7 are floats


class Source(NamedTuple):
    """A file of `tokens` ids of type `dtype` from byte `offset` on; of Arrow (offset -1), about as many at most."""
    path: str
    dtype: np.dtype
    offset: int
    tokens: int
    width: int = 0  # tokens a row, 0: no rows; of Arrow: what each list must hold, 0: anything
    ends: np.ndarray | None = None  # int64, tokens up to the end of each document, where the format lists them
    column: str = ""  # of Arrow

    @property
    def has_rows(self):
        return bool(self.width or self.column)


# ---------------------------------------------------------------------------------------------------------------------
# files -> sources: the header says all; nothing else is read


def open_sources(paths, token_dtype="", token_key="", sequence_length=0):
    """Paths -> Sources in the same order; DataError for a file that is no ids, cut short, or of rows of another length.

    token_dtype: of .bin files without a header, uint16 if not told. sequence_length: what rows must have, 0: any.
    """
    sources = []
    for path in paths:
        suffix = os.path.splitext(path)[1].lower()
        if suffix == ".bin":
            source = open_bin(path, token_dtype)
        elif suffix in (".npy", ".pt"):
            source = (open_npy if suffix == ".npy" else open_pt)(path)
            length = sequence_length or next((s.width for s in sources if s.width), source.width)
            if source.width not in (0, length):
                raise DataError(f"{path} has rows of {source.width:,} tokens, expected {length:,}"
                                f"{'' if sequence_length else ' as in the files before it'}: prepare the others apart")
        else:
            source = open_arrow(path, token_key or "input_ids", sequence_length)
        sources.append(source)
    if not any(source.tokens for source in sources):
        raise DataError(f"no token in {paths[0]}{' and all other files' if len(paths) > 1 else ''}")
    return sources


def files_of_ids(folder):
    """Paths of the files in a folder, searched through, that may hold token ids; .parquet may hold anything."""
    everything = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
    return [path for path in sorted(everything) if path.lower().endswith(ID_SUFFIXES)]


def links_stay(base, paths, follow_links):
    """`paths`, found in the folder `base`; DataError for one that a link leads out of it. A named file is fine."""
    try:
        for path in paths if os.path.isdir(base) and not follow_links else ():
            inside(base, os.path.relpath(path, base))
    except DataError as error:
        raise DataError(f"{error}, or give --follow_links=1 if the link is yours") from None
    return paths


def of_array(path, dtype, shape, offset, is_contiguous):
    """Source of an array of .npy or .pt."""
    if dtype.kind not in "iu":
        raise DataError(f"{path} holds {dtype} numbers, expected token ids: np.uint16 or another integer type")
    if len(shape) not in (1, 2):
        raise DataError(f"{path} holds an array of shape {shape}, expected (tokens,) or (rows, tokens a row)")
    if not is_contiguous:
        raise DataError(f"{path} is stored column by column; save np.ascontiguousarray(ids), or ids.contiguous()")
    return Source(path, dtype, offset, int(np.prod(shape)), shape[1] if len(shape) == 2 else 0)


def open_npy(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # maps, and only the header is read
    except Exception as error:  # a damaged header is read as Python and fails in as many ways
        if re.search("pickle|Python objects", str(error)):
            raise DataError(f"{path} holds Python objects (a pickle), which can run code: refused. Expected an array "
                            "of integers, as np.save writes it") from None
        raise DataError(f"{path}: not a whole .npy file ({error})") from None
    if not isinstance(array, np.memmap):
        raise DataError(f"{path}: expected one array, as np.save writes it; there is {type(array).__name__}")
    return of_array(path, array.dtype, array.shape, array.offset, array.flags.c_contiguous)


def open_pt(path):
    import torch  # a second and a half, and only this kind of file needs it

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        records = [r for r in zipfile.ZipFile(path).infolist() if re.search(r"/data/\d+$", r.filename)]
    except pickle.UnpicklingError:
        raise DataError(f"{path} holds Python objects (a pickle), which can run code: refused. Expected a tensor of "
                        "integers, as torch.save(ids, path) writes it") from None
    except Exception as error:  # zipfile, pickle and torch each have their own word for a damaged file
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"{path}: not a whole .pt file of torch 1.6 or later ({reason})") from None
    if isinstance(tensor, dict) and len(tensor) == 1:
        [tensor] = tensor.values()
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or len(records) != 1:
        raise DataError(f"{path} holds {type(tensor).__name__}, expected one tensor of ids: torch.save(ids, path)")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized or records[0].compress_type:
        raise DataError(f"{path} holds {tensor.dtype} numbers, expected token ids: tensor.to(torch.int32)")
    with open(path, "rb") as file:  # the bytes of the tensor lie in the archive as they are, behind their local header
        lengths = struct.unpack("<HH", os.pread(file.fileno(), 4, records[0].header_offset + 26))
    dtype = tensor[:0].numpy().dtype
    offset = records[0].header_offset + 30 + sum(lengths) + tensor.storage_offset() * dtype.itemsize
    return of_array(path, dtype, tuple(tensor.shape), offset, tensor.is_contiguous())


def open_bin(path, token_dtype):
    index = os.path.splitext(path)[0] + ".idx"
    if os.path.isfile(index):
        return open_megatron(path, index)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        magic, version, n = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        some = np.frombuffer(os.pread(file.fileno(), 8192, 0)[: min(size, 8192) // 2 * 2], "<u2")
    if magic in LLM_C:
        expected, dtype = LLM_C[magic][0], np.dtype(LLM_C[magic][1])
        if version != expected or size != 1024 + n * dtype.itemsize:
            raise DataError(f"{path}: its header says version {version}, {n:,} tokens; expected version {expected} and "
                            f"{1024 + n * dtype.itemsize:,} bytes, there are {size:,}: cut short, or another format")
        return Source(path, dtype, 1024, n)
    try:
        dtype = np.dtype(token_dtype or "uint16").newbyteorder("<")
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "iu":
        raise DataError(f"--token_dtype={token_dtype}: expected uint16, uint32, int32 or int64")
    if size % dtype.itemsize:
        raise DataError(f"{path} holds {size:,} bytes, no multiple of {dtype.itemsize}: cut short, or not {dtype.name}")
    if dtype.itemsize == 2 and len(some) > 64 and not some[1::2].any() and some.any():
        raise DataError(f"{path}: every second id is 0, so it holds 32-bit ids: --token_dtype=uint32")
    return Source(path, dtype, 0, size // dtype.itemsize)


def open_megatron(path, index):
    size = os.path.getsize(index)
    with open(index, "rb") as file:
        head = file.read(34)
        mark, version, code, n, n_docs = struct.unpack("<9sQBQQ", head.ljust(34, b"\0"))
        if mark != b"MMIDIDX\0\0" or version != 1 or not 0 <= size - 34 - 12 * n - 8 * n_docs <= n:
            raise DataError(f"{index}: no whole index of Megatron-LM ({size:,} bytes for {n:,} sequences and "
                            f"{n_docs:,} documents); without it, {path} is read as ids alone")
        if code not in MEGATRON:
            raise DataError(f"{index}: code {code} is no integer type, expected one of {sorted(MEGATRON)}")
        lengths, starts, documents = (np.fromfile(file, dtype, count) for dtype, count in
                                      (("<i4", n), ("<i8", n), ("<i8", n_docs)))
    dtype, ends = np.dtype(MEGATRON[code]), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    whole = (lengths >= 0).all() and np.array_equal(starts, ends[:-1] * dtype.itemsize)
    if not whole or documents.min(initial=0) < 0 or documents.max(initial=0) > n or (np.diff(documents) < 0).any():
        raise DataError(f"{index}: its sequences do not follow each other, or its documents are none of them: damaged")
    if os.path.getsize(path) != ends[-1] * dtype.itemsize:
        raise DataError(f"{path} holds {os.path.getsize(path):,} bytes, its index says {ends[-1]:,} tokens of "
                        f"{dtype.itemsize} bytes: cut short, or another file")
    return Source(path, dtype, 0, int(ends[-1]), ends=ends[documents])


@contextlib.contextmanager
def arrow_file(path):
    """An Arrow or Parquet file -> (its schema, a function of a column that yields its arrays)."""
    import pyarrow  # half a second, and only these files need it
    import pyarrow.parquet

    try:
        with pyarrow.OSFile(path) as file:
            if path.lower().endswith(".parquet"):
                parquet = pyarrow.parquet.ParquetFile(file)
                schema = parquet.schema_arrow
                batches = functools.partial(parquet.iter_batches, 256, use_threads=False)
            else:
                try:
                    reader = pyarrow.ipc.open_file(file)
                    found = (reader.get_batch(i) for i in range(reader.num_record_batches))
                except pyarrow.ArrowInvalid:  # as the `datasets` library writes them: without a footer
                    file.seek(0)
                    reader = found = pyarrow.ipc.open_stream(file)
                schema, batches = reader.schema, lambda columns: found
            yield schema, lambda column: (batch.column(column) for batch in batches(columns=[column]))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Arrow, Feather or Parquet file ({error})") from None


def holds_ids(path, token_key, text_key):
    """Whether a file is of token ids. A .parquet file is when token_key says so, or it has input_ids and no text."""
    if not path.lower().endswith(".parquet"):
        return path.lower().endswith(ID_SUFFIXES)
    if token_key:
        return True
    with contextlib.suppress(DataError), arrow_file(path) as (schema, _):
        return text_key not in schema.names and "input_ids" in schema.names
    return False


def open_arrow(path, column, sequence_length):
    import pyarrow

    with arrow_file(path) as (schema, _):
        kind = schema.field(column).type if schema.names.count(column) == 1 else None
        is_lists = any(test(kind) for test in (pyarrow.types.is_list, pyarrow.types.is_large_list,
                                               pyarrow.types.is_fixed_size_list)) if kind else False
        if not (is_lists and pyarrow.types.is_integer(kind.value_type)):
            there = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(f"{path}: no column of lists of integers {column!r} (there is: {there}), set --token_key")
        dtype = np.dtype(kind.value_type.to_pandas_dtype())
    return Source(path, dtype, -1, os.path.getsize(path) // dtype.itemsize, sequence_length, column=column)


BLOCK = 2**20  # tokens read at a time
LONGEST = 2**20  # tokens of a document; a longer one is cut, counted, so that memory is bounded


class Input(NamedTuple):
    """Files of token ids and what their ids mean."""
    sources: list
    tok: Tokenizer
    spec: str  # what loads tok
    pad_id: int
    packed: bool  # rows are a stream cut anywhere


def open_input(paths, tokenizer="", vocab_size=0, eot_id=-1, pad_id=-1, rows="auto", **of_files):
    """Paths, a tokenizer or a number of ids, how to read -> Input; prints what it takes for granted. DataError."""
    named = "" if tokenizer.startswith("bpe:") else tokenizer
    if bool(named) == bool(vocab_size) or named and eot_id != -1:
        raise DataError("token ids do not say what they stand for: expected --tokenizer=gpt2, another published one or "
                        "a saved folder; or --vocab_size=N --eot_id=M for ids whose tokenizer is not at hand, not both")
    spec = named or f"ids:{vocab_size}:{eot_id}"
    tok = call_tokenizer(Tokenizer.load, spec)
    if not -1 <= pad_id < tok.n_vocab:
        raise DataError(f"pad_id = {pad_id:,}: expected an id of {tok.name}, 0 to {n_ids(tok) - 1:,}, or -1")
    sources, pad_id = open_sources(paths, **of_files), tok.pad_id if pad_id == -1 else pad_id
    packed, note = is_packed(sources, rows, tok, pad_id)
    if note:
        print(note, flush=True)
    return Input(sources, tok, spec, pad_id, packed)


# ---------------------------------------------------------------------------------------------------------------------
# sources -> blocks of ids


def arrow_rows(source):
    """Yields (ids of some lists one after the other int64, their lengths int64)."""
    import pyarrow.compute

    row = 0
    with arrow_file(source.path) as (_, column):
        for lists in column(source.column):
            lists.validate(full=True)  # wrong offsets would read other memory
            lengths = pyarrow.compute.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
            ids, wrong = lists.flatten(), np.flatnonzero(lengths != (source.width or lengths))
            if ids.null_count or len(wrong):
                raise DataError(f"{source.path}: " + (
                    f"list {row + wrong[0]:,} has {lengths[wrong[0]]:,} tokens, expected {source.width:,}" if len(wrong)
                    else f"an id is missing (null) in lists {row:,} to {row + len(lists) - 1:,}"))
            yield ids.to_numpy(zero_copy_only=False).astype(np.int64), lengths.astype(np.int64)
            row += len(lists)


def row_ends(at, n, width):
    """Where rows of `width` end among the n ids from number `at` on."""
    return np.arange(at // width * width + width, at + n + 1, width) - at


def raw_rows(source, start):
    """Yields (number of the first id, ids, where rows and listed documents end among them) from id `start` on."""
    with open(source.path, "rb", buffering=0) as file:
        for at in range(start, source.tokens, BLOCK):
            ids, ends = np.empty(min(BLOCK, source.tokens - at), source.dtype), np.zeros(0, np.int64)
            if os.preadv(file.fileno(), [ids], source.offset + at * source.dtype.itemsize) != ids.nbytes:
                raise DataError(f"{source.path} was cut while in use")
            if source.ends is not None:
                ends = source.ends[slice(*np.searchsorted(source.ends, (at, at + len(ids)), "right"))]
            elif source.width:
                ends = at + row_ends(at, len(ids), source.width)
            yield at, ids, ends - at


def n_ids(tok):
    """Ids from this number on are not of the data; [PAD] is the first id that Tokenizer.of_ids adds."""
    return tok.n_vocab if tok.has_text else tok.pad_id


def blocks(source, start, tok, packed):
    """Yields (number of the first id, ids uint32, where documents end among them beside eot_id) from id `start` on.

    packed: rows end nothing. A list of Arrow that does not end in eot_id gets one, which counts as an id, so that an
    empty list has a place too. DataError for an id out of range.
    """
    def in_range(ids, at):
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_ids(tok):
            wrong = np.flatnonzero((ids < 0) | (ids >= n_ids(tok)))[0]
            raise DataError(f"{source.path}: token {at + wrong:,} is id {ids[wrong]:,}, expected 0 to "
                            f"{n_ids(tok) - 1:,} of {tok.name}: another tokenizer, another vocab_size, or no token ids")
        return ids

    if not source.column:
        for at, ids, ends in raw_rows(source, start):
            yield at, in_range(ids, at).astype("<u4"), ends[:0] if packed and source.ends is None else ends
        return
    at = n_read = 0
    for ids, lengths in arrow_rows(source):
        ids, ends, n_read = in_range(ids, n_read), np.cumsum(lengths), n_read + len(ids)
        if not packed:
            ids = np.insert(ids, ends[(lengths == 0) | (np.append(ids, 0)[ends - 1] != tok.eot_id)], tok.eot_id)
        if at + len(ids) > start:
            skip = max(0, start - at)
            yield at + skip, ids[skip:].astype("<u4"), ends[:0]
        at += len(ids)


def is_packed(sources, rows, tok, pad_id):
    """Whether rows are a stream cut anywhere -> (bool, a sentence that says what was taken for granted, or "").

    rows: "auto" takes them for one when eot_id lies inside those looked at, else each for a document; or "documents",
    "packed".
    """
    if rows not in ("auto", "documents", "packed"):
        raise DataError(f"--rows={rows}: expected auto, documents or packed")
    source = next((source for source in sources if source.has_rows), None)
    if rows != "auto" and not source:
        raise DataError(f"--rows={rows}: {sources[0].path} has no rows")
    if rows != "auto":
        return rows == "packed", ""
    same_length, cut = True, f"a document of more than {LONGEST:,} tokens is cut"
    if source and source.column:
        ids, lengths = next(arrow_rows(source), (np.zeros(0, np.int64), np.zeros(0, np.int64)))
        same_length, ends = len(set(lengths.tolist())) == 1, np.cumsum(lengths)
    else:
        _, ids, ends = next(raw_rows(source or sources[0], 0), (0, np.zeros(0, np.int64), np.zeros(0, np.int64)))
    is_end = ids == tok.eot_id
    if not source:
        if is_end.any() or sources[0].ends is not None:
            return False, ""
        return False, f"no eot_id {tok.eot_id} in the first {len(ids):,} tokens of {sources[0].path}: {cut}"
    inside = is_end[:-1] & ~is_end[1:] & (ids[1:] != pad_id)
    inside[ends[(ends > 0) & (ends < len(ids))] - 1] = False
    if inside.any() and same_length:
        return True, (f"eot_id {tok.eot_id} lies inside the rows of {source.path}, so they are taken for one stream "
                      "cut into rows; --rows=documents if each is a text of its own")
    return False, (f"eot_id {tok.eot_id} does not lie inside the rows of {source.path}, so each row is taken for a "
                   f"document; --rows=packed if texts go on in the next row; {cut}")


# ---------------------------------------------------------------------------------------------------------------------
# blocks -> documents


def pieces(some_blocks, eot_id, pad_id):
    """Blocks (number of the first id, ids, ends) -> (ids of a document with its eot_id, number of the id after it).

    Padding ends what is before it, and comes with what follows. A document longer than LONGEST is cut there, at the
    same places wherever the blocks begin.
    """
    rest, first = np.zeros(0, "<u4"), 0
    for at, ids, ends in some_blocks:
        ids, first, ends, begin = np.concatenate([rest, ids]), at - len(rest), ends + len(rest), 0
        is_pad = ids == pad_id
        ends = np.union1d(ends, np.flatnonzero(is_pad[1:] & ~is_pad[:-1]) + 1) if is_pad.any() else ends
        for end in np.union1d(np.flatnonzero(ids == eot_id) + 1, ends).tolist():
            for stop in (*range(begin + LONGEST, end, LONGEST), end):
                yield ids[begin:stop], first + stop
                begin = stop
        for stop in range(begin + LONGEST, len(ids) + 1, LONGEST):
            yield ids[begin:stop], first + stop
            begin = stop
        rest, first = ids[begin:], first + begin
    if len(rest):
        yield rest, first + len(rest)


def content(ids, eot_id, pad_id):
    """Ids of a piece -> (without eot_id and padding, {what was left out: how much})."""
    whole = ids[:-1] if ids[-1] == eot_id else ids
    kept = whole if pad_id == eot_id else whole[whole != pad_id]
    left_out = {"padding_tokens": len(whole) - len(kept)} if len(kept) < len(whole) else {}
    if not len(whole):  # nothing between two ends: what a row is filled up with, where that is eot_id
        left_out = {"padding_tokens" if pad_id == eot_id else "empty": 1}
    elif len(ids) == LONGEST and ids[-1] != eot_id:
        left_out["documents_cut"] = 1
    return kept, left_out


def read_documents(sources, tok, pad_id, packed):
    """Sources -> `documents` for write_dataset; a position is [number of the file, ids read of it]."""
    def documents(position):
        first, start = position or (0, 0)
        for number in range(first, len(sources)):
            found = blocks(sources[number], start if number == first else 0, tok, packed)
            for ids, end in pieces(found, tok.eot_id, pad_id):
                kept, left_out = content(ids, tok.eot_id, pad_id)
                yield Ids(kept, int(tok.n_bytes[kept].sum()), left_out), None, [number, end]

    return documents
