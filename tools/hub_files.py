"""What `transformers` reads beside the weights: one Python file, the tokenizer, and model.onnx.

tools/export.py writes the files with these functions, and compares each with the training run.
"""

import ast
import builtins
import math
import os
import re
from dataclasses import dataclass
from graphlib import TopologicalSorter

import tokenizers
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from data.tokenizer import MAX_PRETOKEN

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HUB_CLASSES = "tools.hub_model"  # the module whose classes transformers loads

# ---- one Python file ------------------------------------------------------------
#
# An exported model must not need this repository, so its code is copied into one file. OneFile
# starts from the classes in tools/hub_model.py and follows each name that they use to where it is
# defined: in the same module, or in another module of the repository that this one imports. It
# copies the definition unchanged and follows the names in there. Modules stand in the file in the
# order in which they import each other, and all of them share its one namespace:
#
#     from X import a         nothing is left of it: a is defined above, in the part of X
#     from X import a as b    b = a                                     at the end of X's part
#     from lib import m       m = SimpleNamespace(f=f, ...)             at the end of m's part
#     import torch, ...       (other packages)                          at the top of the file
#
# Every other import of our own modules, and one name for two things, raise ValueError.


def modeling_source(model):
    """-> the text of a file with the `transformers` classes for a model of this repository."""
    file = OneFile()
    classes = file.module(HUB_CLASSES)
    # hub_model.py imports one architecture under these names; the file gets that of the model.
    classes.ours["Config"] = (type(model.cfg).__module__, type(model.cfg).__name__)
    classes.ours["Encoder"] = (type(model).__module__, type(model).__name__)
    for statement in classes.statements:
        file.keep(classes, statement)
    with open(os.path.join(ROOT, "LICENSE"), encoding="utf-8") as licence:
        head = "".join(f"# {line}".rstrip() + "\n" for line in licence)
    return f"{head}\n{file.text()}\n"


def module_path(name):
    """lib.heads -> path of lib/heads.py."""
    return os.path.join(ROOT, *name.split(".")) + ".py"


def is_ours(name):
    """Whether a name such as lib.heads is a module of this repository."""
    return os.path.isfile(module_path(name))


@dataclass
class Statement:
    """A statement at the top level of a module, with the comments above it."""
    text: str
    node: ast.stmt
    kept: bool = False  # it goes into the file

    def binds(self):
        """Names that a definition defines. Empty: not a definition, it always has to be kept."""
        if isinstance(self.node, (ast.FunctionDef, ast.ClassDef)):
            # Functions that are called _ are only registered somewhere by their decorator.
            return {self.node.name} - {"_"}
        targets = self.node.targets if isinstance(self.node, ast.Assign) else []
        names = [part for target in targets for part in ast.walk(target)]
        return {part.id for part in names if isinstance(getattr(part, "ctx", None), ast.Store)}


class Module:
    """The text of one of our modules: its statements, and what its imports bind."""

    def __init__(self, name):
        self.name = name
        self.statements = []
        self.ours = {}  # name in here -> (module, name in there); (module, None): the module itself
        self.others = {}  # name in here -> lines that import it from another package
        self.needs = []  # modules that must stand before this one
        self.aliases = {}  # name -> the line that gives something of this module another name
        self.done = set()  # names that are already in the file
        with open(module_path(name), encoding="utf-8") as file:
            text = file.read()
        lines, end = text.splitlines(), 0
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for alias in node.names:
                    self.add_import(node, alias)
            else:
                self.statements.append(Statement("\n".join(lines[end:node.end_lineno]), node))
            end = node.end_lineno

    def add_import(self, node, alias):
        if isinstance(node, ast.Import):
            line = ast.unparse(ast.Import([alias]))
            if is_ours(alias.name):
                self.refuse(line)
            self.others.setdefault(alias.asname or alias.name.split(".")[0], []).append(line)
            return
        line = ast.unparse(ast.ImportFrom(node.module, [alias], node.level))
        if node.level or alias.name == "*" or node.module == "__future__":
            self.refuse(line)
        name = alias.asname or alias.name
        if is_ours(f"{node.module}.{alias.name}"):
            self.ours[name] = (f"{node.module}.{alias.name}", None)
        elif is_ours(node.module):
            self.ours[name] = (node.module, alias.name)
        else:
            self.others[name] = [line]

    def refuse(self, line):
        raise ValueError(
            f"{module_path(self.name)}: the export cannot copy {line!r} into one file; expected "
            "from MODULE import NAME at the top of the module")


