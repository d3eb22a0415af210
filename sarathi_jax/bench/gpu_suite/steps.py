"""One step of a model: random weights, a packed batch, and the least work that the step can be."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sarathi_jax.batch import BatchLayout
from sarathi_jax.bench.gpu_suite.attention import visible_pairs
from sarathi_jax.bench.gpu_suite.results import Skipped
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.models import ModelFunction

_STD = 0.02  # of random weights, as `random_parameters` draws them

Chunks = tuple[tuple[int, int], ...]
"""``(length, KV length)`` of each sequence, decodes first."""


def draw_parameters(model: ModelConfig, engine: EngineConfig) -> dict[str, Array]:
    """Random weights of the spread of `random_parameters`, drawn on the device: 70 billion take seconds, not minutes.

    8-bit weights are drawn as such, uniform over their range, with the scale that gives them that spread.
    """
    shapes = ModelFunction(model, jnp.dtype(engine.dtype), engine.quantization).shapes

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        if dtype == jnp.int8:
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
        width = math.sqrt(12)  # a uniform variable has variance width^2 / 12
        values = jax.random.uniform(key, shape, jnp.bfloat16, -width / 2, width / 2)
        return (values * (1 if dtype == jnp.float8_e4m3fn else _STD)).astype(dtype)

    parameters = {}
    for i, (path, leaf) in enumerate(shapes.items()):
        if path.endswith("norm.weight"):
            parameters[path] = jnp.ones(leaf.shape, leaf.dtype)
        elif path.endswith(".bias"):
            parameters[path] = jnp.zeros(leaf.shape, leaf.dtype)
        elif path.endswith(".scale"):
            unit = _STD if engine.quantization == "w8_fp8" else _STD * math.sqrt(12) / 256
            parameters[path] = jnp.full(leaf.shape, unit, leaf.dtype)
        else:
            parameters[path] = draw(jax.random.key(i, impl="rbg"), leaf.shape, leaf.dtype)
    return jax.block_until_ready(parameters)


def fill_buffer(layout: BatchLayout, cache: CacheConfig, num_rows: int, chunks: Chunks, vocab_size: int) -> np.ndarray:
    """A packed step of these chunks, every sequence in blocks of its own, every chunk drawing a token.

    Args:
      layout: of the bucket, which the chunks fill.
      cache: its blocks.
      num_rows: rows of the device, R.
      chunks: ``(length, KV length)``, decodes first.
      vocab_size: tokens are drawn from it.

    Raises:
      Skipped: the cache has too few blocks.
    """
    used = [-(-kv_len // cache.block_size) for _, kv_len in chunks]
    if sum(used) > cache.num_blocks:
        raise Skipped(f"needs {sum(used)} blocks of the cache, which has {cache.num_blocks}")
    rng = np.random.default_rng(0)
    blocks = rng.permutation(cache.num_blocks).astype(np.int32)
    buffer = np.zeros(layout.size, np.int32)
    batch = layout.unpack(buffer)
    batch.write_indices[:] = cache.num_blocks * cache.block_size
    batch.token_rows[:] = num_rows
    batch.targets[:] = -1
    row = first_block = 0
    for s, (length, kv_len) in enumerate(chunks):
        ids = blocks[first_block : first_block + used[s]]
        first_block += used[s]
        rows, positions = slice(row, row + length), np.arange(kv_len - length, kv_len)
        batch.tokens[rows] = rng.integers(0, vocab_size, length)
        batch.positions[rows] = positions
        batch.token_rows[rows] = s
        batch.write_indices[rows] = ids[positions // cache.block_size] * cache.block_size + positions % cache.block_size
        batch.block_tables[s, : used[s]] = ids
        batch.kv_lens[s], batch.rows[s], batch.samples[s] = kv_len, s, 1
        row += length
        batch.chunk_starts[s + 1 :] = row
    batch.num_decodes[0] = sum(length == 1 for length, _ in chunks)
    batch.num_chunks[0] = len(chunks)
    buffer.setflags(write=False)
    return buffer


def step_work(
    model: ModelConfig, params: dict[str, Array], num_rows: int, bucket: int, chunks: Chunks
) -> tuple[float, float]:
    """Fewest bytes (weights once, K and V of every sequence once, new ones written) and operations of a step.

    Products count every row of the bucket, the head every row of sequences; of the embedding the rows looked up.
    """
    embedding, head, layers, num_bytes = 0, 0, 0, 0.0
    for path, array in params.items():
        if path == "embed.weight":
            embedding = array.shape[1]
            num_bytes += array.nbytes if model.tie_embeddings else bucket * embedding * array.dtype.itemsize
            head += array.size if model.tie_embeddings else 0
            continue
        num_bytes += array.nbytes
        if array.ndim > 1 and not path.endswith(".scale"):
            head, layers = (head + array.size, layers) if path.startswith("head.") else (head, layers + array.size)
    heads, flops = model.num_heads * model.head_dim, 2.0 * (bucket * layers + num_rows * head)
    for window in model.windows:
        for length, kv_len in chunks:
            seen = kv_len if window is None else min(kv_len, window + length - 1)
            num_bytes += 2 * 2 * model.num_kv_heads * model.head_dim * (seen + length)
            pairs = visible_pairs(length, kv_len)
            if window is not None:
                pairs = sum(min(window, position + 1) for position in range(kv_len - length, kv_len))
            flops += 4 * heads * pairs
    return num_bytes, flops
