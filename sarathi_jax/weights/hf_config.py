"""Fields of a published Hugging Face ``config.json`` <-> `ModelConfig`.

The parser honours or refuses: a field that changes the maths in a way the model code does not implement is a
`ConfigError`, a field nobody here has heard of is a logged warning, and only fields known to be harmless are silent.
Missing fields take the defaults of the transformers library, since that is what the writer of the file relied on.
"""

import logging
from collections.abc import Mapping
from typing import Any

from sarathi_jax.config import ConfigError, ModelConfig
from sarathi_jax.weights.fields import count, flag, number
from sarathi_jax.weights.hf_rope import rope_from_hf, rope_to_hf

logger = logging.getLogger(__name__)

# What transformers assumes where config.json is silent; None for num_key_value_heads means "as many as heads".
_DECODER_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "MistralForCausalLM": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "Qwen3ForCausalLM": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
}
_FALCON_ARCHITECTURES = ("FalconForCausalLM", "RWForCausalLM")
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "falcon": "FalconForCausalLM",
    "RefinedWeb": "FalconForCausalLM",
    "RefinedWebModel": "FalconForCausalLM",
}
SUPPORTED_ARCHITECTURES = (*_DECODER_DEFAULTS, "FalconForCausalLM")

# Never part of the maths of inference (or read under another name below).
_HARMLESS = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache initializer_range pretraining_tp
    attention_dropout hidden_dropout pad_token_id unk_token_id bos_token_id eos_token_id auto_map _name_or_path
    tie_word_embeddings vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript
    gradient_checkpointing _attn_implementation _attn_implementation_autoset attn_implementation chunk_size_feed_forward
    id2label label2id problem_type task_specific_params tokenizer_class prefix name_or_path language finetuning_task
    rope_theta rope_scaling rope_parameters is_encoder_decoder tp_plan pp_plan max_length min_length
    """.split()
)
_DECODER_KEYS = frozenset(
    "num_key_value_heads head_dim intermediate_size rms_norm_eps hidden_act sliding_window use_sliding_window "
    "max_window_layers layer_types attention_bias mlp_bias".split()
)
_FALCON_KEYS = frozenset(
    "n_layer n_head n_head_kv n_embed num_kv_heads new_decoder_architecture multi_query parallel_attn alibi bias "
    "num_ln_in_parallel_attn ffn_hidden_size layer_norm_epsilon activation".split()
)
# Fields that are harmless at this value only.
_NEUTRAL: dict[str, Any] = {
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "apply_residual_connection_post_layernorm": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "pruned_heads": {},
    "is_decoder": False,
    "tie_encoder_decoder": False,
}


def model_config_from_hf(fields: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Reads the fields of a published ``config.json``.

    Args:
      fields: the parsed file (or the ``config`` of a ``configs/models`` YAML).
      generation: the parsed ``generation_config.json``, whose end-of-text tokens are added.

    Raises:
      ConfigError: an architecture or a field that is not supported, a missing or malformed field.
    """
    architecture = _architecture(fields)
    falcon = architecture in _FALCON_ARCHITECTURES
    _check_keys(fields, _FALCON_KEYS if falcon else _DECODER_KEYS)
    return _falcon(fields, generation) if falcon else _decoder(fields, generation, architecture)


