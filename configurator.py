"""Settings: literal globals at the top of a script, overridden by config files and --key=value, in the order given.

    python train.py config/micro_span.py --learning_rate=1e-3

    max_steps = 1000  # optimizer steps              <- the comment is the --help text
    config = configure(globals())                    <- every literal assigned above it is a setting

Types are bool, int, float and str; the default decides. 1e6 is an int because it is whole, an int serves as a float,
strings are taken as they are. A config file holds `name = value` lines only; a value may be arithmetic over the
settings so far (`min_lr = learning_rate / 10`), it cannot run code, and a later --key=value does not derive it again.
"""

import ast
import difflib
import os
import sys

ARITHMETIC = (ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def read_settings(path):
    """Script path -> {name: (default, help)} of each `name = literal  # help` above its configure() call."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    lines, settings = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if getattr(node.value.func, "id", "") == "configure":
                break
        elif isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.UnaryOp)):
            text = lines[node.end_lineno - 1][node.end_col_offset:].partition("#")[2].strip()
            settings[node.targets[0].id] = (ast.literal_eval(node.value), text)
    return settings


def convert(value, kind, from_text=False):
    """`value` as `kind` (bool, int, float or str); raises ValueError naming what was expected."""
    try:
        if from_text and kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if from_text and kind in (int, float):
            value = int(value) if value.lstrip("+-").isdigit() else float(value)
        if kind is float and type(value) is int:
            return float(value)
        if kind is int and type(value) is float and value == int(value):
            return int(value)
        if type(value) is kind:
            return value
    except (ValueError, OverflowError, KeyError):
        pass
    raise ValueError(f"expected {EXPECTED[kind]}")


def file_lines(path):
    """Config file -> (where, name, compiled value) of each line, or (where, None, what is wrong with it)."""
    try:
        with open(path, "rb") as file:
            nodes = ast.parse(file.read()).body
    except (OSError, SyntaxError, ValueError) as error:
        there = sorted(f"config/{name}" for name in os.listdir("config")) if os.path.isdir("config") else []
        near = difflib.get_close_matches(path, there, n=1) or there
        yield path, None, f"no such config file; there is: {' '.join(near)}" if isinstance(error, OSError) else error
        return
    for node in nodes:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring at the head
        if not isinstance(node, ast.Assign) or len(node.targets) > 1 or not isinstance(node.targets[0], ast.Name):
            yield where, None, "only 'name = value' lines are allowed"
        elif not all(isinstance(part, ARITHMETIC) for part in ast.walk(node.value)):
            yield where, None, "a value may hold numbers, strings, settings and arithmetic only"
        else:
            yield where, node.targets[0].id, compile(ast.Expression(node.value), path, "eval")


def configure(script_globals, argv=None):
    """Overrides the settings in `script_globals` from `argv` (default sys.argv[1:]) -> all of them as a dict.

    Every problem is listed at once and ends the program, before anything heavy is imported.
    """
    known = read_settings(script_globals["__file__"])
    values, problems = {name: default for name, (default, _) in known.items()}, []

    def assign(where, name, value, from_text=False):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"{where}: unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))
            return
        try:
            values[name] = convert(value, type(known[name][0]), from_text)
        except ValueError as error:
            problems.append(f"{where}: {name} = {value!r}: {error}, such as the default {known[name][0]!r}")

    for arg in sys.argv[1:] if argv is None else argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if arg in ("-h", "--help"):
            settings = [f"  --{name}={default!s:<14} {text}" for name, (default, text) in known.items()]
            print(script_globals["__doc__"].strip(), "\n\nsettings, with their defaults:", *settings, sep="\n")
            sys.exit(0)
        elif arg.startswith("--") and equals:
            assign(arg, key, value, from_text=True)
        elif arg.startswith("--"):
            problems.append(f"{arg}: expected --key=value, for example --{key}={known.get(key, ['VALUE'])[0]}")
        else:
            for where, name, value in file_lines(arg):
                try:
                    if name is None:
                        raise ValueError(value)
                    assign(where, name, eval(value, {"__builtins__": {}}, dict(values)))
                except Exception as error:  # whatever the arithmetic raised is the user's to read, in one line
                    problems.append(f"{where}: {error}")
    if problems:
        sys.exit("configuration refused:\n  " + "\n  ".join(problems))
    script_globals.update(values)
    return values
