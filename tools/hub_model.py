"""The repository's encoders as classes of `transformers`.

    AutoModel.from_pretrained(folder, trust_remote_code=True)
    (or AutoModelForMaskedLM, of a decoder AutoModelForCausalLM; SequenceClassification,
     TokenClassification, QuestionAnswering)

tools/export.py copies this file into the exported folder, with the modules of this repository that
it imports. Each class holds an encoder of the repository as `encoder` and leaves the computation to
it. All of them take, as the models of `transformers` do,

    input_ids (B,T) or inputs_embeds (B,T,token_dim), attention_mask (B,T), on either side, labels,
    output_hidden_states   the concepts (B,C,D) before each layer and at the end, zeros for those
                           behind the end of a short row; of a Transformer the tokens (B,T,D)
    output_attentions      of each layer how concepts read tokens (B,H,C,T); of a Transformer how
                           registers and tokens read each other (B,H,N,N)

Shapes: B rows, T tokens, C concepts, D width of a state, d of a token, V vocabulary, H heads, R
registers, N = R + T.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from lib import kernels
from lib.classifier import Classifier

# In an exported folder these two names stand for the classes of the architecture it was made from.
from model import ConceptConfig as Config
from model import ConceptEncoder as Encoder
from model import Lexicon, gather_rows, split_heads


class EncoderConfig(PretrainedConfig):
    """config.json of an exported model.

    model_settings: "arch" and the fields of the repository's config, as in a checkpoint.
    vocab_size: rows of the token table, where resize_token_embeddings has changed them.
    lexicon_words: how many ids the lexicon knows; those that were added later it does not.
    n_texts: how many texts a classifier reads at once; 2 for pairs.
    aligned: how it compares them, see Classifier.
    """
    model_type = "concept_encoders"

    def __init__(self, model_settings=None, classifier_dropout=0.1, n_texts=1, aligned=True,
                 vocab_size=None, lexicon_words=None, **others):
        self.model_settings = model_settings or {}
        self.n_texts, self.aligned = n_texts, aligned
        self.classifier_dropout = classifier_dropout
        # The names that transformers and other libraries look for.
        cfg = self.of_encoder()
        self.vocab_size = vocab_size or cfg.vocab_size
        self.lexicon_words = lexicon_words or cfg.vocab_size
        self.max_position_embeddings = cfg.longest
        self.num_hidden_layers = cfg.n_layer
        self.num_attention_heads = cfg.n_head
        self.hidden_size = getattr(cfg, "concept_dim", cfg.token_width)
        self.is_decoder, self.use_cache = getattr(cfg, "causal", False), False
        super().__init__(**others)

    def of_encoder(self):
        """-> the config of the repository's encoder, with the token table of the training run."""
        fields = {name: value for name, value in self.model_settings.items() if name != "arch"}
        return Config(**fields)


# ---- the encoder and its token table -------------------------------------------------


class TableEncoder(Encoder):
    """The repository's encoder with its token table as an nn.Embedding, `embeddings`.

    There transformers and other libraries look for it, to resize, count, replace or hook it.
    """
    def __init__(self, cfg):
        super().__init__(cfg)
        table = self._parameters.pop("wte")
        self.embeddings = nn.Embedding.from_pretrained(table.detach(), freeze=False)
        if self.words is not None:
            self.words.__class__ = KnownWords
            self.words.register_buffer("cut_rows", None)

    @property
    def wte(self):
        return self.embeddings.weight

    @property
    def words(self):
        """The lexicon, None where the architecture or its config has none."""
        return getattr(self, "lexicon", None)

    def encode(self, ids, attention_mask=None, added=None, vectors_BTd=None, **others):
        if vectors_BTd is None:
            vectors_BTd = self.vectors(self.embeddings(ids))
        return super().encode(ids, attention_mask, added, vectors_BTd=vectors_BTd, **others)

    def vectors(self, embeds):
        """Rows of the token table (...,token_dim) -> (...,d), in the width in which they are read.
        """
        expansion = getattr(self, "expansion", None)
        return embeds if expansion is None else expansion(embeds)

    @torch.no_grad()
    def nearest_ids(self, embeds):
        """inputs_embeds (B,T,token_dim) -> (B,T), the id with the nearest row of the table.

        Some of what the encoder does goes by ids: masks, documents, which concept owns a token.
        """
        table = self.wte.float()
        return (2 * embeds.float() @ table.T - table.square().sum(-1)).argmax(-1)

    def replace_table(self, embeddings, before_Vd):
        """Takes another table. before_Vd: table() until now. -> how many ids the lexicon knows."""
        n_new, n_old = len(embeddings.weight), len(before_Vd)
        if getattr(self, "copy_head", None) is not None and n_new != n_old:
            raise ValueError(f"a token table of {n_new:,} rows: the copy head scores the {n_old:,} "
                             "ids it was trained with; keep their number")
        self.embeddings = embeddings
        self.fit_head()
        if self.words is None:
            return self.cfg.vocab_size
        n_known, n_cut = self.words.n_known, max(0, self.words.n_known - len(self.wte))
        if n_cut:
            cut = before_Vd[n_known - n_cut:n_known].detach().clone()
            kept = self.words.cut_rows
            self.words.cut_rows = cut if kept is None else torch.cat((cut, kept))
        return self.words.n_known


    def fit_head(self):
        """Gives the head's bias of each word the length of the table; a new word has none."""
        head = getattr(self, "bert_head", None)
        if head is not None and len(head.word_bias) != len(self.wte):
            n_new = len(self.wte) - len(head.word_bias)
            head.word_bias = nn.Parameter(F.pad(head.word_bias.detach(), (0, n_new)))


