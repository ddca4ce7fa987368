"""Reads files of token ids that other programs made, as documents or as blocks of ids.

    .npy .pt                   an integer array of shape (N,), or (N, T) with T tokens a row
    .bin                       Megatron-LM where an .idx file lies beside it; llm.c or
                               modded-nanogpt where the header says so; else nanoGPT, which is
                               ids alone, of type token_dtype
    .arrow .feather .parquet   a column of lists of integers, `input_ids` unless token_key is set

Data goes from paths to Sources (open_sources, which reads headers only), to blocks of ids
(read_blocks), to documents (read_documents). No file is held in memory whole.

All formats but Arrow store their ids as they are from some byte on, so a path, a dtype and an
offset describe them, and a split can refer to them instead of copying them.

A document ends at eot_id and where the format ends one: at the end of a row, a list, a Megatron
document or a file. Documents are yielded without eot_id; write_dataset adds it again.

The formats are described in numpy.lib.format; the zip archives of torch.save; llm.c,
dev/data/data_common.py and llmc/dataloader.h; Megatron-LM, core/datasets/indexed_dataset.py.
"""

import contextlib
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
from data.texts import TABLES, open_table
from data.tokenizer import Tokenizer
from data.workers import Ids

ID_SUFFIXES = (".npy", ".pt", ".bin", ".arrow", ".feather")  # and .parquet, where it has no text
BLOCK = 2**20  # tokens read at a time
LONGEST = 2**20  # tokens of a document; a longer one is cut, to bound memory, and counted
NO_ENDS = np.zeros(0, np.int64)

# llm.c: first number of the header -> (version, dtype of the ids). The header is 256 int32.
LLM_C = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
LLM_C_HEADER = 1024  # bytes
# Megatron-LM: type code in the .idx file -> dtype. Codes 6 and 7 are floats.
MEGATRON = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class Source(NamedTuple):
    """A file of `tokens` ids of type `dtype` that begin at byte `offset`.

    An Arrow file has no such byte: its offset is -1, and `tokens` is an upper estimate.
    """

    path: str
    dtype: np.dtype
    offset: int
    tokens: int
    width: int = 0  # tokens a row, 0: no rows; of Arrow: what each list must hold, 0: any number
    ends: np.ndarray | None = None  # int64, tokens up to the end of each document, if listed
    column: str = ""  # of Arrow


class Input(NamedTuple):
    """Files of token ids and what their ids mean."""

    sources: list
    tok: Tokenizer
    spec: str  # what loads tok: a published name, a folder or ids:VOCAB_SIZE:EOT_ID
    pad_id: int
    packed: bool  # rows are one stream of documents, cut anywhere


def open_input(paths, tokenizer="", vocab_size=0, eot_id=-1, pad_id=-1, rows="auto", **of_files):
    """Opens files of token ids -> Input. Prints what it assumes about rows. Raises DataError.

    The ids are those of `tokenizer` (published name or folder), or else there are vocab_size of
    them and eot_id ends a document. pad_id: -1 is that of the tokenizer. of_files: the settings
    of open_sources.
    """
    # bpe, the default of prepare.py, is trained on text: for ids it means that none is given.
    named = "" if tokenizer.startswith("bpe") else tokenizer
    if bool(named) == bool(vocab_size) or named and eot_id != -1:
        raise DataError("token ids do not say what they stand for: expected --tokenizer=gpt2, "
                        "another published one or a saved folder; or --vocab_size=N --eot_id=M for "
                        "ids whose tokenizer is not at hand, not both")
    spec = named or f"ids:{vocab_size}:{eot_id}"
    tok = call_tokenizer(Tokenizer.load, spec)
    if not -1 <= pad_id < tok.n_vocab:
        raise DataError(f"pad_id = {pad_id:,}: expected an id of {tok.name}, 0 to "
                        f"{n_data_ids(tok) - 1:,}, or -1")
    if pad_id == -1:
        pad_id = tok.pad_id
    sources = open_sources(paths, **of_files)
    packed, note = is_packed(sources, rows, tok.eot_id, pad_id)
    if note:
        print(note, flush=True)
    return Input(sources, tok, spec, pad_id, packed)


