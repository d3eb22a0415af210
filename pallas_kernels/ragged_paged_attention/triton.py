"""The Triton backend: Ampere and later, by Pallas' Triton lowering (deprecated in JAX since 0.11, working).

Three launches of fixed grid, whatever the batch:

    write    one program a token             k_new, v_new -> cache, in place
    decodes  (sequence, KV head, split)      one row of each KV head's queries, a share of the keys -> partial results
    tiles    (tile, KV head)                 up to `tile_rows` rows of a chunk, all its keys -> results

The last two are the same kernel. The query heads of a KV head are rows of one product, so a block of keys is read once
for all of them. The shares of a decode's keys are merged by their log-sum-exp (Flash-Decoding, arXiv 2311.01282). Loads
are masked by key: what no row may see is never read, so the cache may hold anything there.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.ragged_paged_attention.tuning import Problem, problem_of
from pallas_kernels.ragged_paged_attention.work import Tiles, decode_tiles, prefill_tiles

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = ("float32", "bfloat16")

_MASKED = -1e30  # finite: a tile of keys without a visible one must not make inf - inf
_MIN_ROWS = 16  # of a product on tensor cores


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one launch of attention is cut.

    Attributes:
      rows: query rows of a program, tokens times the padded query heads of a KV head.
      keys: of one step of the loop.
      splits: programs that share the keys of a tile.
      warps, stages: as Triton takes them.
    """

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may be chosen without changing the result, for the launch of decodes and for that of tiles.

    Attributes:
      decode_keys, tile_keys: of one step of the loop.
      decode_splits: programs that share the keys of a decode.
      tile_rows: query rows of a tile, at least the padded query heads of a KV head.
      decode_warps, tile_warps, decode_stages, tile_stages: as Triton takes them.
    """

    decode_keys: int
    decode_splits: int
    tile_rows: int
    tile_keys: int
    decode_warps: int = 4
    decode_stages: int = 2
    tile_warps: int = 4
    tile_stages: int = 2

    def __post_init__(self):
        for name in ("decode_keys", "tile_rows", "tile_keys"):
            value = getattr(self, name)
            if value < _MIN_ROWS or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two from {_MIN_ROWS} on")
        if self.decode_splits < 1:
            raise ValueError(f"decode_splits={self.decode_splits} must be positive")

    def decodes(self, heads_per_kv: int) -> Launch:
        rows = max(_MIN_ROWS, pl.next_power_of_2(heads_per_kv))
        return Launch(rows, self.decode_keys, self.decode_splits, self.decode_warps, self.decode_stages)

    def tiles(self, heads_per_kv: int) -> Launch:
        rows = max(self.tile_rows, pl.next_power_of_2(heads_per_kv))
        return Launch(rows, self.tile_keys, 1, self.tile_warps, self.tile_stages)


CHOICES = {
    "decode_keys": (32, 64, 128),
    "decode_splits": (1, 2, 4, 8, 16, 32),
    "decode_warps": (2, 4, 8),
    "decode_stages": (1, 2, 3, 4),
    "tile_rows": (32, 64, 128),
    "tile_keys": (32, 64, 128),
    "tile_warps": (4, 8),
    "tile_stages": (1, 2, 3),
}
"""What `pallas_kernels.tune` tries, field by field."""


def choose_tuning(problem: Problem) -> Tuning:
    """The heuristic: two programs of decodes for each of an H200's 132 cores, but no share of keys below 256.

    Tiles fill a tensor core in bfloat16; they are smaller in float32, which has none and needs the registers.
    """
    decodes = min(problem.num_sequences, problem.num_tokens)
    wanted = pl.next_power_of_2(pl.cdiv(2 * 132, decodes * problem.kv_heads))
    keys, rows = (64, 64) if problem.dtype == "bfloat16" else (32, 32)
    splits = max(1, min(wanted, problem.max_keys // 256, 32))
    return Tuning(decode_keys=keys, decode_splits=splits, tile_rows=rows, tile_keys=keys)


@functools.partial(jax.jit, static_argnames=("scale", "window", "interpret", "tuning"))
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
    interpret: bool = False,
    tuning: Tuning | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """See `pallas_kernels.ragged_paged_attention.api`; `tuning` None: by heuristic."""
    problem = problem_of(q, kv_cache, block_tables)
    tuning = choose_tuning(problem) if tuning is None else tuning
    kv_cache = write_kv(k_new, v_new, kv_cache, write_indices, interpret=interpret)
    num_tokens, heads_per_kv = problem.num_tokens, problem.heads_per_kv
    attend = functools.partial(_attend, q, kv_cache, block_tables, scale=scale, window=window, interpret=interpret)
    out = jnp.zeros(q.shape, jnp.float32)
    rows = jnp.arange(num_tokens)[:, None, None]
    if num_tokens > 1:  # a single token is a decode
        launch = tuning.tiles(heads_per_kv)
        tile_rows = launch.rows // pl.next_power_of_2(heads_per_kv)
        tiles = prefill_tiles(
            chunk_starts, kv_lens, num_decodes, num_chunks, num_tokens=num_tokens, tile_rows=tile_rows
        )
        out = jnp.where(rows < chunk_starts[num_chunks], attend(tiles, num_tokens, launch), out)
    num_rows = min(problem.num_sequences, num_tokens)
    decoded = attend(decode_tiles(kv_lens[:num_rows], num_decodes), num_rows, tuning.decodes(heads_per_kv))
    decoded = jnp.pad(decoded, ((0, num_tokens - num_rows), (0, 0), (0, 0)))
    return jnp.where(rows < num_decodes, decoded, out), kv_cache


def write_kv(
    k_new: Array, v_new: Array, kv_cache: tuple[Array, Array], write_indices: Array, *, interpret: bool
) -> tuple[Array, Array]:
    """Stores each new key and value at its slot, in the memory of the cache given; slots outside are dropped."""
    num_tokens, num_heads, head_dim = k_new.shape
    num_blocks, _, block_size, _ = kv_cache[0].shape

    def kernel(indices, k_new, v_new, _k_in, _v_in, k_cache, v_cache):
        token = pl.program_id(0)
        slot = indices[token]
        heads = jnp.arange(pl.next_power_of_2(num_heads))
        live = (heads < num_heads) & (slot < num_blocks * block_size)
        columns = jnp.arange(head_dim)[None, :]
        mask = live[:, None] & (columns < head_dim)
        block, offset = lax.div(slot, block_size), lax.rem(slot, block_size)
        for new, cache in ((k_new, k_cache), (v_new, v_cache)):
            row = plgpu.load(
                new.at[_fill(token, mask), jnp.where(live, heads, 0)[:, None], columns], mask=mask, other=0
            )
            # A dead lane points outside: interpretation would write the old value where it points.
            index = (_fill(block, mask), jnp.where(live, heads, num_heads)[:, None], _fill(offset, mask), columns)
            plgpu.store(cache.at[index], row.astype(cache.dtype), mask=mask)

    return pl.pallas_call(
        kernel,
        grid=(num_tokens,),
        out_shape=tuple(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in kv_cache),
        input_output_aliases={3: 0, 4: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="write_kv",
    )(write_indices, k_new, v_new, *kv_cache)


def _attend(
    q: Array,
    kv_cache: tuple[Array, Array],
    block_tables: Array,
    tiles: Tiles,
    num_rows: int,
    launch: Launch,
    *,
    scale: float,
    window: int | None,
    interpret: bool,
) -> Array:
    """Attention of all tiles.

    Args:
      q: [T, H, D].
      kv_cache: K and V, [N, G, K, D], the step's own keys and values among them.
      block_tables: i32[S, P].
      tiles: what to compute; every row of the batch is in at most one.
      num_rows: rows from here on are in no tile.
      launch: how to cut it.
      scale: multiplies the scores.
      window: keys that a row sees, or None.
      interpret: runs anywhere, slowly.

    Returns:
      f32[num_rows, H, D]; rows that are in no tile hold anything.
    """
    heads, head_dim = q.shape[1:]
    kv_heads = kv_cache[0].shape[1]
    splits = launch.splits
    shapes = [jax.ShapeDtypeStruct((splits, num_rows, heads, head_dim), jnp.float32)]
    if splits > 1:
        shapes.append(jax.ShapeDtypeStruct((splits, num_rows, heads), jnp.float32))
    out, *lse = pl.pallas_call(
        functools.partial(_kernel, launch=launch, scale=scale, window=window),
        grid=(tiles.chunks.shape[0], kv_heads, splits),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=interpret,
        name="ragged_paged_attention",
    )(tiles.chunks, tiles.first_rows, tiles.num_rows, tiles.positions, block_tables, q, *kv_cache)
    if splits == 1:
        return out[0]
    weights = jnp.exp(lse[0] - lse[0].max(axis=0))
    return jnp.sum(out * (weights / weights.sum(axis=0))[..., None], axis=0)


def _kernel(
    chunks, first_rows, num_rows, positions, tables, q_ref, k_cache, v_cache, out_ref, *lse_ref, launch, scale, window
) -> None:
    """One tile, one KV head, one share of the keys."""
    tile, kv_head, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    live_rows = num_rows[tile]
    block_size, head_dim = k_cache.shape[2:]
    heads_per_kv = q_ref.shape[1] // k_cache.shape[1]
    padded_heads = pl.next_power_of_2(heads_per_kv)
    columns = jnp.arange(head_dim)[None, :]  # no select on it, or loads of 16 bytes become loads of one element

    @pl.when(live_rows > 0)
    def _():
        chunk, first_row, position = chunks[tile], first_rows[tile], positions[tile]
        lanes = jnp.arange(launch.rows)
        row, head = lax.div(lanes, padded_heads), lax.rem(lanes, padded_heads)
        live = (row < live_rows) & (head < heads_per_kv)
        mask = live[:, None] & (columns < head_dim)
        row_positions = (position + row)[:, None]
        token = first_row + jnp.where(live, row, 0)
        head = kv_head * heads_per_kv + jnp.where(live, head, 0)
        q = plgpu.load(q_ref.at[token[:, None], head[:, None], columns], mask=mask, other=0).astype(k_cache.dtype)

        end = position + live_rows
        start = 0 if window is None else jnp.maximum(position - window + 1, 0)
        first_step, last_step = lax.div(start, launch.keys), lax.div(end + launch.keys - 1, launch.keys)
        share = lax.div(last_step - first_step + launch.splits - 1, launch.splits)
        first_step = first_step + split * share
        last_step = jnp.minimum(first_step + share, last_step)

        def step(i, carry):
            best, total, out = carry
            keys = i * launch.keys + jnp.arange(launch.keys)
            wanted = (keys >= start) & (keys < end)
            if launch.keys <= block_size:
                block = jnp.broadcast_to(tables[chunk, lax.div(i * launch.keys, block_size)], keys.shape)
            else:
                entries = tables.at[jnp.broadcast_to(chunk, keys.shape), lax.div(keys, block_size)]
                block = plgpu.load(entries, mask=wanted, other=0)
            offset = lax.rem(keys, block_size)
            mask = wanted[:, None] & (columns < head_dim)
            index = (block[:, None], _fill(kv_head, mask), offset[:, None], columns)
            k = plgpu.load(k_cache.at[index], mask=mask, other=0)
            v = plgpu.load(v_cache.at[index], mask=mask, other=0)
            visible = wanted[None, :] & (keys[None, :] <= row_positions)
            if window is not None:
                visible &= keys[None, :] > row_positions - window
            scores = jnp.where(visible, _product(q, k.T) * (scale * math.log2(math.e)), _MASKED)
            new_best = jnp.maximum(best, scores.max(axis=1))
            weights = jnp.where(visible, jnp.exp2(scores - new_best[:, None]), 0)
            shrink = jnp.exp2(best - new_best)
            update = _product(weights.astype(v.dtype), v)
            return new_best, total * shrink + weights.sum(axis=1), out * shrink[:, None] + update

        rows = launch.rows
        zeros = jnp.zeros((rows, head_dim), jnp.float32)
        carry = (jnp.full(rows, _MASKED, jnp.float32), jnp.zeros(rows, jnp.float32), zeros)
        best, total, out = lax.fori_loop(first_step, last_step, step, carry)
        seen = total > 0
        out = out / jnp.where(seen, total, 1)[:, None]
        # A dead lane points outside: interpretation would write the old value where it points.
        token = jnp.where(live, token, out_ref.shape[1])
        index = (_fill(split, mask), token[:, None], head[:, None], columns)
        plgpu.store(out_ref.at[index], out, mask=mask)
        if lse_ref:
            lse = jnp.where(seen, best * math.log(2) + jnp.log(jnp.where(seen, total, 1)), _MASKED)
            plgpu.store(lse_ref[0].at[_fill(split, live), token, head], lse, mask=live)


def _fill(scalar: Array, like: Array) -> Array:
    """The scalar, once for each lane: masked loads and stores take arrays only."""
    return jnp.broadcast_to(scalar, like.shape)


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
