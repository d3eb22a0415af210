"""The KV cache on the device: for each layer keys and values, [blocks, kv_heads, block_size, head_dim] each."""

import jax
import jax.numpy as jnp

from sarathi_jax.config import CacheConfig, Dtype, ModelConfig

KVCache = list[tuple[jax.Array, jax.Array]]


def cache_shapes(model: ModelConfig, cache: CacheConfig, dtype: jnp.dtype) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
    """Shapes of a cache, one pair a layer."""
    shape = (cache.num_blocks, model.num_kv_heads, cache.block_size, model.head_dim)
    return [(jax.ShapeDtypeStruct(shape, dtype),) * 2 for _ in range(model.num_layers)]


def allocate_cache(model: ModelConfig, cache: CacheConfig, dtype: jnp.dtype) -> KVCache:
    """A cache of zeros: attention may multiply what was never written by zero, so it must be finite."""
    return [(jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)) for k, v in cache_shapes(model, cache, dtype)]


def block_bytes(model: ModelConfig, block_size: int, dtype: Dtype) -> int:
    """Bytes of one block over all layers."""
    return 2 * model.num_layers * model.num_kv_heads * block_size * model.head_dim * jnp.dtype(dtype).itemsize
