"""The repository's encoders as classes of `transformers`; export.py puts the sources of one architecture before them.

    AutoModel.from_pretrained(folder, trust_remote_code=True)   or AutoModelForMaskedLM, ...ForSequenceClassification

All of them hold the repository's encoder as `encoder`, with its own names of weights, and compute nothing themselves.
Padding goes to the right, where the tokenizer puts it: positions count from the first column.

Shapes: B rows, T tokens, C concepts, D width of a state, V vocabulary.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, MaskedLMOutput, SequenceClassifierOutput

from lib.heads import Classifier
from model import ConceptConfig as Config  # of the architecture that is exported
from model import ConceptEncoder as Encoder


class EncoderConfig(PretrainedConfig):
    """model_settings: the fields of the repository's config, as in a checkpoint; n_texts: 2 to classify pairs."""
    model_type = "concept_encoders"

    def __init__(self, model_settings=None, classifier_dropout=0.1, n_texts=1, **others):
        self.model_settings, self.n_texts = model_settings or {}, n_texts
        self.classifier_dropout = classifier_dropout
        cfg = self.of_encoder()
        self.vocab_size, self.max_position_embeddings = cfg.vocab_size, cfg.longest
        self.num_hidden_layers, self.num_attention_heads = cfg.n_layer, cfg.n_head
        self.hidden_size = getattr(cfg, "concept_dim", cfg.token_width)
        super().__init__(**others)

    def of_encoder(self):
        return Config(**{name: value for name, value in self.model_settings.items() if name != "arch"})


class EncoderPreTrainedModel(PreTrainedModel):
    config_class = EncoderConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^segments$", r"^(out|compare)\."]  # a classifier's, for the other classes

    def __init__(self, config):
        super().__init__(config)
        self.encoder = built(config.of_encoder())
        for module in self.encoder.modules():
            saved = module.state_dict()
            module.computed = {name: t for name, t in module.named_buffers(recurse=False) if name not in saved}
        self.encoder.to(torch.get_default_dtype())  # that of from_pretrained(dtype=...)

    def _init_weights(self, module):
        """For what from_pretrained does not find in the file, and has overwritten with whatever was in memory."""
        for name, value in getattr(module, "computed", {}).items():  # positions and ranks: exact in any dtype
            setattr(module, name, value.to(getattr(module, name).device, copy=True))

    def cleaned(self, input_ids, attention_mask):
        """-> ids and bool mask or None. To a model that tells documents apart, padding continues the last of them."""
        real_BT = None if attention_mask is None else attention_mask.bool()
        if self.encoder.cfg.isolate_documents and real_BT is not None:
            input_ids = input_ids.masked_fill(~real_BT, self.encoder.cfg.eot_id)
        return input_ids, real_BT


