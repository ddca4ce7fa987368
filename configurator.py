"""Settings of a command: literal globals at the top, changed by config files and --key=value.

    python train.py config/micro_span.py --learning_rate=1e-3        applied in the order given

    max_steps = 1000  # optimizer steps              <- the comment is the --help text
    config = configure(globals())                    <- every literal assigned above is a setting

Types are bool, int, float and str; the default decides. 1e6 is an int because it is whole, an int
serves as a float. Booleans have their common spellings, and --flag alone means --flag=true. In
settings that are paths, ~ and $VARIABLES are replaced; a relative path starts from the folder in
which the command was called. A config file holds `name = value` lines only. A value may be
arithmetic over the settings so far (`min_lr = learning_rate / 10`); a later --learning_rate=...
does not derive it again. Config files are parsed, not run: they cannot execute code.
"""

import ast
import difflib
import glob
import math
import operator
import os
import re
import shlex
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))

# What a value in a config file may be made of, beside constants and settings. There are no calls
# and no attributes, so that a config file from somebody else is safe to read.
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
              ast.Pow: operator.pow, ast.UAdd: operator.pos, ast.USub: operator.neg}

# how a message names the four types of settings
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True,
            "false": False, "0": False, "no": False, "off": False}

# Settings that are paths, or paths with commas between, or may be a path instead of a name.
PATHS = ("out_dir", "data_dir", "init_from", "checkpoint", "compare", "control_dir", "controls",
         "input", "data", "tokenizer", "decontaminate", "parts_dir", "hub", "glue_dir", "task",
         "init_from_task", "task_dir", "to", "embed", "judge", "sts", "pll", "dir")
# "-" and what editors and web pages make of it: hyphens, dashes, the minus sign
DASHES = tuple("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212")


# ---- the script ---------------------------------------------------------------------------------

def parse_script(path):
    """Script path -> (its source, its syntax tree)."""
    # The script is parsed, not imported: importing a command runs it.
    with open(path, encoding="utf-8") as file:
        source = file.read()
    return source, ast.parse(source)


def read_settings(path):
    """Script path -> {name: (default, help)} of each `name = literal  # help` above configure()."""
    source, tree = parse_script(path)
    lines = source.splitlines()
    settings = {}
    for node in tree.body:
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


def check_import(path):
    """Raises ImportError for a command that is imported, if that would start its work."""
    _, tree = parse_script(path)
    if any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in tree.body):
        return  # it works under `if __name__ == "__main__"` only
    command = os.path.relpath(os.path.realpath(path), os.path.realpath(ROOT))
    raise ImportError(f"{command} is a command, importing it would start its work: run it by "
                      f"`python {command}`, in a notebook by `%run {command}`; the functions "
                      "for use from Python are in lib/notebook.py")


# ---- values -------------------------------------------------------------------------------------

def as_bool(value):
    """A boolean in any common spelling (true, 1, yes, on, ...) -> bool; anything else -> None."""
    return BOOLEANS.get(str(value).lower())


def is_switch(default, text):
    """Whether --flag alone sets it: a boolean, or a string whose help offers `| true | false`."""
    return isinstance(default, bool) or "| true | false" in text


def convert(value, kind, from_text=False):
    """`value` as `kind` (bool, int, float or str); ValueError says what was expected.

    from_text: `value` is a string from the command line. Without it a string is not taken for a
    number: in a config file `steps = "4"` is a mistake.
    """
    expected = f"expected {EXPECTED[kind]}"
    if kind is bool:
        value = as_bool(value)
    elif kind in (int, float):
        try:
            if from_text:
                value = value.replace("\u2212", "-")  # the minus sign of web pages
                try:
                    value = int(value)  # float() would lose digits of a seed above 2**53
                except ValueError:
                    value = float(value)
            # Two conversions lose nothing and are what a user means: 1 as a float, 1e6 as an int.
            # not isinstance: True is an int in Python, but no number of steps
            if type(value) in (int, float) and (kind is float or value == int(value)):
                value = kind(value)
        except (ValueError, OverflowError):  # int(nan); int(inf), float(10**400)
            pass
        if type(value) is int and abs(value) >= 2**63:
            raise ValueError(f"{expected} below 2**63")
        if type(value) is float and not math.isfinite(value):
            raise ValueError(expected)
    elif type(value) is str and "\0" in value:
        raise ValueError("a NUL character is in no text or path")
    if type(value) is not kind:
        raise ValueError(expected)
    return value