def model_config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` fields that `model_config_from_hf` reads back as an equal `ModelConfig`.

    Raises:
      ConfigError: no published architecture has this combination of features.
    """
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) if len(config.eos_token_ids) != 1 else config.eos_token_ids[0],
        "rope_theta": config.rope.theta,
        "rope_scaling": rope_to_hf(config.rope),
    }
    return fields | (_falcon_to_hf(config) if config.architecture == "falcon" else _decoder_to_hf(config))


def _architecture(fields: Mapping[str, Any]) -> str:
    named = fields.get("architectures") or []
    architecture = named[0] if named else _MODEL_TYPES.get(fields.get("model_type", ""))
    if architecture is None:
        raise ConfigError(
            f"config.json names no architecture (architectures={named!r}, model_type={fields.get('model_type')!r}); "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if architecture not in (*_DECODER_DEFAULTS, *_FALCON_ARCHITECTURES):
        raise ConfigError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return architecture


def _check_keys(fields: Mapping[str, Any], known: frozenset[str]) -> None:
    for key, neutral in _NEUTRAL.items():
        if fields.get(key) is not None and fields[key] != neutral:
            raise ConfigError(f"{key}={fields[key]!r} is not supported (only {neutral!r} or no such field)")
    unknown = sorted(k for k in fields if k not in _HARMLESS and k not in known and k not in _NEUTRAL)
    if unknown:
        logger.warning(
            "config.json has fields that this program does not know and ignores; if one changes the maths, the "
            "model's answers are wrong: %s",
            ", ".join(f"{key}={fields[key]!r}" for key in unknown),
        )


def _decoder(fields: Mapping[str, Any], generation: Mapping[str, Any] | None, architecture: str) -> ModelConfig:
    defaults = _DECODER_DEFAULTS[architecture]
    fields = {**defaults, **fields}
    hidden_act = fields.get("hidden_act", "silu")
    if hidden_act != "silu":
        raise ConfigError(f"hidden_act={hidden_act!r} is not supported for {architecture} (only 'silu')")
    qwen2 = architecture == "Qwen2ForCausalLM"
    biased_attention = flag(fields, "attention_bias", False)
    if biased_attention and architecture not in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        raise ConfigError(f"attention_bias=True is not a field of {architecture}; its attention has fixed biases")
    if flag(fields, "mlp_bias", False) and architecture != "LlamaForCausalLM":
        raise ConfigError(f"mlp_bias=True is not a field of {architecture}")
    hidden_size = count(fields, "hidden_size")
    num_layers = count(fields, "num_hidden_layers")
    num_heads = count(fields, "num_attention_heads")
    rope, max_position = rope_from_hf(fields, count(fields, "max_position_embeddings"))
    return ModelConfig(
        architecture="decoder",
        vocab_size=count(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=count(fields, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if fields.get("num_key_value_heads") is None else count(fields, "num_key_value_heads"),
        head_dim=_head_dim(fields, hidden_size, num_heads),
        max_position=max_position,
        norm_eps=number(fields, "rms_norm_eps", 1e-6),
        rope=rope,
        windows=_windows(fields, architecture, num_layers),
        qkv_bias=qwen2 or biased_attention,
        out_bias=biased_attention,
        mlp_bias=flag(fields, "mlp_bias", False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_embeddings=flag(fields, "tie_word_embeddings", False),
        bos_token_id=_bos(fields),
        eos_token_ids=_eos(fields, generation),
    )


def _windows(fields: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    if architecture == "LlamaForCausalLM":
        if fields.get("sliding_window") is not None:
            raise ConfigError("sliding_window is not a field of LlamaForCausalLM; set it to null")
        return (None,) * num_layers
    window = None if fields.get("sliding_window") is None else count(fields, "sliding_window")
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not flag(fields, "use_sliding_window", False):
        return (None,) * num_layers
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.get("max_window_layers", 28)
        layer_types = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    if len(layer_types) != num_layers or not set(layer_types) <= {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"layer_types={layer_types!r} must name full_attention or sliding_attention for each of {num_layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _falcon(fields: Mapping[str, Any], generation: Mapping[str, Any] | None) -> ModelConfig:
    # The first releases (RefinedWeb, RefinedWebModel) used the names of Bloom; RefinedWeb is the 40B layout.
    aliases = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_kv_heads": "n_head_kv"}
    fields = {**fields, **{new: fields[old] for new, old in aliases.items() if old in fields and new not in fields}}
    if not flag(fields, "parallel_attn", True):
        raise ConfigError("parallel_attn=false is not supported: only Falcon models with parallel attention and MLP")
    if flag(fields, "alibi", False):
        raise ConfigError("alibi=true is not supported: only Falcon models with rotary positions")
    activation = fields.get("activation", "gelu")
    if activation != "gelu":
        raise ConfigError(f"activation={activation!r} is not supported for Falcon (only 'gelu')")
    hidden_size = count(fields, "hidden_size")
    num_layers = count(fields, "num_hidden_layers")
    num_heads = count(fields, "num_attention_heads")
    new_layout = flag(fields, "new_decoder_architecture", fields.get("model_type") == "RefinedWeb")
    if not new_layout and flag(fields, "multi_query", True):
        num_kv_heads = 1
    else:
        num_kv_heads = num_heads if fields.get("num_kv_heads") is None else count(fields, "num_kv_heads")
    if not new_layout and num_kv_heads not in (1, num_heads):
        raise ConfigError(
            f"num_kv_heads={num_kv_heads} needs new_decoder_architecture=true (the old layout has 1 or {num_heads})"
        )
    num_norms = fields.get("num_ln_in_parallel_attn") or (2 if new_layout else 1)
    if num_norms not in (1, 2) or (num_norms == 2 and not new_layout):
        raise ConfigError(
            f"num_ln_in_parallel_attn={num_norms!r} with new_decoder_architecture={new_layout} is not supported"
        )
    bias = flag(fields, "bias", False)
    rope, max_position = rope_from_hf(
        fields, count({"max_position_embeddings": 2048, **fields}, "max_position_embeddings")
    )
    return ModelConfig(
        architecture="falcon",
        vocab_size=count(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=(
            4 * hidden_size if fields.get("ffn_hidden_size") is None else count(fields, "ffn_hidden_size")
        ),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim({}, hidden_size, num_heads),
        max_position=max_position,
        norm_eps=number(fields, "layer_norm_epsilon", 1e-5),
        rope=rope,
        windows=(None,) * num_layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        tie_embeddings=flag(fields, "tie_word_embeddings", True),
        num_parallel_norms=num_norms,
        bos_token_id=_bos(fields),
        eos_token_ids=_eos(fields, generation),
    )


def _decoder_to_hf(config: ModelConfig) -> dict[str, Any]:
    sizes = {window for window in config.windows if window is not None}
    if config.qk_norm:
        architecture, fits = "Qwen3ForCausalLM", config.qkv_bias == config.out_bias and not config.mlp_bias
    elif config.qkv_bias and not config.out_bias:
        architecture, fits = "Qwen2ForCausalLM", not config.mlp_bias
    elif sizes:
        plain = not (config.qkv_bias or config.out_bias or config.mlp_bias)
        architecture, fits = "MistralForCausalLM", plain and None not in config.windows
    else:
        architecture, fits = "LlamaForCausalLM", config.qkv_bias == config.out_bias
    if not fits or len(sizes) > 1:
        raise ConfigError(
            f"no published architecture has this combination: qk_norm={config.qk_norm}, qkv_bias={config.qkv_bias}, "
            f"out_bias={config.out_bias}, mlp_bias={config.mlp_bias}, windows={sorted(sizes)}"
        )
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_act": "silu",
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
    }
    if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        fields["attention_bias"] = config.qkv_bias
    if architecture == "LlamaForCausalLM":
        fields["mlp_bias"] = config.mlp_bias
    else:
        fields["sliding_window"] = next(iter(sizes), None)
    if architecture.startswith("Qwen"):
        fields["use_sliding_window"] = bool(sizes)
        fields["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in config.windows]
    return fields


def _falcon_to_hf(config: ModelConfig) -> dict[str, Any]:
    if len({config.qkv_bias, config.out_bias, config.mlp_bias}) > 1:
        raise ConfigError("Falcon has either every bias or none")
    if config.head_dim * config.num_heads != config.hidden_size or any(config.windows) or config.qk_norm:
        raise ConfigError("Falcon needs head_dim * num_heads == hidden_size, full attention and no qk_norm")
    new_layout = config.num_parallel_norms == 2 or config.num_kv_heads not in (1, config.num_heads)
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "activation": "gelu",
        "alibi": False,
        "parallel_attn": True,
        "bias": config.qkv_bias,
        "new_decoder_architecture": new_layout,
        "num_ln_in_parallel_attn": config.num_parallel_norms if new_layout else None,
        "multi_query": not new_layout and config.num_kv_heads == 1,
        "num_kv_heads": config.num_kv_heads,
        "ffn_hidden_size": config.intermediate_size,
        "layer_norm_epsilon": config.norm_eps,
    }


def _head_dim(fields: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim = count(fields, "head_dim")
    elif hidden_size % num_heads:
        raise ConfigError(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads} and head_dim is not given"
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise ConfigError(f"head_dim={head_dim} must be even: the rotary embedding turns pairs")
    return head_dim


def _eos(fields: Mapping[str, Any], generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """End-of-text tokens of both files, in order of first mention."""
    found: dict[int, None] = {}
    for source in (fields, generation or {}):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list | tuple) else [value]:
            if token is None:
                continue
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ConfigError(f"eos_token_id={value!r} must be a token id or a list of them")
            found[token] = None
    return tuple(found)


def _bos(fields: Mapping[str, Any]) -> int | None:
    value = fields.get("bos_token_id")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ConfigError(f"bos_token_id={value!r} must be a token id or null")
    return value
