"""data/ids.py: what files of token ids hold arrives in the bins, each document once."""

import json
import os
import pickle
import struct

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import call, crashed, refused, result, write_arrow_file

from data import documents
from data import ids as id_files
from data.bins import DataError
from data.ids import cut_documents, open_input, open_sources, read_documents
from data.reader import TokenData
from data.tokenizer import Tokenizer

EOT, PAD, N = 999, 998, 1000  # ids 0 to 997 are words
IDS = [f"--vocab_size={N}", f"--eot_id={EOT}"]


def some_documents(n=80, seed=0):
    """n different documents of 1 to 90 ids."""
    rng = np.random.default_rng(seed)

    def words():
        return rng.integers(0, 990, rng.integers(0, 90))

    return [np.append(words(), i % 990).tolist() for i in range(n)]


def stream(some):
    return [i for document in some for i in (*document, EOT)]


def padded(some, width=100):
    """One document a row, eot_id, then padding."""
    return [[*document, EOT, *[PAD] * (width - len(document) - 1)] for document in some]


def npy_header(dtype, shape):
    """numpy.lib.format, version 1.0, by hand."""
    header = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header


def write_npy(path, ids, dtype="<i8"):
    ids = np.array(ids, dtype)
    path.write_bytes(npy_header(dtype, ids.shape) + ids.tobytes())


def write_llm_c(path, ids, magic, version, dtype):
    header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    path.write_bytes(header + np.array(ids, dtype).tobytes())


def write_megatron(path, some, code, dtype):
    """Two sequences a document where it is long enough."""
    sequences, index = [], [0]
    for document in some:
        sequences += [part for part in (document[:20], document[20:]) if part]
        index.append(len(sequences))
    lengths, itemsize = [len(part) for part in sequences], np.dtype(dtype).itemsize
    starts = [sum(lengths[:i]) * itemsize for i in range(len(lengths))]
    path.write_bytes(np.array([i for document in some for i in document], dtype).tobytes())
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(index))
        + struct.pack(f"<{len(lengths)}i{len(starts)}q{len(index)}q", *lengths, *starts, *index))


def write_arrow(path, rows, kind="int32"):
    lists = pyarrow.array(rows, pyarrow.list_(pyarrow.type_for_alias(kind)))
    table = pyarrow.table({"text_id": range(len(rows)), "input_ids": lists})
    write_arrow_file(path, table, rows=9)


def one_a_row(path, some):
    write_npy(path, padded(some), "<u4")
    return {"rows": "documents", "pad_id": PAD}


def one_stream(path, some):
    """Rows of 64 that documents run across; what is left over goes into a second file."""
    ids = stream(some)
    n = len(ids) // 64 * 64
    write_npy(path, np.array(ids[:n]).reshape(-1, 64))
    write_npy(path.with_name("b.npy"), np.array([ids[n:] + [EOT] * (64 - len(ids) + n)]))


def one_of_32_bits(path, some):
    np.array(stream(some), "<u4").tofile(path)
    return {"token_dtype": "uint32"}


FORMATS = {  # how to write some documents; returns what a reader has to be told
    "npy, flat": ("a.npy", lambda path, some: write_npy(path, stream(some), "<u2")),
    "npy, big-endian": ("a.npy", lambda path, some: write_npy(path, stream(some), ">i4")),
    "npy, a document a row": ("a.npy", one_a_row),
    "pt, flat": ("a.pt", lambda path, some: torch.save(torch.tensor(stream(some)), path)),
    "pt, part of a tensor": ("a.pt", lambda path, some: torch.save(
        torch.tensor([5, *stream(some)])[1:], path)),
    "pt, in a dictionary": ("a.pt", lambda path, some: torch.save({"ids": torch.tensor(
        stream(some), dtype=torch.int16)}, path)),
    "nanoGPT": ("a.bin", lambda path, some: np.array(stream(some), "<u2").tofile(path)),
    "nanoGPT, 32 bits": ("a.bin", one_of_32_bits),
    "llm.c": ("a.bin", lambda path, some: write_llm_c(
        path, [EOT, *stream(some)[:-1]], 20240520, 1, "<u2")),
    "llm.c, 32 bits": ("a.bin", lambda path, some: write_llm_c(
        path, stream(some), 20240801, 7, "<u4")),
    "Megatron": ("a.bin", lambda path, some: write_megatron(path, some, 8, "<u2")),
    "Megatron with eod": ("a.bin", lambda path, some: write_megatron(
        path, [[*d, EOT] for d in some], 4, "<i4")),
    "arrow": ("a.arrow", write_arrow),
    "feather": ("a.feather", lambda path, some: write_arrow(
        path, [[*d, EOT] for d in some], "uint16")),
    "parquet": ("a.parquet", write_arrow),
}