class OneFile:
    """Collects the definitions of a file; see above."""

    def __init__(self):
        self.modules = {}  # name -> Module
        self.imports = set()  # lines at the top
        self.meanings = {}  # name in the file -> what it stands for

    def module(self, name):
        if name not in self.modules:
            module = self.modules[name] = Module(name)
            for statement in module.statements:
                if not statement.binds():
                    self.keep(module, statement)
        return self.modules[name]

    def keep(self, module, statement):
        """Puts a statement into the file, and all that it needs."""
        if statement.kept:
            return
        statement.kept = True
        for name in statement.binds():
            self.claim(name, f"that of {module_path(module.name)}")
        for part in ast.walk(statement.node):
            if isinstance(part, (ast.Import, ast.ImportFrom)):  # inside a function
                names = [alias.name for alias in part.names] + [getattr(part, "module", "")]
                if any(is_ours(name or "") for name in names):
                    module.refuse(ast.unparse(part))
            elif isinstance(part, ast.Name):  # or a local variable: that makes no difference
                self.need(module, part.id)

    def need(self, module, name):
        """Puts into the file what a name stands for in a module."""
        if name in module.done:
            return
        module.done.add(name)
        definitions = [statement for statement in module.statements if name in statement.binds()]
        if name in module.ours:
            self.link(module, name)
        elif name in module.others:
            self.imports.update(module.others[name])
            self.claim(name, module.others[name][0])
        elif not definitions and hasattr(builtins, name):
            self.claim(name, "that of Python")
        for statement in definitions:
            self.keep(module, statement)

    def link(self, module, name):
        """What a module imports from another one of ours."""
        origin_name, original = module.ours[name]
        origin = self.module(origin_name)
        module.needs.append(origin_name)
        if original is None:
            names = sorted(set().union(*(statement.binds() for statement in origin.statements)))
            self.imports.add("from types import SimpleNamespace")
            same = ", ".join(f"{each}={each}" for each in names)
            line = f"{name} = SimpleNamespace({same})"
        else:
            names, line = [original], f"{name} = {original}"
        for each in names:
            self.need(origin, each)
        if name != original:
            self.claim(name, line)
            origin.aliases[name] = line

    def claim(self, name, meaning):
        """Raises ValueError when a name already stands for something else."""
        before = self.meanings.setdefault(name, meaning)
        if before != meaning:
            raise ValueError(f"the export puts all code into one file, where {name!r} would stand "
                             f"for two things: {before}, and {meaning}; rename one of them")

    def text(self):
        def order(line):  # Python's own modules first
            return "transformers" in line, "torch" in line, line

        parts = ["\n".join(sorted(self.imports, key=order))]
        needs = {name: module.needs for name, module in self.modules.items()}
        for name in TopologicalSorter(needs).static_order():
            module = self.modules[name]
            title = f"# ---- {name.replace('.', '/')}.py "
            code = "\n".join(statement.text for statement in module.statements if statement.kept)
            parts.append(f"{title:-<100}\n\n{code.strip()}")
            if module.aliases:
                parts.append("\n".join(module.aliases.values()))
        return "\n\n\n".join(parts)


# ---- the tokenizer ----------------------------------------------------------------


