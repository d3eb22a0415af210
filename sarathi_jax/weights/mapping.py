"""Which published tensors make up which parameter: data only, read in both directions.

Parameters are named by dotted paths into the Flax module. Legend: V vocabulary, E hidden, I intermediate, H heads,
G KV heads, R = H / G query heads a group, D head size. Weights lie (out, in), as published; projections that read the
same input are fused:

    attn.qkv.weight    [G, R + 2, D, E]    of each KV group: its R query heads, its key head, its value head
    mlp.gate_up.weight [2, I, E]           gate, up

A published tensor, reshaped, fills one region of one parameter, so the same table loads and writes a checkpoint.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from sarathi_jax.config import ModelConfig

Index = tuple[int | slice, ...]
WHOLE: Index = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """One published tensor and where it lies: ``parameter[index] == tensor.reshape(parameter[index].shape)``.

    Attributes:
      tensor_name: its name in the published checkpoint.
      tensor_shape: its published shape.
      index: basic (view-making) index of its region in the parameter; `WHOLE` for all of it.
    """

    tensor_name: str
    tensor_shape: tuple[int, ...]
    index: Index = WHOLE

    def region(self, parameter: np.ndarray) -> np.ndarray:
        """The view of the parameter that this tensor fills, of as many elements, in the same order."""
        return parameter[self.index] if self.index else parameter


@dataclasses.dataclass(frozen=True)
class ParameterSource:
    """A parameter: its dotted path, its shape and the published tensors that fill it without overlap."""

    path: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameter_sources(config: ModelConfig) -> tuple[ParameterSource, ...]:
    """Every parameter of the model, in the order of the forward pass."""
    return tuple(_falcon_sources(config) if config.architecture == "falcon" else _decoder_sources(config))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by dotted path."""
    return {source.path: source.shape for source in parameter_sources(config)}


def num_parameters(config: ModelConfig) -> int:
    """Elements of all parameters; a tied head counts once."""
    return sum(source.size for source in parameter_sources(config))


def hf_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every published tensor that the model needs."""
    return {part.tensor_name: part.tensor_shape for source in parameter_sources(config) for part in source.parts}


HEAD_TENSOR = "lm_head.weight"
_ROTARY_BUFFER = re.compile(
    r"(model|transformer)\.((layers|h)\.\d+\.(self_attn|self_attention)\.)?(rotary_emb|rotary|maybe_rotary)\.inv_freq"
)


def is_tolerated(tensor_name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor although no parameter needs it.

    These are the frequencies of the rotary embedding, which old checkpoints stored as buffers, and the output head of a
    model that ties it to the embedding (the loader checks that the two are equal).
    """
    return bool(_ROTARY_BUFFER.fullmatch(tensor_name)) or (config.tie_embeddings and tensor_name == HEAD_TENSOR)


def embedding_tensor(config: ModelConfig) -> str:
    """Published name of the token embedding."""
    return "transformer.word_embeddings.weight" if config.architecture == "falcon" else "model.embed_tokens.weight"


