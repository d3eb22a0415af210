"""The TPU backend (v5e and later), by Pallas' Mosaic lowering.

Three calls of fixed grid, whatever the batch, each a loop on one core:

    write    one step a touched block    block -> VMEM, the new rows over the old, -> back to where it was
    decodes  one step a sequence         one token, all heads
    tiles    one step a tile             up to `tile_rows` tokens of a chunk, all heads

The last two are the same kernel. A block of the cache holds all KV heads, [G, K, D], so one copy brings a block of keys
for every head. Copies are double buffered: while one step of keys is multiplied, the next is under way, be it of the
same tile or the first of the next tile.

    copy     tile 0 keys 0 | tile 0 keys 1 | tile 1 keys 0 | ...
    multiply               | tile 0 keys 0 | tile 0 keys 1 | tile 1 keys 0 | ...

A DMA cannot address one row of tiled memory, which is why whole blocks are rewritten. It cannot mask either: scores of
keys out of sight are overwritten, and their values set to zero, so the cache may hold anything there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.tuning import Problem, problem_of
from pallas_kernels.ragged_paged_attention.work import Tiles, decode_tiles, prefill_tiles

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = ("float32", "bfloat16")

_UNSEEN = -1e30  # finite: a step without a visible key must not make inf - inf
_SUBLANES = 8
_LANES = 128


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may be chosen without changing the result.

    Attributes:
      step_keys: keys of a step, one block at least.
      tile_heads: rows of all heads of a tile; queries, result and running sums take 3 KB of VMEM each.
    """

    step_keys: int = 128
    tile_heads: int = 1024

    def __post_init__(self):
        for name in ("step_keys", "tile_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


CHOICES = {"step_keys": (64, 128, 256, 512), "tile_heads": (256, 512, 1024, 2048)}
"""What `pallas_kernels.tune` tries, field by field."""


def choose_tuning(problem: Problem) -> Tuning:
    """The heuristic: the same for all sizes, within the VMEM of a v5e."""
    del problem
    return Tuning()


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
    interpret: Any = False,
    tuning: Tuning | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """See `pallas_kernels.ragged_paged_attention.api`; `tuning` None: by heuristic."""
    tuning = choose_tuning(problem_of(q, kv_cache, block_tables)) if tuning is None else tuning
    num_tokens, heads, head_dim = q.shape
    num_sequences, kv_heads = kv_lens.shape[0], k_new.shape[1]
    heads_per_kv = heads // kv_heads
    kv_cache = write_kv(k_new, v_new, kv_cache, write_indices, num_sequences, interpret=interpret)
    attend = functools.partial(
        _attend,
        kv_cache=kv_cache,
        block_tables=block_tables,
        scale=scale,
        window=window,
        step_keys=tuning.step_keys,
        interpret=interpret,
    )
    by_head = q.reshape(num_tokens, kv_heads, heads_per_kv, head_dim)
    rows = jnp.arange(num_tokens)
    out = jnp.zeros(q.shape, jnp.float32)
    if num_tokens > 1:  # a single token is a decode
        tile_rows = max(1, min(pl.next_power_of_2(num_tokens), tuning.tile_heads // heads))
        tiles = prefill_tiles(
            chunk_starts, kv_lens, num_decodes, num_chunks, num_tokens=num_tokens, tile_rows=tile_rows
        )
        sources = jnp.minimum(tiles.first_rows[:, None] + jnp.arange(tile_rows), num_tokens - 1)
        result = attend(by_head[sources].swapaxes(1, 2), tiles)
        result = result.swapaxes(1, 2).reshape(-1, heads, head_dim)
        ends = jnp.where(tiles.num_rows > 0, tiles.first_rows + tiles.num_rows, num_tokens)
        tile = jnp.minimum(jnp.sum(ends <= rows[:, None], axis=1), tiles.chunks.shape[0] - 1)
        result = result[jnp.clip(tile * tile_rows + rows - tiles.first_rows[tile], 0, result.shape[0] - 1)]
        out = jnp.where((rows < chunk_starts[num_chunks])[:, None, None], result, out)
    num_rows = min(num_sequences, num_tokens)
    decoded = attend(by_head[:num_rows, :, None], decode_tiles(kv_lens[:num_rows], num_decodes))
    decoded = jnp.pad(decoded.reshape(num_rows, heads, head_dim), ((0, num_tokens - num_rows), (0, 0), (0, 0)))
    return jnp.where((rows < num_decodes)[:, None, None], decoded, out), kv_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Writes:
    """Which rows go where in the cache: one run of tokens for each block touched.

    Attributes:
      blocks: i32[W]; an unused run names the block of the last used one, so that nothing more is moved.
      first_offsets: i32[W], place of the run's first token in its block.
      first_tokens: i32[W].
      num_tokens: i32[W], 0 for an unused run.
    """

    blocks: Array
    first_offsets: Array
    first_tokens: Array
    num_tokens: Array


def _plan_writes(write_indices: Array, num_sequences: int, num_blocks: int, block_size: int) -> _Writes:
    """Runs of consecutive tokens in one block; a chunk of l tokens has at most ``(l + 2K - 2) // K``."""
    num_tokens = write_indices.shape[0]
    chunks = min(num_sequences, num_tokens)
    max_runs = min(num_tokens, (num_tokens + chunks * (2 * block_size - 2)) // block_size)
    blocks = write_indices // block_size
    live = write_indices < num_blocks * block_size
    starts = live & jnp.concatenate([jnp.ones(1, bool), (blocks[1:] != blocks[:-1]) | ~live[:-1]])
    run_of_token = jnp.where(live, jnp.cumsum(starts) - 1, max_runs)
    counts = jnp.zeros(max_runs, jnp.int32).at[run_of_token].add(1, mode="drop")
    first = jnp.nonzero(starts, size=max_runs, fill_value=num_tokens - 1)[0].astype(jnp.int32)
    last_used = jnp.maximum(starts.sum() - 1, 0)
    source = first[jnp.minimum(jnp.arange(max_runs), last_used)]
    return _Writes(jnp.minimum(blocks[source], num_blocks - 1), write_indices[first] % block_size, first, counts)


def write_kv(
    k_new: Array,
    v_new: Array,
    kv_cache: tuple[Array, Array],
    write_indices: Array,
    num_sequences: int,
    *,
    interpret: Any,
) -> tuple[Array, Array]:
    """Stores each new key and value at its slot, in the memory of the cache given; slots outside are dropped."""
    num_tokens = k_new.shape[0]
    num_blocks, kv_heads, block_size, head_dim = kv_cache[0].shape
    writes = _plan_writes(write_indices, num_sequences, num_blocks, block_size)
    # The rows as they will lie in their block: [W, G, K, D].
    tokens = writes.first_tokens[:, None] + jnp.arange(block_size) - writes.first_offsets[:, None]
    tokens = jnp.clip(tokens, 0, num_tokens - 1)
    staged = [new.astype(kv_cache[0].dtype)[tokens].swapaxes(1, 2) for new in (k_new, v_new)]

    def kernel(blocks, first_offsets, counts, k_staged, v_staged, k_in, v_in, k_out, v_out):
        run = pl.program_id(0)

        # An unused run stays at the last block and must not undo what the last used one wrote there.
        @pl.when((counts[run] > 0) | (run == 0))
        def _():
            offset = lax.broadcasted_iota(jnp.int32, (kv_heads, block_size, head_dim), 1) - first_offsets[run]
            new = (offset >= 0) & (offset < counts[run])
            k_out[0] = jnp.where(new, k_staged[0], k_in[0])
            v_out[0] = jnp.where(new, v_staged[0], v_in[0])

    shape = (1, kv_heads, block_size, head_dim)
    row = pl.BlockSpec(shape, lambda run, *_: (run, 0, 0, 0))
    block = pl.BlockSpec(shape, lambda run, blocks, *_: (blocks[run], 0, 0, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(writes.blocks.shape[0],),
            in_specs=[row, row, block, block],
            out_specs=[block, block],
        ),
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in kv_cache],
        input_output_aliases={5: 0, 6: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="write_kv",
    )(writes.blocks, writes.first_offsets, writes.num_tokens, *staged, *kv_cache)


def _attend(
    q: Array,
    tiles: Tiles,
    *,
    kv_cache: tuple[Array, Array],
    block_tables: Array,
    scale: float,
    window: int | None,
    step_keys: int,
    interpret: Any,
) -> Array:
    """Attention of all tiles.

    Args:
      q: [W, G, B, R, D], up to B tokens of each tile, R query heads of each KV head.
      tiles: what they are; unused ones come last.
      kv_cache: K and V, [N, G, K, D], the step's own keys and values among them.
      block_tables: i32[S, P].
      scale: multiplies the scores.
      window: keys that a row sees, or None.
      step_keys: as in `Tuning`.
      interpret: False, or how to interpret.

    Returns:
      f32[W, G, B, R, D]; rows that are in no tile hold anything.
    """
    num_tiles, kv_heads, tile_rows, heads_per_kv, head_dim = q.shape
    block_size, max_blocks, dtype = kv_cache[0].shape[2], block_tables.shape[1], kv_cache[0].dtype
    rows = tile_rows * heads_per_kv
    padded = pl.cdiv(rows, _SUBLANES) * _SUBLANES
    q = q.astype(jnp.float32).reshape(num_tiles, kv_heads, rows, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    step_blocks = max(1, min(step_keys // block_size, max_blocks))
    buffer = pltpu.VMEM((2, step_blocks, kv_heads, block_size, head_dim), dtype)
    running = pltpu.VMEM((kv_heads, padded, _LANES), jnp.float32)
    tile = pl.BlockSpec((1, kv_heads, padded, head_dim), lambda i, *_: (i, 0, 0, 0))
    cache = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        functools.partial(_kernel, max_blocks=max_blocks, heads_per_kv=heads_per_kv, scale=scale, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(num_tiles,),
            in_specs=[tile, cache, cache],
            out_specs=tile,
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.SemaphoreType.DMA((2,)),
                running,
                running,
                pltpu.VMEM((kv_heads, padded, head_dim), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="ragged_paged_attention",
    )(
        tiles.chunks,
        tiles.num_rows,
        tiles.positions,
        jnp.sum(tiles.num_rows > 0, dtype=jnp.int32)[None],
        block_tables.reshape(-1),  # two dimensions would be padded to a multiple of 128 entries a sequence
        q,
        *kv_cache,
    )
    return out[:, :, :rows].reshape(num_tiles, kv_heads, tile_rows, heads_per_kv, head_dim)


def _kernel(
    chunks,
    num_rows,
    positions,
    num_used,
    tables,
    q_ref,
    k_cache,
    v_cache,
    out_ref,
    k_buffer,
    v_buffer,
    arrived,
    best_ref,
    total_ref,
    sum_ref,
    steps_done,
    *,
    max_blocks,
    heads_per_kv,
    scale,
    window,
) -> None:
    """One tile, all heads."""
    _, step_blocks, kv_heads, block_size, head_dim = k_buffer.shape
    step_keys = step_blocks * block_size
    rows = q_ref.shape[2]
    tile = pl.program_id(0)

    def first_key(tile):
        return 0 if window is None else jnp.maximum(positions[tile] - window + 1, 0)

    def end_key(tile):
        return positions[tile] + num_rows[tile]

    def for_each_copy(tile, step, slot, do):
        """Does something with each copy of one step of keys and values; past the last block the last one again."""
        last = lax.div(end_key(tile) - 1, block_size)

        def body(i, _):
            block = tables[chunks[tile] * max_blocks + jnp.minimum(step * step_blocks + i, last)]
            do(pltpu.make_async_copy(k_cache.at[block], k_buffer.at[slot, i], arrived.at[slot]))
            do(pltpu.make_async_copy(v_cache.at[block], v_buffer.at[slot, i], arrived.at[slot]))
            return 0

        lax.fori_loop(0, step_blocks, body, 0)

    def start(tile, step, slot):
        for_each_copy(tile, step, slot, lambda copy: copy.start())

    def wait(tile, step, slot):
        for_each_copy(tile, step, slot, lambda copy: copy.wait())

    @pl.when((tile == 0) & (num_used[0] > 0))
    def _():
        steps_done[0] = 0
        start(0, lax.div(first_key(0), step_keys), 0)

    @pl.when(tile < num_used[0])
    def _():
        best_ref[...] = jnp.full_like(best_ref, _UNSEEN)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        first, end = first_key(tile), end_key(tile)
        last_step = lax.div(end - 1, step_keys)

        def attend_step(step, _):
            slot = lax.rem(steps_done[0], 2)
            same_tile = step < last_step
            next_tile = jnp.where(same_tile, tile, jnp.minimum(tile + 1, num_used[0] - 1))
            next_step = jnp.where(same_tile, step + 1, lax.div(first_key(next_tile), step_keys))

            @pl.when(same_tile | (tile + 1 < num_used[0]))
            def _():
                start(next_tile, next_step, 1 - slot)

            wait(tile, step, slot)
            keys = step * step_keys + lax.broadcasted_iota(jnp.int32, (rows, step_keys), 1)
            row = lax.div(lax.broadcasted_iota(jnp.int32, (rows, step_keys), 0), heads_per_kv)
            row_positions = positions[tile] + row
            visible = (keys <= row_positions) & (keys < end)
            if window is not None:
                visible &= keys > row_positions - window
            value_keys = step * step_keys + lax.broadcasted_iota(jnp.int32, (step_keys, head_dim), 0)
            wanted = (value_keys >= first) & (value_keys < end)

            def attend_head(head, _):
                q = q_ref[0, head].astype(k_buffer.dtype)
                k = k_buffer[slot, :, head].reshape(step_keys, head_dim)
                v = v_buffer[slot, :, head].reshape(step_keys, head_dim)
                v = jnp.where(wanted, v, jnp.zeros_like(v))
                scores = jnp.where(visible, _product(q, k, (1, 1)) * scale, _UNSEEN)
                best = best_ref[head]  # one number a row, the same in every lane
                new_best = jnp.maximum(best, scores.max(axis=1, keepdims=True))
                weights = jnp.where(visible, jnp.exp(scores - new_best[:, :1]), 0)
                shrink = jnp.exp(best - new_best)
                best_ref[head] = new_best
                total_ref[head] = total_ref[head] * shrink + weights.sum(axis=1, keepdims=True)
                sum_ref[head] = sum_ref[head] * shrink[:, :head_dim] + _product(weights.astype(v.dtype), v, (1, 0))
                return 0

            lax.fori_loop(0, kv_heads, attend_head, 0)
            steps_done[0] += 1
            return 0

        lax.fori_loop(lax.div(first, step_keys), last_step + 1, attend_step, 0)
        total = total_ref[:, :, :head_dim]
        out_ref[0] = sum_ref[...] / jnp.where(total > 0, total, 1)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
