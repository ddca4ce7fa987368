"""Settings of a training run: what may be set and what has an effect, and the model they describe.

Commands pass plain values in; nothing here reads a command's globals.
"""

import math
from dataclasses import MISSING, asdict, fields

from data.reader import parse_batch_schedule
from lib.baselines import ResonanceConfig, ResonanceLM, Transformer, TransformerConfig
from lib.log import TRACKERS, trackers_of
from masking import CURRICULA, SCORES, check_masking
from model import ConceptConfig, ConceptEncoder

# value of the setting `arch` -> (its settings as a dataclass, its model)
ARCHS = {
    "concept": (ConceptConfig, ConceptEncoder),
    "transformer": (TransformerConfig, Transformer),
    "resonance": (ResonanceConfig, ResonanceLM),
}
OBJECTIVES = ("mlm", "clm", "mntp")
OPTIMIZERS = ("adamw", "muon", "stable_adamw")


# ---- what may be set ----------------------------------------------------------------------------

def check_settings(config, defaults, world_size):
    """Raises ValueError naming all settings that are wrong, contradict each other or do nothing.

    config, defaults: {name: value} of train.py. world_size: number of processes.
    """
    problems = bad_values(config) + settings_without_effect(config, defaults)
    batch_size, micro_batch = config["batch_size"], config["micro_batch"]
    rows = batch_size // world_size
    for name in ("block_schedule", "batch_schedule"):
        # A run of so many minutes does not know its number of steps in advance.
        if config[name] and config["max_minutes"]:
            problems.append(f"{name}: its shares are of a known number of steps; give max_steps, "
                            "not max_minutes")
    if config["curriculum"] != "off" and config["max_minutes"]:
        problems.append(f"curriculum={config['curriculum']}: its stages are shares of a known "
                        "number of steps; give max_steps, not max_minutes")
    if config["batch_schedule"]:
        try:
            sizes = parse_batch_schedule(config["batch_schedule"], batch_size)
            problems += [f"batch_schedule: {n} rows do not divide among {world_size} processes"
                         for n, _ in sizes if n % world_size]
        except ValueError as error:
            problems.append(str(error))
    if config["parallel"] == "fsdp" and world_size == 1:
        problems.append("parallel=fsdp gives each process a part of the model, and there is one "
                        "process; start several by torchrun --nproc_per_node=N, or --parallel=ddp")
    if batch_size % world_size:
        problems.append(f"batch_size={batch_size} does not divide among {world_size} processes")
    elif not problems and rows % min(micro_batch, rows):  # with a problem, these may be 0
        fits = [n for n in range(1, micro_batch + 1) if rows % n == 0]
        problems.append(f"micro_batch={micro_batch} does not divide the {rows} rows of a process; "
                        f"--micro_batch={fits[-1]} does")
    if problems:
        raise ValueError("\n       ".join(problems))


def check_with_data(config, is_padded, dtype):
    """As check_settings, for what only data and machine tell: rows with padding, the dtype chosen.
    """
    if is_padded and config["arch"] == "resonance" and config["mixer"] == "fnet":
        raise ValueError("mixer=fnet reads padding as if it were text; data without padding and "
                         "rows=block, or mixer=resonance")
    if config["parallel"] == "fsdp" and dtype == "fp16":
        raise ValueError("parallel=fsdp with dtype=fp16: losses are not scaled there; "
                         "--dtype=bf16, --dtype=fp32 or --parallel=ddp")


