"""Tensor parallelism: each device of a mesh has a part of every layer, of the cache and of the vocabulary.

Products come in pairs (Megatron-LM, arXiv 1909.08053): the first is split by its outputs (heads, inner units), the
second by its inputs, so that a pair ends in one sum over the devices. With more devices than KV heads a KV head is on
several of them, each with some of its query heads.
"""

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sarathi_jax.partition import TensorSplit

AXIS = "tp"

# Last components of a parameter's path -> how it is split; whatever is not listed is on every device.
_SPECS = {
    "embed.weight": P(AXIS),
    "head.weight": P(AXIS),
    "head.scale": P(AXIS),
    "attn.qkv.weight": P(AXIS),
    "attn.qkv.scale": P(AXIS),
    "attn.qkv.bias": P(AXIS),
    "attn.out.weight": P(None, AXIS),
    "mlp.gate_up.weight": P(None, AXIS),
    "mlp.gate_up.scale": P(None, AXIS),
    "mlp.gate_up.bias": P(None, AXIS),
    "mlp.up.weight": P(AXIS),
    "mlp.up.scale": P(AXIS),
    "mlp.up.bias": P(AXIS),
    "mlp.down.weight": P(None, AXIS),
}

CACHE_SPEC = P(None, AXIS)
"""Of keys and of values, [blocks, kv_heads, block_size, head_dim]."""


def spec_of(path: str) -> P:
    """How a parameter is split."""
    return _SPECS.get(re.sub(r"^layers\.\d+\.", "", path), P())


def put_parts(split: TensorSplit, mesh: Mesh, path: str, values: np.ndarray) -> jax.Array:
    """A parameter on the devices, each of which gets its own part alone.

    Args:
      split: of the model.
      mesh: of `make_meshes`.
      path, values: as in `TensorSplit.widen`.
    """
    values = split.widen(path, values)
    sharding = NamedSharding(mesh, spec_of(path))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
