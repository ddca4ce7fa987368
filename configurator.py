"""Settings: literal globals at the top of a script, overridden by config files and --key=value, in the order given.

    python train.py config/micro_span.py --learning_rate=1e-3

    out_dir = "out"  # where checkpoints go         <- the comment is the --help text
    max_steps = 1000  # optimizer steps
    config = configure(globals())                    <- every literal assigned above becomes a setting

Types are bool, int, float and str; the default decides. 1e6 is an int because it is whole, an int serves as a float,
strings are taken as they are, bools are true or false in any case. A config file holds `name = value` lines only; a
value may be arithmetic over the settings so far (`min_lr = learning_rate / 10`). It cannot run code. A value derived
in a file is not derived again when a later --key=value changes its source.
Every problem is listed at once and ends the program before anything heavy is imported.
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
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "configure":
                break
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            if type(value) in EXPECTED:
                help_text = lines[node.end_lineno - 1][node.end_col_offset:].partition("#")[2].strip()
                settings[node.targets[0].id] = (value, help_text)
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


def configure(script_globals, argv=None):
    """Overrides the settings in `script_globals` from `argv` (default sys.argv[1:]); returns all of them as a dict."""
    known = read_settings(script_globals["__file__"])
    values, problems = {name: default for name, (default, _) in known.items()}, []

    def assign(name, value, where, from_text=False):
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
            assign(key, value, arg, from_text=True)
        elif arg.startswith("--"):
            problems.append(f"{arg}: expected --key=value, for example --{key}={known.get(key, ['VALUE'])[0]}")
        elif os.path.isfile(arg):
            with open(arg, "rb") as file:
                run_config_file(arg, file.read(), values, assign, problems)
        else:
            there = sorted(f"config/{name}" for name in os.listdir("config")) if os.path.isdir("config") else []
            near = difflib.get_close_matches(arg, there, n=1) or there
            problems.append(f"{arg}: no such config file; there is: {' '.join(near)}")
    if problems:
        sys.exit("configuration refused:\n  " + "\n  ".join(problems))
    script_globals.update(values)
    return values


def run_config_file(path, source, values, assign, problems):
    """Assigns each `name = arithmetic` line of a config file; anything else becomes a problem."""
    try:
        nodes = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        problems.append(f"{path}: {error}")
        return
    for node in nodes:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring at the head
        if not isinstance(node, ast.Assign) or len(node.targets) > 1 or not isinstance(node.targets[0], ast.Name):
            problems.append(f"{where}: only 'name = value' lines are allowed")
        elif not all(isinstance(part, ARITHMETIC) for part in ast.walk(node.value)):
            problems.append(f"{where}: a value may hold numbers, strings, settings and arithmetic only")
        else:
            try:
                value = eval(compile(ast.Expression(node.value), path, "eval"), {"__builtins__": {}}, dict(values))
            except Exception as error:  # whatever the arithmetic raised is the user's to read, in one line
                problems.append(f"{where}: {error}")
            else:
                assign(node.targets[0].id, value, where)