def bad_values(config):
    """Settings of train.py whose value nothing can be done with -> list of messages."""
    problems = []

    def one_of(name, *choices):
        if config[name] not in choices:
            problems.append(f"{name}={config[name]!r}: expected {', '.join(choices)}")

    masking = ("masking_type", "mlm_probability", "concept_window", "span_length_distribution",
               "mask_replace", "diffusion_schedule")
    try:
        check_masking(*(config[name] for name in masking), block_size=config["block_size"])
    except ValueError as error:
        problems.append(str(error))
    one_of("parallel", "ddp", "fsdp")
    one_of("arch", *ARCHS)
    one_of("objective", *OBJECTIVES)
    if config["arch"] == "concept" and config["objective"] != "mlm":
        problems.append(f"objective={config['objective']}: concepts read the whole row before "
                        "anything is predicted, so every prediction would see its own answer or "
                        "its neighbours'; arch=transformer or arch=resonance")
    if config["carry_optimizer"] and config["init_from"] in ("auto", "scratch", "resume"):
        problems.append("carry_optimizer=True needs a run to carry it from: --init_from=DIR")
    one_of("importance", *SCORES)
    one_of("curriculum", *CURRICULA)
    first, second = config["stage_1_end"], config["stage_2_end"]
    if not 0 < first < second < 1:
        problems.append(f"stage_1_end={first}, stage_2_end={second}: expected shares of the run, "
                        "the first above 0 and below the second, the second below 1")
    one_of("init_table", "random", "cooccurrence")
    one_of("optimizer", *OPTIMIZERS)
    one_of("lr_schedule", "cosine", "linear", "wsd", "constant")
    one_of("wandb", "online", "offline", "off")
    for name in trackers_of(config["log_to"], config["wandb"]):
        if name not in TRACKERS:
            problems.append(f"log_to={config['log_to']!r}: expected {' or '.join(TRACKERS)}, or "
                            "both with a comma")
    one_of("compile", "auto", "true", "false")
    for name in ("anchored", "hide_masked"):
        one_of(name, "auto", "true", "false")
    one_of("rows", "block", "document")
    # each comparison is false for nan, which is refused too
    for name in ("batch_size", "micro_batch", "learning_rate", "max_steps", "eval_interval",
                 "eval_rows", "log_interval", "block_size", "concept_std"):
        if not 0 < config[name] < math.inf:
            problems.append(f"{name}={config[name]}: expected more than 0")
    for name in ("min_lr", "health_rows", "warmup_steps", "max_tokens", "max_minutes",
                 "overfit_tokens", "stop_at_step", "patience", "weight_decay", "grad_clip",
                 "save_minutes", "hang_minutes", "seed", "vocab_size", "max_length",
                 "checkpoint_every", "lr_restarts"):
        if not 0 <= config[name] < math.inf:
            problems.append(f"{name}={config[name]}: expected 0 or more")
    for name in ("beta1", "beta2", "dropout"):
        if not 0 <= config[name] < 1:
            problems.append(f"{name}={config[name]}: expected from 0, below 1")
    if not 0 < config["decay_fraction"] <= 1:
        problems.append(f"decay_fraction={config['decay_fraction']}: expected a share of the run, "
                        "above 0, up to 1")
    if config["lr_schedule"] != "constant" and config["min_lr"] > config["learning_rate"]:
        problems.append(f"min_lr={config['min_lr']} is above learning_rate="
                        f"{config['learning_rate']}, and the schedule goes down from one to the "
                        f"other; --min_lr={config['learning_rate'] / 100:g} does")
    # A zero too many ends here and not where memory or 64 bits do.
    if config["hang_minutes"] > 1e6:
        problems.append(f"hang_minutes={config['hang_minutes']}: expected at most 1,000,000")
    if config["max_steps"] > 2**31:
        problems.append(f"max_steps={config['max_steps']}: expected at most {2**31:,}")
    for name in ("batch_size", "micro_batch", "n_layer", "n_head", "n_concept", "concept_dim",
                 "token_dim", "ffn_dim", "n_mixer", "mixer_kernel", "n_decoder", "n_register",
                 "vocab_size", "n_frequency", "local_window", "global_every"):
        if config[name] > 2**24:
            problems.append(f"{name}={config[name]}: expected at most {2**24:,}")
    return problems