def documents_in(folder):
    """Documents of both splits through TokenData, sorted."""
    found = []
    for split in ("train", "val"):
        data = TokenData(str(folder), split, 1)
        ids = np.empty(data.n_tokens, data.dtype)
        data.read(0, ids)
        assert ids[-1] == data.eot_id
        ends = np.flatnonzero(ids == data.eot_id) + 1
        found += [part[:-1].tolist() for part in np.split(ids, ends)[:-1]]
    return sorted(found)


def documents_of(found):
    """An Input -> `documents` for write_dataset."""
    return read_documents(found.sources, found.tok, found.pad_id, found.packed)


def prepare(out, *paths, val_fraction=0.3, **options):
    """Files of token ids -> bins, as prepare.py makes them, but in this process -> the summary."""
    found = open_input(sorted(map(str, paths)), **{"vocab_size": N, "eot_id": EOT, **options})
    n_tokens = sum(source.tokens for source in found.sources)
    return documents.write_dataset(documents_of(found), str(out), found.spec, val_fraction,
                                   num_proc=1, input_tokens=n_tokens)


@pytest.mark.parametrize("name", FORMATS)
def test_ids_come_back_as_they_were(name, tmp_path):
    file, write = FORMATS[name]
    options = write(tmp_path / file, some_documents()) or {}
    done = prepare(tmp_path / "out", tmp_path / file, **options)
    assert documents_in(tmp_path / "out") == sorted(some_documents())
    assert done["empty"] == (name == "llm.c") and done["bytes"] == done["duplicates"] == 0
    assert done["train_tokens"] + done["val_tokens"] == len(stream(some_documents()))
    if name == "npy, a document a row":
        assert done["padding_tokens"] == sum(99 - len(document) for document in some_documents())


def test_a_stream_cut_into_rows_is_joined_and_takes_a_quarter_of_the_space(tmp_path):
    one_stream(tmp_path / "a.npy", some_documents(400))
    done = call("prepare.py", f"--input={tmp_path}", f"--out_dir={tmp_path}/out", *IDS,
                "--val_fraction=0.2")
    assert "taken for one stream" in done.stdout
    whole, found = sorted(some_documents(400)), documents_in(tmp_path / "out")
    lost = [d for d in whole if d not in found]
    assert len(lost) <= 1, "only the document that goes on in the next file is cut"
    size = sum((tmp_path / "out" / f"{split}.bin").stat().st_size for split in ("train", "val"))
    assert size < 0.26 * sum(path.stat().st_size for path in tmp_path.glob("*.npy"))


def test_what_rows_are_is_guessed_and_said(tmp_path):
    some = [d[:40] + [7] * (40 - len(d)) for d in some_documents()]
    for name, rows, expected in (("bare", some, False), ("ended", [[*d, EOT] for d in some], False),
                                 ("padded", [[*d, EOT, PAD] for d in some], False),
                                 ("begun", [[EOT, *d] for d in some], True)):
        write_npy(tmp_path / f"{name}.npy", rows)
        write_arrow(tmp_path / f"{name}.arrow", rows)
        for suffix in (".npy", ".arrow"):
            found = open_input([str(tmp_path / (name + suffix))], "", N, EOT, PAD)
            assert found.packed == expected, name + suffix
            kept = [unit.ids.tolist() for unit, _, _ in documents_of(found)(None) if len(unit.ids)]
            assert kept == some, name + suffix


