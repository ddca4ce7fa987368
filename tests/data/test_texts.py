"""Promises of data/texts.py: what is read as a text, whichever command reads it."""

import gzip
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_arrow_file, zstd
from test_filters import prose, settings

from data import inputs
from data.bins import DataError
from data.filters import Filters
from data.texts import Reader, kind, read_lines, read_strings
from lib import embed

TEXTS = [prose(30, seed) for seed in range(40)] + ["na\u00efve \U0001f600"]
STRINGS = pyarrow.array(TEXTS)


def texts_of(path, **changes):
    return list(Reader(settings(**changes)).texts(str(path), kind(str(path))))


def write_table(path, array, name="text"):
    write_arrow_file(path, pyarrow.table([array], [name]), rows=5)


# --------------------------------------------------------------------------------------------------
# tables


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
@pytest.mark.parametrize("array", [
    STRINGS, STRINGS.cast(pyarrow.large_string()), STRINGS.cast(pyarrow.string_view()),
    STRINGS.cast(pyarrow.binary()), STRINGS.dictionary_encode()], ids=lambda array: str(array.type))
def test_every_kind_of_text_column_is_read(array, suffix, tmp_path):
    write_table(tmp_path / f"a.{suffix}", array)
    assert texts_of(tmp_path / f"a.{suffix}") == TEXTS


def test_bytes_in_a_table_that_are_not_utf8_are_replaced_or_refused(tmp_path):
    broken = pyarrow.array([b"good", b"caf\xe9"])
    for array in (broken, pyarrow.Array.from_buffers(pyarrow.string(), 2, broken.buffers())):
        write_table(tmp_path / "a.arrow", array)
        assert texts_of(tmp_path / "a.arrow") == ["good", "caf\ufffd"]
        with pytest.raises(DataError, match="row 2: not UTF-8"):
            texts_of(tmp_path / "a.arrow", on_bad_utf8="refuse")


def test_two_columns_of_one_name_are_refused(tmp_path):
    for other in (STRINGS, pyarrow.array(range(len(TEXTS)))):
        for arrays in ([STRINGS, other], [other, STRINGS]):
            pyarrow.parquet.write_table(pyarrow.table(arrays, ["text", "text"]),
                                        tmp_path / "a.parquet")
            with pytest.raises(DataError, match="2 columns named 'text'"):
                texts_of(tmp_path / "a.parquet")


def test_a_row_without_a_text_is_a_bad_line(tmp_path):
    write_table(tmp_path / "a.parquet", pyarrow.array(["one", None, "two"]))
    with pytest.raises(DataError, match="a.parquet: row 2: no text, it is null.*on_bad_line=skip"):
        texts_of(tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", on_bad_line="skip") == ["one", None, "two"]


@pytest.mark.parametrize("array", [pyarrow.nulls(5), pyarrow.nulls(5, pyarrow.string())],
                         ids=["null", "string"])
def test_a_table_of_nulls_is_a_bad_file(array, tmp_path):
    write_table(tmp_path / "a.parquet", array)
    with pytest.raises(DataError, match="all its texts are null.*on_bad_file=skip"):
        texts_of(tmp_path / "a.parquet")
    assert len(texts_of(tmp_path / "a.parquet", on_bad_file="skip")) == 1  # BAD_FILE
    assert texts_of(tmp_path / "a.parquet", on_bad_line="skip") == [None] * 5
    write_table(tmp_path / "b.parquet", STRINGS, "other")
    assert len(texts_of(tmp_path / "b.parquet", on_bad_file="skip")) == 1


def test_a_key_may_lead_into_objects(tmp_path):
    rows = [{"meta": {"text": text, "n": 1}} for text in TEXTS]
    write_table(tmp_path / "a.parquet", pyarrow.array([row["meta"] for row in rows]), "meta")
    write_table(tmp_path / "a.arrow", pyarrow.array([row["meta"] for row in rows]), "meta")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text(json.dumps({"meta.text": "a name with a dot"}) + "\n")
    for name in ("a.parquet", "a.arrow", "a.jsonl"):
        assert texts_of(tmp_path / name, text_key="meta.text") == TEXTS
        with pytest.raises(DataError, match="there is: meta"):
            texts_of(tmp_path / name)
    assert texts_of(tmp_path / "b.jsonl", text_key="meta.text") == ["a name with a dot"]


def test_folders_that_datasets_saved_are_read_without_their_caches(tmp_path):
    made = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "saved")
    write_table(tmp_path / "saved/train/cache-1.arrow", pyarrow.array(["of an earlier filter"]))
    files = inputs.find_inputs(str(tmp_path / "saved"))
    assert [path.split("/")[-2] for path in files.paths] == ["test", "train"]
    assert [text for path in files.paths for text in texts_of(path)] == TEXTS * 2


