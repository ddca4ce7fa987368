"""Token ids that others made -> documents for write_dataset, and blocks for a report or a split.

No file is held in memory whole. A document ends in eot_id, which a reader takes away and write_dataset puts back, and
where the format says: at the end of a row, a list, a Megatron document, a file. formats.py says what the files are.
"""

import os
from typing import NamedTuple

import numpy as np

from data.bins import DataError
from data.documents import call_tokenizer
from data.formats import arrow_file, open_sources
from data.tokenizer import Tokenizer
from data.workers import Ids

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
