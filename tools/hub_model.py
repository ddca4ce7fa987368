"""The repository's encoders as classes of `transformers`.

    AutoModel.from_pretrained(folder, trust_remote_code=True)
    (or AutoModelForMaskedLM, AutoModelForSequenceClassification)

tools/export.py writes this file, together with the code that it imports from this repository,
into one Python file of the exported folder. Each class holds an encoder of the repository as
`encoder`, with the same names of weights, and leaves the computation to it. Padding must be on
the right, where the tokenizer puts it: positions count from the first column.

Shapes: B rows, T tokens, C concepts, D width of a state, V vocabulary.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    SequenceClassifierOutput,
)

from lib.heads import Classifier

# In an exported file these two names stand for the classes of the architecture that is exported.
from model import ConceptConfig as Config
from model import ConceptEncoder as Encoder


class EncoderConfig(PretrainedConfig):
    """config.json of an exported model.

    model_settings: "arch" and the fields of the repository's config, as in a checkpoint.
    n_texts: how many texts a classifier reads at once; 2 for pairs.
    """
    model_type = "concept_encoders"

    def __init__(self, model_settings=None, classifier_dropout=0.1, n_texts=1, **others):
        self.model_settings = model_settings or {}
        self.n_texts = n_texts
        self.classifier_dropout = classifier_dropout
        # The names that transformers and other libraries look for.
        cfg = self.of_encoder()
        self.vocab_size = cfg.vocab_size
        self.max_position_embeddings = cfg.longest
        self.num_hidden_layers = cfg.n_layer
        self.num_attention_heads = cfg.n_head
        self.hidden_size = getattr(cfg, "concept_dim", cfg.token_width)
        super().__init__(**others)

    def of_encoder(self):
        """-> the config of the repository's encoder."""
        fields = {name: value for name, value in self.model_settings.items() if name != "arch"}
        return Config(**fields)


class EncoderPreTrainedModel(PreTrainedModel):
    """What the three model classes share: building the encoder and preparing its input."""
    config_class = EncoderConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    # The weights of a classifier's head, when a folder with one is loaded as another class.
    _keys_to_ignore_on_load_unexpected = [r"^segments$", r"^(out|compare)\."]

    def __init__(self, config):
        super().__init__(config)
        self.encoder = build_encoder(config.of_encoder())
        # Buffers that are computed and not stored in the weights file (positions, ranks).
        # from_pretrained overwrites them with uninitialised memory; _init_weights restores them.
        for module in self.encoder.modules():
            saved = module.state_dict()
            buffers = module.named_buffers(recurse=False)
            module.computed = {name: t for name, t in buffers if name not in saved}
        self.encoder.to(torch.get_default_dtype())  # that of from_pretrained(dtype=...)

    def _init_weights(self, module):
        """Sets what from_pretrained does not find in the weights file. In fp32 for any dtype."""
        for name, value in getattr(module, "computed", {}).items():
            device = getattr(module, name).device
            setattr(module, name, value.to(device, copy=True))

    def prepare(self, input_ids, attention_mask):
        """-> ids and a bool mask (None without attention_mask).

        With isolate_documents, padding becomes end-of-document marks, so that it continues the
        last document and does not begin another one.
        """
        real_BT = None if attention_mask is None else attention_mask.bool()
        if self.encoder.cfg.isolate_documents and real_BT is not None:
            input_ids = input_ids.masked_fill(~real_BT, self.encoder.cfg.eot_id)
        return input_ids, real_BT


def build_encoder(cfg):
    """An encoder on the CPU in fp32, with fresh weights.

    from_pretrained sets another default device and dtype for new tensors. Buffers that are not
    stored would be computed there and lose precision, or get no values on the meta device.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return Encoder(cfg)
    finally:
        torch.set_default_dtype(before)


def as_asked(output, return_dict):
    """`transformers` returns its output objects unless return_dict=False asks for a tuple."""
    return output.to_tuple() if return_dict is False else output


class EncoderModel(EncoderPreTrainedModel):
    """The encoder without a head.

    last_hidden_state: the concepts (B,C,D); of a Transformer the token states (B,T,D) that its
    last layer reads. pooler_output (B,D): an embedding of the row, the maximum over the concepts,
    or the mean over the tokens.
    """
    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, return_dict=None):
        ids, real_BT = self.prepare(input_ids, attention_mask)
        concepts, tokens = self.encoder.encode(ids, real_BT)
        if self.encoder.arch == "concept":
            output = BaseModelOutputWithPooling(concepts, concepts.amax(1))
        else:
            real_BT = torch.ones_like(ids) if real_BT is None else real_BT
            weight_BT1 = real_BT[..., None].to(tokens.dtype)
            mean_BD = (tokens * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
            output = BaseModelOutputWithPooling(tokens, mean_BD)
        return as_asked(output, return_dict)


class EncoderForMaskedLM(EncoderPreTrainedModel):
    """logits (B,T,V) at every position. loss: mean nats over the labels that are not -100."""
    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None,
                return_dict=None):
        ids, real_BT = self.prepare(input_ids, attention_mask)
        concepts, tokens = self.encoder.encode(ids, real_BT)
        positions_BT = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        documents = self.encoder.documents(ids)
        states = self.encoder.decode(concepts, tokens, positions_BT, documents, real_BT)
        logits_BTV = self.encoder.logits(states)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels.flatten())
        return as_asked(MaskedLMOutput(loss, logits_BTV), return_dict)


class EncoderForSequenceClassification(EncoderPreTrainedModel):
    """The repository's Classifier, with the same names of weights. -> logits (B, num_labels).

    The answer is decoded at the first token of a row. The tokenizer of a pretrained model puts an
    end-of-document mark there; it is replaced by [MASK], where pretraining has learned to answer.
    """
    read = Classifier.read

    def __init__(self, config):
        super().__init__(config)
        head = Classifier(self.encoder, config.num_labels, config.n_texts,
                          config.classifier_dropout)
        # The parts become attributes of this model: as a submodule, the head would store the
        # encoder a second time and change the names of all weights.
        self.n_texts = config.n_texts
        self.segments = head.segments
        self.drop = head.drop
        self.compare = head.compare
        self.out = head.out
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self.out:
            nn.init.normal_(module.weight, 0, 0.02)
            nn.init.zeros_(module.bias)
        elif module is self:
            nn.init.zeros_(self.segments)

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None,
                return_dict=None):
        """token_type_ids: 0 for the first token, 1 for the first text, 2 for the second.

        Without them, the row is one text.
        """
        ids, real_BT = self.prepare(input_ids, attention_mask)
        is_first_T = torch.arange(ids.shape[1], device=ids.device) == 0
        is_mark_BT = is_first_T & (ids == self.encoder.cfg.eot_id)
        ids = ids.masked_fill(is_mark_BT, self.encoder.cfg.mask_id)
        if token_type_ids is None:
            token_type_ids = (~is_first_T).long().expand(ids.shape)
        if real_BT is None:
            real_BT = torch.ones_like(ids, dtype=torch.bool)
        logits = Classifier.forward(self, ids, token_type_ids, real_BT)
        loss = None if labels is None else self.loss(logits, labels)
        return as_asked(SequenceClassifierOutput(loss, logits), return_dict)

    def loss(self, logits, labels):
        """The loss that `transformers` takes for the problem_type of its config."""
        if self.config.problem_type == "regression" or self.config.num_labels == 1:
            scores = logits.squeeze(-1)
            return F.mse_loss(scores, labels.to(logits.dtype).view(scores.shape))
        if self.config.problem_type == "multi_label_classification" or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels.view(-1))