class KnownWords(Lexicon):
    """A Lexicon that gives the same logits as before after the token table got another length.

    It scores the ids of the training run and centres the scores over them. So the rows of ids that
    were cut off stay here as `cut_rows`, and ids that were added have no logits from the lexicon.
    """
    @property
    def n_known(self):
        return len(self.id_weight) - (0 if self.cut_rows is None else len(self.cut_rows))

    def row_logits(self, content_BCE, table_Vd):
        V, n_known = len(table_Vd), self.n_known
        if V == len(self.id_weight) == n_known:
            return super().row_logits(content_BCE, table_Vd)
        rows = table_Vd[:n_known]
        if self.cut_rows is not None:
            rows = torch.cat((rows, self.cut_rows.to(rows.dtype)))
        return F.pad(super().row_logits(content_BCE, rows)[:, :n_known], (0, V - n_known))


def build_encoder(config):
    """The encoder of an EncoderConfig on the CPU in fp32, with fresh weights.

    from_pretrained sets another default device and dtype for new tensors. Buffers that are not
    stored would be computed there and lose precision, or get no values on the meta device.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            encoder = TableEncoder(config.of_encoder())
            if config.vocab_size != len(encoder.wte):
                encoder.embeddings = nn.Embedding(config.vocab_size, encoder.wte.shape[1])
                encoder.fit_head()
            if encoder.words is not None and config.lexicon_words < encoder.cfg.vocab_size:
                n_cut = encoder.cfg.vocab_size - config.lexicon_words
                encoder.words.cut_rows = torch.zeros(n_cut, encoder.cfg.token_width)
            return encoder
    finally:
        torch.set_default_dtype(before)


# ---- a batch -----------------------------------------------------------------------


@dataclass
class Batch:
    """Rows as the encoder reads them, with padding on the right."""
    ids: torch.Tensor  # (B,T)
    real: torch.Tensor  # (B,T) bool, True for tokens, or None: all are
    vectors: torch.Tensor  # (B,T,d)
    first: torch.Tensor  # (B,1), how much padding the user had on the left, or None

    def places(self, step):
        """(B,T): the columns moved by `step` times that padding."""
        T = self.ids.shape[1]
        moved = torch.arange(T, device=self.ids.device) + step * self.first
        # moved % T, which torch.onnx cannot translate
        return torch.where(moved < 0, moved + T, torch.where(moved < T, moved, moved - T))

    def from_left(self, t):
        """(B,T) or (B,T,d) as the user gave it -> the same with padding on the right."""
        if self.first is None or t is None:
            return t
        places = self.places(1)
        return t.gather(1, places) if t.ndim == 2 else gather_rows(t, places)

    def as_given(self, t):
        """Outputs (B,T,...) -> the same in the columns of the user's input."""
        return t if self.first is None else gather_rows(t, self.places(-1))

    def weights_as_given(self, weights, axes):
        """Attention weights (B,H,Q,N) -> the same with these axes in the columns of the input.

        Registers, which stand before the tokens, stay where they are.
        """
        if self.first is None:
            return weights
        T = self.ids.shape[1]
        for axis in axes:
            n = weights.shape[axis] - T
            places = F.pad(self.places(-1) + n, (n, 0))
            places[:, :n] = torch.arange(n, device=places.device)
            shape = [len(places), 1, 1, 1]
            shape[axis] = n + T
            weights = weights.gather(axis, places.view(shape).expand_as(weights))
        return weights


