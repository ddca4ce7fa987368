"""The structure of the repository: six files at the top, imports in one direction, plain files."""

import ast
import io
import subprocess
import tokenize
from functools import cache

import pytest
from conftest import ROOT

SIX = {"model.py", "train.py", "masking.py", "prepare.py", "finetune_glue.py", "configurator.py"}
FOLDERS = ("data", "lib", "tools")
LISTED = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT,
                        capture_output=True, text=True).stdout.split()
CODE = sorted(n for n in LISTED if not n.startswith(("records/", "tests/")) and (ROOT / n).exists())
# what changes its settings on the command line: "\nconfig", because configurator.py explains it
COMMANDS = {name for name in CODE
            if "\nconfig = configure(globals()" in (ROOT / name).read_text()}


@cache
def imports(name):
    """Files of the repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            path = module.replace(".", "/") + ".py"
            if path in CODE:
                found.add(path)
    return found


def closure(name):
    """The file and everything it imports, directly or not."""
    found, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += imports(name)
    return found


def layer(name):
    """0: model and its parts, masking, configurator; 1: lib, data; 2: commands and what they need.
    """
    of_model = ("lib/kernels.py", "lib/resonance.py")
    if name in ("model.py", "masking.py", "configurator.py", *of_model):
        return 0
    if name in SIX or name.startswith("tools/"):
        return 2
    return 1


def test_code_at_the_top_is_six_files():
    assert {name for name in CODE if "/" not in name} == SIX
    folders = {name.split("/")[0] for name in CODE if "/" in name}
    assert folders == {"config", *FOLDERS}


@pytest.mark.parametrize("name", CODE)
def test_imports_go_one_way(name):
    """Commands -> lib and data -> model, masking, configurator; model.py -> kernels, resonance."""
    for other in imports(name):
        assert layer(other) <= layer(name), f"{name} imports {other}"
        assert other not in COMMANDS, f"{name} imports the command {other}"
        if other.startswith("tools/"):
            assert name.startswith("tools/"), f"{name} imports {other}"


def test_nothing_imports_in_a_circle():
    for name in CODE:
        assert all(name not in closure(other) for other in imports(name)), name


def test_records_are_never_imported():
    for name in CODE:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            found = []
            if isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            assert not any(module.startswith("records") for module in found), name


def test_training_needs_few_files():
    assert len(closure("train.py")) <= 21, sorted(closure("train.py"))


def test_preparing_data_loads_no_torch():
    for name in ("prepare.py", "data/workers.py", "data/documents.py", "data/inputs.py"):
        for other in closure(name):
            tree = ast.parse((ROOT / other).read_text())
            for node in tree.body:
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    modules = [node.module]
                else:
                    continue
                assert not any(m.split(".")[0] == "torch" for m in modules), f"{name} -> {other}"


@pytest.mark.parametrize("name", sorted(SIX))
def test_the_six_files_say_why(name):
    """At least 15 comments per 100 lines of code."""
    text = (ROOT / name).read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant):
                docstrings |= set(range(body[0].lineno, body[0].end_lineno + 1))
    lines = [n for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    code = [n for n in lines if n not in docstrings]
    assert len(comments) >= 0.15 * len(code), f"{len(comments)} comments on {len(code)} lines"
