"""Settings: typed, complete, refused all at once, and none of them ignored."""

import ast
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import as_bool, configure, expand_path, read_settings, without_traceback
from lib.settings import ARCHS, bad_values, fields_of
from tools import arms

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("data/**/*.py")]
SCRIPTS = sorted(p for p in SOURCES if "config = configure(globals())" in p.read_text())
COMMANDS = sorted(p for p in SOURCES if "config = configure(globals()" in p.read_text()
                  and p.name != "configurator.py")
CONFIGS = sorted(ROOT.glob("config/**/*.py"))

SCRIPT = '''"""A script.

    python script.py
"""
out_dir = "out"  # where it goes
data_dir = ""  # several with commas between
steps = 10  # number of steps
rate = 0.5  # a rate
flag = False  # a switch
mode = "auto"  # auto | true | false
note = ""  # a text
config = configure(globals())
later = 3
'''


@pytest.fixture
def run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(*argv, **files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_bytes(text if type(text) is bytes else text.encode())
        names = dict(__file__=str(script), __doc__="A script.")
        argv = [str(tmp_path / a) if a.endswith(".py") else a for a in argv]
        return configure(names, argv), names
    return run


@pytest.fixture
def refused(run):
    def refused(*argv, **files):
        with pytest.raises(SystemExit) as stop:
            run(*argv, **files)
        return str(stop.value)
    return refused


def message(script, *argv):
    """What a command of the repository says when it refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        configure(dict(__file__=str(ROOT / script)), argv)
    return str(stop.value)


def test_overrides_are_typed_and_reach_the_script(run):
    config, names = run("--steps=1e3", "--rate=2", "--flag=TRUE", "--out_dir=a=b")
    expected = dict(out_dir="a=b", steps=1000, rate=2.0, flag=True)
    assert config == config | expected
    assert {k: names[k] for k in config} == config
    assert type(config["steps"]) is int and type(config["rate"]) is float


def test_threads_that_wait_leave_the_core_to_others(run, monkeypatch):
    """Set before torch is imported, which is when it is read; what the user has set stays."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    run()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    run()
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    for script in COMMANDS:
        imports = script.read_text().split("configure(globals()")[0]
        assert not re.search(r"^(import|from) (torch|lib)\b", imports, re.M), script


def test_files_and_flags_apply_in_the_order_given(run):
    config, _ = run("a.py", "--steps=7", "b.py", a="steps = 5\nrate = steps / 10\n",
                    b="rate = -rate + 1  # why\n")
    assert config["steps"] == 7 and config["rate"] == 0.5
    assert run("--steps=1", "--steps=2")[0]["steps"] == 2


# ---- values -------------------------------------------------------------------------------------

@pytest.mark.parametrize("word, value", [
    ("true", True), ("True", True), ("TRUE", True), ("1", True), ("yes", True), ("on", True),
    ("false", False), ("False", False), ("0", False), ("No", False), ("OFF", False)])
def test_a_boolean_is_taken_in_any_common_spelling(run, word, value):
    config, _ = run(f"--flag={word}", f"--mode={word}")
    assert config["flag"] is value and config["mode"] == str(value).lower()
    assert as_bool(word) is value
    quoted = word if word.lower() in ("0", "1") or word in ("True", "False") else repr(word)
    config, _ = run("a.py", a=f"flag = {quoted}\nmode = {quoted}\n")
    assert config["flag"] is value and config["mode"] == str(value).lower()


def test_a_switch_alone_is_on_and_takes_no_word_behind_it(run, refused):
    config, _ = run("--flag", "--mode", "a.py", a="steps = 3")
    assert config["flag"] is True and config["mode"] == "true" and config["steps"] == 3
    assert "--flag: write --flag=off" in refused("--flag", "off")
    assert "--mode: write --mode=False" in refused("--mode", "False")


@pytest.mark.parametrize("value", ["2", "tru", "", "None", "-1"])
def test_other_words_are_no_boolean(refused, value):
    assert f"flag = {value!r}: expected true or false" in refused(f"--flag={value}")


def test_every_boolean_of_every_command_is_a_switch():
    """None is an integer whose help explains 0 and 1, and all take the same spellings."""
    for script in COMMANDS:
        for name, (default, text) in read_settings(script).items():
            assert isinstance(default, bool) or not re.match(r"(split: )?1[: ]", text), name
            assert default not in ("true", "false"), name
            if isinstance(default, bool) or "| true | false" in text:
                config = configure(dict(__file__=str(script)), [f"--{name}=YES"])
                assert config[name] in (True, "true"), f"{script} {name}"


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "", "0x10", "1_000.5", str(2**63),
                                   "-99999999999999999999", "9" * 5000, "\u00b2"])