def expand_path(text):
    """Replaces ~ and $VARIABLE in a path, or in each of several with commas between.

    Raises ValueError for a variable or a home folder that does not exist.
    """
    def value_of(match):
        name = match[1] or match[2]
        # An empty one counts too: $OUT/run would become /run.
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set")
        return os.environ[name]

    parts = []
    for part in text.split(","):
        home = os.path.expanduser(part)
        if home.startswith("~"):
            raise ValueError(f"found no home folder {part.split('/')[0]}; a folder of this name "
                             f"here is ./{part}")
        parts.append(re.sub(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", value_of, home))
    return ",".join(parts)


def read_value(name, value, default, text, from_text):
    """What a user gave for a setting -> its value; ValueError says what was expected.

    default, text: of the setting.
    """
    if is_switch(default, text) and type(default) is str and as_bool(value) is not None:
        return str(as_bool(value)).lower()  # a string such as auto | true | false
    try:
        value = convert(value, type(default), from_text)
    except ValueError as error:
        raise ValueError(f"{error}, such as the default {default!r}") from None
    if name in PATHS and default and not value.strip():
        raise ValueError(f"expected a path, such as the default {default!r}")
    return expand_path(value) if name in PATHS else value


# ---- config files -------------------------------------------------------------------------------

def find_config(path, known):
    """Argument that is no setting -> path of a config file, of the caller or of the repository.

    known: the settings of the command. Raises ValueError with what was probably meant.
    """
    path = expand_path(path)
    if not path.endswith(".py") or os.path.isdir(path):
        raise ValueError(no_config(path, known))
    if os.path.exists(path):
        return path
    of_repository = os.path.join(ROOT, path)
    if not os.path.isfile(of_repository):
        raise ValueError(no_config(path, known))
    if os.environ.get("RANK", "0") == "0":  # one of the processes of torchrun says it
        print(f"{path} is not in this folder; taken from {ROOT}", file=sys.stderr)
    return of_repository


def no_config(path, known):
    """Message for an argument that is neither a setting nor a config file: what may be meant."""
    files = glob.glob(os.path.join(glob.escape(ROOT), "config", "**", "*.py"), recursive=True)
    configs = sorted(os.path.relpath(file, ROOT) for file in files)
    folder, name = os.path.split(path.removesuffix(".py"))
    nearest = [file for file in configs
               if folder in ("", "config") and os.path.basename(file) == f"{name}.py"]
    nearest = nearest or difflib.get_close_matches(path, configs, n=1)
    if nearest and not os.path.exists(path):
        return f"no such config file; did you mean {nearest[0]}?"
    # A folder, a checkpoint, a file of text: the setting it belongs to was left out.
    if path.endswith(".py"):
        settings = []
    elif os.path.exists(os.path.join(path, "meta.json")):
        settings = ["data_dir", "input", "data"]
    elif path.endswith(".pt") or "." not in name and (folder or os.path.isdir(path)):
        settings = ["input", "data", "out_dir"]
    else:
        settings = ["input", "data"] if "." in name else []
    for setting in settings:
        if setting in known:
            right = shlex.quote(f"--{setting}={path}")
            return f"not a config file, did you mean {right}?"
    if os.path.exists(path):
        return "not a config file: expected a file with .py at its end"
    return f"no such config file; there is: {' '.join(configs)}"


def compute(node, values):
    """The value of an expression in a config file. values: the settings so far.

    ValueError for anything but arithmetic, and for numbers that no setting could hold.
    """
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in values:
            raise ValueError(f"name {node.id!r} is not defined")
        return values[node.id]
    # calls, comparisons, lists and the like have no operator, or one that is not in the table
    function = ARITHMETIC.get(type(getattr(node, "op", None)))
    # the two sides of an operator, or the one behind a sign
    parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    if function:
        parts = [compute(part, values) for part in parts]
    # strings can be joined and nothing else: "a" * 10**9 would fill the memory
    texts = [part for part in parts if isinstance(part, (str, bytes))]
    if not function or texts and (function is not operator.add or len(texts) < len(parts)):
        raise ValueError("a value may hold numbers, strings, settings and arithmetic only")
    # 9**9**9 would take years
    if function is operator.pow and abs(parts[1]) * math.log2(abs(parts[0]) + 2) > 10_000:
        raise ValueError("expected a smaller power")
    return function(*parts)


def read_config_file(path):
    """Config file -> ([(where, name, expression) of each line], [problems as text])."""
    try:
        with open(path, "rb") as file:
            nodes = ast.parse(file.read()).body
    except OSError as error:
        return [], [f"{path}: {error.strerror}"]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [], [f"{path}: {error or 'too deeply nested'}"]
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
        else:
            # computed by configure(), which knows the settings so far
            assignments.append((where, node.targets[0].id, node.value))
    return assignments, problems


# ---- arguments ----------------------------------------------------------------------------------

def suggestion(name, known):
    """What may be meant by the name of a setting that this command does not have, or ""."""
    plain = name.replace("-", "_").lower()
    # read here, after a mistake, so that commands do not wait for it
    with open(os.path.join(ROOT, "config", "other_names.txt"), encoding="utf-8") as file:
        lines = [line.partition("->") for line in file if not line.startswith("#")]
    for theirs, _, ours in lines:
        if plain not in theirs.split():
            continue
        # each choice is a setting, or several: "batch_size and micro_batch"
        choices = ours.strip().split(", ")
        names = {choice: re.sub(r"=\w+", "", choice).split(" and ") for choice in choices}
        for choice in choices:
            if all(one in known for one in names[choice]):
                return f": here it is {choice}"
        is_sentence = not all(one.isidentifier() for one in sum(names.values(), []))
        return f": {ours.strip()}" if is_sentence else f": in other commands {choices[0]}"
    nearest = difflib.get_close_matches(plain, known, n=1, cutoff=0.75)
    return f", did you mean {nearest[0]!r}?" if nearest else ""


def print_help(script, known):
    """The docstring of the script and each setting with its default and comment."""
    # from the source: python -OO drops docstrings
    docstring = ast.get_docstring(parse_script(script)[1], clean=False) or ""
    print(docstring.strip(), "\n\nsettings, with their defaults:", sep="\n")
    for name, (default, text) in known.items():
        setting = f"--{name}={default}"
        print(f"  {setting:<34} {text}")


def set_streams():
    """Text that a terminal or file cannot show ends no command; standard input is UTF-8."""
    # A notebook's streams lack reconfigure, and can show all.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # like all other text that is read here; no change where it is so already, for a stream from
    # which something has been read allows none
    if hasattr(sys.stdin, "reconfigure") and sys.stdin.encoding.lower() != "utf-8":
        sys.stdin.reconfigure(encoding="utf-8")


def without_traceback(kind, error, trace):
    """sys.excepthook: Ctrl-C where a command has not yet begun, mostly while torch is imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def split_argument(arg, following, known):
    """An argument that sets something -> (name, value as text); ValueError says how to write it.

    following: the arguments behind it. The value of a `--key value` is taken out of them, so that
    it does not count as a config file.
    """
    key, equals, value = arg.lstrip("".join(DASHES)).partition("=")
    name = key.replace("-", "_")
    default, text = known.get(name, (None, ""))
    if not equals and following:
        after = following[0]
        is_value = not after.startswith("-") and not after.endswith(".py") or after[1:].isdigit()
        if as_bool(after) is not None or is_value and not is_switch(default, text):
            value = following.pop(0)
    if not name:
        raise ValueError("expected --key=value")
    if name not in known:
        raise ValueError(f"unknown setting {key!r}{suggestion(name, known)}")
    if arg == f"--{name}={value}":
        return name, value
    if arg == f"--{name}" and not value and is_switch(default, text):
        return name, "true"
    if equals or value:
        right = shlex.quote(f"--{name}={value}")
        raise ValueError(f"write {right}")
    raise ValueError(f"expected --key=value, for example --{name}={default}")


# ---- all of it ----------------------------------------------------------------------------------

def configure(script_globals, argv=None):
    """Overrides the settings in `script_globals` from `argv` (default sys.argv[1:]) -> all as dict.

    All problems are listed in one message, which ends the program. A script that is imported keeps
    its defaults: the arguments are those of another program. Raises ImportError if all its work
    would start.
    """
    script = script_globals["__file__"]
    known = read_settings(script)
    values = {name: default for name, (default, _) in known.items()}
    # __mp_main__: a process that multiprocessing spawned, which needs the settings of its parent
    if script_globals.get("__name__", "__main__") not in ("__main__", "__mp_main__"):
        check_import(script)
        return values
    set_streams()
    # The imports of a command come after this line, and the one of torch takes seconds.
    sys.excepthook = without_traceback
    # Threads that wait for each other spin. Where other programs use the cores, what they wait for
    # does not run meanwhile; with libgomp's own value a step took 2.4 times as long (records/speed)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # collected, not raised one by one: a user with three mistakes wants to see three messages
    problems = []

    def assign(where, name, value, from_text=False):
        # A misspelt name must not pass: the run would silently use the default.
        if name not in known:
            problems.append(f"{where}: unknown setting {name!r}{suggestion(name, known)}")
            return
        try:
            values[name] = read_value(name, value, *known[name], from_text)
        except ValueError as error:
            problems.append(f"{where}: {name} = {value!r}: {error}")

    def apply_file(path):
        assignments, file_problems = read_config_file(path)
        problems.extend(file_problems)
        for where, name, expression in assignments:
            try:
                # names stand for the settings so far
                value = compute(expression, values)
            except Exception as error:  # whatever arithmetic raises, such as 1 / 0
                problems.append(f"{where}: {error}")
            else:
                assign(where, name, value)

    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        try:
            print_help(script, known)
            sys.stdout.flush()
        except BrokenPipeError:  # of --help | head, which has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    # In the order given, so that what comes later wins: a preset first, then what differs from it.
    # A later file can also build on an earlier one.
    while arguments:
        arg = arguments.pop(0)
        try:
            is_setting = "=" in arg and not os.path.exists(arg) and not arg.endswith(".py")
            if arg.startswith(DASHES) or is_setting:
                assign(arg, *split_argument(arg, arguments, known), from_text=True)
            else:
                apply_file(find_config(arg, known))
        except ValueError as error:
            problems.append(f"{arg}: {error}")
    if problems:
        sys.exit("configuration refused:\n  " + "\n  ".join(problems))
    # The settings are globals of the script, so its code reads `learning_rate` as a plain name.
    script_globals.update(values)
    return values
