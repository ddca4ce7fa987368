"""What `transformers` reads beside the weights: Python files, the tokenizer, and model.onnx.

tools/export.py writes the files with these functions, and compares each with the training run.
"""

import ast
import math
import os
import re

import tokenizers
import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from data.tokenizer import MAX_PRETOKEN
from lib.files import write_json

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELING = "tools.hub_model"  # the modules whose classes transformers loads
TOKENIZATION = "tools.hub_tokenizer"

# ---- the Python files -------------------------------------------------------------
#
# An exported model must not need this repository. Its folder gets a copy of each module of the
# repository that the classes of transformers import, directly or not. The copies stand side by
# side, because transformers finds no modules in subfolders, and import each other from there:
#
#     from lib.heads import a       from .concept_encoders_lib_heads import a
#     from lib import kernels       from . import concept_encoders_lib_kernels as kernels
#     import masking as m           from . import concept_encoders_masking as m
#
# Nothing else in a module changes, and other packages are imported as before.


def code_files(model):
    """A model of this repository -> {file name: text} of its `transformers` classes and all that
    they import. ValueError for an import that cannot be copied.
    """
    files, todo = {}, [MODELING, TOKENIZATION]
    while todo:
        module = todo.pop()
        with open(module_path(module), encoding="utf-8") as file:
            text = file.read()
        if module == MODELING:
            # It imports one architecture; the folder gets that of the model.
            for name, role in ((type(model.cfg), "Config"), (type(model), "Encoder")):
                text, n = re.subn(rf"from model import \w+ as {role}\b",
                                  f"from {name.__module__} import {name.__name__} as {role}", text)
                assert n == 1, role
        text, needed = import_copies(module, text)
        files[module] = text
        todo += sorted(needed - {*files, *todo})
    with open(os.path.join(ROOT, "LICENSE"), encoding="utf-8") as licence:
        head = "".join(f"# {line}".rstrip() + "\n" for line in licence) + "\n"
    # transformers looks for "from .NAME import" in a file to find out what else to copy to its
    # cache. It does not know "from . import NAME", so each file is named in that way too.
    others = [f"from .{copy_name(module)} import __name__ as _  # noqa: F401\n"
              for module in sorted(set(files) - {MODELING, TOKENIZATION})]
    found = {f"{copy_name(module)}.py": head + text for module, text in files.items()}
    found[f"{copy_name(MODELING)}.py"] += "\n# All files of this model.\n" + "".join(others)
    return found


def copy_name(module):
    """lib.kernels -> the name of its copy, without .py."""
    named = {MODELING: "modeling_concept_encoders", TOKENIZATION: "tokenization_concept_encoders"}
    return named.get(module) or "concept_encoders_" + module.replace(".", "_")


def module_path(name):
    """lib.heads -> path of lib/heads.py."""
    return os.path.join(ROOT, *name.split(".")) + ".py"


def is_ours(name):
    """Whether a name such as lib.heads is a module of this repository."""
    return os.path.isfile(module_path(name))


def import_copies(module, text):
    """The text of one of our modules -> (text that imports copies, names of modules it needs)."""
    data, needed = text.encode(), set()
    starts = [0]  # of each line, in bytes, as ast counts columns
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    nodes = import_statements(ast.parse(text))
    # From the last to the first: what stands before an import keeps its place.
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset), reverse=True):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before = data[start:end].decode()
        after = import_copy(module, node, before, needed)
        data = data[:start] + after.encode() + data[end:]
    return data.decode(), needed