def test_odd_numbers_never_become_ints(refused, value):
    assert f"steps = {value!r}: expected a whole number" in refused(f"--steps={value}")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "", "1,5", "1/2"])
def test_odd_numbers_never_become_floats(refused, value):
    assert f"rate = {value!r}: expected a number" in refused(f"--rate={value}")


def test_numbers_may_be_written_with_underscores_or_a_minus_sign(run):
    config, _ = run("--steps=9_007_199_254_740_993", "--rate=\u22121_0.5")
    assert config["steps"] == 2**53 + 1 and config["rate"] == -10.5
    assert run("--steps=1.0")[0]["steps"] == 1


@pytest.mark.parametrize("text", ["rate = 1e308 * 10", "rate = 10 ** 400", "steps = 1e308 * 10",
                                  "steps = 2 ** 70", "note = 'a\\0b'", "out_dir = 'a\\0b'"])
def test_a_value_of_a_file_that_nothing_can_hold_names_its_line(refused, text):
    assert f"a.py:1: {text.partition(' ')[0]}" in refused("a.py", a=text)


@pytest.mark.parametrize("name, values", [
    ("seed", (-1,)), ("concept_std", (-1.0, 0.0)), ("dropout", (-0.1, 1.0)), ("block_size", (0,)),
    ("vocab_size", (-1, 2**40)), ("max_length", (-1,)), ("max_steps", (0, 2**62)),
    ("n_layer", (10**9,)), ("concept_dim", (2**40,)), ("batch_size", (0, 2**40))])
def test_a_value_that_training_cannot_use_is_named(name, values):
    defaults = {name: default for name, (default, _) in read_settings(ROOT / "train.py").items()}
    assert not bad_values(defaults)
    for value in values:
        assert f"{name}={value}: expected" in "".join(bad_values(defaults | {name: value}))


# ---- names --------------------------------------------------------------------------------------

def test_settings_after_configure_are_not_settings(refused):
    assert "unknown setting 'later'" in refused("--later=4")


@pytest.mark.parametrize("value, reason", [
    ("9**9**9**9", "a smaller power"), ("2**20000", "a smaller power"),
    ("'a' * 10**9", "numbers, strings"), ("'%999999999d' % 1", "numbers, strings"),
    ("b'a' * 10**9", "numbers, strings"), ("1 << 10**9", "numbers, strings"),
    ("open('x')", "numbers, strings"), ("steps.real", "numbers, strings"),
    ("1 / 0", "division by zero"), ("'a' + 1", "numbers, strings")])
def test_a_config_file_of_somebody_else_neither_runs_nor_stalls(value, reason, refused):
    assert reason in refused("a.py", a=f"steps = {value}\n")


def test_all_problems_are_listed_at_once_with_suggestions(refused):
    text = refused("--step=3", "--steps=1.5", "--rate=fast", "--flag=2", "--steps", "a.py",
                   "missing.py", a='stepz = 3\nsteps = "4"\nrate = open("x")\nimport os\n'
                   'rate = nothing + 1\nflag = 3\n')
    for part in ("did you mean 'steps'", "steps = '1.5': expected a whole number",
                 "rate = 'fast': expected a number", "flag = '2': expected true or false",
                 "--steps: expected --key=value", "a.py:1: unknown setting 'stepz'", "steps = '4'",
                 "a.py:3: a value may hold numbers", "a.py:4: only 'name = value'", "a.py:5",
                 "flag = 3", "no such config file"):
        assert part in text, f"{part!r} missing in:\n{text}"


@pytest.mark.parametrize("script, arg, ours", [
    ("train.py", "--max_iters=5", "max_steps"), ("train.py", "--lr_decay_iters=5", "max_steps"),
    ("train.py", "--lr=1", "learning_rate"),
    ("train.py", "--n_embd=5", "concept_dim and token_dim"),
    ("train.py", "--gradient_accumulation_steps=4", "batch_size and micro_batch"),
    ("train.py", "--per_device_train_batch_size=4", "micro_batch"),
    ("train.py", "--num_train_epochs=4", "max_steps"), ("train.py", "--epochs=4", "max_steps"),
    ("train.py", "--mlm_prob=0.2", "mlm_probability"), ("train.py", "--dataset=owt", "data_dir"),
    ("train.py", "--warmup_ratio=0.1", "warmup_steps"), ("train.py", "--output_dir=x", "out_dir"),
    ("train.py", "--model_name_or_path=x", "init_from"), ("train.py", "--bf16", "dtype=bf16"),
    ("train.py", "--fp16=True", "dtype=fp16"), ("train.py", "--max-seq-length=9", "block_size"),
    ("train.py", "--hidden_size 9", "concept_dim and token_dim"),
    ("finetune_glue.py", "--learning_rate=1", "lrs"), ("finetune_glue.py", "--lr=1", "lrs"),
    ("finetune_glue.py", "--num_train_epochs=1", "epochs"),
    ("finetune_glue.py", "--max_seq_length=9", "max_tokens"),
    ("tools/eval.py", "--batch_size=9", "micro_batch"), ("tools/eval.py", "--eval_iters=9", "rows"),
    ("prepare.py", "--dataset=x", "input"), ("prepare.py", "--num_workers=2", "num_proc")])