# --------------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.ndjson", "c4.00000.json.gz", "a.json.zst",
                                  "list.json", "long_list.json.gz"])
def test_json_is_read_by_any_of_its_names(name, tmp_path):
    texts = TEXTS if "long" not in name else [f"{i} " + TEXTS[i % 40] for i in range(9000)]
    lines = [json.dumps({"text": text, "n": [1, {"a": "]"}]}) for text in texts]
    data = ("\n".join(lines) if "list" not in name else "[\n " + ",\n ".join(lines) + "]\n")
    pack = {".gz": gzip.compress, ".zst": zstd.compress}.get("." + name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + data.encode()))
    assert texts_of(tmp_path / name) == texts
    assert [text for text, _ in read_lines(str(tmp_path / name))] == texts


@pytest.mark.parametrize("line, there", [
    ({"text": None}, "null"), ({"text": ["a"]}, "a list"), ({"text": 5}, "the number 5"),
    ({"text": True}, "a boolean"), ({"text": {"a": 1}}, "an object"), ({}, "an empty object"),
    ({"id": 1, "meta": {"text": "x"}}, "id, meta.text"), (["a"], "list")])
def test_what_is_no_text_is_named(line, there, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + json.dumps(line))
    message = rf"a.jsonl:2: no text under 'text' \(there is: {there}\); .*--text_key"
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / "a.jsonl")


def test_an_object_over_several_lines_is_read(tmp_path):
    objects = [json.dumps({"text": text, "n": {}}, indent=1) for text in TEXTS]
    for n in (1, len(TEXTS)):
        (tmp_path / "a.json").write_text("\n".join(objects[:n]) + "\n\n")
        assert texts_of(tmp_path / "a.json") == TEXTS[:n]
    (tmp_path / "a.json").write_text(objects[0][:-9])
    with pytest.raises(DataError, match="a.json: item 1: no JSON"):
        texts_of(tmp_path / "a.json")


def test_a_damaged_list_is_a_bad_file(tmp_path):
    for data, item in (('[{"text": "x"}, {"text": "y"', 2), ('[{"text": "x"} oops]', 2), ("[", 1)):
        (tmp_path / "a.json").write_text(data)
        with pytest.raises(DataError, match=f"a.json: item {item}: no JSON"):
            texts_of(tmp_path / "a.json")


def test_a_json_file_of_joined_lists_is_read_whole(tmp_path):
    lists = [json.dumps([{"text": text} for text in part]) for part in (TEXTS[:2], [], TEXTS[2:])]
    for between in ("\n", "", ",", " \ufeff"):
        (tmp_path / "a.json").write_text(between.join(lists) + "\n")
        assert texts_of(tmp_path / "a.json") == TEXTS
    (tmp_path / "a.json").write_text(lists[0] + " oops")
    with pytest.raises(DataError, match="a.json: item 3: found 'o' after a list, expected another"):
        texts_of(tmp_path / "a.json")