def import_statements(tree):
    """All import statements of a parsed file. Expressions hold none, and most nodes are in them."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo += getattr(node, field, [])
    return found


def import_copy(module, node, before, needed):
    """What an import statement becomes. Adds the names of our modules in it to `needed`."""
    kept, ours = [], []
    if isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:  # from .x import y: relative to the package that holds the module
            package = module.split(".")[:-node.level]
            origin = ".".join(package + ([origin] if origin else []))
        if is_ours(origin):
            needed.add(origin)
            return re.sub(r"from\s+[.\w]+\s+import", f"from .{copy_name(origin)} import", before,
                          count=1)
    for alias in node.names:
        if isinstance(node, ast.Import):
            name = alias.name
            # "import lib.extra" binds the name lib, and there is no lib among the copies.
            binds, fits = alias.asname or name, alias.asname or "." not in name
        else:
            name = f"{origin}.{alias.name}".strip(".")
            binds, fits = alias.asname or alias.name, True
        if is_ours(name) and fits:
            needed.add(name)
            ours.append(f"from . import {copy_name(name)} as {binds}")
        elif is_ours(name) or is_ours_only(name):
            raise ValueError(f"{module_path(module)}, line {node.lineno}: the export cannot copy "
                             f"{before!r}; expected from MODULE import NAME")
        else:
            kept.append(alias)
    if not ours:
        return before
    if kept:
        node.names = kept
        ours.append(ast.unparse(node))
    return "; ".join(ours)


def is_ours_only(name):
    """Whether a name is one of our packages, or something in it that is no module."""
    return os.path.isfile(os.path.join(ROOT, name.split(".")[0], "__init__.py"))


# ---- the tokenizer ----------------------------------------------------------------


def last_merge(token, ranks):
    """The two parts that tiktoken joins last to make a token; None if its merges never make it."""
    parts = [token[i:i + 1] for i in range(len(token))]
    found = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]  # of each pair
    while len(parts) > 2:
        rank = min(found)
        if rank == math.inf:
            return None
        i = found.index(rank)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del found[i]
        for j in range(max(0, i - 1), min(i + 1, len(found))):  # the pairs with the new part
            found[j] = ranks.get(parts[j] + parts[j + 1], math.inf)
    return parts


def hub_tokenizer(tok, is_classifier=False, ends=True):
    """Our Tokenizer -> one of the `tokenizers` library that gives the same ids.

    It also adds what a row begins and ends with: as heads.encode_texts for a classifier, else as
    lib.fill.encode_masked, or without the mark at the end, behind which a decoder would not go on.
    Unlike ours, it reads the names of special ids in a text as these ids.
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
        # The space before a mask belongs to the hidden token. Only the space is replaced: [MASK]
        # keeps its place in the text, which its offsets tell.
        steps.append(normalizers.Replace(Regex(r" (?=\[MASK\])"), ""))
    if steps:
        hub.normalizer = normalizers.Sequence(steps + ([hub.normalizer] if hub.normalizer else []))
    # normalized=True: looked for after the normalizer has removed the space before it
    hub.add_special_tokens([
        tokenizers.AddedToken(name, special=True, normalized=name == "[MASK]" and not is_classifier)
        for name in tok.specials])
    template = tokenizers.processors.TemplateProcessing(
        single=f"{start}:0 $A:1 {end}:1" if ends else f"{start}:0 $A:1",
        pair=f"{start}:0 $A:1 {end}:1 $B:2" + (f" {end}:2" if ends else ""),
        special_tokens=[(name, tok.specials[name]) for name in {start, end}])
    # A token's offsets are those of its word, without the space before it: libraries find the words
    # of a text by the gaps between them. A space that the normalizer has put there has no offset.
    trim = tokenizers.processors.ByteLevel(
        trim_offsets=True, add_prefix_space=is_classifier and words_have_a_space)
    hub.post_processor = tokenizers.processors.Sequence([trim, template])
    return hub


def special_ids(tok):
    """Roles that `transformers` knows -> ids. Our end-of-document mark is its bos and its eos."""
    return dict(pad=tok.pad_id, mask=tok.mask_id, cls=tok.cls_id, sep=tok.sep_id, bos=tok.eot_id,
                eos=tok.eot_id)


def write_tokenizer(folder, tok, longest, inputs, is_causal=False):
    """Writes the tokenizer's files. inputs: names of what the model takes; a classifier takes
    token_type_ids. longest: tokens of the model's longest row. is_causal: of a decoder, whose
    prompts have no mark at their end and padding before them.
    """
    is_classifier, split_words = "token_type_ids" in inputs, "add spaces"
    if is_classifier:  # its rows begin with a space, but for bytes, where that is dropped
        split_words = "refuse" if tok.name == "byte" else "have spaces"
    ends = is_classifier or not is_causal
    hub_tokenizer(tok, is_classifier, ends).save(os.path.join(folder, "tokenizer.json"))
    tokens = {f"{role}_token": tok.special_names[i] for role, i in special_ids(tok).items()}
    write_json(os.path.join(folder, "tokenizer_config.json"), tokens | dict(
        auto_map=dict(AutoTokenizer=[None, f"{copy_name(TOKENIZATION)}.EncoderTokenizer"]),
        split_words=split_words, tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=longest, padding_side="right" if ends else "left",
        model_input_names=inputs,
        clean_up_tokenization_spaces=False))


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
    if not merges:  # bytes: the pieces make no difference to the ids, but they are called words
        pattern = r" ?[^\s]+|\s"
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