def test_names_of_other_trainers_lead_to_ours(script, arg, ours):
    assert f"here it is {ours}\n" in message(script, *arg.split()) + "\n"


@pytest.mark.parametrize("arg, part", [
    ("--eval_only=True", "tools/eval.py --out_dir=RUN"), ("--wandb_log=True", "here it is"),
    ("--nproc_per_node=4", "torchrun --nproc_per_node=4 train.py"),
    ("--local-rank=0", "torchrun"), ("--local_rank", "torchrun"), ("--do_train", "train.py"),
    ("--push_to_hub", "in other commands push"), ("--qqqq=1", "unknown setting 'qqqq'")])
def test_a_name_without_a_setting_of_ours_says_what_to_do(arg, part):
    assert part in message("train.py", arg)


def test_no_foreign_name_hides_a_setting_and_all_lead_to_one():
    names = set().union(*(read_settings(script) for script in COMMANDS)) | {"log_to"}
    lines = (ROOT / "config/other_names.txt").read_text().splitlines()
    for line in lines[2:]:
        theirs, arrow, ours = line.partition(" -> ")
        assert arrow and theirs and ours, line
        if " " not in ours.replace(", ", "").replace(" and ", ""):
            for one in re.split(", | and ", ours):
                assert one.partition("=")[0] in names, line
    theirs = [name for line in lines[2:] for name in line.partition(" -> ")[0].split()]
    assert len(theirs) == len(set(theirs))


@pytest.mark.parametrize("argv, right", [
    (["--learning-rate=1e-3"], "--learning_rate=1e-3"), (["--out_dir", "out/x"], "--out_dir=out/x"),
    (["learning_rate=1e-3"], "--learning_rate=1e-3"), (["-seed=1"], "--seed=1"),
    (["\u2014seed=1"], "--seed=1"), (["\u2013\u2013seed=1"], "--seed=1"),
    (["--seed", "-1"], "--seed=-1"), (["--max-steps", "5"], "--max_steps=5"),
    (["---seed=1"], "--seed=1")])
def test_another_form_of_a_setting_is_refused_with_the_right_one(argv, right):
    text = message("train.py", *argv)
    assert f": write {right}" in text and len(text.splitlines()) == 2, text


@pytest.mark.parametrize("arg", ["--=x", "--", "-"])
def test_a_setting_without_a_name_is_refused(refused, arg):
    assert "expected --key=value" in refused(arg)


# ---- paths --------------------------------------------------------------------------------------