def test_with_a_tokenizer_bytes_and_text_are_known(tmp_path):
    tok, texts = Tokenizer.load("byte"), [f"{i} naïve 漢字 " * (i % 7 + 1) for i in range(60)]
    write_npy(tmp_path / "a.npy", np.concatenate([[*ids, tok.eot_id] for ids in tok.encode(texts)]))
    done = prepare(tmp_path / "out", tmp_path / "a.npy", tokenizer="byte", vocab_size=0, eot_id=-1)
    assert done["bytes"] == sum(len(text.encode()) for text in texts)
    assert sorted(map(tok.decode, documents_in(tmp_path / "out"))) == sorted(texts)


def test_padding_inside_a_packed_row_ends_a_document(tmp_path):
    rows = [[1, 2, EOT, 3, 4, PAD], [5, 6, EOT, 7, PAD, PAD], [8, EOT, 9, 10, EOT, 11], [12] * 6]
    write_npy(tmp_path / "a.npy", rows)
    found = open_input([str(tmp_path / "a.npy")], "", N, EOT, PAD)
    units = [unit for unit, _, _ in documents_of(found)(None)]
    assert [unit.ids.tolist() for unit in units] == [
        [1, 2], [3, 4], [5, 6], [7], [8], [9, 10], [11, *[12] * 6]]
    assert sum(unit.left_out.get("padding_tokens", 0) for unit in units) == 3


def test_duplicates_padding_and_empty_lists_are_counted(tmp_path):
    some = some_documents(60)
    write_arrow(tmp_path / "a.arrow", [[], *some, [], [PAD, PAD], *some[:5], [*some[0], PAD]])
    done = prepare(tmp_path / "out", tmp_path / "a.arrow", pad_id=PAD)
    assert (done["documents"], done["duplicates"], done["empty"]) == (60, 6, 2)
    assert done["padding_tokens"] == 3
    assert documents_in(tmp_path / "out") == sorted(some)


def test_the_split_depends_on_the_ids_alone(tmp_path):
    write_npy(tmp_path / "a.npy", stream(some_documents()))
    write_arrow(tmp_path / "b.parquet", some_documents()[::-1])
    for name in ("a.npy", "b.parquet"):
        prepare(tmp_path / f"out_{name}", tmp_path / name)
    a, b = (TokenData(f"{tmp_path}/out_{name}", "val", 1) for name in ("a.npy", "b.parquet"))
    a_ids, b_ids = (sorted(data.block(range(data.n_tokens)).flatten()) for data in (a, b))
    assert a_ids == b_ids


@pytest.mark.parametrize("eot_id", [EOT, 5, -1])
def test_documents_are_cut_at_the_same_places_wherever_blocks_begin(eot_id, monkeypatch):
    monkeypatch.setattr(id_files, "LONGEST", 50)
    ids, rng = np.array(stream(some_documents(30)), "<u4"), np.random.default_rng(0)
    ids[200:210] = ids[300] = ids[rng.integers(0, len(ids), 20)] = PAD

    def blocks(start, most):
        while start < len(ids):
            n = int(min(rng.integers(1, most), len(ids) - start))
            ends = [end - start for end in (100, 500, 501) if start < end <= start + n]
            yield start, ids[start:start + n], np.array(ends, np.int64)
            start += n

    whole = [(part.tolist(), end) for part, end in cut_documents(blocks(0, 9999), eot_id, PAD)]
    assert [i for part, _ in whole for i in part] == ids.tolist()
    assert max(len(part) for part, _ in whole) == 50
    assert {100, 500, 501} <= {end for _, end in whole}
    assert all(eot_id not in part[:-1] for part, _ in whole)
    assert all(part.index(PAD) == 0 for part, _ in whole if PAD in part)
    for n, (_, end) in enumerate(whole):
        rest = [(part.tolist(), end) for part, end in cut_documents(blocks(end, 60), eot_id, PAD)]
        assert rest == whole[n + 1:]