def n_data_ids(tok):
    """How many ids may occur in data: without a text tokenizer, those before the added specials."""
    return tok.n_vocab if tok.has_text else tok.pad_id  # [PAD] is the first that of_ids adds


# -----------------------------------------------------------------------------
# paths


def files_of_ids(folder):
    """Paths of all files below a folder that may hold token ids; .parquet is not among them."""
    everything = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
    return [path for path in sorted(everything) if path.lower().endswith(ID_SUFFIXES)]


def holds_ids(path, token_key, text_key):
    """Whether a file holds token ids, not text.

    A table does when token_key is set, or when it has input_ids and no text_key column. With
    neither of them, or damaged, a .parquet file is taken for text, the others for ids.
    """
    if not path.lower().endswith(TABLES):
        return path.lower().endswith(ID_SUFFIXES)
    if token_key:
        return True
    with contextlib.suppress(DataError), open_table(path) as (schema, _):
        if "input_ids" in schema.names or text_key.split(".")[0] in schema.names:
            return text_key.split(".")[0] not in schema.names
    return path.lower().endswith(ID_SUFFIXES)


def links_stay(base, paths, follow_links):
    """Returns `paths`, which were found in `base`; DataError for a link that leads out of it.

    Where `base` is no folder the user has named the file itself, and a link is fine.
    """
    if follow_links or not os.path.isdir(base):
        return paths
    try:
        for path in paths:
            inside(base, os.path.relpath(path, base))
    except DataError as error:
        raise DataError(f"{error}, or give --follow_links=1 if the link is yours") from None
    return paths


# -----------------------------------------------------------------------------
# paths -> Sources: nothing but headers is read


def open_sources(paths, token_dtype="", token_key="", sequence_length=0):
    """Paths -> Sources in the same order.

    token_dtype: of .bin files without a header; "" is uint16. token_key: column of Arrow files;
    "" is input_ids. sequence_length: tokens that each row must have; 0: any number, but the same
    in all .npy and .pt files. DataError: a file holds no ids, is cut short or has other rows.
    """
    if sequence_length < 0:
        raise DataError(f"--sequence_length={sequence_length}: expected a number of tokens, or 0")
    sources, width = [], sequence_length
    for path in paths:
        suffix = os.path.splitext(path)[1].lower()
        if suffix == ".bin":
            source = open_bin(path, token_dtype)
        elif suffix == ".npy":
            source = open_npy(path)
        elif suffix == ".pt":
            source = open_pt(path)
        else:
            source = open_arrow(path, token_key or "input_ids", sequence_length)
        width = width or source.width
        if source.width not in (0, width):
            why = "" if sequence_length else " as in the files before it"
            raise DataError(f"{path} has rows of {source.width:,} tokens, expected {width:,}{why}: "
                            "prepare the others apart")
        sources.append(source)
    if not any(source.tokens for source in sources):
        others = " and all other files" if len(paths) > 1 else ""
        raise DataError(f"no token in {paths[0]}{others}")
    return sources


def array_source(path, dtype, shape, offset, is_contiguous):
    """Source of an array in a .npy or .pt file."""
    if dtype.kind not in "iu":
        raise DataError(f"{path} holds {dtype} numbers, expected token ids: np.uint16 or another "
                        "integer type")
    if len(shape) not in (1, 2):
        expected = "(tokens,) or (rows, tokens a row)"
        raise DataError(f"{path} holds an array of shape {shape}, expected {expected}")
    if not is_contiguous:
        raise DataError(f"{path} is stored column by column; save np.ascontiguousarray(ids), "
                        "or ids.contiguous()")
    width = shape[1] if len(shape) == 2 else 0
    return Source(path, dtype, offset, int(np.prod(shape)), width)


