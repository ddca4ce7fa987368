"""Damaged and random files for everything that reads files: the long form of test_fuzz.py.

    make fuzz                                          all targets, 10 minutes each
    python tests/faults/fuzz.py --target=checkpoint --minutes=1

A reader may succeed, or raise the ValueError or OSError that becomes one message. Anything else,
a crash of the interpreter and an example of more than 20 seconds included, is a finding: printed
with its file, counted in records/faults.md, and the command ends with an error.
"""

# ---- settings -----------------------------------------------------------------------------------
target = ""  # one of TARGETS below; empty: all, each in a process of its own
minutes = 10.0  # for each target
folder = "out/fuzz"  # files of the examples; those of findings are kept
seed = 0  # of the first round of examples
page = "records/faults.md"  # the table goes here
# -------------------------------------------------------------------------------------------------
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/faults")]

from configurator import configure

config = configure(globals())

import contextlib
import copy
import io
import json
import shutil
import signal
import subprocess
import time
import traceback

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from data import documents, ids, reader, texts
from data.tokenizer import Tokenizer
from data.validation import validate_folder
from lib import glue
from lib.files import print_result, read_object
from lib.log import read_log, rewind_log
from lib.run import checkpoint_to_resume, load_run

SECONDS = 20  # most an example may take

# ---- mutations ----------------------------------------------------------------------------------

EDIT = st.tuples(st.sampled_from(["replace", "insert", "delete", "cut", "repeat", "flip"]),
                 st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9))
# what stands in a JSON file or a checkpoint in place of what belongs there
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "", "\0", -1, 2**63, 10**30, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3), max_leaves=4)
CHANGE = st.tuples(st.integers(0, 2**16), st.just("delete") | VALUE.map(lambda value: [value]))


def edited(content, edits):
    """Bytes with some places overwritten, inserted, left out, repeated, or cut off."""
    for kind, place, data in edits:
        at = int(place * len(content))
        after = {"replace": data + content[at + len(data):], "insert": data + content[at:],
                 "delete": content[at + len(data):], "cut": b"",
                 "repeat": content[at:at + 64] * data[0] + content[at:],
                 "flip": bytes([content[at] ^ 1 << data[0] % 8]) + content[at + 1:]
                 if content else b""}[kind]
        content = content[:at] + after
    return content


def changed(value, changes):
    """A copy of nested dicts and lists with some items deleted or replaced by [new]."""
    value = copy.deepcopy(value)
    for number, new in changes:
        places = []

        def walk(inside, places=places):
            items = inside.items() if isinstance(inside, dict) else enumerate(inside)
            for key, item in list(items):
                places.append((inside, key))
                if isinstance(item, (dict, list)):
                    walk(item)
        walk(value)
        if places:
            inside, key = places[number % len(places)]
            if new == "delete":
                del inside[key]
            else:
                inside[key] = new[0]
    return value


# ---- targets: a folder with valid files, which of them are changed, what reads them -------------

WORDS = ["The cat sees the river. It reads.", "naïve 漢字 [MASK]", "", "a\tb"] * 5


def make_bins(folder):
    units = documents.from_texts(lambda: ((f"{i} {WORDS[i % 4]}", None) for i in range(200)))
    with contextlib.redirect_stderr(io.StringIO()):
        documents.write_dataset(units, str(folder), "byte", val_fraction=0.3, num_proc=1)


def read_bins(folder):
    for rows in ("block", "document"):
        data = reader.TokenData(str(folder), "train", 16, rows=rows)
        data.batch(0, 4)
    batches = reader.Batches(str(folder), "", "block", 16, "", 0, 4, 10)
    batches.batch(3)
    batches.plan()


def validate_bins(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        validate_folder(str(folder))


def make_tokenizer(folder):
    Tokenizer.train([f"{word} {i}" for i in range(300) for word in WORDS], 600, True).save(folder)


def read_tokenizer(folder):
    tok = Tokenizer.load(str(folder))
    tok.decode(tok.encode(WORDS)[0])


def make_library(folder):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(WORDS, trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))


def make_config(folder):
    folder.mkdir(parents=True)
    (folder / "config.py").write_bytes((ROOT / "config/micro_span.py").read_bytes())


def read_config(folder):
    hook = sys.excepthook
    try:
        configure({"__file__": str(ROOT / "train.py"), "__name__": "__main__"},
                  [str(folder / "config.py")])
    finally:
        sys.excepthook = hook


OWN = dict(text=["line"], label="verdict", labels=["bad", "good"])


def make_task(folder):
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(OWN))
    rows = [f"{WORDS[i % 3]}\t{'good' if i % 2 else 'bad'}" for i in range(20)]
    (folder / "train.tsv").write_text("\n".join(["line\tverdict", *rows]) + "\n")
    for split in ("dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(
            json.dumps(dict(line=word, verdict="good")) + "\n" for word in WORDS))
    (folder / "test.csv").write_text('line\n"a, b"\n"c ""d"""\n')
    (folder / "test.jsonl").unlink()


