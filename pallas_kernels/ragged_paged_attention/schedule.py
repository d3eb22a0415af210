"""The work list of the Hopper backend: what each piece of attention reads and where its result goes, in plain jnp.

A *row* is one query head of one token, and the rows of a KV head that belong to a chunk are consecutive: with R query
heads for each KV head, row ``t * R + r`` is head r of token t. A piece is a run of rows and a range of keys:

    wide    128 rows of a longer chunk, all the keys they see                  -> rows of the result
    narrow  64 rows (R of them live) of a decode, a share of the keys it sees  -> a partial result

Shares are as long as it takes to fill the device: a decode that is longer than a fair share of all the keys is split.
Partial results are merged by their log-sum-exp (Flash-Decoding, arXiv 2311.01282).

The lists have the length that the worst batch of the bucket needs. The same for every layer of a model, so XLA computes
them once a step.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.ragged_paged_attention.work import max_tiles, prefill_tiles

WIDE_ROWS = 128
NARROW_ROWS = 64
ROW_ALIGNMENT = 8  # a TMA copy into WGMMA's layout starts at a multiple of it

# Columns of `Schedule.pieces`.
NARROW, SEQUENCE, QUERY_ROW, POSITION, FIRST_KEY, END_KEY, RESULT = range(7)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The static sizes of a batch, and what follows from them.

    Attributes:
      num_tokens: T.
      num_sequences: S.
      kv_heads: G.
      heads_per_kv: R.
      step_keys: keys that a consumer takes at once; shares are multiples of it.
      wanted_pieces: decodes are split until there are about so many pieces.
    """

    num_tokens: int
    num_sequences: int
    kv_heads: int
    heads_per_kv: int
    step_keys: int
    wanted_pieces: int

    @property
    def max_decodes(self) -> int:
        return min(self.num_tokens, self.num_sequences)

    @property
    def wide_tiles(self) -> int:
        return max(1, max_tiles(self.num_tokens * self.heads_per_kv, self.max_decodes, WIDE_ROWS))

    @property
    def narrow_tiles(self) -> int:
        """Pieces that the rows of one token make: more than one where R exceeds 64."""
        return pl.cdiv(self.heads_per_kv, NARROW_ROWS)

    @property
    def partial_rows(self) -> int:
        """Rows that a narrow piece stores."""
        return min(NARROW_ROWS, _align(self.heads_per_kv))

    @property
    def max_shares(self) -> int:
        """Fair shares that all the keys of the decodes are divided into."""
        return pl.cdiv(self.wanted_pieces, self.kv_heads * self.narrow_tiles)

    @property
    def split_slots(self) -> int:
        """Most shares of decodes that are split: each of them is longer than one share, so rounding at most doubles."""
        return 2 * self.max_shares

    @property
    def partial_slots(self) -> int:
        """Places for partial results: those of split decodes, then one for each decode that is whole."""
        return (self.split_slots + self.max_decodes) * self.narrow_tiles

    @property
    def max_pieces(self) -> int:
        return self.wide_tiles + (self.max_shares + self.max_decodes) * self.narrow_tiles

    @property
    def packed_rows(self) -> int:
        """Rows of the packed queries: every chunk aligned, and a whole tile of room behind the last one."""
        rows = self.num_tokens * self.heads_per_kv + self.max_decodes * (ROW_ALIGNMENT - 1)
        return _align(rows) + WIDE_ROWS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """What to compute and how to put it together.

    Attributes:
      num_pieces: i32[1], the leading pieces that are in use; each of them stands for all KV heads.
      pieces: i32[7, max_pieces]: narrow or not; sequence; first row in the packed queries; position of the first row in
        its sequence, in rows; first key, and end of the keys; tile of the wide result or slot of the partial ones.
      packed_tokens, packed_heads: i32[packed_rows], what each row of the packed queries holds.
      shares: i32[max_decodes], pieces of each decode; 0 for none.
      wide_rows: i32[T], the first row of each token in the wide result.
    """

    num_pieces: Array
    pieces: Array
    packed_tokens: Array
    packed_heads: Array
    shares: Array
    wide_rows: Array