def pickle_error(path, expected):
    return DataError(f"{path} holds Python objects (a pickle), which can run code: refused. "
                     f"Expected {expected}")


def open_npy(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: reads the header only
    except Exception as error:  # numpy evaluates the header as Python: damage can raise anything
        if re.search("pickle|Python objects", str(error)):
            raise pickle_error(path, "an array of integers, as np.save writes it") from None
        raise DataError(f"{path}: not a whole .npy file ({error})") from None
    if not isinstance(array, np.memmap):
        there = type(array).__name__
        raise DataError(f"{path}: expected one array, as np.save writes it; there is {there}")
    return array_source(path, array.dtype, array.shape, array.offset, array.flags.c_contiguous)


def open_pt(path):
    import torch  # takes 1.5 s, and no other format needs it

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        archive = zipfile.ZipFile(path).infolist()
    except pickle.UnpicklingError:
        expected = "a tensor of integers, as torch.save(ids, path) writes it"
        raise pickle_error(path, expected) from None
    except Exception as error:  # zipfile, pickle and torch each raise their own errors on damage
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"{path}: not a whole .pt file of torch 1.6 or later ({reason})") from None
    storages = [record for record in archive if re.search(r"/data/\d+$", record.filename)]
    if isinstance(tensor, dict) and len(tensor) == 1:
        [tensor] = tensor.values()
    is_dense = (isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
                and tensor.ndim > 0)
    if not is_dense or len(storages) != 1:
        raise DataError(f"{path} holds {type(tensor).__name__}, expected one tensor of ids: "
                        "torch.save(ids, path)")
    [storage] = storages
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
    if not is_integer or storage.compress_type:
        raise DataError(f"{path} holds {tensor.dtype} numbers, expected token ids: "
                        "tensor.to(torch.int32)")
    # In the zip archive the bytes of the tensor follow a local header of 30 bytes, a name and an
    # extra field, whose lengths stand at byte 26 of that header.
    with open(path, "rb") as file:
        file.seek(storage.header_offset + 26)
        lengths = struct.unpack("<HH", file.read(4))
    dtype = tensor[:0].numpy().dtype
    begin = storage.header_offset + 30 + sum(lengths)
    offset = begin + tensor.storage_offset() * dtype.itemsize
    return array_source(path, dtype, tuple(tensor.shape), offset, tensor.is_contiguous())


def open_bin(path, token_dtype):
    index = os.path.splitext(path)[0] + ".idx"
    if os.path.isfile(index):
        return open_megatron(path, index)
    with open(path, "rb") as file:
        magic, version, n_tokens = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
    if magic in LLM_C:
        return open_llm_c(path, *LLM_C[magic], version, n_tokens)
    return open_nanogpt(path, token_dtype or "uint16")


def open_llm_c(path, expected_version, dtype, version, n_tokens):
    dtype, size = np.dtype(dtype), os.path.getsize(path)
    expected = LLM_C_HEADER + n_tokens * dtype.itemsize
    if version != expected_version or size != expected:
        raise DataError(f"{path}: its header says version {version}, {n_tokens:,} tokens; expected "
                        f"version {expected_version} and {expected:,} bytes, there are {size:,}: "
                        "cut short, or another format")
    return Source(path, dtype, LLM_C_HEADER, n_tokens)