def settings_without_effect(config, defaults):
    """Settings of train.py that were changed, but nothing reads them here -> list of messages."""
    # A setting that silently does nothing would be believed in: an experiment with it says "no
    # difference". So it is refused.
    if config["objective"] == "clm":  # nothing is masked
        masks = ("masking_type", "mlm_probability", "concept_window", "span_length_distribution",
                 "mask_replace", "diffusion_schedule", "importance", "importance_weights",
                 "curriculum", "stage_1_end", "stage_2_end")
        given = [f"{name}={config[name]}" for name in masks if config[name] != defaults[name]]
        if given:
            return [f"{', '.join(given)}: nothing is masked with objective=clm, which predicts "
                    "every next token; leave masks out, or put config/decoder.py behind the preset"]
    return [f"{name}={config[name]} has no effect here; leave it at {defaults[name]}"
            for name in unread_settings(config) if config[name] != defaults[name]]


def unread_settings(config):
    """Names of settings that nothing reads, given the others."""
    unread = []
    if config["masking_type"] != "concepts":
        unread += ["concept_window"]
    if config["masking_type"] != "span":
        unread += ["span_length_distribution"]
    if config["masking_type"] != "diffusion":
        unread += ["diffusion_schedule"]
    if config["masking_type"] != "importance":
        unread += ["importance", "importance_weights", "curriculum"]
    if config["masking_type"] != "importance" or config["curriculum"] == "off":
        unread += ["stage_1_end", "stage_2_end"]
    # A transformer may be given the settings of a concept model, so that one command line compares
    # the two.
    if config["arch"] in ARCHS:
        unread += sorted(settings_of_others(config, but=("concept",)))
    if config["init_from"] not in ("auto", "scratch", "resume"):
        unread += ["init_table"]  # it comes with the weights
    if not config["n_mixer"]:
        unread += ["mixer_kernel", "resonant_mixers"]
    # strict has no local path beside the concepts
    if config["arch"] == "concept" and config["bottleneck"] != "open":
        unread += ["n_mixer", "mixer_kernel", "n_decoder", "self_attention", "lexicon",
                   "resonant_mixers"]
    if config["resonant_mixers"]:
        unread += ["mixer_kernel"]
    if config["arch"] == "concept" and not config["resonant_mixers"]:
        unread += ["n_frequency"]
    if not config["local_window"]:
        unread += ["global_every"]
    unread += unread_by_layers(config)
    has_anchors = {"auto": config["bottleneck"] == "strict", "false": False}
    if config["arch"] == "concept" and not has_anchors.get(config["anchored"], True):
        unread += ["anchor_slope", "local_heads"]
    if config["lr_schedule"] != "wsd":
        unread += ["decay_fraction"]
    if config["lr_schedule"] != "cosine":
        unread += ["lr_restarts"]
    if config["lr_schedule"] == "constant":
        unread += ["min_lr"]
    if config["rows"] != "block":
        unread += ["isolate_documents"]
    return [name for name in unread if name != "rope_theta"]  # the phases set it on any preset


def unread_by_layers(config):
    """Settings of attention and of resonance, where no layer of a baseline is of that kind."""
    if config["arch"] == "concept" or config["arch"] not in ARCHS:
        return []
    names, kinds = [], ["a"] * max(0, config["n_layer"])
    if config["arch"] == "resonance" and config["mixers"]:
        kinds = [config["mixers"][i % len(config["mixers"])] for i in range(len(kinds))]
    if "a" not in kinds:
        names += ["rope_theta", "qk_norm"]
    # Layer 0 and every global_every-th one see the whole row.
    if not any(kind == "a" and i % max(1, config["global_every"])
               for i, kind in enumerate(kinds)):
        names += ["local_window"]
    if config["arch"] == "resonance" and ("r" not in kinds or config["mixer"] == "fnet"):
        names += ["n_frequency"]
    return names


def settings_of_others(config, but=()):
    """Names of settings that only other architectures have. but: not counting these."""
    names = set().union(*(fields_of(arch) for arch in ARCHS)) & set(config)
    return names - fields_of(config["arch"]) - set().union(*map(fields_of, but))