def read_task(folder):
    glue.read_task(glue.find_task(str(folder)), "")


def read_official(folder):
    for name in ("mrpc", "sst2", "cola", "stsb"):
        with contextlib.suppress(ValueError):
            glue.read_split(glue.TASKS[name], str(folder / "train.tsv"), "train")


def make_official(folder):
    folder.mkdir(parents=True)
    rows = [f"{i % 2}\t{i}\t{i}\t{WORDS[0]}\t{WORDS[1]}" for i in range(9)]
    (folder / "train.tsv").write_text("\n".join(
        ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows]) + "\n")


def make_ids(folder):
    folder.mkdir(parents=True)
    array = np.arange(300, dtype=np.uint16).reshape(10, 30) % 50
    np.save(folder / "a.npy", array)
    torch.save(torch.arange(300).reshape(10, 30) % 50, folder / "a.pt")
    np.savez(folder / "a.npz", array)
    array.tofile(folder / "plain.bin")
    array.tofile(folder / "megatron.bin")
    lengths = np.full(10, 30)
    with open(folder / "megatron.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + np.uint64(1).tobytes() + np.uint8(8).tobytes()
                   + np.array([10, 11], np.uint64).tobytes() + lengths.astype("<i4").tobytes()
                   + (np.arange(10) * 60).astype("<i8").tobytes() + np.arange(11).tobytes())
    head = np.zeros(256, "<i4")
    head[:3] = 20240520, 1, 300
    (folder / "llmc.bin").write_bytes(head.tobytes() + array.tobytes())
    import pyarrow.parquet
    table = pyarrow.table({"input_ids": array.tolist()})
    pyarrow.parquet.write_table(table, folder / "a.parquet")


def read_ids(folder):
    (folder / "b.npy").unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".idx", ".npz"):
            continue
        with contextlib.suppress(ValueError, OSError):
            with contextlib.redirect_stdout(io.StringIO()):
                source = ids.open_input([str(path)], vocab_size=60, eot_id=3)
            unit = ids.read_documents(source.sources, source.tok, source.pad_id, source.packed)
            for _ in unit(0) if callable(unit) else unit:
                pass
    shutil.copy(folder / "a.npz", folder / "b.npy")  # another kind of file under this name
    with contextlib.suppress(ValueError):
        ids.open_sources([str(folder / "b.npy")])