def make_schedule(
    bucket: Bucket, chunk_starts: Array, kv_lens: Array, num_decodes: Array, num_chunks: Array, window: int | None
) -> Schedule:
    """Cuts a batch into pieces.

    Args:
      bucket: its static sizes.
      chunk_starts, kv_lens, num_decodes, num_chunks, window: as in `api.ragged_paged_attention`.
    """
    rows_per_token = bucket.heads_per_kv
    chunks = jnp.arange(bucket.num_sequences, dtype=jnp.int32)
    row_counts = jnp.where(chunks < num_chunks, jnp.diff(chunk_starts), 0) * rows_per_token
    packed_ends = jnp.cumsum(_align(row_counts), dtype=jnp.int32)
    packed_starts = packed_ends - _align(row_counts)
    packed = jnp.arange(bucket.packed_rows, dtype=jnp.int32)
    owner = jnp.minimum(_owner(packed_ends, packed), bucket.num_sequences - 1)
    offset = packed - packed_starts[owner]

    wide, num_wide, tile_starts = _wide_pieces(
        bucket, chunk_starts, kv_lens, num_decodes, num_chunks, packed_starts, window
    )
    shares, narrow, num_narrow = _narrow_pieces(bucket, kv_lens, num_decodes, packed_starts, window)
    # Wide ones first and the last tile of a chunk, which sees most keys, before the others: the small ones fill gaps.
    piece = jnp.arange(bucket.max_pieces, dtype=jnp.int32)
    from_wide = wide[:, jnp.clip(num_wide - 1 - piece, 0, wide.shape[1] - 1)]
    from_narrow = narrow[:, jnp.clip(piece - num_wide, 0, narrow.shape[1] - 1)]

    tokens = jnp.arange(bucket.num_tokens, dtype=jnp.int32)
    chunk = jnp.minimum(_owner(chunk_starts[1:], tokens), bucket.num_sequences - 1)
    return Schedule(
        num_pieces=(num_wide + num_narrow)[None],
        pieces=jnp.where(piece < num_wide, from_wide, from_narrow),
        packed_tokens=jnp.clip(chunk_starts[owner] + offset // rows_per_token, 0, bucket.num_tokens - 1),
        packed_heads=offset % rows_per_token,
        shares=shares,
        wide_rows=tile_starts[chunk] * WIDE_ROWS + (tokens - chunk_starts[chunk]) * rows_per_token,
    )


def pack_queries(q: Array, bucket: Bucket, schedule: Schedule) -> Array:
    """Query rows by KV head, each chunk aligned: [T, H, D] -> [G, packed_rows, D]."""
    rows = q.reshape(bucket.num_tokens, bucket.kv_heads, bucket.heads_per_kv, q.shape[-1])
    head = jnp.arange(bucket.kv_heads)[:, None]
    return rows[schedule.packed_tokens[None], head, schedule.packed_heads[None]]


def gather_result(
    bucket: Bucket, schedule: Schedule, wide: Array, partial: Array, lse: Array, num_decodes: Array, num_live: Array
) -> Array:
    """Puts the results of the pieces where their tokens are.

    Args:
      bucket, schedule: of this batch.
      wide: [G, wide_tiles * 128, D], results of wide pieces.
      partial: f32[G, partial_slots, partial_rows, D], results of narrow pieces.
      lse: f32[G, partial_slots, partial_rows], their log-sum-exp, base 2.
      num_decodes: i32 scalar.
      num_live: i32 scalar, tokens that are not padding.

    Returns:
      f32[T, H, D], zero for padding.
    """
    heads = jnp.arange(bucket.kv_heads)[None, :, None]
    rows = schedule.wide_rows[:, None, None] + jnp.arange(bucket.heads_per_kv)
    out = wide[heads, jnp.minimum(rows, wide.shape[1] - 1)].astype(jnp.float32)
    decoded = _merge_shares(bucket, schedule.shares, partial, lse)
    decoded = jnp.pad(decoded, ((0, bucket.num_tokens - bucket.max_decodes), *[(0, 0)] * 3))
    token = jnp.arange(bucket.num_tokens)[:, None, None, None]
    out = jnp.where(token < num_decodes, decoded, jnp.where(token < num_live, out, 0))
    return out.reshape(bucket.num_tokens, -1, out.shape[-1])


def _wide_pieces(
    bucket: Bucket,
    chunk_starts: Array,
    kv_lens: Array,
    num_decodes: Array,
    num_chunks: Array,
    packed_starts: Array,
    window: int | None,
) -> tuple[Array, Array, Array]:
    """Columns of the pieces of longer chunks, how many are in use, and the first tile of each chunk."""
    rows_per_token = bucket.heads_per_kv
    row_starts = chunk_starts * rows_per_token
    tiles = prefill_tiles(
        row_starts,
        kv_lens * rows_per_token,
        num_decodes,
        num_chunks,
        num_tokens=bucket.num_tokens * rows_per_token,
        tile_rows=WIDE_ROWS,
    )
    last_row = tiles.positions + jnp.maximum(tiles.num_rows, 1) - 1
    columns = {
        NARROW: jnp.zeros_like(tiles.chunks),
        SEQUENCE: tiles.chunks,
        QUERY_ROW: packed_starts[tiles.chunks] + tiles.first_rows - row_starts[tiles.chunks],
        POSITION: tiles.positions,
        FIRST_KEY: _first_visible(tiles.positions // rows_per_token, window),
        END_KEY: last_row // rows_per_token + 1,
        RESULT: jnp.arange(tiles.chunks.shape[0], dtype=jnp.int32),
    }
    chunks = jnp.arange(bucket.num_sequences)
    tiled = (chunks >= num_decodes) & (chunks < num_chunks)
    counts = jnp.where(tiled, pl.cdiv(jnp.diff(row_starts), WIDE_ROWS), 0)
    used = jnp.sum(tiles.num_rows > 0, dtype=jnp.int32)
    return _stack(columns), used, jnp.cumsum(counts, dtype=jnp.int32) - counts


def _narrow_pieces(
    bucket: Bucket, kv_lens: Array, num_decodes: Array, packed_starts: Array, window: int | None
) -> tuple[Array, Array, Array]:
    """Shares of each decode, columns of their pieces, and how many are in use."""
    step, tiles = bucket.step_keys, bucket.narrow_tiles
    decodes = jnp.arange(bucket.max_decodes, dtype=jnp.int32)
    ends = jnp.where(decodes < num_decodes, kv_lens[: bucket.max_decodes], 0)
    first_keys = _first_visible(ends - 1, window)
    first_steps = first_keys // step
    steps = jnp.where(ends > 0, pl.cdiv(ends, step) - first_steps, 0)
    fair = jnp.maximum(pl.cdiv(jnp.sum(steps), bucket.max_shares), 1)
    shares = pl.cdiv(steps, fair)
    share_ends = jnp.cumsum(shares, dtype=jnp.int32)
    split_ends = jnp.cumsum(jnp.where(shares > 1, shares, 0), dtype=jnp.int32)

    piece = jnp.arange((bucket.max_shares + bucket.max_decodes) * tiles, dtype=jnp.int32)
    decode = jnp.minimum(_owner(share_ends * tiles, piece), bucket.max_decodes - 1)
    share = piece // tiles - (share_ends - shares)[decode]
    tile = piece % tiles
    count = jnp.maximum(shares[decode], 1)
    begin = first_steps[decode] + share * steps[decode] // count
    end = first_steps[decode] + (share + 1) * steps[decode] // count
    split_slot = split_ends[decode] - shares[decode] + share
    slot = jnp.where(shares[decode] > 1, split_slot, bucket.split_slots + decode)
    columns = {
        NARROW: jnp.ones_like(decode),
        SEQUENCE: decode,
        QUERY_ROW: packed_starts[decode] + tile * NARROW_ROWS,
        POSITION: (ends[decode] - 1) * bucket.heads_per_kv + tile * NARROW_ROWS,
        FIRST_KEY: jnp.maximum(begin * step, first_keys[decode]),
        END_KEY: jnp.minimum(end * step, ends[decode]),
        RESULT: slot * tiles + tile,
    }
    return shares, _stack(columns), share_ends[-1] * tiles


def _merge_shares(bucket: Bucket, shares: Array, partial: Array, lse: Array) -> Array:
    """Decodes' results, f32[max_decodes, G, R, D]: whole ones as they are, split ones as weighted sums of their shares.

    The sums are one product with a 0/1 matrix: as regular as the shares are not, and the same in every run.
    """
    groups, rows, head_dim = bucket.kv_heads, bucket.heads_per_kv, partial.shape[-1]
    partial = partial.reshape(groups, -1, bucket.narrow_tiles * bucket.partial_rows, head_dim)[:, :, :rows]
    lse = lse.reshape(groups, -1, bucket.narrow_tiles * bucket.partial_rows)[:, :, :rows]
    whole = partial[:, bucket.split_slots :].swapaxes(0, 1)
    split_shares = jnp.where(shares > 1, shares, 0)
    split_ends = jnp.cumsum(split_shares, dtype=jnp.int32)
    # Split decodes are few, so they are numbered: the matrix has a row for each of them.
    number = jnp.cumsum(shares > 1, dtype=jnp.int32) - 1
    slots = jnp.arange(bucket.split_slots, dtype=jnp.int32)
    used = slots < split_ends[-1]
    owner = number[jnp.minimum(_owner(split_ends, slots), bucket.max_decodes - 1)]
    belongs = (owner == jnp.arange(min(bucket.max_shares, bucket.max_decodes))[:, None]) & used
    lse = lse[:, : bucket.split_slots].transpose(1, 0, 2)
    best = jnp.where(belongs[:, :, None, None], lse, -jnp.inf).max(axis=1)
    weights = jnp.where(used[:, None, None], jnp.exp2(lse - best[jnp.where(used, owner, 0)]), 0)
    # Slots without a share were never written: they may hold NaN.
    weighted = jnp.where(used[:, None, None, None], partial[:, : bucket.split_slots].swapaxes(0, 1), 0)
    weighted = weighted * weights[..., None]
    sums = jnp.dot(
        belongs.astype(jnp.float32), weighted.reshape(bucket.split_slots, -1), precision=lax.Precision.HIGHEST
    )
    totals = jnp.sum(jnp.where(belongs[:, :, None, None], weights, 0), axis=1)
    merged = sums.reshape(-1, groups, rows, head_dim) / jnp.where(totals > 0, totals, 1)[..., None]
    return jnp.where((shares > 1)[:, None, None, None], merged[jnp.maximum(number, 0)], whole)


def _align(rows):
    return (rows + ROW_ALIGNMENT - 1) // ROW_ALIGNMENT * ROW_ALIGNMENT


def _owner(ends: Array, indices: Array) -> Array:
    """The run that each index falls into, where runs follow each other and end at `ends`."""
    return jnp.searchsorted(ends, indices, side="right", method="compare_all").astype(jnp.int32)


def _first_visible(positions: Array, window: int | None) -> Array:
    return jnp.zeros_like(positions) if window is None else jnp.maximum(positions - window + 1, 0)


def _stack(columns: dict[int, Array]) -> Array:
    return jnp.stack([columns[name] for name in sorted(columns)]).astype(jnp.int32)