@pytest.mark.parametrize("name", ["npy, a document a row", "llm.c", "Megatron", "arrow", "parquet"])
def test_killed_after_any_chunk_then_the_same_bytes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(id_files, "BLOCK", 300)
    monkeypatch.setattr(id_files, "LONGEST", 70)
    some = [[], *some_documents(40), [], *some_documents(3)]
    for file in ("a", "b"):
        FORMATS[name][1]((tmp_path / file).with_suffix(os.path.splitext(FORMATS[name][0])[1]), some)
        some = some_documents(20, seed=1)
    paths = [path for path in tmp_path.iterdir() if path.suffix != ".idx"]

    def prepared(out):
        prepare(out, *paths, pad_id=PAD)
        return {path.name: path.read_bytes() for path in out.glob("*.bin")} | {
            "counts": {k: v for k, v in json.loads((out / "meta.json").read_text()).items()
                       if k != "command"}}

    whole = prepared(tmp_path / "whole")
    assert whole["counts"]["duplicates"] >= 3 and whole["counts"]["documents_cut"] > 3
    outs = list(crashed(prepared, tmp_path, (documents, "commit"), moments=["before"]))
    assert len(outs) > 5
    for out in outs:
        assert prepared(out) == whole, out.name


# -----------------------------------------------------------------------------
# refusals


class Payload:
    """Runs when it is unpickled."""
    def __reduce__(self):
        return open, ("/tmp/payload_of_a_test_ran", "w")


def whole(ids, dtype="<i8"):
    return lambda path: write_npy(path, ids, dtype)


def cut(write, n, suffix=""):
    """What `write` writes, without the last n bytes, of the file with another suffix if told."""
    def write_less(path):
        write(path)
        path = path.with_suffix(suffix or path.suffix)
        path.write_bytes(path.read_bytes()[:-n])
    return write_less


def damage(write, suffix, at, data):
    """What `write` writes, with `data` at a byte of the file with another suffix."""
    def write_wrong(path):
        write(path)
        other = path.with_suffix(suffix)
        whole = bytearray(other.read_bytes())
        whole[at:at + len(data)] = data
        other.write_bytes(whole)
    return write_wrong


def shard(path):
    write_llm_c(path, stream(some_documents()), 20240520, 1, "<u2")


def megatron(path):
    write_megatron(path, some_documents(), 8, "<u2")


def far_list(path):
    write_arrow(path, [[1], [2]])
    wrong = path.read_bytes().replace(struct.pack("<3i", 0, 1, 2), struct.pack("<3i", 0, 1, 70_000))
    path.write_bytes(wrong)


def pt(value, **options):
    return lambda path: torch.save(value, path, **options)