def test_home_and_variables_are_replaced_in_every_path(run, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/disk/my data")
    config, _ = run("--out_dir=~/out/x", "--data_dir=~/a,~,${DATA}/b,$DATA", "--note=~ costs $5 $X")
    assert config["out_dir"] == "/home/me/out/x" and config["note"] == "~ costs $5 $X"
    assert config["data_dir"] == "/home/me/a,/home/me,/disk/my data/b,/disk/my data"
    config, _ = run("a.py", a='out_dir = "$DATA/caf\u00e9 x"\ndata_dir = out_dir + "/~"\n')
    assert config["data_dir"] == "/disk/my data/caf\u00e9 x/~"
    for text in ("bpe:16000", "-", "a~b", "./~", "a$", "$1", "texts/*.txt", ""):
        assert expand_path(text) == text


@pytest.mark.parametrize("value, part", [
    ("$NOT_SET/x", "the environment variable NOT_SET is not set"),
    ("a,${EMPTY}/x", "the environment variable EMPTY is not set"),
    ("~no-such-user/x", "no home folder ~no-such-user")])
def test_a_path_that_cannot_be_resolved_is_refused(refused, monkeypatch, value, part):
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert part in refused(f"--out_dir={value}")


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_path_is_refused_where_one_is_needed(refused, run, value):
    assert f"out_dir = {value!r}: expected a path" in refused(f"--out_dir={value}")
    assert run(f"--data_dir={value}")[0]["data_dir"] == value


def test_every_setting_that_names_a_folder_or_file_is_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for script in COMMANDS:
        for name, (default, text) in read_settings(script).items():
            is_path = name.endswith(("_dir", "_from")) or re.search(r"\b([Ff]olders?|DIR)\b", text)
            if type(default) is str and is_path and name not in ("data_weights", "name"):
                config = configure(dict(__file__=str(script)), [f"--{name}=~/x"])
                assert config[name] == "/home/me/x", f"{script} {name}"


# ---- config files -------------------------------------------------------------------------------

@pytest.mark.parametrize("path, parts", [
    ("config/sweep_dims.py", ["config/sweep_dims.py", "did you mean config/sweeps/dims.py?"]),
    ("config/micro_spam.py", ["did you mean config/micro_span.py?"]),
    ("config/demo", ["did you mean config/demo.py?"]), ("demo", ["did you mean config/demo.py?"]),
    ("xyz", ["there is:", "config/demo.py", "config/sweeps/dims.py"])])
def test_a_config_file_that_is_not_there_leads_to_the_nearest_one(path, parts, monkeypatch,
                                                                  tmp_path):
    for folder in (ROOT, tmp_path):
        monkeypatch.chdir(folder)
        text = message("train.py", path)
        assert all(part in text for part in ["no such config file", *parts])


@pytest.mark.parametrize("script, path, right", [
    ("tools/eval.py", "out/demo", "--out_dir=out/demo"), ("train.py", "here", "--out_dir=here"),
    ("tools/eval.py", "out/demo/best.pt", "--out_dir=out/demo/best.pt"),
    ("prepare.py", "input.txt", "--input=input.txt"), ("prepare.py", "here", "--input=here"),
    ("prepare.py", "a b", "'--input=a b'"), ("train.py", "bins", "--data_dir=bins"),
    ("tools/eval.py", "bins/", "--data_dir=bins/")])
def test_a_folder_or_file_alone_leads_to_its_setting(script, path, right, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    Path("a b").mkdir()
    Path("bins").mkdir()
    Path("bins/meta.json").touch()
    text = message(script, path)
    assert f"did you mean {right}?" in text and "config/" not in text


def test_a_config_file_is_the_callers_or_else_the_repositorys(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    config = configure(dict(__file__=str(ROOT / "train.py")), ["config/demo.py"])
    assert config["out_dir"] == "out/demo"
    assert f"config/demo.py is not in this folder; taken from {ROOT}" in capsys.readouterr().err
    Path("config").mkdir()
    Path("config/demo.py").write_text("out_dir = 'mine'")
    config = configure(dict(__file__=str(ROOT / "train.py")), ["config/demo.py"])
    assert config["out_dir"] == "mine" and not capsys.readouterr().err


def test_a_config_file_of_any_editor_is_read(run):
    config, _ = run("a b\u00e9.py", **{"a b\u00e9": b"\xef\xbb\xbf# BOM\r\nsteps = 3\t# tab\r\n"
                                       b"\r\nnote = 'caf\xc3\xa9'\r\n"})
    assert config["steps"] == 3 and config["note"] == "caf\u00e9"


@pytest.mark.parametrize("text", [
    b"steps = = 3\n", b"steps = 3\0\n", b"\tsteps = 3\n", b"note = 'caf\xe9'\n",
    "steps = 3\n".encode("utf-16"), b"steps = " + b"(" * 300 + b"3" + b")" * 300,
    b"steps = " + b"-" * 20000 + b"3"], ids=range(7))
def test_a_config_file_that_cannot_be_read_is_named(refused, text):
    assert "/a.py" in refused("a.py", a=text)


def test_a_config_that_is_a_folder_or_unreadable_is_named(refused, tmp_path):
    (tmp_path / "folder.py").mkdir()
    assert "folder.py: not a config file" in refused("folder.py")
    os.mkfifo(tmp_path / "loop.py.txt")
    (tmp_path / "loop.py").symlink_to("loop.py")
    assert "loop.py: no such config file" in refused("loop.py")


# ---- how a command starts -----------------------------------------------------------------------

def test_help_prints_every_setting_with_its_comment(run, capsys):
    for argv in (["--help"], ["--nonsense=1", "missing.py", "-h"]):
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "--steps=10" in out and "number of steps" in out
        assert out.startswith("A script.\n\n    python script.py\n")


def test_help_and_refusals_work_without_docstrings_and_in_ascii(tmp_path):
    """python -OO drops docstrings; a stdout that is not UTF-8 cannot show all text."""
    command = [sys.executable, "-OO", str(ROOT / "train.py")]
    ascii_only = dict(os.environ, PYTHONIOENCODING="ascii", LANG="C")
    done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True,
                          env=ascii_only)
    assert done.returncode == 0 and done.stdout.startswith("Train a model"), done.stderr
    done = subprocess.run([*command, "--learning_rat=caf\u00e9"], cwd=tmp_path, capture_output=True,
                          text=True, env=ascii_only)
    assert done.returncode and "did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr and r"caf\xe9" in done.stderr


def test_output_in_another_encoding_ends_no_command(run, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9"), "ascii"))
    run()
    assert sys.stdin.read() == "caf\u00e9"
    run()  # standard input has been read from
    print("caf\u00e9 \udcff", flush=True)
    assert written.getvalue() == b"caf\\xe9 \\udcff\n"


def test_identical_commands_give_identical_configs(run):
    assert run("--steps=3")[0] == run("--steps=3")[0]


def test_an_imported_command_keeps_its_defaults(tmp_path, monkeypatch):
    """A notebook's kernel, pytest and others have arguments of their own."""
    monkeypatch.setattr("sys.argv", ["kernel", "-f", "kernel.json", "--steps=3"])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + '\nif __name__ == "__main__":\n    print(later)\n')
    names = dict(__file__=str(script), __name__="script", steps=10)
    assert configure(names)["steps"] == 10 and names["steps"] == 10
    monkeypatch.setattr("sys.argv", ["script.py", "--steps=3"])
    for name in ("__main__", "__mp_main__"):  # the second: a process of multiprocessing
        assert configure(dict(__file__=str(script), __name__=name))["steps"] == 3


def test_importing_a_command_never_starts_it(tmp_path):
    """It either only defines functions or raises ImportError before torch is imported."""
    program = """
import importlib.util, sys
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("imported", path)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        print(path, "is imported")
    except ImportError as error:
        assert "torch" not in sys.modules, path
        print(path, error)
"""
    works = [path for path in COMMANDS if 'if __name__ == "__main__"' not in path.read_text()]
    done = subprocess.run([sys.executable, "-c", program, *works], cwd=tmp_path, text=True,
                          capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    assert ROOT / "train.py" in works
    for path, line in zip(works, done.stdout.splitlines(), strict=True):
        command = path.relative_to(ROOT)
        assert f"run it by `python {command}`" in line and "lib/notebook.py" in line


def test_a_typo_ends_in_one_message_without_traceback():
    done = subprocess.run([sys.executable, "train.py", "--learning_rat=1"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the repository's own scripts and configs ---------------------------------

@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_setting_is_read(script):
    """Each setting occurs again in its script, as a name or as a key of `config`, is a setting of
    the model, or is read by data/hub.py, to which the scripts of the hub's data sets give all.
    """
    nodes = list(ast.walk(ast.parse(script.read_text())))
    read = {node.id for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant)}
    model_fields = set()
    if "model_settings(" in script.read_text():
        model_fields = set().union(*map(fields_of, ARCHS))
    if "(config, " in script.read_text() and "from data.hub import" in script.read_text():
        constants = ast.walk(ast.parse((ROOT / "data/hub.py").read_text()))
        read |= {node.value for node in constants if isinstance(node, ast.Constant)}
    unread = set(read_settings(script)) - read - model_fields
    assert not unread, f"settings nobody reads: {unread}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_setting_has_a_comment(script):
    assert not [name for name, (_, text) in read_settings(script).items() if not text]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_is_accepted(path):
    """By train.py; a sweep by sweep.py, and each of its arms by train.py."""
    def accept(script, arguments):
        return configure(dict(__file__=str(ROOT / script), __doc__=""), arguments)
    if path.parent.name != "sweeps":
        accept("train.py", [str(path)])
        return
    sweep = accept("tools/sweep.py", [str(path)])
    of_grid = arms.combinations(sweep["grid"])
    own = [*arms.named(sweep["arms"], "out").values(), *(arguments for _, arguments in of_grid)]
    assert len(own) > 1
    for arguments in own:
        # shares of a budget are turned into shapes by the sweep
        arguments = shlex.split(sweep["base"]) + [
            word for word in arguments if word[2:].partition("=")[0] not in arms.SOLVED]
        accept("train.py", [str(ROOT / a) if a.endswith(".py") else a for a in arguments])


def test_ctrl_c_before_a_command_begins_shows_no_traceback(capsys):
    """Most of that time torch is being imported."""
    without_traceback(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
    without_traceback(ZeroDivisionError, ZeroDivisionError("by zero"), None)
    assert "ZeroDivisionError: by zero" in capsys.readouterr().err