def rows_to_overfit(n, T):
    """Rows of T tokens of a run on n tokens. Raises ValueError unless these are whole rows."""
    if T < 1:
        raise ValueError(f"block_size={T}: expected more than 0")
    if n < T or n % T:
        near = max(T, round(n / T) * T)
        raise ValueError(f"overfit_tokens={n}: expected whole rows of block_size={T} tokens; "
                         f"--overfit_tokens={near}, or another --block_size")
    return n // T


def warmup_within(warmup_steps, n_steps, say):
    """warmup_steps, or a tenth of the run where that is shorter than the warm-up; says so."""
    if warmup_steps < n_steps:
        return warmup_steps
    shorter = n_steps // 10
    say(f"warmup_steps={warmup_steps} is as long as the whole run of {n_steps} steps or longer: "
        f"{shorter} are used")
    return shorter


def describe_settings(config, defaults):
    """Lines of text: which settings differ from the defaults, which ones have no effect."""
    changed = [f"{name}={value}" for name, value in config.items() if value != defaults[name]]
    lines = [f"settings that differ from the defaults: {', '.join(changed) or 'none'}"]
    unused = sorted(name for name in settings_of_others(config) if config[name] != defaults[name])
    if unused:
        lines.append(f"arch {config['arch']}, which does not use {', '.join(unused)}")
    if config["masking_type"] == "diffusion" and config["mlm_probability"] < 1:
        lines.append(f"diffusion hides from one token to {config['mlm_probability']:.0%} of a row; "
                     "a likelihood needs --mlm_probability=1")
    return "\n".join(lines)


# ---- the model they describe --------------------------------------------------------------------

def fields_of(arch):
    """Names of the settings of an architecture."""
    return {field.name for field in fields(ARCHS[arch][0])}


def model_settings(arch, config, tok):
    """Settings of train.py -> those of its model of this architecture, for build_model.

    Raises ValueError if vocab_size is smaller than the tokenizer's.
    """
    vocab_size = config["vocab_size"] or tok.vocab_size
    if vocab_size < tok.n_vocab:
        raise ValueError(f"vocab_size={vocab_size}, but the tokenizer of {config['data_dir']} has "
                         f"{tok.n_vocab} ids; use --vocab_size=0")
    settings = {name: config[name] for name in fields_of(arch) if name in config}
    if arch != "concept":
        settings |= dict(causal=config["objective"] == "clm", mntp=config["objective"] == "mntp")
    for name in {"anchored", "hide_masked"} & set(settings):
        settings[name] = dict(auto=None, true=True, false=False)[config[name]]
    return settings | dict(arch=arch, vocab_size=vocab_size, mask_id=tok.mask_id, eot_id=tok.eot_id)


def build_model(model_settings):
    """Settings of a model ("arch", some fields of its config) -> model with fresh weights."""
    settings = dict(model_settings)
    config_class, model_class = ARCHS[settings.pop("arch", "concept")]
    return model_class(config_class(**settings))


def settings_of(model):
    """The settings of an uncompiled, unwrapped model, from which build_model makes it again."""
    return dict(arch=model.arch) | asdict(model.cfg)


def with_defaults(settings):
    """Model settings of a checkpoint, with the defaults of settings that it does not have.

    So a setting may be added to a config class without making older checkpoints unreadable. Its
    default must then be what models did before.
    """
    settings = {"arch": "concept"} | settings  # older checkpoints have no "arch"
    if str(settings["arch"]) not in ARCHS:  # str: a damaged one may have a type without a hash
        raise ValueError(f"arch={settings['arch']!r}: expected {', '.join(ARCHS)}")
    config_class, _ = ARCHS[settings["arch"]]
    defaults = {field.name: field.default for field in fields(config_class)
                if field.default is not MISSING}
    if "anchored" in defaults:
        defaults["anchored"] = False  # no model had anchors before there was this setting
    return defaults | settings


def is_causal(model):
    """Whether a model is a decoder: every token is predicted from those before it."""
    return getattr(model.cfg, "causal", False)
