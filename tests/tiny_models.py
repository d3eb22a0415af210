"""Small random models of every family in the published file format; needs neither torch nor JAX.

`TINY` holds the ``config.json`` of each: the fields that the published model of the family has, at a size that computes
in milliseconds. Weights are drawn from the names of the model and of the tensor, so they are the same everywhere.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

VOCAB_SIZE = 160
NUM_DECODES = 32
"""Greedy steps that the oracle takes after each prompt."""

PROMPT_LENGTHS = (5, 29, 70, 1, 2, 12, 24, 40)
"""Eight prompts, for batches of 1 to 8: shorter than, as long as and far longer than the sliding window."""

WINDOW = 24

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "use_cache": True,
    "initializer_range": 0.02,
}
_LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_QWEN2 = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": WINDOW,
    "max_window_layers": 0,
    "tie_word_embeddings": True,
}
_FALCON = {key: value for key, value in _COMMON.items() if key != "max_position_embeddings"} | {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "alibi": False,
    "attention_dropout": 0.0,
    "bias": False,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
}

TINY: dict[str, dict[str, Any]] = {
    "mistral": _LLAMA
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
    },
    # Seven query heads to a KV head, as Yi-34B has 56 to 8.
    "yi": _LLAMA | {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1, "rope_theta": 5000000.0},
    "llama2": _LLAMA | {"num_key_value_heads": 4},
    "llama2-gqa": _LLAMA | {"num_attention_heads": 8, "hidden_size": 128, "num_hidden_layers": 3},
    "llama3.1": _LLAMA
    | {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "eos_token_id": [2, 3, 4],
    },
    "llama-linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-yarn": _LLAMA
    | {
        "head_dim": 32,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        },
    },
    "llama-bias": _LLAMA | {"attention_bias": True, "mlp_bias": True},
    # The window is written in the file but switched off, as in every published Qwen2.5.
    "qwen2": _QWEN2,
    "qwen2-yarn-mixed": _QWEN2
    | {
        "num_hidden_layers": 3,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        "use_sliding_window": True,
        "max_window_layers": 1,
        "tie_word_embeddings": False,
    },
    "qwen3": _QWEN2
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "attention_bias": False,
        "sliding_window": None,
    },
    "falcon-7b": _FALCON | {"hidden_size": 80, "num_attention_heads": 5},
    "falcon-40b": _FALCON | {"num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon-11b": _FALCON
    | {
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 160,
        "max_position_embeddings": 512,
        "rope_theta": 500042.0,
        "tie_word_embeddings": False,
    },
    "falcon-bias": _FALCON | {"num_attention_heads": 4, "bias": True},
}

_SALT = {"llama2-gqa": 1, "falcon-11b": 1}
"""Changes the draw of a model whose greedy text would meet a near tie (`make_golden` refuses those)."""


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model, as the published files have them.

    Args:
      config: fields of a ``config.json``.
    """
    return _falcon_shapes(config) if config["model_type"] == "falcon" else _llama_shapes(config)