def built(cfg):
    """An encoder on the CPU in fp32, whatever from_pretrained has set for new tensors: not all of them are loaded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return Encoder(cfg)
    finally:
        torch.set_default_dtype(before)


class EncoderModel(EncoderPreTrainedModel):
    """last_hidden_state: the concepts (B,C,D); of a Transformer the token states (B,T,D) that its last layer reads.
    pooler_output (B,D): an embedding of the row, the largest value over the concepts, or the mean over the tokens.
    """
    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, return_dict=None):
        ids, real_BT = self.cleaned(input_ids, attention_mask)
        concepts, tokens = self.encoder.encode(ids, real_BT)
        if self.encoder.arch == "concept":
            output = BaseModelOutputWithPooling(concepts, concepts.amax(1))
        else:
            weight_BT1 = (torch.ones_like(ids) if real_BT is None else real_BT)[..., None].to(tokens.dtype)
            mean_BD = (tokens * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
            output = BaseModelOutputWithPooling(tokens, mean_BD)
        return output if return_dict in (None, True) else output.to_tuple()


class EncoderForMaskedLM(EncoderPreTrainedModel):
    """logits (B,T,V) at every position; loss: mean nats over the positions whose label is not -100."""
    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, return_dict=None):
        ids, real_BT = self.cleaned(input_ids, attention_mask)
        concepts, tokens = self.encoder.encode(ids, real_BT)
        positions_BT = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        states = self.encoder.decode(concepts, tokens, positions_BT, self.encoder.documents(ids), real_BT)
        logits_BTV = self.encoder.logits(states)
        nats = None if labels is None else F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels.flatten())
        output = MaskedLMOutput(nats, logits_BTV)
        return output if return_dict in (None, True) else output.to_tuple()


class EncoderForSequenceClassification(EncoderPreTrainedModel):
    """The repository's Classifier, whose parts this model has under the same names. -> logits (B, num_labels).

    A row is asked at its first token. Where that is the mark between documents, as the tokenizer of a pretrained model
    puts it, it is read as a [MASK]: a place where pretraining has learned to answer.
    """
    read = Classifier.read

    def __init__(self, config):
        super().__init__(config)
        head = Classifier(self.encoder, config.num_labels, config.n_texts, config.classifier_dropout)
        self.n_texts, self.segments, self.drop = config.n_texts, head.segments, head.drop
        self.compare, self.out = head.compare, head.out
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.out:
            nn.init.normal_(module.weight, 0, 0.02)
            nn.init.zeros_(module.bias)
        elif module is self:
            nn.init.zeros_(self.segments)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, return_dict=None):
        """token_type_ids: 0 for the first token, 1 for the first text, 2 for the second; default: one text."""
        ids, real_BT = self.cleaned(input_ids, attention_mask)
        first_T = torch.arange(ids.shape[1], device=ids.device) == 0
        ids = ids.masked_fill(first_T & (ids == self.encoder.cfg.eot_id), self.encoder.cfg.mask_id)
        segments = (~first_T).long().expand(ids.shape) if token_type_ids is None else token_type_ids
        real_BT = torch.ones_like(ids, dtype=torch.bool) if real_BT is None else real_BT
        logits = Classifier.forward(self, ids, segments, real_BT)
        output = SequenceClassifierOutput(None if labels is None else self.loss(logits, labels), logits)
        return output if return_dict in (None, True) else output.to_tuple()

    def loss(self, logits, labels):
        if self.config.problem_type == "regression" or self.config.num_labels == 1:
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(logits.squeeze(-1).shape))
        if self.config.problem_type == "multi_label_classification" or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels.view(-1))


# ---- for export.py alone -------------------------------------------------------

import ast
import math
import os
import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data.tokenizer import MAX_PRETOKEN

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def modeling_source(arch):
    """The sources of one architecture and its `transformers` classes -> the text of one file."""
    encoder, names = dict(concept=("model", "ConceptConfig, ConceptEncoder"),
                          transformer=("lib/baselines", "TransformerConfig, Transformer"))[arch]
    imports, parts, ours = set(), [], ("lib", "data", "model")
    for name in ("lib/loss", "lib/layers", encoder, "lib/heads", "tools/hub_model"):
        with open(os.path.join(ROOT, f"{name}.py"), encoding="utf-8") as file:
            text = file.read().partition("# ---- for export.py alone")[0]
        lines, nodes = text.splitlines(), ast.parse(text).body
        if name == "lib/heads":
            [wanted] = [node for node in nodes if getattr(node, "name", "") == "Classifier"]
            lines, nodes = lines[wanted.lineno - 1:wanted.end_lineno], []
        for node in reversed(nodes):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                if (getattr(node, "module", None) or node.names[0].name).split(".")[0] not in ours:
                    imports.add(ast.unparse(node))
                del lines[node.lineno - 1:node.end_lineno]
        text = re.sub(r"\bloss\.(\w+\()", r"\1", "\n".join(lines).strip())
        parts.append(f"# ---- {name}.py {'-' * (100 - len(name))}\n\n{text}")
    parts.insert(-1, f"Config, Encoder = {names}")
    with open(os.path.join(ROOT, "LICENSE"), encoding="utf-8") as file:
        head = [f"# {line}".strip() for line in file] + [""]
    head += sorted(imports, key=lambda line: ("transformers" in line, "torch" in line, line))
    return "\n\n\n".join(["\n".join(head), *parts]) + "\n"


def last_merge(token, ranks):
    """The two parts that tiktoken joins last to make this token; None if its merges never get there."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def hub_tokenizer(tok, is_classifier=False):
    """Our Tokenizer -> one of the `tokenizers` library that gives the same ids.

    A token has one merge: inside it, parts are joined in the same order whatever stands around it. Tokens that merges
    do not reach are found whole, as tiktoken finds them. is_classifier: rows as heads.encode_texts makes them, else as
    sample.encode_masked does. Names of special ids in a text are read as these, which ours never does.
    """
    hub = Tokenizer.from_str(tok.library) if tok.library else from_ranks(tok)
    inner = [hub.normalizer] if hub.normalizer else []
    start, end, spaced = "<|endoftext|>", "<|endoftext|>", tok.name != "byte"
    if is_classifier:  # \x1c to \x1f are white space to str.strip
        start, end, outer = "[CLS]", "[SEP]", r"[\s\x1c-\x1f]+"
        hub.normalizer = normalizers.Sequence([normalizers.Replace(Regex(rf"\A{outer}|{outer}\z"), ""),
                                               *[normalizers.Prepend(" ")] * spaced, *inner])
    elif spaced:  # the space before a mask belongs to the hidden token
        hub.normalizer = normalizers.Sequence([normalizers.Replace(" [MASK]", "[MASK]"), *inner])
    hub.add_special_tokens([AddedToken(special, special=True, normalized=special == "[MASK]" and not is_classifier)
                            for special in tok.specials])  # normalized: looked for in what the normalizer returns
    hub.post_processor = processors.TemplateProcessing(
        single=f"{start}:0 $A:1 {end}:1", pair=f"{start}:0 $A:1 {end}:1 $B:2 {end}:2",
        special_tokens=[(special, tok.specials[special]) for special in {start, end}])
    return hub