def test_of_a_folder_json_is_taken_only_without_texts(tmp_path, capsys):
    for name in ("a.txt", "package.json", "b.json.gz"):
        (tmp_path / name).write_text("x")
    names = [path.split("/")[-1] for path in inputs.find_inputs(str(tmp_path)).paths]
    assert names == ["a.txt", "b.json.gz"]
    assert f"{tmp_path}: left out beside texts: 1 .json; to read them" in capsys.readouterr().err
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.json.gz").unlink()
    assert len(inputs.find_inputs(str(tmp_path)).paths) == 1


# --------------------------------------------------------------------------------------------------
# what other commands read


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.gz", "a.md.zst", "a.jsonl.gz", "a.JSONL",
                                  "a.parquet"])
def test_embed_reads_what_prepare_reads(name, tmp_path):
    """Rows are those of the file, not of its packed bytes."""
    if name.endswith("parquet"):
        write_table(tmp_path / name, STRINGS)
    else:
        lines = [json.dumps({"text": t}) if "json" in name.lower() else t for t in TEXTS]
        pack = {"gz": gzip.compress, "zst": zstd.compress}.get(name.split(".")[-1], bytes)
        (tmp_path / name).write_bytes(pack("\n".join(lines).encode()))
    state = embed.embed_file(str(tmp_path / name), str(tmp_path / "e.npy"), lengths, {})
    assert np.load(tmp_path / "e.npy")[:, 0].tolist() == [len(text) for text in TEXTS]
    assert state["done"] == len(TEXTS)


def lengths(texts):
    return np.array([[len(text)] for text in texts], np.float32), 0


def test_embed_refuses_utf_16_damage_and_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "marked.txt").write_bytes("\n".join(TEXTS).encode("utf-16"))
    (tmp_path / "plain.txt").write_bytes("\n".join(TEXTS).encode("utf-16-le"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text\n" * 900)[:-9])
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "config.json").write_text("{}")
    for name, to, message in (("marked.txt", "e", "UTF-16.*iconv"), ("plain.txt", "e", "UTF-16"),
                              ("cut.txt.gz", "e", "cut short"), ("a.txt", "", "to is empty"),
                              ("a.txt", ".", "is a folder"),
                              ("a.txt", "config", "config.json exists and is of something else")):
        to = str(tmp_path / to) if to else ""
        with pytest.raises(ValueError, match=message):
            embed.embed_file(str(tmp_path / name), to, lengths, {})
    assert (tmp_path / "config.json").read_text() == "{}"
    assert len(list(tmp_path.iterdir())) == 5


def test_embed_writes_through_a_link(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "disk").mkdir()
    (tmp_path / "e.npy").symlink_to("disk/e.npy")
    embed.embed_file(str(tmp_path / "a.txt"), str(tmp_path / "e.npy"), lengths, {})
    assert (tmp_path / "e.npy").is_symlink() and len(np.load(tmp_path / "disk/e.npy")) == 2


def test_decontamination_reads_every_kind_of_test_file(tmp_path):
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(DataError, match="no text of 13 words there"):
        Filters(settings(decontaminate=str(tmp_path)))
    write_table(tmp_path / "validation-0.parquet", pyarrow.array(TEXTS[:1]), "sentence")
    (tmp_path / "test.JSON.gz").write_bytes(gzip.compress(json.dumps(
        {"qas": [{"question": TEXTS[1]}], "n": 1}).encode()))
    (tmp_path / "dev.tsv").write_text(f"1\t{TEXTS[2]}\r\n")
    (tmp_path / "diagnostic.txt").write_text(TEXTS[3])
    judge = Filters(settings(decontaminate=str(tmp_path))).judge
    assert [judge(text)[0] for text in TEXTS[:5]] == ["contaminated"] * 4 + [""]
    (tmp_path / "bad.jsonl").write_text("5\n")
    with pytest.raises(DataError, match="bad.jsonl:1: expected a JSON object, found the number 5"):
        list(read_strings(str(tmp_path / "bad.jsonl")))
    with pytest.raises(DataError, match="no such file or folder.*hf download nyu-mll/glue"):
        Filters(settings(decontaminate="glue_that_is_not_there"))
