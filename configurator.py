"""Settings of a command: literal globals at the top, changed by config files and --key=value.

    python train.py config/micro_span.py --learning_rate=1e-3        applied in the order given

    max_steps = 1000  # optimizer steps              <- the comment is the --help text
    config = configure(globals())                    <- every literal assigned above is a setting

Types are bool, int, float and str; the default decides. 1e6 is an int because it is whole, an int
serves as a float, strings are taken as they are. A config file holds `name = value` lines only. A
value may be arithmetic over the settings so far (`min_lr = learning_rate / 10`); a later
--learning_rate=... does not derive it again. Config files are parsed, not run: they cannot execute
code.
"""

import ast
import difflib
import glob
import os
import sys

# What a value in a config file may be made of. There are no calls and no attributes, so that a
# config file from somebody else is safe to read.
ARITHMETIC = (ast.Constant, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)

# how a message names the four types of settings
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def read_settings(path):
    """Script path -> {name: (default, help)} of each `name = literal  # help` above configure()."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    lines = source.splitlines()
    settings = {}
    # The script is parsed, not imported: importing a command runs it.
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign):
            continue
        value = node.value
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "configure":
            break
        # Other assignments, such as lists or calls, are ordinary code.
        # A negative number is a minus sign (UnaryOp) and a constant.
        if isinstance(value, (ast.Constant, ast.UnaryOp)):
            # ast drops comments, so the help text is cut out of the source line
            rest_of_line = lines[node.end_lineno - 1][node.end_col_offset:]
            comment = rest_of_line.partition("#")[2].strip()
            settings[node.targets[0].id] = (ast.literal_eval(value), comment)
    return settings


def convert(value, kind, from_text=False):
    """`value` as `kind` (bool, int, float or str); ValueError says what was expected.

    from_text: `value` is a string from the command line. Without it a string is not taken for a
    number: in a config file `steps = "4"` is a mistake.
    """
    try:
        if from_text and kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if from_text and kind in (int, float):
            # float() for 1e6 and 0.5, but not for all: a seed above 2**53 would lose digits
            value = int(value) if value.lstrip("+-").isdigit() else float(value)
        # Two conversions lose nothing and are what a user means: 1 as a float, 1e6 as an int.
        if kind is float and type(value) is int:
            return float(value)
        if kind is int and type(value) is float and value == int(value):
            return int(value)
        # not isinstance: True is an int in Python, but no number of steps
        if type(value) is kind:
            return value
    except (ValueError, OverflowError, KeyError):  # int(inf) is an OverflowError
        pass
    raise ValueError(f"expected {EXPECTED[kind]}")


def no_such_file(path):
    """Message for a config file that does not exist: the nearest one in config/, or all of them."""
    root = os.path.dirname(os.path.abspath(__file__))
    files = glob.glob(os.path.join(root, "config", "**", "*.py"), recursive=True)
    # relative to where the command runs, so that the suggestion can be typed as it stands
    known = sorted(os.path.relpath(file) for file in files)
    nearest = difflib.get_close_matches(path, known, n=1)
    if nearest:
        return f"no such config file; did you mean {nearest[0]}?"
    return f"no such config file; there is: {' '.join(known)}"


def read_config_file(path):
    """Config file -> ([(where, name, compiled value) of each line], [problems as text])."""
    try:
        with open(path, "rb") as file:
            nodes = ast.parse(file.read()).body
    except OSError:
        return [], [f"{path}: {no_such_file(path)}"]
    except (SyntaxError, ValueError) as error:  # ValueError: a zero byte
        return [], [f"{path}: {error}"]
    # All lines are looked at, also after a wrong one, so that one message names all mistakes.
    assignments, problems = [], []
    for node in nodes:
        where = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring at the top of the file
        # one name only: neither `a = b = 1` nor `a, b = 1, 2`
        is_assignment = isinstance(node, ast.Assign) and len(node.targets) == 1
        if not is_assignment or not isinstance(node.targets[0], ast.Name):
            problems.append(f"{where}: only 'name = value' lines are allowed")
        elif not all(isinstance(part, ARITHMETIC) for part in ast.walk(node.value)):
            problems.append(f"{where}: a value may hold numbers, strings, settings and "
                            "arithmetic only")
        else:
            # computed by configure(), which knows the settings so far
            value = compile(ast.Expression(node.value), path, "eval")
            assignments.append((where, node.targets[0].id, value))
    return assignments, problems


def configure(script_globals, argv=None):
    """Overrides the settings in `script_globals` from `argv` (default sys.argv[1:]) -> all as dict.

    All problems are listed in one message, which ends the program.
    """
    known = read_settings(script_globals["__file__"])
    values = {name: default for name, (default, _) in known.items()}
    # collected, not raised one by one: a user with three mistakes wants to see three messages
    problems = []

    def assign(where, name, value, from_text=False):
        # A misspelt name must not pass: the run would silently use the default.
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {nearest[0]!r}?" if nearest else ""
            problems.append(f"{where}: unknown setting {name!r}{hint}")
            return
        default, _ = known[name]  # its type is that of the setting
        try:
            values[name] = convert(value, type(default), from_text)
        except ValueError as error:
            problems.append(f"{where}: {name} = {value!r}: {error}, "
                            f"such as the default {default!r}")

    # In the order given, so that what comes later wins: a preset first, then what differs from it.
    # A later file can also build on an earlier one.
    for arg in sys.argv[1:] if argv is None else argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if arg in ("-h", "--help"):
            print(script_globals["__doc__"].strip(), "\n\nsettings, with their defaults:", sep="\n")
            for name, (default, text) in known.items():
                setting = f"--{name}={default}"
                print(f"  {setting:<34} {text}")
            sys.exit(0)
        elif arg.startswith("--") and equals:
            assign(arg, key, value, from_text=True)
        elif arg.startswith("--"):
            example = known[key][0] if key in known else "VALUE"
            problems.append(f"{arg}: expected --key=value, for example --{key}={example}")
        else:
            assignments, file_problems = read_config_file(arg)
            problems += file_problems
            for where, name, expression in assignments:
                try:
                    # Names stand for the settings so far. ARITHMETIC has been checked, so eval
                    # cannot call anything; no builtins, so that other names are unknown.
                    value = eval(expression, {"__builtins__": {}}, dict(values))
                except Exception as error:  # whatever arithmetic raises, such as 1 / 0
                    problems.append(f"{where}: {error}")
                else:
                    assign(where, name, value)
    if problems:
        sys.exit("configuration refused:\n  " + "\n  ".join(problems))
    # The settings are globals of the script, so its code reads `learning_rate` as a plain name.
    script_globals.update(values)
    return values