def from_ranks(tok):
    """The library's tokenizer for the ranks of a Tokenizer."""
    shown = [byte for byte in range(256) if chr(byte).isprintable() and byte != 32]  # bytes as characters, as in GPT-2
    char = dict(zip(shown + sorted(set(range(256)) - set(shown)), map(chr, [*shown, *range(256, 512)])))
    name = {token: "".join(char[byte] for byte in token) for token in sorted(tok.ranks, key=tok.ranks.get)}
    pairs = filter(None, (last_merge(token, tok.ranks) for token in name if len(token) > 1))
    merges = [(name[a], name[b]) for a, b in pairs]
    vocabulary = {name[token]: i for token, i in tok.ranks.items()} | tok.specials
    hub = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=bool(merges)))
    # Oniguruma takes {1,3}+ for a repetition of repetitions and $ for the end of a line
    pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", tok.pattern).replace("$", r"\z")
    hub.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MAX_PRETOKEN}}}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hub.decoder = decoders.ByteLevel()
    if tok.normalizer:
        hub.normalizer = normalizers.NFC()
    return hub


def write_onnx(path, hub, longest, names):
    """A model of `transformers` -> path, and a function that runs it: inputs of these names (B,T) int64 -> [logits]."""
    import onnxruntime

    shape = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=longest)}
    example = {name: torch.ones(2, min(longest, 5), dtype=torch.int64) for name in names}
    program = torch.onnx.export(hub, kwargs=example, dynamo=True, dynamic_shapes=dict.fromkeys(names, shape),
                                input_names=names, output_names=["logits"], verbose=False)
    program.save(path, external_data=sum(p.numel() for p in hub.parameters()) > 4e8)  # a file may hold 2 GB
    session = onnxruntime.InferenceSession(path)
    return lambda *batch: [torch.from_numpy(t) for t in session.run(None, {
        name: t.numpy() for name, t in zip(names, batch)})]
