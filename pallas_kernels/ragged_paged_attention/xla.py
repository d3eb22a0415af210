"""The XLA backend: tiles of query rows against segments of keys with an online softmax, in bounded memory.

A tile is up to `rows` consecutive tokens of one chunk. Decodes are tiles of one row; longer chunks are cut into tiles
of `_TILE_ROWS`. Both loops have trip counts that depend on the data, so one compiled program serves every mix and every
length, and absent work costs nothing.

    tile    0   1   2  |  3            4      | 5
    chunk   0   1   2  |  3 (100 tokens)      | 4 (20 tokens)
    rows    1   1   1  |  64           36     | 20
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

_TILE_ROWS = 64
_SEGMENT_TOKENS = 256
_MASKED = -1e30  # finite: a segment without a visible key must not make inf - inf


def write_kv(k_new: Array, v_new: Array, kv_cache: tuple[Array, Array], write_indices: Array) -> tuple[Array, Array]:
    """Stores each new key and value at its slot, in place when the cache is donated; slots outside are dropped.

    As a scatter of rows of the head size: three times faster on CPU than one with a window over the heads. On a view of
    the cache with fewer dimensions XLA would copy all of it where there is but one head.
    """
    num_heads, block_size = kv_cache[0].shape[1:3]
    block, offset = write_indices[:, None] // block_size, write_indices[:, None] % block_size

    def write(cache: Array, new: Array) -> Array:
        return cache.at[block, jnp.arange(num_heads), offset].set(new.astype(cache.dtype), mode="drop")

    return write(kv_cache[0], k_new), write(kv_cache[1], v_new)


# Jitted, so that the layers of a model share one trace.
@functools.partial(jax.jit, static_argnames=("scale", "window"))
def ragged_paged_attention(
    q: Array,
    k_new: Array,
    v_new: Array,
    kv_cache: tuple[Array, Array],
    write_indices: Array,
    chunk_starts: Array,
    kv_lens: Array,
    block_tables: Array,
    num_decodes: Array,
    num_chunks: Array,
    *,
    scale: float,
    window: int | None,
) -> tuple[Array, tuple[Array, Array]]:
    """See `pallas_kernels.ragged_paged_attention.api`."""
    kv_cache = write_kv(k_new, v_new, kv_cache, write_indices)
    tokens, heads, head_dim = q.shape
    kv_heads = k_new.shape[1]
    rows = min(_TILE_ROWS, tokens)
    chunks = jnp.arange(chunk_starts.shape[0] - 1)
    lengths = jnp.where(chunks < num_chunks, jnp.diff(chunk_starts), 0)
    # The last tile may reach past its chunk, so there is room for a whole tile behind the last token.
    q = jnp.pad(q.astype(jnp.float32) * scale, ((0, rows), (0, 0), (0, 0)))
    q = q.reshape(tokens + rows, kv_heads, heads // kv_heads, head_dim)
    out = jnp.zeros(q.shape, jnp.float32)

    def attend(out: Array, chunk: Array, offset: Array, tile_rows: int) -> Array:
        first = chunk_starts[chunk] + offset
        tile = lax.dynamic_slice_in_dim(q, first, tile_rows)
        position = kv_lens[chunk] - lengths[chunk] + offset
        result = _attend_tile(tile, position, kv_lens[chunk], kv_cache, block_tables[chunk], window)
        # Tiles of a chunk come in order: what this one writes past its chunk, the next tile or nobody reads.
        return lax.dynamic_update_slice_in_dim(out, result, first, axis=0)

    def attend_decode(i: Array, out: Array) -> Array:
        return attend(out, i, jnp.int32(0), 1)

    def attend_tile(i: Array, out: Array) -> Array:
        chunk = jnp.sum(tile_ends <= i)
        offset = (i - tile_ends[chunk] + tile_counts[chunk]) * rows
        return attend(out, chunk, offset, rows)

    tile_counts = jnp.where(chunks < num_decodes, 0, -(-lengths // rows))
    tile_ends = jnp.cumsum(tile_counts)
    # Tiles first: their spill-over lands on rows of later chunks only, and decodes lie before them all.
    out = lax.fori_loop(0, tile_ends[-1], attend_tile, out)
    out = lax.fori_loop(0, num_decodes, attend_decode, out)
    live = jnp.arange(tokens) < chunk_starts[num_chunks]
    out = jnp.where(live[:, None, None], out[:tokens].reshape(tokens, heads, head_dim), 0)
    return out, kv_cache


def _attend_tile(
    q: Array, position: Array, kv_len: Array, kv_cache: tuple[Array, Array], table: Array, window: int | None
) -> Array:
    """Attention of one tile.

    Args:
      q: f32[rows, G, R, D], scaled.
      position: of the first row in its sequence.
      kv_len: keys of the sequence.
      kv_cache: K and V, [N, G, K, D].
      table: i32[P], the sequence's blocks.
      window: keys that a row sees, or None.

    Returns:
      f32[rows, G, R, D].
    """
    rows, kv_heads, heads_per_kv, head_dim = q.shape
    num_blocks, _, block_size, _ = kv_cache[0].shape
    segment_blocks = min(max(1, _SEGMENT_TOKENS // block_size), table.shape[0])
    segment = segment_blocks * block_size
    table = jnp.pad(table, (0, -table.shape[0] % segment_blocks))
    dtype = kv_cache[0].dtype
    q = q.swapaxes(0, 1).reshape(kv_heads, rows * heads_per_kv, head_dim).astype(dtype).astype(jnp.float32)
    row_positions = position + jnp.arange(rows * heads_per_kv) // heads_per_kv
    # A (block, head) is one row: gathering whole rows takes half the time of gathering [block_size, head_dim] slices.
    flat = [cache.reshape(num_blocks * kv_heads, block_size * head_dim) for cache in kv_cache]

    def add_segment(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, out = carry
        blocks = lax.dynamic_slice_in_dim(table, j * segment_blocks, segment_blocks)
        # Gathered with the head outside, so that both products see [G, tokens, D] without a transposition.
        index = blocks * kv_heads + jnp.arange(kv_heads)[:, None]
        k, v = (c[index].reshape(kv_heads, segment, head_dim).astype(jnp.float32) for c in flat)
        keys = j * segment + jnp.arange(segment)
        visible = (keys <= row_positions[:, None]) & (keys < kv_len)
        if window is not None:
            visible &= keys > row_positions[:, None] - window
        # A key out of everybody's sight may be uninitialised memory: 0 x NaN is NaN, so it must not reach the sum.
        seen = keys < kv_len
        if window is not None:
            seen &= keys > position - window
        v = jnp.where(seen[:, None], v, 0)
        scores = jnp.einsum("gqd,gkd->gqk", q, k, precision=lax.Precision.HIGHEST)
        scores = jnp.where(visible, scores, _MASKED)
        new_best = jnp.maximum(best, scores.max(axis=-1))
        weights = jnp.where(visible, jnp.exp(scores - new_best[..., None]), 0)
        shrink = jnp.exp(best - new_best)
        update = jnp.einsum("gqk,gkd->gqd", weights, v, precision=lax.Precision.HIGHEST)
        return new_best, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + update

    first = jnp.int32(0) if window is None else jnp.maximum(position - window + 1, 0) // segment
    last = -(-jnp.minimum(position + rows, kv_len) // segment)
    shape = (kv_heads, rows * heads_per_kv)
    carry = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
    _, total, out = lax.fori_loop(first, last, add_segment, carry)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    return out.reshape(kv_heads, rows, heads_per_kv, head_dim).swapaxes(0, 1)