def make_texts(folder):
    import gzip

    import pyarrow.parquet
    from backports import zstd

    folder.mkdir(parents=True)
    lines = "".join(json.dumps(dict(text=word, id=i)) + "\n" for i, word in enumerate(WORDS))
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.txt").write_text("\n".join(WORDS))
    (folder / "a.json").write_text(json.dumps([dict(text=word) for word in WORDS]))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "a.jsonl.zst").write_bytes(zstd.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": WORDS}), folder / "a.parquet")


def read_texts(folder):
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(ValueError, OSError):
            for _ in texts.read_lines(str(path)):
                pass


def make_run(folder):
    from conftest import call
    make_bins(folder.parent / "bins")
    call("train.py", f"--data_dir={folder.parent / 'bins'}", f"--out_dir={folder}", "--dtype=fp32",
         "--block_size=16", "--n_layer=1", "--n_head=2", "--n_concept=4", "--concept_dim=16",
         "--token_dim=16", "--ffn_dim=16", "--batch_size=4", "--micro_batch=4", "--max_steps=2",
         "--warmup_steps=1", "--eval_interval=2", "--eval_rows=4", "--health_rows=0",
         "--init_table=random", "--device=cpu")


def read_run(folder):
    with contextlib.redirect_stderr(io.StringIO()):
        load_run(str(folder), "cpu", "last")
        checkpoint_to_resume(str(folder), "auto", lambda *_: None)


def read_records(folder):
    read_log(folder)
    with contextlib.suppress(ValueError):
        read_object(str(folder / "config.json"))
    rewind_log(folder, 1)


# name: (makes the files, patterns of those that are changed, reads them)
TARGETS = {
    "tokenizer folder": (make_tokenizer, ["*"], read_tokenizer),
    "tokenizer.json": (make_library, ["*"], read_tokenizer),
    "bins and meta.json": (make_bins, ["meta.json", "train.bin"], read_bins),
    "validate": (make_bins, ["meta.json", "*.bin"], validate_bins),
    "config file": (make_config, ["config.py"], read_config),
    "task.json, tsv, csv, jsonl": (make_task, ["*"], read_task),
    "GLUE tsv": (make_official, ["*"], read_official),
    "files of token ids": (make_ids, ["*"], read_ids),
    "files of text": (make_texts, ["*"], read_texts),
    "checkpoint": (make_run, ["ckpt.pt"], read_run),
    "log.jsonl, config.json": (make_run, ["log.jsonl", "config.json"], read_records),
}


# ---- trying -------------------------------------------------------------------------------------

class TooSlow(BaseException):
    """An example took too long. No reader catches it by mistake, as it might an Exception."""


def too_slow(*_):
    raise TooSlow(f"more than {SECONDS} s")


class Fuzz:
    """Examples of one target: changes a valid folder, reads it, puts it right again.

    findings: {kind of error and its place: its traceback}. tried: examples.
    """

    def __init__(self, name, folder):
        make, patterns, self.read = TARGETS[name]
        self.name, self.folder, self.findings, self.tried = name, Path(folder).resolve(), {}, 0
        shutil.rmtree(self.folder.parent / self.folder.name, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        make(self.folder)
        self.files = sorted({path for pattern in patterns for path in self.folder.glob(pattern)
                             if path.is_file()})
        self.before = {path: path.read_bytes() for path in self.files}
        self.read(self.folder)  # valid files are read

    def strategy(self):
        """-> which file, and its new content, as a hypothesis strategy."""
        def of(path):
            content = self.before[path]
            ways = [st.lists(EDIT, min_size=1, max_size=4).map(lambda e: edited(content, e)),
                    st.binary(max_size=300)]
            if path.suffix == ".json":
                value = json.loads(content)
                ways.append(st.lists(CHANGE, min_size=1, max_size=2).map(
                    lambda c: json.dumps(changed(value, c)).encode()))
            if path.suffix == ".pt" and path.name != "a.pt":
                value = torch.load(path, weights_only=True)
                ways.append(st.lists(CHANGE, min_size=1, max_size=2).map(
                    lambda c: saved(changed(value, c))))
            return st.one_of(ways).map(lambda new: (path, new))
        return st.one_of([of(path) for path in self.files])

    def example(self, path, content):
        path.write_bytes(content)
        self.tried += 1
        signal.signal(signal.SIGALRM, too_slow)
        signal.alarm(SECONDS)
        try:
            self.read(self.folder)
        except (ValueError, OSError) as error:
            if not str(error).strip():
                self.note(path, content, error)
        except SystemExit as error:
            if not isinstance(error.code, str):
                self.note(path, content, error)
        except BaseException as error:  # PanicException of Rust libraries is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            self.note(path, content, error)
        finally:
            signal.alarm(0)
            path.write_bytes(self.before[path])

    def note(self, path, content, error):
        ours = [frame for frame in traceback.extract_tb(error.__traceback__)
                if str(ROOT) in frame.filename and "tests" not in frame.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        key = f"{type(error).__name__} at {where}"
        if key not in self.findings:
            self.findings[key] = "".join(traceback.format_exception(error)[-6:])
            kept = self.folder.parent / f"finding_{len(self.findings)}_{path.name}"
            kept.write_bytes(content)

    def round(self, number, examples, derandomize=False):
        """Tries so many examples."""
        @settings(max_examples=examples, deadline=None, database=None, derandomize=derandomize,
                  suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        @given(self.strategy())
        def tries(example):
            self.example(*example)
        if not derandomize:
            tries = with_seed(number)(tries)
        tries()


def saved(value):
    """torch.save -> bytes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def main():
    if target:
        # without commas, which stand between folders
        fuzz = Fuzz(target, Path(folder) / "".join(filter(str.isalnum, target)) / "files")
        begin, number = time.monotonic(), seed
        while time.monotonic() - begin < 60 * minutes:
            fuzz.round(number, 100)
            number += 1
        for key, text in fuzz.findings.items():
            print(f"{key}\n{text}", flush=True)
        print_result(dict(target=target, tried=fuzz.tried, findings=list(fuzz.findings)))
        sys.exit(bool(fuzz.findings))
    from storm import command_line, replace_section, versions
    rows, bad = [], 0
    for name in TARGETS:
        done = subprocess.run([sys.executable, __file__, f"--target={name}",
                               f"--minutes={minutes}", f"--folder={folder}", f"--seed={seed}"],
                              capture_output=True, text=True)
        try:
            found = json.loads(done.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):  # the interpreter itself has crashed
            found = dict(tried="?", findings=[f"exit code {done.returncode}"])
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
        bad += len(found["findings"])
        rows.append(f"| {name} | {found['tried']} | {len(found['findings'])} |")
    command = command_line("tests/faults/fuzz.py")
    table = "\n".join(["| reader of | examples | findings |", "|---|---:|---:|", *rows])
    replace_section(page, "## Damaged and random files",
                    f"`{command}` ({versions()})\n\n{table}\n")
    print_result(dict(findings=bad))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
