"""How a mixed batch is cut into pieces of fixed number and size, on the device and before a kernel: plain jnp.

A decode is a tile of one row: chunk s is row s. The other chunks are cut into tiles of `tile_rows` rows; as many tiles
as the worst batch of the bucket needs are always there, and those that this batch does not need have no rows.

    tile    0            1      | 2      3
    chunk   3 (100 tokens)      | 4      -          tile_rows = 64
    rows    64           36     | 20     0
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Runs of consecutive rows of one chunk, in the order of the rows.

    Attributes:
      chunks: i32[W], the chunk of each tile; 0 for an unused one.
      first_rows: i32[W], its first row in the batch; 0 for an unused one.
      num_rows: i32[W], 0 for an unused one.
      positions: i32[W], of its first row in the sequence.
    """

    chunks: Array
    first_rows: Array
    num_rows: Array
    positions: Array


def max_tiles(num_tokens: int, num_sequences: int, tile_rows: int) -> int:
    """Most tiles that any batch of the bucket can need.

    n chunks of l tokens in all make at most ``(l + n * (tile_rows - 1)) // tile_rows``.

    Args:
      num_tokens: T.
      num_sequences: S.
      tile_rows: rows of a full tile.
    """
    return (num_tokens + min(num_sequences, num_tokens) * (tile_rows - 1)) // tile_rows


def decode_tiles(kv_lens: Array, num_decodes: Array) -> Tiles:
    """One tile a sequence, of which the first `num_decodes` are used.

    Args:
      kv_lens: i32[W].
      num_decodes: i32 scalar.
    """
    chunks = jnp.arange(kv_lens.shape[0], dtype=jnp.int32)
    used = chunks < num_decodes
    return Tiles(
        chunks=jnp.where(used, chunks, 0),
        first_rows=jnp.where(used, chunks, 0),
        num_rows=used.astype(jnp.int32),
        positions=jnp.where(used, kv_lens - 1, 0),
    )


def prefill_tiles(
    chunk_starts: Array, kv_lens: Array, num_decodes: Array, num_chunks: Array, *, num_tokens: int, tile_rows: int
) -> Tiles:
    """Cuts every chunk that is not a leading decode into tiles.

    Args:
      chunk_starts, kv_lens, num_decodes, num_chunks: as in `api.ragged_paged_attention`.
      num_tokens: T.
      tile_rows: rows of a full tile.
    """
    num_sequences = kv_lens.shape[0]
    chunks = jnp.arange(num_sequences, dtype=jnp.int32)
    lengths = jnp.diff(chunk_starts)
    tiled = (chunks >= num_decodes) & (chunks < num_chunks)
    counts = jnp.where(tiled, -(-lengths // tile_rows), 0)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    tiles = jnp.arange(max_tiles(num_tokens, num_sequences, tile_rows), dtype=jnp.int32)
    owner = jnp.sum(ends[None, :] <= tiles[:, None], axis=1, dtype=jnp.int32)
    used = owner < num_sequences
    owner = jnp.where(used, owner, 0)
    offset = (tiles - ends[owner] + counts[owner]) * tile_rows
    length = lengths[owner]
    return Tiles(
        chunks=owner,
        first_rows=jnp.where(used, chunk_starts[owner] + offset, 0),
        num_rows=jnp.where(used, jnp.minimum(length - offset, tile_rows), 0),
        positions=jnp.where(used, kv_lens[owner] - length + offset, 0),
    )