def last_merge(token, ranks):
    """The two parts that tiktoken joins last to make a token; None if its merges never make it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = enumerate(zip(parts, parts[1:]))
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in pairs)
        if rank == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hub_tokenizer(tok, is_classifier=False):
    """Our Tokenizer -> one of the `tokenizers` library that gives the same ids.

    It also adds what a row begins and ends with: as heads.encode_texts for a classifier, else as
    sample.encode_masked. Unlike ours, it reads the names of special ids in a text as these ids.
    """
    hub = Tokenizer.from_str(tok.library) if tok.library else from_ranks(tok)
    start, end = ("[CLS]", "[SEP]") if is_classifier else ("<|endoftext|>", "<|endoftext|>")
    words_have_a_space = tok.name != "byte"
    steps = []  # of the normalizer
    if is_classifier:
        space = r"[\s\x1c-\x1f]+"  # what str.strip removes: \s of this library lacks these four
        steps.append(normalizers.Replace(Regex(rf"\A{space}|{space}\z"), ""))
        if words_have_a_space:
            steps.append(normalizers.Prepend(" "))
    elif words_have_a_space:
        # The space before a mask belongs to the hidden token.
        steps.append(normalizers.Replace(" [MASK]", "[MASK]"))
    if steps:
        hub.normalizer = normalizers.Sequence(steps + ([hub.normalizer] if hub.normalizer else []))
    # normalized=True: looked for after the normalizer has removed the space before it
    hub.add_special_tokens([
        tokenizers.AddedToken(name, special=True, normalized=name == "[MASK]" and not is_classifier)
        for name in tok.specials])
    hub.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start}:0 $A:1 {end}:1", pair=f"{start}:0 $A:1 {end}:1 $B:2 {end}:2",
        special_tokens=[(name, tok.specials[name]) for name in {start, end}])
    return hub


def byte_characters():
    """A printable character for each byte, as GPT-2 writes them: {byte: character}."""
    shown = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in shown]
    characters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(others))]
    return dict(zip(shown + others, characters))


def from_ranks(tok):
    """The library's tokenizer for one of ours that is given by the ranks of its tokens.

    One merge for each token is enough: whatever stands around a token, its parts are joined in
    the same order. Tokens that no merges lead to are found whole, as by tiktoken (ignore_merges).
    """
    char = byte_characters()
    tokens = sorted(tok.ranks, key=tok.ranks.get)
    name = {token: "".join(char[byte] for byte in token) for token in tokens}
    pairs = [last_merge(token, tok.ranks) for token in tokens if len(token) > 1]
    merges = [(name[pair[0]], name[pair[1]]) for pair in pairs if pair]
    vocabulary = {name[token]: i for token, i in tok.ranks.items()} | tok.specials
    hub = Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=bool(merges)))
    # The library's regular expressions read {1,3}+ as a repetition of repetitions and $ as the
    # end of a line; ours mean a possessive repetition and the end of the text.
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", tok.pattern).replace("$", r"\z")
    hub.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MAX_PRETOKEN}}}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hub.decoder = tokenizers.decoders.ByteLevel()
    if tok.normalizer:
        hub.normalizer = normalizers.NFC()
    return hub


# ---- onnx -------------------------------------------------------------------------


def write_onnx(path, hub, longest, names):
    """Writes a model of `transformers` for onnxruntime.

    -> a function that runs the file: inputs of these names (B,T) int64 -> [logits].
    """
    import onnxruntime

    shape = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=longest)}
    example = {name: torch.ones(2, min(longest, 5), dtype=torch.int64) for name in names}
    program = torch.onnx.export(
        hub, kwargs=example, dynamo=True, dynamic_shapes=dict.fromkeys(names, shape),
        input_names=names, output_names=["logits"], verbose=False)
    n_params = sum(p.numel() for p in hub.parameters())
    program.save(path, external_data=n_params > 4e8)  # one onnx file holds at most 2 GB
    session = onnxruntime.InferenceSession(path)

    def run(*batch):
        inputs = {name: part.numpy() for name, part in zip(names, batch)}
        return [torch.from_numpy(output) for output in session.run(None, inputs)]

    return run
