"""Settings: typed, complete, refused all at once, and none of them ignored."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import configure, read_settings
from lib.run import ARCHS, fields_of

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("data/**/*.py")]
SCRIPTS = sorted(p for p in SOURCES if "config = configure(globals())" in p.read_text())
CONFIGS = sorted(ROOT.glob("config/**/*.py"))

SCRIPT = '''"""A script.

    python script.py
"""
out_dir = "out"  # where it goes
steps = 10  # number of steps
rate = 0.5  # a rate
flag = False  # a switch
config = configure(globals())
later = 3
'''


@pytest.fixture
def run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(*argv, **files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        names = dict(__file__=str(script), __doc__="A script.")
        argv = [str(tmp_path / a) if a.endswith(".py") else a for a in argv]
        return configure(names, argv), names
    return run


def test_overrides_are_typed_and_reach_the_script(run):
    config, names = run("--steps=1e3", "--rate=2", "--flag=TRUE", "--out_dir=a=b")
    assert config == dict(out_dir="a=b", steps=1000, rate=2.0, flag=True)
    assert {k: names[k] for k in config} == config
    assert type(config["steps"]) is int and type(config["rate"]) is float


def test_files_and_flags_apply_in_the_order_given(run):
    config, _ = run("a.py", "--steps=7", "b.py", a="steps = 5\nrate = steps / 10\n",
                    b="rate = -rate + 1  # why\n")
    assert config["steps"] == 7 and config["rate"] == 0.5


def test_settings_after_configure_are_not_settings(run):
    with pytest.raises(SystemExit, match="unknown setting 'later'"):
        run("--later=4")


def test_all_problems_are_listed_at_once_with_suggestions(run):
    with pytest.raises(SystemExit) as stop:
        run("--step=3", "--steps=1.5", "--rate=fast", "--flag=1", "--steps", "a.py", "missing.py",
            a='stepz = 3\nsteps = "4"\nrate = open("x")\nimport os\nrate = nothing + 1\nflag = 1\n')
    text = str(stop.value)
    for part in ("did you mean 'steps'", "steps = '1.5': expected a whole number",
                 "rate = 'fast': expected a number", "flag = '1': expected true or false",
                 "--steps: expected --key=value", "a.py:1", "steps = '4'",
                 "a.py:3: a value may hold numbers", "a.py:4: only 'name = value'", "a.py:5",
                 "flag = 1", "no such config file"):
        assert part in text, f"{part!r} missing in:\n{text}"


@pytest.mark.parametrize("path, parts", [
    ("config/sweep_dims.py", ["config/sweep_dims.py", "did you mean config/sweeps/dims.py?"]),
    ("config/micro_spam.py", ["did you mean config/micro_span.py?"]),
    ("xyz", ["there is:", "config/demo.py", "config/sweeps/dims.py"])])
def test_a_config_file_that_is_not_there_leads_to_the_nearest_one(path, parts, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        configure(dict(__file__=str(ROOT / "train.py"), __doc__=""), [path])
    assert all(part in str(stop.value) for part in ["no such config file", *parts])


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "", "0x10", "1_000.5"])
def test_odd_numbers_never_become_ints(run, value):
    with pytest.raises(SystemExit, match="expected a whole number"):
        run(f"--steps={value}")


def test_syntax_error_in_a_file_names_the_file(run):
    with pytest.raises(SystemExit, match="a.py"):
        run("a.py", a="steps = = 3\n")
    with pytest.raises(SystemExit, match="a.py"):
        run("a.py", a="steps = 3\0\n")


def test_help_prints_every_setting_with_its_comment(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--steps=10" in out and "number of steps" in out


def test_identical_commands_give_identical_configs(run):
    assert run("--steps=3")[0] == run("--steps=3")[0]


# ---- the repository's own scripts and configs ---------------------------------

@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_setting_is_read(script):
    """Each setting occurs again as a name in its script, or is a setting of the model."""
    tree = ast.parse(script.read_text())
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    model_fields = set()
    if "model_settings(" in script.read_text():
        model_fields = set().union(*map(fields_of, ARCHS))
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
    lines = [shlex.split(line, comments=True) for line in sweep["arms"].splitlines()]
    assert len([line for line in lines if line]) > 1
    for _, *arguments in filter(None, lines):
        arguments = shlex.split(sweep["base"]) + arguments
        accept("train.py", [str(ROOT / a) if a.endswith(".py") else a for a in arguments])


def test_a_typo_ends_in_one_message_without_traceback():
    done = subprocess.run([sys.executable, "train.py", "--learning_rat=1"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean 'learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr
