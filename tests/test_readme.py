"""The READMEs are true: commands run, links lead somewhere; presets are what their heads say."""

import ast
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from runpy import run_path

import pytest
import torch
from conftest import ROOT, Fork, call, result, run_script

from lib import jobs
from lib.settings import ARCHS
from masking import predicted_share

pytestmark = pytest.mark.long(0)

READMES = ["README.md", "data/README.md", "config/README.md", "tools/README.md"]  # in this order
README = "\n".join((ROOT / name).read_text() for name in READMES)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", "").splitlines()
            if line.strip() and not line.startswith("#")]
# Commands run as written, in a copy of the repository whose files have other defaults: all that is
# smaller here is the model, the number of steps and rows, and Python's documentation.
SMALL_CONFIG = dict(max_steps=2, n_layer=1, batch_size=4, micro_batch=2, n_concept=8,
                    concept_dim=64, token_dim=64, ffn_dim=64, eval_rows=2, health_rows=2,
                    max_minutes=0)
SMALL = {
    "data/pydocs/prepare.py": dict(max_bytes=100_000, tokenizer="bpe:600"),
    "tools/eval.py": dict(rows=2, health_rows=2, pll_texts=2),
    "data/stats.py": dict(vocabularies="600"),
    "finetune_glue.py": dict(seeds=1, grid_seeds=0, epochs=1),
    "config/sweeps/efficiency.py": dict(
        base="--n_layer=1 --batch_size=2 --micro_batch=2 --eval_rows=2 --health_rows=2 "
             "--concept_dim=64 --token_dim=64 --block_size=64 --data_dir=data/pydocs",
        arms="open --ffn_dim=64\nmixers --arch=transformer --n_layer=0 --ffn_dim=192",
        flops=3e7),
    # width 32: 4 layers of 96 and 3 of 144 have this many parameters
    "config/sweeps/allocation_demo.py": dict(
        base="--arch=transformer --n_mixer=0 --block_size=32 --batch_size=2 --micro_batch=2 "
             "--eval_rows=2 --max_steps=2 --init_table=random --data_dir=data/pydocs",
        grid="glu 3 4.5", budget=74200, jobs=1),
}


