"""The KV cache on the device: for each layer keys and values, [blocks, kv_heads, block_size, head_dim] each."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Sharding

from sarathi_jax.config import CacheConfig, ModelConfig

KVCache = list[tuple[jax.Array, jax.Array]]


def row_major(sharding: Sharding) -> Format:
    """How the cache lies in memory, said outright: left to itself a TPU lays heads of 64 out otherwise, and then copies
    the whole cache for the attention kernel in every layer."""
    return Format(Layout((0, 1, 2, 3)), sharding)


def cache_shapes(
    model: ModelConfig, cache: CacheConfig, dtype: jnp.dtype, format: Format | None = None
) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
    """Shapes of a cache, one pair a layer; with a `format`, where it is and how it lies there."""
    shape = (cache.num_blocks, model.num_kv_heads, cache.block_size, model.head_dim)
    return [(jax.ShapeDtypeStruct(shape, dtype, sharding=format),) * 2 for _ in range(model.num_layers)]


def allocate_cache(model: ModelConfig, cache: CacheConfig, dtype: jnp.dtype, format: Format) -> KVCache:
    """A cache of zeros: attention may multiply what was never written by zero, so it must be finite."""
    shape = cache_shapes(model, cache, dtype)[0][0].shape
    zeros = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=format)
    return [(zeros(), zeros()) for _ in range(model.num_layers)]