def open_nanogpt(path, token_dtype):
    size = os.path.getsize(path)
    try:
        dtype = np.dtype(token_dtype).newbyteorder("<")
    except (TypeError, ValueError, SyntaxError):  # numpy's, for what is no name of a type
        dtype = np.dtype(object)
    if dtype.kind not in "iu":
        raise DataError(f"--token_dtype={token_dtype}: expected uint16, uint32, int32 or int64")
    if size % dtype.itemsize:
        raise DataError(f"{path} holds {size:,} bytes, no multiple of {dtype.itemsize}: cut short, "
                        f"or not {dtype.name}")
    if dtype.itemsize == 2:
        first = np.fromfile(path, "<u2", 4096)
        if len(first) > 64 and first.any() and not first[1::2].any():
            raise DataError(f"{path}: every second id is 0, so it holds 32-bit ids: "
                            "--token_dtype=uint32")
    return Source(path, dtype, 0, size // dtype.itemsize)


def open_megatron(path, index):
    """Source of a Megatron-LM .bin file; its .idx file lists sequences and documents of them."""
    size, header = os.path.getsize(index), struct.Struct("<9sQBQQ")
    with open(index, "rb") as file:
        head = file.read(header.size).ljust(header.size, b"\0")
        magic, version, code, n, n_documents = header.unpack(head)
        # Multimodal indexes append one byte for each sequence.
        extra = size - header.size - 12 * n - 8 * n_documents
        if magic != b"MMIDIDX\0\0" or version != 1 or not 0 <= extra <= n:
            raise DataError(f"{index}: no whole index of Megatron-LM ({size:,} bytes for {n:,} "
                            f"sequences and {n_documents:,} documents); without it, {path} is read "
                            "as ids alone")
        if code not in MEGATRON:
            raise DataError(f"{index}: code {code} is no integer type, expected one of "
                            f"{sorted(MEGATRON)}")
        lengths = np.fromfile(file, "<i4", n)  # tokens of each sequence
        starts = np.fromfile(file, "<i8", n)  # first byte of each sequence
        documents = np.fromfile(file, "<i8", n_documents)  # sequences before each document bound
    dtype = np.dtype(MEGATRON[code])
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if ((lengths < 0).any() or not np.array_equal(starts, ends[:-1] * dtype.itemsize)
            or (np.diff(documents) < 0).any()
            or documents.min(initial=0) < 0 or documents.max(initial=0) > n):
        raise DataError(f"{index}: damaged, its sequences do not follow each other or its "
                        "documents are not made of them")
    size = os.path.getsize(path)
    if size != ends[-1] * dtype.itemsize:
        raise DataError(f"{path} holds {size:,} bytes, its index says {ends[-1]:,} tokens of "
                        f"{dtype.itemsize} bytes: cut short, or another file")
    return Source(path, dtype, 0, int(ends[-1]), ends=ends[documents])


def open_arrow(path, column, sequence_length):
    from pyarrow import types

    with open_table(path) as (schema, _):
        kind = schema.field(column).type if schema.names.count(column) == 1 else None
        is_list = kind is not None and (
            types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
        if not is_list or not types.is_integer(kind.value_type):
            there = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise DataError(f"{path}: no column of lists of integers {column!r} "
                            f"(there is: {there}), set --token_key")
        dtype = np.dtype(kind.value_type.to_pandas_dtype())
    most = os.path.getsize(path) // dtype.itemsize
    return Source(path, dtype, -1, most, sequence_length, column=column)


# -----------------------------------------------------------------------------
# Sources -> blocks: (number of the first id, ids, ends). `ends` are the places in a block where the
# format ends a row or a document. The rest of the code calls read_blocks.


def raw_blocks(source, start):
    """Yields blocks of a Source that is not Arrow, from id `start` on, in the type of the file."""
    with open(source.path, "rb", buffering=0) as file:
        for at in range(start, source.tokens, BLOCK):
            ids, ends = np.empty(min(BLOCK, source.tokens - at), source.dtype), NO_ENDS
            byte = source.offset + at * source.dtype.itemsize
            if os.preadv(file.fileno(), [ids], byte) != ids.nbytes:
                raise DataError(f"{source.path} was cut while in use")
            if source.ends is not None:
                low, high = np.searchsorted(source.ends, (at, at + len(ids)), "right")
                ends = source.ends[low:high] - at
            elif source.width:
                ends = row_ends(at, len(ids), source.width)
            yield at, ids, ends


def row_ends(at, n, width):
    """Where rows of `width` tokens end in a block of n ids that begins with id number `at`."""
    return np.arange(at // width * width + width, at + n + 1, width) - at


def raw_lists(source):
    """Yields (ids of some lists of an Arrow file, joined; lengths of these lists), both int64."""
    import pyarrow.compute

    first = 0  # number of the first list of a batch
    with open_table(source.path) as (_, read):
        for lists in read(source.column):
            lists.validate(full=True)  # wrong offsets would read other memory
            lengths = pyarrow.compute.list_value_length(lists).fill_null(0)
            lengths, ids = lengths.to_numpy(zero_copy_only=False), lists.flatten()
            wrong = np.flatnonzero(lengths != source.width) if source.width else NO_ENDS
            if len(wrong):
                raise DataError(f"{source.path}: list {first + wrong[0]:,} has "
                                f"{lengths[wrong[0]]:,} tokens, expected {source.width:,}")
            if ids.null_count:
                raise DataError(f"{source.path}: an id is missing (null) in lists {first:,} to "
                                f"{first + len(lists) - 1:,}")
            yield ids.to_numpy(zero_copy_only=False).astype(np.int64), lengths.astype(np.int64)
            first += len(lists)


def is_packed(sources, rows, eot_id, pad_id):
    """What rows are -> (True if they are one stream cut into rows, what was assumed or "").

    rows: "documents" and "packed" say it. "auto" decides from the first rows: they are packed when
    eot_id lies inside one of them, else each row is a document.
    """
    if rows not in ("auto", "documents", "packed"):
        raise DataError(f"--rows={rows}: expected auto, documents or packed")
    source = next((source for source in sources if source.width or source.column), None)
    if rows != "auto":
        if not source:
            raise DataError(f"--rows={rows}: {sources[0].path} has no rows")
        return rows == "packed", ""
    cut = f"a document of more than {LONGEST:,} tokens is cut"
    if not source:
        _, ids, _ = next(raw_blocks(sources[0], 0), (0, NO_ENDS, NO_ENDS))
        if sources[0].ends is not None or (ids == eot_id).any():
            return False, ""
        return False, (f"no eot_id {eot_id} in the first {len(ids):,} tokens of "
                       f"{sources[0].path}: {cut}")
    if eot_inside_rows(source, eot_id, pad_id):
        return True, (f"eot_id {eot_id} lies inside the rows of {source.path}, so they are taken "
                      "for one stream cut into rows; --rows=documents if each is a text of its own")
    return False, (f"eot_id {eot_id} does not lie inside the rows of {source.path}, so each row is "
                   f"taken for a document; --rows=packed if texts go on in the next row; {cut}")


def eot_inside_rows(source, eot_id, pad_id):
    """Whether, in the first rows of a file, text goes on after an eot_id in the same row."""
    if source.column:
        ids, lengths = next(raw_lists(source), (NO_ENDS, NO_ENDS))
        if len(np.unique(lengths)) != 1:  # a stream is cut into rows of one length
            return False
        ends = np.cumsum(lengths)
    else:
        _, ids, ends = next(raw_blocks(source, 0), (0, NO_ENDS, NO_ENDS))
    is_eot = ids == eot_id
    text_follows = is_eot[:-1] & ~is_eot[1:] & (ids[1:] != pad_id)
    text_follows[ends[(ends > 0) & (ends < len(ids))] - 1] = False  # that is the next row
    return text_follows.any()


def read_blocks(source, start, tok, packed):
    """Yields blocks with ids uint32 from id `start` on; `ends` are those of documents.

    packed: the end of a row ends no document. A list of Arrow that does not end in eot_id gets
    one, which counts as an id: so every list, also an empty one, has a place where reading can go
    on. DataError for an id out of range.
    """
    if not source.column:
        for at, ids, ends in raw_blocks(source, start):
            check_range(source, at, ids, tok)
            if packed and source.ends is None:
                ends = NO_ENDS
            yield at, ids.astype("<u4"), ends
        return
    at = n_read = 0  # ids so far, with and without those added
    for ids, lengths in raw_lists(source):
        check_range(source, n_read, ids, tok)
        n_read += len(ids)
        if not packed:
            ends = np.cumsum(lengths)
            last = np.append(ids, 0)[ends - 1]  # the appended 0 is for a batch without any id
            ids = np.insert(ids, ends[(lengths == 0) | (last != tok.eot_id)], tok.eot_id)
        skip = max(0, start - at)
        if skip < len(ids):
            yield at + skip, ids[skip:].astype("<u4"), NO_ENDS
        at += len(ids)


def check_range(source, at, ids, tok):
    """DataError when one of the ids, the first of which is number `at`, is not of the tokenizer."""
    most = n_data_ids(tok) - 1
    if len(ids) and not 0 <= ids.min() <= ids.max() <= most:
        wrong = np.flatnonzero((ids < 0) | (ids > most))[0]
        raise DataError(f"{source.path}: token {at + wrong:,} is id {ids[wrong]:,}, expected "
                        f"0 to {most:,} of {tok.name}: another tokenizer, another vocab_size, "
                        "or no token ids")


# -----------------------------------------------------------------------------
# blocks -> documents


def cut_documents(blocks, eot_id, pad_id):
    """Cuts blocks into documents -> yields (ids with the eot_id, number of the id after them).

    Padding ends the document before it and comes at the beginning of the next one, so that no
    piece is padding alone unless the file ends with it. A document longer than LONGEST is cut.
    Where blocks begin changes nothing: a resume finds the same documents.
    """
    rest, first = np.zeros(0, "<u4"), 0  # ids of a document that goes on in the next block
    for at, ids, ends in blocks:
        first, ends, begin = at - len(rest), ends + len(rest), 0
        ids = np.concatenate([rest, ids])
        is_pad = ids == pad_id
        if is_pad.any():
            ends = np.union1d(ends, np.flatnonzero(is_pad[1:] & ~is_pad[:-1]) + 1)
        for end in np.union1d(ends, np.flatnonzero(ids == eot_id) + 1).tolist():
            for stop in (*range(begin + LONGEST, end, LONGEST), end):
                yield ids[begin:stop], first + stop
                begin = stop
        for stop in range(begin + LONGEST, len(ids) + 1, LONGEST):
            yield ids[begin:stop], first + stop
            begin = stop
        rest, first = ids[begin:], first + begin
    if len(rest):
        yield rest, first + len(rest)


def cut_rows(blocks, width):
    """Cuts blocks into rows of `width` tokens -> yields (ids, number of the id after them)."""
    rows = ((at, ids, row_ends(at, len(ids), width)) for at, ids, _ in blocks)
    return cut_documents(rows, -1, -1)  # no id is -1, so rows end at their ends alone


def without_markers(ids, eot_id, pad_id):
    """Ids of a document -> (the same without eot_id and padding, {what was left out: how much})."""
    text = ids[:-1] if ids[-1] == eot_id else ids
    kept = text if pad_id == eot_id else text[text != pad_id]
    left_out = {}
    if len(kept) < len(text):
        left_out["padding_tokens"] = len(text) - len(kept)
    if not len(text):  # one eot_id follows another: rows may be filled up with it
        left_out["padding_tokens" if pad_id == eot_id else "empty"] = 1
    elif len(ids) == LONGEST and ids[-1] != eot_id:
        left_out["documents_cut"] = 1
    return kept, left_out


def read_documents(sources, tok, pad_id, packed):
    """Sources -> `documents` for write_dataset; a position is [number of the file, ids read]."""
    def documents(position):
        first, start = position or (0, 0)
        for number in range(first, len(sources)):
            blocks = read_blocks(sources[number], start if number == first else 0, tok, packed)
            for ids, end in cut_documents(blocks, tok.eot_id, pad_id):
                kept, left_out = without_markers(ids, tok.eot_id, pad_id)
                n_bytes = int(tok.n_bytes[kept].sum())
                yield Ids(kept, n_bytes, left_out), None, [number, end]

    return documents