@contextmanager
def recording(layers, inputs, weights):
    """While it is open, lists get what goes into each layer and the weights of its attention.

    inputs, weights: lists, or None to leave that out.
    """
    hooks = []
    for layer in layers:
        if inputs is not None:
            hooks.append(layer.register_forward_pre_hook(
                lambda layer, given: inputs.append(given[0])))
        if weights is not None and hasattr(getattr(layer, "read", None), "kv"):  # it attends
            # A layer that is computed again for its gradients must not do anything else there.
            has_gradient = not getattr(layer, "gradient_checkpointing", False)
            hooks.append(layer.read.register_forward_pre_hook(
                partial(add_weights, weights, has_gradient)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def add_weights(weights, has_gradient, read, given):
    with torch.set_grad_enabled(has_gradient and torch.is_grad_enabled()):
        weights.append(attention_weights(read, *given))


def attention_weights(read, x_BQD, y_BND, mask=None, *others):
    """How an Attention of the repository, called like this, weighs what it reads. -> (B,H,Q,N).

    The weights of a query add up to 1, or in a local head to 0 where nothing is near. In the owned
    heads of an OwnedAttention each token is read by one query only; a query that owns no token has
    weights of 0 there.
    """
    n_owned = read.n_owned_head
    rotary = others[0] if others and not n_owned else None
    k_BND = read.kv(y_BND).chunk(2, dim=-1)[0]
    q, k = split_heads(read.q(x_BQD), k_BND, read.n_head, rotary, read.gain, read.qk_norm)
    owned = (n_owned, *others[1:]) if n_owned else ()
    return kernels.attention_weights(q, k, mask, *owned).to(y_BND.dtype)


# ---- what the classes share ------------------------------------------------------------


class EncoderPreTrainedModel(PreTrainedModel):
    """Building the encoder, its token table, and reading a batch."""
    config_class = EncoderConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TableEncoder"]
    # The head of a fine-tuned model, when its folder is loaded as another class.
    _keys_to_ignore_on_load_unexpected = [r"^segments$", r"^(out|compare|classifier|qa_outputs)\."]

    def __init__(self, config):
        super().__init__(config)
        self.encoder = build_encoder(config)
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
        if isinstance(module, nn.Embedding) and module is not self.encoder.embeddings:
            nn.init.normal_(module.weight, 0, float(self.encoder.wte.float().std()))  # added ids
        elif isinstance(module, nn.Linear) and module in self.children():  # a head
            nn.init.normal_(module.weight, 0, 0.02)
            nn.init.zeros_(module.bias)

    def _set_gradient_checkpointing(self, *args, **kwargs):
        """Makes the encoder's layers such that transformers can compute them again for gradients.
        """
        layers = [*self.encoder.mixers, *self.encoder.layers]
        if hasattr(self.encoder, "last"):
            layers.append(self.encoder.last)
        for layer in layers:
            kind = type(layer)
            if not issubclass(kind, GradientCheckpointingLayer):
                layer.__class__ = type(kind.__name__, (GradientCheckpointingLayer, kind), {})
        super()._set_gradient_checkpointing(*args, **kwargs)

    # ---- the token table

    def get_input_embeddings(self):
        return self.encoder.embeddings

    def set_input_embeddings(self, value):
        if value is not self.encoder.embeddings:
            before = self.encoder.table()
            self.config.lexicon_words = self.encoder.replace_table(value, before)
            self.config.vocab_size = len(value.weight)

    def get_output_embeddings(self):
        return None  # logits come from the same table, in the encoder

    @torch.no_grad()
    def resize_token_embeddings(self, *args, **kwargs):
        before = self.encoder.table().clone()  # transformers changes the table in place
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.lexicon_words = self.encoder.replace_table(embeddings, before)
        return embeddings

    # ---- reading

    def batch(self, input_ids, attention_mask, inputs_embeds):
        """-> Batch. ValueError for both of ids and embeddings or none, or a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        ids = self.encoder.nearest_ids(inputs_embeds) if input_ids is None else input_ids
        batch = Batch(ids, None, None, None)
        if attention_mask is not None:
            if attention_mask.shape != ids.shape:
                raise ValueError(f"attention_mask has the shape {tuple(attention_mask.shape)}; "
                                 f"expected that of the tokens, {tuple(ids.shape)}")
            real = attention_mask.bool()
            batch.first = real.int().argmax(1, keepdim=True)
            batch.real = batch.from_left(real)
            batch.ids = batch.from_left(ids)
        embeds = batch.from_left(inputs_embeds)
        if embeds is None:
            embeds = self.encoder.embeddings(batch.ids)
        batch.vectors = self.encoder.vectors(embeds)
        return batch

    def join_documents(self, batch):
        """The texts of a row see each other, though the tokenizer of a pretrained model puts
        end-of-document marks around them. Such a row begins with one.
        """
        if self.encoder.cfg.isolate_documents:
            is_mark = batch.ids == self.encoder.cfg.eot_id
            batch.ids = batch.ids.masked_fill(is_mark & is_mark[:, :1], self.config.sep_token_id)

    def read(self, batch, extras, added=None):
        """A Batch -> concepts (B,C,D), tokens (B,T,d). extras: an Extras, which gets its part."""
        layers = [*self.encoder.layers]
        if self.config.is_decoder:  # it has read the whole row then
            layers.append(self.encoder.last)
        with recording(layers, extras.states, extras.weights):
            concepts, tokens = self.encoder.encode(
                batch.ids, batch.real, added, vectors_BTd=batch.vectors)
        if extras.states is not None:
            extras.states.append(concepts if self.encoder.arch == "concept" else tokens)
        return concepts, tokens

    def read_tokens(self, batch, extras):
        """A Batch -> the decoder's states (B,T,D) at all its tokens."""
        concepts, tokens = self.read(batch, extras)
        places_BT = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        places_BT = places_BT.expand(batch.ids.shape)
        documents = self.encoder.documents(batch.ids, batch.real)
        # The decoder of a Transformer is its last layer, unless that has run in `read`.
        has_last = hasattr(self.encoder, "last") and not self.config.is_decoder
        last = [self.encoder.last] if has_last else []
        with recording(last, None, extras.weights):
            states = self.encoder.decode(concepts, tokens, places_BT, documents, batch.real)
        if last and extras.states is not None:
            extras.states.append(states)
        return states

    def answer(self, kind, batch, extras, return_dict, **parts):
        """An output object of `transformers`, or a tuple where return_dict=False asks for one."""
        has_concepts, T = self.encoder.arch == "concept", batch.ids.shape[1]
        states, weights = extras.states, extras.weights
        if states is not None:  # concepts have no columns; registers stand before the tokens
            states = tuple(self.all_concepts(t, 1) if has_concepts else batch.as_given(t[:, -T:])
                           for t in states)
        if weights is not None:
            axes = [3] if has_concepts else [2, 3]
            weights = [batch.weights_as_given(t, axes) for t in weights]
            weights = tuple(self.all_concepts(t, 2) if has_concepts else t for t in weights)
        output = kind(**parts, hidden_states=states, attentions=weights)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def all_concepts(self, t, axis):
        """Zeros for the concepts behind the end of a short row, which a layer has not computed."""
        n_missing = self.encoder.cfg.n_concept - t.shape[axis]
        return F.pad(t, (0, 0) * (t.ndim - 1 - axis) + (0, n_missing))

    def extras(self, output_hidden_states, output_attentions):
        """What is asked for here, or else in the config."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return Extras([] if output_hidden_states else None, [] if output_attentions else None)


@dataclass
class Extras:
    """Hidden states and attention weights of a forward pass, where they are asked for."""
    states: list  # before each layer and at the end, or None
    weights: list  # of the attention of each layer, or None


def mean_nats(logits_NV, labels_N, unlabelled=-100):
    """Mean cross-entropy over the labels that are not `unlabelled`; 0 where there is none, not NaN.
    """
    nats = F.cross_entropy(logits_NV.float(), labels_N, ignore_index=unlabelled, reduction="sum")
    return nats / (labels_N != unlabelled).sum().clamp(min=1)


# ---- the classes -----------------------------------------------------------------------


class EncoderModel(EncoderPreTrainedModel):
    """The encoder without a head.

    last_hidden_state: the concepts (B,C,D); of a Transformer the token states (B,T,D) that its
    last layer reads. pooler_output (B,D): an embedding of the row, ConceptEncoder.pooled or the
    mean over the tokens.
    """
    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
                output_hidden_states=None, output_attentions=None, return_dict=None):
        batch = self.batch(input_ids, attention_mask, inputs_embeds)
        extras = self.extras(output_hidden_states, output_attentions)
        concepts, tokens = self.read(batch, extras)
        if self.encoder.arch == "concept":
            states = concepts
            pooled = self.encoder.pooled(concepts, batch.ids, batch.real)
        else:
            real_BT = torch.ones_like(batch.ids) if batch.real is None else batch.real
            weight_BT1 = real_BT[..., None].to(tokens.dtype)
            states = batch.as_given(tokens)
            pooled = (tokens * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
        return self.answer(BaseModelOutputWithPooling, batch, extras, return_dict,
                           last_hidden_state=states, pooler_output=pooled)

    def multi_vectors(self, input_ids=None, attention_mask=None, token_type_ids=None,
                      inputs_embeds=None):
        """All concepts of each row as unit vectors, to search by late interaction: (B,C,D).

        Each text has the same number of them, however long it is; of anchored concepts those that
        stand behind its end are zeros. A Transformer gives one vector a token (B,T,D), zeros for
        padding.
        """
        states = self(input_ids, attention_mask, token_type_ids, inputs_embeds,
                      return_dict=True).last_hidden_state
        vectors = F.normalize(states.float(), dim=-1)
        if self.encoder.arch == "concept":
            batch = self.batch(input_ids, attention_mask, inputs_embeds)
            return vectors * self.encoder.standing(batch.ids, batch.real)[..., None]
        return vectors if attention_mask is None else vectors * attention_mask[..., None]


class EncoderForMaskedLM(EncoderPreTrainedModel):
    """logits (B,T,V) at every position. loss: mean nats over the labels that are not -100."""
    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
                labels=None, output_hidden_states=None, output_attentions=None, return_dict=None):
        batch = self.batch(input_ids, attention_mask, inputs_embeds)
        extras = self.extras(output_hidden_states, output_attentions)
        logits_BTV = self.encoder.logits(self.read_tokens(batch, extras))
        logits_BTV = batch.as_given(logits_BTV)
        loss = None
        if labels is not None:
            loss = mean_nats(logits_BTV.flatten(0, 1), labels.flatten())
        return self.answer(MaskedLMOutput, batch, extras, return_dict, loss=loss, logits=logits_BTV)


class EncoderForCausalLM(EncoderPreTrainedModel, GenerationMixin):
    """logits (B,T,V) of the token behind each position. loss: mean nats over the labels (B,T) that
    are not -100; labels are the input_ids, they are moved by one place here.

    generate() reads the whole text anew for each token: the repository's own generation keeps what
    it has computed (tools/sample.py).
    """
    def __init__(self, config):
        super().__init__(config)
        if not config.is_decoder:
            raise ValueError("this model was trained with masks, and each of its tokens sees those "
                             "behind it; load it with AutoModelForMaskedLM")
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        return dict(input_ids=input_ids, attention_mask=attention_mask)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
                labels=None, output_hidden_states=None, output_attentions=None, return_dict=None):
        batch = self.batch(input_ids, attention_mask, inputs_embeds)
        extras = self.extras(output_hidden_states, output_attentions)
        logits_BTV = self.encoder.logits(self.read_tokens(batch, extras))
        logits_BTV = batch.as_given(logits_BTV)
        loss = None
        if labels is not None:
            loss = mean_nats(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return self.answer(CausalLMOutput, batch, extras, return_dict, loss=loss, logits=logits_BTV)


class EncoderForSequenceClassification(EncoderPreTrainedModel):
    """The repository's Classifier, with the same names of weights. -> logits (B, num_labels).

    The answer is decoded at the first token of a row. The tokenizer of a pretrained model puts an
    end-of-document mark there; it is replaced by [MASK], where pretraining has learned to answer.
    """
    def __init__(self, config):
        super().__init__(config)
        head = Classifier(self.encoder, config.num_labels, config.n_texts,
                          config.classifier_dropout, config.aligned)
        # The parts become attributes of this model: as a submodule, the head would store the
        # encoder a second time and change the names of all weights.
        self.n_texts, self.aligned = config.n_texts, config.aligned
        self.segments = head.segments
        self.drop = head.drop
        self.compare = head.compare
        self.out = head.out
        self.post_init()

    # the methods of the head, which use these parts
    read_part, comparison = Classifier.read_part, Classifier.comparison
    decide = Classifier.answer

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            nn.init.zeros_(self.segments)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
                labels=None, output_hidden_states=None, output_attentions=None, return_dict=None):
        """token_type_ids: 0 for the first token, 1 for the first text, 2 for the second.

        Without them, the row is one text.
        """
        batch = self.batch(input_ids, attention_mask, inputs_embeds)
        extras = self.extras(output_hidden_states, output_attentions)
        cfg, device = self.encoder.cfg, batch.ids.device
        is_first_T = torch.arange(batch.ids.shape[1], device=device) == 0
        is_mark_BT = is_first_T & (batch.ids == cfg.eot_id)
        self.join_documents(batch)
        batch.ids = batch.ids.masked_fill(is_mark_BT, cfg.mask_id)
        mask_d = self.encoder.vectors(self.encoder.wte[cfg.mask_id])
        batch.vectors = torch.where(is_mark_BT[..., None], mask_d, batch.vectors)
        kinds = batch.from_left(token_type_ids)
        if kinds is None:
            kinds = (~is_first_T).long().expand(batch.ids.shape)
        if batch.real is None:
            batch.real = torch.ones_like(batch.ids, dtype=torch.bool)
        concepts, tokens = self.read(batch, extras, added=F.embedding(kinds, self.segments))
        logits = self.decide(concepts, tokens, batch.ids, kinds, batch.real, batch.vectors)
        loss = None if labels is None else self.loss(logits, labels)
        return self.answer(SequenceClassifierOutput, batch, extras, return_dict, loss=loss,
                           logits=logits)

    def loss(self, logits, labels):
        """The loss that `transformers` takes for the problem_type of its config."""
        if self.config.problem_type == "regression" or self.config.num_labels == 1:
            scores = logits.squeeze(-1)
            return F.mse_loss(scores, labels.to(logits.dtype).view(scores.shape))
        if self.config.problem_type == "multi_label_classification" or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels.view(-1))


class EncoderForTokenClassification(EncoderPreTrainedModel):
    """logits (B,T,num_labels) from the decoder's state at each token. labels (B,T), -100: none."""
    def __init__(self, config):
        super().__init__(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
                labels=None, output_hidden_states=None, output_attentions=None, return_dict=None):
        batch = self.batch(input_ids, attention_mask, inputs_embeds)
        self.join_documents(batch)
        extras = self.extras(output_hidden_states, output_attentions)
        states = batch.as_given(self.read_tokens(batch, extras))
        logits = self.classifier(self.drop(states))
        loss = None
        if labels is not None:
            loss = mean_nats(logits.flatten(0, 1), labels.flatten())
        return self.answer(TokenClassifierOutput, batch, extras, return_dict, loss=loss,
                           logits=logits)


class EncoderForQuestionAnswering(EncoderPreTrainedModel):
    """start_logits and end_logits (B,T) of the answer in a row of question and text.

    start_positions, end_positions (B,): where it is. Places outside the row do not count.
    """
    def __init__(self, config):
        super().__init__(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None,
                start_positions=None, end_positions=None, output_hidden_states=None,
                output_attentions=None, return_dict=None):
        batch = self.batch(input_ids, attention_mask, inputs_embeds)
        self.join_documents(batch)
        extras = self.extras(output_hidden_states, output_attentions)
        states = batch.as_given(self.read_tokens(batch, extras))
        start, end = self.qa_outputs(self.drop(states)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            T = start.shape[1]
            losses = [mean_nats(logits, places.view(-1).clamp(0, T), unlabelled=T)
                      for logits, places in ((start, start_positions), (end, end_positions))]
            loss = sum(losses) / 2
        return self.answer(QuestionAnsweringModelOutput, batch, extras, return_dict, loss=loss,
                           start_logits=start.contiguous(), end_logits=end.contiguous())