def make_small(clone):
    """Changes the defaults of the copy; a setting that is no longer there is an error."""
    for name, settings in SMALL.items():
        text = (clone / name).read_text()
        for key, value in settings.items():
            pattern = rf"^{key} = (\"\"\".*?\"\"\"|\(.*?\)$|[^#\n]*)"
            text, n = re.subn(pattern, lambda _, k=key, v=value: f"{k} = {v!r}  ", text,
                              flags=re.M | re.S)
            assert n == 1, f"{name} has no setting {key}"
        if name.endswith("allocation_demo.py"):
            text += "embed_share = 0.276\n"
        (clone / name).write_text(text)
    for path in clone.glob("config/*.py"):
        with open(path, "a") as file:
            file.writelines(f"{key} = {value!r}\n" for key, value in SMALL_CONFIG.items())


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked and new files, as in a fresh clone, with a folder of texts to prepare."""
    clone = tmp_path_factory.mktemp("clone")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT,
                           capture_output=True, text=True)
    for name in filter(lambda n: (ROOT / n).is_file(), names.stdout.split("\n")):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    (clone / "texts").mkdir()
    sources = sorted(path for pattern in ("*.py", "lib/*.py", "data/*.py", "tools/*.py")
                     for path in ROOT.glob(pattern))
    (clone / "input.txt").write_text("\n".join(path.read_text() for path in sources))
    for i, path in enumerate(sorted(ROOT.glob("*.py"))):
        (clone / "texts" / f"{i}.txt").write_text(path.read_text())
    for folder, header, row in (("glue/MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
                                 f"{{}}\t1\t2\ta cat\t{'a dog and ' * 5}a cat"),
                                ("my_task", "question\treply\tverdict", "who?\tme\t{}")):
        (clone / folder).mkdir(parents=True)
        for split in ("train", "dev"):
            answers = ("0", "1") if folder != "my_task" else ("no", "yes")
            lines = [header, *(row.format(answer) for answer in answers * 4)]
            (clone / folder / f"{split}.tsv").write_text("\n".join(lines))
    task = re.search(r"```json\n(.*?)```", README, re.S).group(1)
    (clone / "my_task" / "task.json").write_text(task)
    make_small(clone)
    return clone


def test_every_command_of_the_readme_runs(clone, monkeypatch):
    """In order, in one copy of the repository; make with -n."""
    monkeypatch.setattr(jobs, "stopping", False)
    assert len(COMMANDS) >= 8
    done_before = []
    for command in COMMANDS:
        command, _, _ = command.partition("  #")
        # a loop around a command that ends well runs it once
        command = command.removeprefix("until ").removesuffix("; do sleep 5; done")
        command, _, stdin = command.partition(" < ")
        words, env = shlex.split(command), {"STDIN": str(clone / stdin.strip())} if stdin else {}
        if words[0] == "make":
            done = subprocess.run(["make", "-n", *words[1:]], cwd=clone, capture_output=True,
                                  text=True)
        elif words in done_before:
            continue
        elif words[0] == "torchrun":
            nproc = int(words[1].removeprefix("--nproc_per_node="))
            done = run_script(words[2:], cwd=clone, nproc=nproc)
        elif words[1] == "tools/sweep.py":
            with monkeypatch.context() as patch:
                patch.setattr(subprocess, "Popen", Fork)  # its runs start at once
                done = call(*words[1:], cwd=clone, ok=False)
        else:
            assert words[0] == "python", command
            done = run_script(words[1:], cwd=clone, env=env)
        done_before.append(words)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_of_the_readme_runs(clone, tmp_path, snippet):
    """After the commands above, which it needs."""
    if "transformers" in snippet:
        pytest.importorskip("sentence_transformers")
    env = {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run_script(["-c", snippet], cwd=clone, env=env)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_make_demo_runs_what_the_readme_explains(clone):
    lines = subprocess.run(["make", "-n", "demo"], cwd=clone, capture_output=True, text=True).stdout
    found = re.findall(r"^\.venv/bin/python ((?!-m pip).*)$", lines, re.M)
    block = re.search(r"```sh\n(python data/pydocs.*?)```", README, re.S)[1]
    wanted = [re.sub(r"\s+#.*", "", line).removeprefix("python ") for line in block.splitlines()]
    assert found == wanted


@pytest.mark.parametrize("readme", [*READMES, "records/README.md"])
def test_files_the_readme_names_exist(readme):
    """Links, paths from the top, and in the README of a folder the names of files in it."""
    text, folder = (ROOT / readme).read_text(), (ROOT / readme).parent
    for name in re.findall(r"\]\(([^)#]+)\)", text):
        assert name.startswith("http") or (folder / name).exists(), name
    if readme == "records/README.md":
        return
    paths = r"`((?:config|data|lib|records|sweeps|tests|tools)/[a-z_/]+\.\w+)`"
    for name in re.findall(paths, text):
        assert (ROOT / name).exists() or (folder / name).exists(), name
    for name in re.findall(r"^\| `(\w+\.py)`", text, re.M):
        assert (folder / name).exists(), name


def test_the_tree_of_the_readme_is_the_tree():
    tree = re.findall(r"^(\w+(?:\.py|/))  ", (ROOT / "README.md").read_text(), re.M)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    there = {name.partition("/")[0] + "/" for name in tracked.split() if "/" in name}
    there = {name for name in there if not name.startswith(".")}
    assert set(tree) == there | {path.name for path in ROOT.glob("*.py")}


def test_the_demo_sentences_have_masks():
    lines = (ROOT / "config" / "demo_sentences.txt").read_text().splitlines()
    assert len(lines) == 5 and all("[MASK]" in line for line in lines)


SIZES = {"tiny": 100e6, "small": 500e6, "base": 1e9, "large": 3e9, "xlarge": 7e9}


# The others are for minutes, or go on top of a preset.
PRESETS = sorted(path for path in (ROOT / "config").glob("*.py")
                 if not path.stem.startswith(("demo", "mini", "phase", "decoder", "speedrun")))
# Millions of parameters that Ettin states (2507.11412, table 1), and our names for round sizes.
STATED = {"17m": 16.9, "32m": 32.1, "68m": 68.5, "150m": 149.7, "400m": 395.9, "1b": 1031.3,
          "resonance_small": 50, "resonance_medium": 200, "resonance_large": 500,
          "resonance_xlarge": 1000}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_heads_state_size_and_cost_correctly(path):
    """Parameters, MFLOP a token, tokens and FLOP are what model and settings give."""
    settings, head = run_path(path), run_path(path)["__doc__"]
    with torch.device("meta"):
        config_class, model_class = ARCHS[settings.get("arch", "concept")]
        names = [field.name for field in fields(config_class) if field.name in settings]
        causal = dict(causal=True) if settings.get("objective") == "clm" else {}
        model = model_class(config_class(**{name: settings[name] for name in names}, **causal))
    size = f"{model.num_params():,} parameters with a {model.cfg.vocab_size:,}-word vocabulary"
    assert size in head
    stated = STATED.get(path.stem.removeprefix("ettin_"), model.num_params() / 1e6)
    exact = 0.002 if path.stem.startswith("ettin") else 0.01
    assert model.num_params() == pytest.approx(stated * 1e6, rel=exact)
    assert abs(model.num_params() / SIZES.get(path.stem, model.num_params()) - 1) < 0.06
    T = settings["block_size"]
    share = predicted_share(settings.get("masking_type"), settings.get("mlm_probability"),
                            settings.get("objective", "mlm"))
    flops = model.flops_per_token(T, math.ceil(share * T))
    tokens = float(re.search(r"([\d.]+) B tokens", head)[1]) * 1e9
    assert tokens == pytest.approx(settings["max_steps"] * settings["batch_size"] * T, rel=0.01)
    assert f"{flops / 1e6:,.1f} MFLOP a token" in head and f"{flops * tokens:.1e} FLOP" in head


def messages():
    """The texts of the sources, what an f-string fills in as \0."""
    found = []
    for path in [p for p in ROOT.glob("**/*.py") if not {".venv", "records", "tests"} & {*p.parts}]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0"
                                     for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_table_of_costs_is_what_the_command_prints():
    row = re.search(r"^\| `micro_balanced` \|(.*)\|$", README, re.M)[1]
    done = call("tools/bench.py", "--estimate=1", "config/micro_balanced.py", "--n_gpu=4")
    gpus = result(done)["gpus"]
    cells = [cell.strip() for cell in row.split("|")][2:]
    for cell, name in zip(cells, ("rtx3090", "rtx4090", "a100", "h100"), strict=True):
        assert cell == f"{gpus[name]['hours']:.1f} h, ${gpus[name]['usd']:.2f}"
    assert "42.9 MFLOP a token" in done.stdout, "as the preset's head says"


def test_the_presets_have_the_parameters_of_the_table():
    table = (ROOT / "config/README.md").read_text().split("## Presets")[1].split("\n\n`decoder")[0]
    checked = 0
    for names, counts in re.findall(r"^\| (.*?) \| ([\d,; ]+)(?: \(.*?\))? \|", table, re.M):
        stems = re.findall(r"`(\w+)\.py`", names)
        found = counts.split("; ") if "; " in counts else [counts] * len(stems)
        for stem, count in zip(stems, found, strict=True):
            assert count.strip() in run_path(ROOT / f"config/{stem}.py")["__doc__"], stem
            checked += 1
    assert checked > 10


def fixed_parts(message):
    """The runs of plain words in an example of a message: something else is filled in between."""
    found = re.findall(r"(?<!\S)[A-Za-z]+(?: [A-Za-z]+)*(?!\S)", message)
    return [words for words in found if " " in words]


def test_the_messages_that_the_page_explains_exist():
    section = (ROOT / "tools/README.md").read_text().split("## When things go wrong")[1]
    quoted = re.findall(r"^\| `([^`]+)` \|", section, re.M)
    assert len(quoted) > 25
    sources = messages()
    for page in ("config/README.md", "data/README.md"):  # with examples for what is filled in
        section = (ROOT / page).read_text().split("## When something is refused")[1]
        parts = re.findall(r"^\| `([^`]+)` \|", section.split("\n## ")[0], re.M)
        assert len(parts) > 3, page
        for message in parts:
            assert any(part in text for text in sources for part in fixed_parts(message)), message
    for message in quoted:
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert any(re.search(pattern, text, re.S) for text in sources), message


def test_help_of_every_command_lists_its_settings():
    for script in ("train.py", "prepare.py", "finetune_glue.py", "tools/eval.py", "tools/sample.py",
                   "tools/export.py", "tools/sweep.py", "tools/bench.py"):
        assert "settings, with their defaults" in call(script, "--help").stdout