def tiny_config(name: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ``config.json`` of a tiny model.

    Args:
      name: a key of `TINY`.
      changes: fields to set otherwise; a larger ``vocab_size``, for instance.
    """
    return TINY[name] | dict(changes or {})


def tiny_weights(name: str, changes: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
    """Float32 weights of a tiny model by published tensor name.

    Spread such that attention is neither flat nor saturated and the last token does not decide alone.

    Args:
      name: a key of `TINY`.
      changes: as in `tiny_config`.
    """
    config = tiny_config(name, changes)
    tied = config.get("tie_word_embeddings", config["model_type"] == "falcon")
    weights = {tensor: _draw(name, tensor, shape, tied) for tensor, shape in tensor_shapes(config).items()}
    return weights | _leftovers(name, config, weights)


def write_tiny_model(
    name: str,
    directory: Path,
    *,
    dtype: str = "float32",
    shards: int = 2,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config.json, generation_config.json and safetensors as they are published; returns the directory.

    Args:
      name: a key of `TINY`.
      directory: made if absent.
      dtype: ``float32``, or ``bfloat16`` (rounded to nearest even).
      shards: safetensors files; more than one come with an index.
      changes: as in `tiny_config`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(name, changes) | {"torch_dtype": dtype}
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    storage = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    weights = {tensor: value.astype(storage) for tensor, value in tiny_weights(name, changes).items()}
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def tiny_prompts(vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Eight prompts of `PROMPT_LENGTHS` random token ids, the same everywhere.

    Args:
      vocab_size: ids are drawn from ``[0, vocab_size)``.
    """
    ids = np.floor(_uniform("prompts", sum(PROMPT_LENGTHS)) * vocab_size).astype(int).tolist()
    starts = np.cumsum((0, *PROMPT_LENGTHS))
    return [ids[start:stop] for start, stop in itertools.pairwise(starts)]


def _llama_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Llama, Mistral, Yi, Qwen2 and Qwen3."""
    size, inner, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    head_dim = config.get("head_dim") or size // config["num_attention_heads"]
    q_size, kv_size = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    qkv_bias = kind == "qwen2" or config.get("attention_bias", False)
    out_bias = kind != "qwen2" and config.get("attention_bias", False)
    products = {
        "self_attn.q_proj": (q_size, size, qkv_bias),
        "self_attn.k_proj": (kv_size, size, qkv_bias),
        "self_attn.v_proj": (kv_size, size, qkv_bias),
        "self_attn.o_proj": (size, q_size, out_bias),
        "mlp.gate_proj": (inner, size, config.get("mlp_bias", False)),
        "mlp.up_proj": (inner, size, config.get("mlp_bias", False)),
        "mlp.down_proj": (size, inner, config.get("mlp_bias", False)),
    }
    norms = {"input_layernorm": size, "post_attention_layernorm": size}
    if kind == "qwen3":
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], size)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, (rows, columns, bias) in products.items():
            shapes[f"{prefix}{part}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{part}.bias"] = (rows,)
        shapes |= {f"{prefix}{norm}.weight": (width,) for norm, width in norms.items()}
    shapes["model.norm.weight"] = (size,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], size)
    return shapes


def _falcon_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    size, heads, new = config["hidden_size"], config["num_attention_heads"], config["new_decoder_architecture"]
    inner = config.get("ffn_hidden_size") or 4 * size
    kv_heads = config["num_kv_heads"] if new else 1
    products = {
        "self_attention.query_key_value": ((heads + 2 * kv_heads) * (size // heads), size),
        "self_attention.dense": (size, size),
        "mlp.dense_h_to_4h": (inner, size),
        "mlp.dense_4h_to_h": (size, inner),
    }
    two_norms = new and config.get("num_ln_in_parallel_attn", 2) == 2
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (config["vocab_size"], size)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}."
        for part, (rows, columns) in products.items():
            shapes[f"{prefix}{part}.weight"] = (rows, columns)
            if config["bias"]:
                shapes[f"{prefix}{part}.bias"] = (rows,)
        for norm in ("ln_attn", "ln_mlp") if two_norms else ("input_layernorm",):
            shapes |= {f"{prefix}{norm}.weight": (size,), f"{prefix}{norm}.bias": (size,)}
    shapes |= {"transformer.ln_f.weight": (size,), "transformer.ln_f.bias": (size,)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (config["vocab_size"], size)
    return shapes


def _leftovers(name: str, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What published files hold beyond the model: rotation frequencies (LLaMA2), a copy of a tied head (Falcon-40B)."""
    if name == "llama2":
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        frequencies = (config["rope_theta"] ** (-np.arange(half) / half)).astype(np.float32)
        layers = range(config["num_hidden_layers"])
        return {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies for layer in layers}
    if name == "falcon-40b":
        return {"lm_head.weight": weights["transformer.word_embeddings.weight"]}
    return {}


def _draw(name: str, tensor: str, shape: tuple[int, ...], tied: bool) -> np.ndarray:
    centred = 2 * _uniform(f"{name}/{_SALT.get(name, 0)}/{tensor}", math.prod(shape)).reshape(shape) - 1
    is_norm = any(part in tensor for part in ("norm", "ln_"))
    if is_norm and tensor.endswith("weight"):
        value = 1 + 0.6 * centred
    elif len(shape) == 1:
        value = 0.5 * centred
    elif "embed" in tensor:
        # A tied head sees the embedding of the last token again: kept small, or each token would predict itself.
        value = (0.2 if tied else 1.5) * centred
    else:
        gain = 2.0 if "lm_head" in tensor else 1.4
        value = gain * math.sqrt(3 / shape[1]) * centred
    return value.astype(np.float32)


def _uniform(key: str, count: int) -> np.ndarray:
    """f64[count] in [0, 1): uniform draws are exact, unlike normal ones, which depend on the machine's logarithm."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.PCG64(seed)).random(count)