def _decoder_sources(config: ModelConfig) -> Iterator[ParameterSource]:
    e, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    yield _whole("embed.weight", embedding_tensor(config), (config.vocab_size, e))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        yield _whole(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", (e,))
        yield _split_qkv(config, f"{ours}.attn.qkv.weight", f"{theirs}.self_attn", "weight", (e,))
        if config.qkv_bias:
            yield _split_qkv(config, f"{ours}.attn.qkv.bias", f"{theirs}.self_attn", "bias", ())
        if config.qk_norm:
            yield _whole(f"{ours}.attn.q_norm.weight", f"{theirs}.self_attn.q_norm.weight", (d,))
            yield _whole(f"{ours}.attn.k_norm.weight", f"{theirs}.self_attn.k_norm.weight", (d,))
        yield _whole(f"{ours}.attn.out.weight", f"{theirs}.self_attn.o_proj.weight", (e, config.num_heads * d))
        if config.out_bias:
            yield _whole(f"{ours}.attn.out.bias", f"{theirs}.self_attn.o_proj.bias", (e,))
        yield _whole(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", (e,))
        yield _gate_up(f"{ours}.mlp.gate_up.weight", f"{theirs}.mlp", "weight", (i, e))
        if config.mlp_bias:
            yield _gate_up(f"{ours}.mlp.gate_up.bias", f"{theirs}.mlp", "bias", (i,))
        yield _whole(f"{ours}.mlp.down.weight", f"{theirs}.mlp.down_proj.weight", (e, i))
        if config.mlp_bias:
            yield _whole(f"{ours}.mlp.down.bias", f"{theirs}.mlp.down_proj.bias", (e,))
    yield _whole("norm.weight", "model.norm.weight", (e,))
    if not config.tie_embeddings:
        yield _whole("head.weight", HEAD_TENSOR, (config.vocab_size, e))


def _falcon_sources(config: ModelConfig) -> Iterator[ParameterSource]:
    e, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    qkv_shape = (config.num_kv_heads, config.heads_per_kv + 2, d)
    qkv_rows = math.prod(qkv_shape)
    yield _whole("embed.weight", embedding_tensor(config), (config.vocab_size, e))
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        norms = {"attn_norm": "input_layernorm"}
        if config.num_parallel_norms == 2:
            norms = {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}
        for our_norm, their_norm in norms.items():
            for leaf in ("weight", "bias"):
                yield _whole(f"{ours}.{our_norm}.{leaf}", f"{theirs}.{their_norm}.{leaf}", (e,))
        # All three published layouts (grouped, multi-query, multi-head) store each group's queries, then its key and
        # value, which is the order of the parameter.
        fused = f"{theirs}.self_attention.query_key_value"
        yield _reshaped(f"{ours}.attn.qkv.weight", (*qkv_shape, e), f"{fused}.weight", (qkv_rows, e))
        if config.qkv_bias:
            yield _reshaped(f"{ours}.attn.qkv.bias", qkv_shape, f"{fused}.bias", (qkv_rows,))
        products = [
            ("attn.out", "self_attention.dense", (e, config.num_heads * d), config.out_bias),
            ("mlp.up", "mlp.dense_h_to_4h", (i, e), config.mlp_bias),
            ("mlp.down", "mlp.dense_4h_to_h", (e, i), config.mlp_bias),
        ]
        for our_name, their_name, shape, biased in products:
            yield _whole(f"{ours}.{our_name}.weight", f"{theirs}.{their_name}.weight", shape)
            if biased:
                yield _whole(f"{ours}.{our_name}.bias", f"{theirs}.{their_name}.bias", shape[:1])
    for leaf in ("weight", "bias"):
        yield _whole(f"norm.{leaf}", f"transformer.ln_f.{leaf}", (e,))
    if not config.tie_embeddings:
        yield _whole("head.weight", HEAD_TENSOR, (config.vocab_size, e))


def _whole(path: str, tensor_name: str, shape: tuple[int, ...]) -> ParameterSource:
    return ParameterSource(path, shape, (Part(tensor_name, shape),))


def _reshaped(path: str, shape: tuple[int, ...], tensor_name: str, tensor_shape: tuple[int, ...]) -> ParameterSource:
    return ParameterSource(path, shape, (Part(tensor_name, tensor_shape),))


def _split_qkv(config: ModelConfig, path: str, prefix: str, leaf: str, inputs: tuple[int, ...]) -> ParameterSource:
    """The fused QKV projection from q_proj [H*D, ...], k_proj and v_proj [G*D, ...]."""
    groups, ratio, d = config.num_kv_heads, config.heads_per_kv, config.head_dim
    every = slice(None)
    parts = (
        Part(f"{prefix}.q_proj.{leaf}", (groups * ratio * d, *inputs), (every, slice(0, ratio))),
        Part(f"{prefix}.k_proj.{leaf}", (groups * d, *inputs), (every, ratio)),
        Part(f"{prefix}.v_proj.{leaf}", (groups * d, *inputs), (every, ratio + 1)),
    )
    return ParameterSource(path, (groups, ratio + 2, d, *inputs), parts)


def _gate_up(path: str, prefix: str, leaf: str, shape: tuple[int, ...]) -> ParameterSource:
    parts = (Part(f"{prefix}.gate_proj.{leaf}", shape, (0,)), Part(f"{prefix}.up_proj.{leaf}", shape, (1,)))
    return ParameterSource(path, (2, *shape), parts)