IDS_2D = [[1, 2, 3], [4, 5, 6]]
BAD = {  # name: (file, how to write it, options, what the message says)
    "npy pickled": ("a.npy", lambda path: np.save(
        path, np.array([Payload()], object), allow_pickle=True), {},
                    "a pickle.*refused"),
    "pickle called npy": ("a.npy", lambda path: path.write_bytes(pickle.dumps(Payload())), {},
                          "a pickle.*refused"),
    "pt pickled": ("a.pt", pt(Payload()), {}, "a pickle.*refused"),
    "npz called npy": ("a.npy", lambda path: np.savez(path.open("wb"), a=np.arange(3)), {},
                       "expected one array"),
    "npy cut": ("a.npy", cut(whole(IDS_2D), 1), {}, "not a whole .npy"),
    "npy header cut": ("a.npy", cut(whole(IDS_2D), 100), {}, "not a whole .npy"),
    "npy empty": ("a.npy", lambda path: path.write_bytes(b""), {}, "not a whole .npy file"),
    "npy of a negative shape": ("a.npy", lambda path: path.write_bytes(
        npy_header("<i8", (-3, 5))), {}, "not a whole"),
    "npy of half a header": ("a.npy", lambda path: path.write_bytes(
        npy_header("<i8", ((3,),)).replace(b")", b"(")), {},
                             "not a whole"),
    "npy of no token": ("a.npy", whole(np.zeros((0, 8))), {}, "no token in"),
    "npy of floats": ("a.npy", whole(IDS_2D, "<f4"), {}, "float32.*np.uint16"),
    "npy of truth values": ("a.npy", whole(IDS_2D, "|b1"), {}, "bool"),
    "npy of three dimensions": ("a.npy", whole([IDS_2D]), {}, r"shape \(1, 2, 3\)"),
    "npy by columns": ("a.npy", lambda path: np.save(path, np.array(IDS_2D).T), {},
                       "ascontiguousarray"),
    "id too large": ("a.npy", whole([[1, 2, 3], [4, 5, N]]), {},
                     r"token 5 is id 1,000, expected 0 to 999 of ids:1000"),
    "id negative": ("a.npy", whole([[1, -100, 3]]), {}, "token 1 is id -100"),
    "id too large in Arrow": ("a.arrow", lambda path: write_arrow(path, [[1], [2, 7000]]), {},
                              "token 2 is id 7,000"),
    "rows of another length": ("a.npy", whole(IDS_2D), {"sequence_length": 32768},
                               "rows of 3 tokens, expected 32,768"),
    "lists of another length": ("a.arrow", lambda path: write_arrow(path, [[1, 2], [3]]),
                                {"sequence_length": 2},
                                "list 1 has 1 tokens, expected 2"),
    "pt cut": ("a.pt", cut(pt(torch.tensor(IDS_2D)), 30), {}, "not a whole .pt"),
    "pt of floats": ("a.pt", pt(torch.ones(2, 2)), {}, "float32"),
    "pt of bfloat16": ("a.pt", pt(torch.ones(2, 2, dtype=torch.bfloat16)), {}, "bfloat16"),
    "pt of two tensors": ("a.pt", pt({"a": torch.arange(3), "b": torch.arange(3)}), {},
                          "expected one tensor"),
    "pt of a list": ("a.pt", pt([1, 2, 3]), {}, "holds list"),
    "pt turned": ("a.pt", pt(torch.tensor(IDS_2D).T), {}, "contiguous"),
    "pt of old": ("a.pt", pt(torch.arange(3), _use_new_zipfile_serialization=False), {},
                  "torch 1.6"),
    "bin of an odd size": ("a.bin", lambda path: path.write_bytes(b"\1\0\2"), {},
                           "no multiple of 2"),
    "bin of 32 bits": ("a.bin", lambda path: np.arange(99, dtype="<u4").tofile(path), {},
                       "--token_dtype=uint32"),
    "no type": ("a.bin", lambda path: path.write_bytes(b"\1\0"), {"token_dtype": "float"},
                "expected uint16"),
    "shard cut": ("a.bin", cut(shard, 2), {}, "header says version 1, .* cut short"),
    "shard of another version": ("a.bin", damage(shard, ".bin", 4, b"\2"), {},
                                 "version 2, .* expected version 1"),
    "Megatron's bin cut": ("a.bin", cut(megatron, 2), {}, "its index says"),
    "Megatron's index cut": ("a.bin", cut(megatron, 9, ".idx"), {}, "no whole index"),
    "Megatron's index of floats": ("a.bin", damage(megatron, ".idx", 17, b"\7"), {}, "code 7"),
    "Megatron's sequences elsewhere": ("a.bin", damage(megatron, ".idx", 34, b"\1"), {},
                                       "damaged|its index says"),
    "arrow cut": ("a.arrow", cut(lambda path: write_arrow(path, some_documents()), 300), {},
                  "not a whole .arrow"),
    "arrow with a list that leaves the file": ("a.arrow", far_list, {}, "not a whole"),
    "no arrow": ("a.arrow", lambda path: path.write_bytes(b"plain text, no table"), {},
                 "not a whole .arrow"),
    "arrow of floats": ("a.arrow", lambda path: write_arrow(path, [[1.0]], "float"), {},
                        r"no column of lists.*there is: text_id \(int64\), input_ids \(list"),
    "arrow of another column": ("a.arrow", lambda path: write_arrow(path, IDS_2D),
                                {"token_key": "ids"},
                                "no column of lists of integers 'ids'"),
    "arrow with a gap": ("a.arrow", lambda path: write_arrow(path, [[1, None]]), {}, "missing"),
    "rows of what has none": ("a.npy", whole([1, 2]), {"rows": "packed"}, "has no rows"),
    "no kind of rows": ("a.npy", whole(IDS_2D), {"rows": "some"},
                        "expected auto, documents or packed"),
    "pad_id outside": ("a.npy", whole(IDS_2D), {"pad_id": 99999}, "pad_id = 99,999"),
    "two tokenizers": ("a.npy", whole(IDS_2D), {"tokenizer": "byte"}, "not both"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(name, tmp_path):
    file, write, options, message = BAD[name]
    write(tmp_path / file)
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path / "out", tmp_path / file, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not os.path.exists("/tmp/payload_of_a_test_ran") and not list(tmp_path.glob("out/*.bin"))


def test_ids_need_to_be_named_and_texts_take_no_settings_of_ids(tmp_path):
    write_npy(tmp_path / "a.npy", IDS_2D)
    (tmp_path / "a.txt").write_text("text")
    write_npy(tmp_path / "b.npy", [[1, 2]])
    for files, options, messages in (
            ("a.npy", [], ["--tokenizer=gpt2", "--vocab_size=N --eot_id=M"]),
            ("a.txt", IDS, ["only token ids"]),
            ("a.*", IDS, ["prepare them apart"]),
            ("a.npy", ["--vocab_size=7", "--eot_id=7"], ["eot_id below"]),
            ("*.npy", IDS, ["b.npy has rows of 2 tokens, expected 3"]),
            ("a.npy", [*IDS, "--cut_chars=500"], ["--cut_chars: only texts"]),
            ("a.npy", [*IDS, "--val_ratio=0.5"], ["--val_ratio: prepare takes"])):
        done = call("prepare.py", f"--input={tmp_path}/{files}", f"--out_dir={tmp_path}/out",
                    *options, ok=False)
        refused(done, *messages)


def test_links_that_leave_the_folder_are_refused_until_allowed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    write_npy(tmp_path / "elsewhere/a.npy", stream(some_documents()))
    (tmp_path / "here/a.npy").symlink_to("../elsewhere/a.npy")
    (tmp_path / "here/folder").symlink_to("../elsewhere")
    for pattern in ("here", "here/**/*.npy"):
        done = call("prepare.py", f"--input={tmp_path}/{pattern}", f"--out_dir={tmp_path}/out",
                    *IDS, ok=False)
        refused(done, "leads out of", "--follow_links=1")
    (tmp_path / "elsewhere/b.npy").symlink_to("a.npy")
    # The second pattern names the link itself.
    for pattern, options, n in (("here", ["--follow_links=1"], 3), ("here/folder/*", [], 2)):
        done = result(call("prepare.py", "validate", f"--input={tmp_path}/{pattern}", *IDS,
                           *options))
        assert done["tokens"] == n * len(stream(some_documents()))


def test_parquet_is_ids_when_it_has_no_text_or_token_key_says_so(tmp_path):
    rows = some_documents()
    table = pyarrow.table({"text": [f"text number {i}" for i in range(80)], "input_ids": rows})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert not id_files.open_sources([str(tmp_path / "a.parquet")])[0].width
    args = [f"--input={tmp_path}/a.parquet", "--val_fraction=0.2"]
    done = result(call("prepare.py", *args, f"--out_dir={tmp_path}/text", "--tokenizer=byte"))
    assert done["bytes"] > 80 * 10
    done = result(call("prepare.py", *args, f"--out_dir={tmp_path}/ids", "--token_key=input_ids",
                       *IDS))
    assert done["bytes"] == 0
    assert documents_in(tmp_path / "ids") == sorted(rows)


def test_headers_alone_are_read_to_open_a_file(tmp_path):
    """64 GB of zeros, of which the disk holds none, take no time and no memory."""
    header = npy_header("<i8", (250_000, 32768))
    (tmp_path / "a.npy").write_bytes(header)
    os.truncate(tmp_path / "a.npy", len(header) + 250_000 * 32768 * 8)
    [source] = open_sources([str(tmp_path / "a.npy")])
    assert source.tokens == 250_000 * 32768 and source.offset == len(header)


def test_a_file_that_is_cut_while_it_is_read_is_one_message(tmp_path):
    np.zeros(5000, "<u2").tofile(tmp_path / "a.bin")
    found = open_input([str(tmp_path / "a.bin")], "", N, EOT)
    os.truncate(tmp_path / "a.bin", 4000)
    with pytest.raises(DataError, match="cut while in use"):
        list(documents_of(found)(None))
