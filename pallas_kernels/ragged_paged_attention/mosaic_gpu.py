"""The Hopper backend, by Pallas' Mosaic GPU lowering. Experimental: it compiles for an H200, no GPU has run it yet.

Two launches of fixed grid, whatever the batch: `write_kv` stores the keys and values of the step in the cache, in
place; `attend` is a persistent kernel, one program a multiprocessor, that works through the list of pieces that
`schedule.py` makes on the device. Prefill chunks and decodes share the launch: while some multiprocessors wait for
memory, others keep their tensor cores busy.

    piece i = program, program + programs, ...          (a run of query rows, a range of keys, a KV head)

    producer warpgroup                            two consumer warpgroups
    reads the block table                         copy their 64 query rows to shared memory
      |                                             |
      |   TMA, one a block          k_full          v
      +--> K ring [stages, 128, D] ---------> S = Q K^T     WGMMA, shared x shared
      |         ^------------------ k_free ---------+
      |                                         mask where rows differ, online softmax in base 2
      |                             v_full          v
      +--> V ring [stages, 128, D] ---------> O += P V      WGMMA, registers x shared
                ^------------------ v_free ---------+
                                                    v
                                    O / l  -> shared memory -> TMA -> rows of the result, or a partial result and its
                                                                      log-sum-exp

The query heads of a KV head are rows of one product, so K and V are read once for all of them. In a wide piece both
consumers work on the same keys for rows of their own, half a step apart: one multiplies while the other is at its
softmax (FlashAttention-3, arXiv 2407.08608). In a narrow piece the first does all, the other only gives the stages
back: decodes are bound by memory, of which the rings keep 128 KB in flight.

TMA cannot mask inside a tile. Scores of keys out of sight are overwritten, and rows of V that no row may see are set to
zero in shared memory before they meet a weight of zero (0 x NaN is NaN), in the few steps that have any. So the unused
cache may hold anything.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import schedule
from pallas_kernels.ragged_paged_attention.schedule import NARROW_ROWS, WIDE_ROWS, Bucket
from pallas_kernels.ragged_paged_attention.tuning import Problem, problem_of

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
DTYPES = ("bfloat16",)  # WGMMA would round float32 to TF32

_CONSUMERS = 2
_PRODUCER = 2  # the warpgroup behind the consumers
_ROWS = 64  # of a consumer: what one WGMMA takes
# Finite: a step without a visible key must not make inf - inf. A power of two: its product with the scale is exact, so
# that a fused multiply-subtract of that product from itself leaves no rest, which exp2 would turn into infinity.
_UNSEEN = -(2.0**100)
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may be chosen without changing the result.

    Attributes:
      step_keys: keys of a stage.
      stages: stages of each ring.
      programs: of the persistent grid; one fits on a multiprocessor, an H100 or H200 has 132.
      wanted_pieces: decodes are split until there are about so many pieces.
      take_turns: whether barriers hold the consumers half a step apart.
      producer_registers, consumer_registers: a thread; 128 producing and 256 consuming threads share 65536.
    """

    step_keys: int = 128
    stages: int = 2
    programs: int = 132
    wanted_pieces: int = 264
    take_turns: bool = True
    producer_registers: int = 40
    consumer_registers: int = 232

    def __post_init__(self):
        if self.step_keys not in (64, 128):
            raise ValueError(f"step_keys={self.step_keys} must be 64 or 128")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2")


CHOICES = {
    "step_keys": (64, 128),
    "stages": (2, 3, 4, 6, 8),
    "wanted_pieces": (132, 264, 528, 1056),
    "take_turns": (True, False),
}
"""What `pallas_kernels.tune` tries, field by field."""


def choose_tuning(problem: Problem, interpret: Any = False) -> Tuning:
    """The heuristic: rings of 128 KB, enough in flight for the memory's latency, and room for the results.

    Args:
      problem: the sizes of a call.
      interpret: whether to interpret, which takes its time for every program: two show all that can happen.
    """
    stages = 256 // problem.head_dim
    return Tuning(stages=stages) if interpret is False else Tuning(stages=stages, programs=2, wanted_pieces=8)


@dataclasses.dataclass(frozen=True)
class Options:
    """The static side of the kernel.

    Attributes:
      heads_per_kv: R.
      scale, window: as in `api.ragged_paged_attention`.
      tuning: how to cut it.
      emulate_wgmma: `jnp.dot` in its place: interpretation has not the forms of WGMMA that the kernel needs.
    """

    heads_per_kv: int
    scale: float
    window: int | None
    tuning: Tuning
    emulate_wgmma: bool


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
    problem = problem_of(q, kv_cache, block_tables)
    tuning = choose_tuning(problem, interpret) if tuning is None else tuning
    interpret = plgpu.InterpretGPUParams(detect_races=True) if interpret is True else interpret
    bucket = Bucket(
        num_tokens=problem.num_tokens,
        num_sequences=problem.num_sequences,
        kv_heads=problem.kv_heads,
        heads_per_kv=problem.heads_per_kv,
        step_keys=tuning.step_keys,
        wanted_pieces=tuning.wanted_pieces,
    )
    kv_cache = write_kv(k_new, v_new, kv_cache, write_indices, interpret=interpret)
    plan = schedule.make_schedule(bucket, chunk_starts, kv_lens, num_decodes, num_chunks, window)
    packed = schedule.pack_queries(q.astype(kv_cache[0].dtype), bucket, plan)
    options = Options(bucket.heads_per_kv, scale, window, tuning, emulate_wgmma=interpret is not False)
    wide, partial, lse = attend(options, bucket, plan, packed, kv_cache, block_tables, interpret=interpret)
    out = schedule.gather_result(bucket, plan, wide, partial, lse, num_decodes, chunk_starts[num_chunks])
    return out, kv_cache


def write_kv(
    k_new: Array, v_new: Array, kv_cache: tuple[Array, Array], write_indices: Array, *, interpret: Any
) -> tuple[Array, Array]:
    """Stores each new key and value at its slot, in the memory of the cache given; slots outside are dropped.

    A program takes some tokens: they come to shared memory by one TMA copy and leave by one each, all heads at once.
    """
    num_tokens, num_heads, head_dim = k_new.shape
    num_blocks, _, block_size, _ = kv_cache[0].shape
    dtype = kv_cache[0].dtype
    # Few enough to fit, many enough that programs are not many more than multiprocessors.
    rows = max(1, min(8, num_tokens, 2**14 // (num_heads * head_dim)))

    def kernel(slots, k_new, v_new, k_cache, v_cache, k_rows, v_rows, arrived):
        wanted = lax.axis_index("program") * rows
        first = jnp.minimum(wanted, num_tokens - rows)  # the last program has some tokens that are not its own
        plgpu.copy_gmem_to_smem(k_new.at[pl.ds(first, rows)], k_rows, arrived)
        plgpu.copy_gmem_to_smem(v_new.at[pl.ds(first, rows)], v_rows, arrived)
        plgpu.barrier_wait(arrived)
        for row in range(rows):
            slot = slots[first + row]
            block, offset = lax.div(slot, block_size), lax.rem(slot, block_size)

            @pl.when((first + row >= wanted) & (slot < num_blocks * block_size))
            def _(row=row, block=block, offset=offset):
                plgpu.copy_smem_to_gmem(k_rows.at[row], k_cache.at[block, :, offset])
                plgpu.copy_smem_to_gmem(v_rows.at[row], v_cache.at[block, :, offset])

        plgpu.wait_smem_to_gmem(0)

    memory = plgpu.SMEM((rows, num_heads, head_dim), dtype)
    write = plgpu.kernel(
        kernel,
        scratch_types=[memory, memory, plgpu.Barrier(num_arrivals=2)],
        grid=(pl.cdiv(num_tokens, rows),),
        grid_names=("program",),
        interpret=None if interpret is False else interpret,
        kernel_name="write_kv",
    )
    # References: the kernel's output is its input's memory (`input_output_aliases` of the call that is compiled).
    caches = [jax.new_ref(cache) for cache in kv_cache]
    write(write_indices, k_new.astype(dtype), v_new.astype(dtype), *caches)
    return jax.freeze(caches[0]), jax.freeze(caches[1])


def attend(
    options: Options,
    bucket: Bucket,
    plan: schedule.Schedule,
    packed: Array,
    kv_cache: tuple[Array, Array],
    block_tables: Array,
    *,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Attention of all pieces.

    Args:
      options: how.
      bucket, plan: what to compute.
      packed: [G, packed_rows, D], the queries.
      kv_cache: K and V, [N, G, K, D], the step's own keys and values among them.
      block_tables: i32[S, P].
      interpret: False, or how to interpret.

    Returns:
      Results of wide pieces, [G, wide_tiles * 128, D]; those of narrow ones, f32[G, partial_slots, partial_rows, D],
      and their log-sum-exp, base 2. What no piece writes holds anything.
    """
    groups, head_dim = bucket.kv_heads, packed.shape[-1]
    dtype, rows = packed.dtype, bucket.partial_rows
    tuning = options.tuning
    copies = max(1, tuning.step_keys // kv_cache[0].shape[2])
    ring = _tiled_smem((tuning.stages, tuning.step_keys, head_dim), dtype)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=tuning.stages)
    free = plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=tuning.stages)
    kernel = plgpu.kernel(
        functools.partial(_kernel, options=options),
        out_type=[
            jax.ShapeDtypeStruct((groups, bucket.wide_tiles * WIDE_ROWS, head_dim), dtype),
            jax.ShapeDtypeStruct((groups, bucket.partial_slots, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((groups, bucket.partial_slots, rows), jnp.float32),
        ],
        scratch_types={
            "q_smem": _tiled_smem((_CONSUMERS, _ROWS, head_dim), dtype),
            "k_ring": ring,
            "v_ring": ring,
            "partial_smem": _tiled_smem((NARROW_ROWS, head_dim), jnp.float32),
            "lse_smem": plgpu.SMEM((NARROW_ROWS,), jnp.float32),
            "q_full": plgpu.Barrier(num_barriers=_CONSUMERS),
            "k_full": full,
            "v_full": full,
            "k_free": free,
            "v_free": free,
            "v_cleaned": plgpu.Barrier(num_arrivals=_CONSUMERS),
            "turn": plgpu.Barrier(num_arrivals=_CONSUMERS),
        },
        grid=(tuning.programs,),
        grid_names=("program",),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=None if interpret is False else interpret,
        kernel_name="ragged_paged_attention",
    )
    return kernel(plan.num_pieces, plan.pieces, block_tables, packed, *kv_cache)


def _tiled_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the layout that WGMMA reads and TMA writes: tiles of 8 rows of 128 bytes, swizzled."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))  # pyright: ignore[reportAbstractUsage]


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Shared memory and barriers of a program; the barriers of the rings are in the module's drawing."""

    q_smem: Any  # [consumers, 64, D], queries; then the result of a wide piece
    k_ring: Any  # [stages, step_keys, D]
    v_ring: Any
    partial_smem: Any  # f32[64, D], the result of a narrow piece
    lse_smem: Any  # f32[64]
    q_full: Any  # one for each consumer
    k_full: Any  # one for each stage, as the next three
    v_full: Any
    k_free: Any
    v_free: Any
    v_cleaned: Any  # both consumers have cleaned their share of a stage of V
    turn: Any  # both consumers have come to where the tensor cores change hands


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What every warpgroup knows of a piece, all scalars. Steps begin at multiples of their size.

    Attributes:
      column: of the piece in `schedule.Schedule.pieces`.
      kv_head: neighbouring indices are the KV heads of a column.
      narrow, first_key, end_key: from there.
      first_step, num_steps: to take.
    """

    column: Array
    kv_head: Array
    narrow: Array
    first_key: Array
    end_key: Array
    first_step: Array
    num_steps: Array


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What only a consumer knows of its piece: see `schedule.Schedule`."""

    query: Array
    position: Array
    result: Array


def _read_piece(pieces, index: Array, kv_heads: int, step_keys: int) -> _Piece:
    column = lax.div(index, kv_heads)
    first_key, end_key = pieces[schedule.FIRST_KEY, column], pieces[schedule.END_KEY, column]
    first_step = lax.div(first_key, step_keys)
    return _Piece(
        column=column,
        kv_head=lax.rem(index, kv_heads),
        narrow=pieces[schedule.NARROW, column] == 1,
        first_key=first_key,
        end_key=end_key,
        first_step=first_step,
        num_steps=lax.div(end_key + step_keys - 1, step_keys) - first_step,
    )


def _read_rows(pieces, column: Array, warpgroup: Array, narrow: Array) -> _Rows:
    """The 64 rows of a warpgroup."""
    offset = jnp.where(narrow, 0, warpgroup * _ROWS)
    return _Rows(
        query=pieces[schedule.QUERY_ROW, column] + offset,
        position=pieces[schedule.POSITION, column] + offset,
        result=pieces[schedule.RESULT, column],
    )


def _kernel(
    num_pieces, pieces, tables, packed, k_cache, v_cache, wide, partial, lse, *, options: Options, **scratch
) -> None:
    """One program: its pieces, each warpgroup in its role."""
    smem = _Scratch(**scratch)
    tuning, kv_heads = options.tuning, packed.shape[0]
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    count = lax.div(num_pieces[0] * kv_heads - program + tuning.programs - 1, tuning.programs)

    def for_each_piece(work: Callable[[_Piece, Array], None]) -> Array:
        """Calls ``work(piece, stages used before it)``; returns the stages used by all."""

        def body(i: Array, used: Array) -> Array:
            piece = _read_piece(pieces, program + i * tuning.programs, kv_heads, tuning.step_keys)
            work(piece, used)
            return used + piece.num_steps

        return lax.fori_loop(0, count, body, jnp.int32(0))

    @pl.when(warpgroup == _PRODUCER)
    def _():
        plgpu.set_max_registers(tuning.producer_registers, action="decrease")
        used = for_each_piece(functools.partial(_load_piece, smem, pieces, tables, k_cache, v_cache, tuning))

        # A program ends when its last stages have been given back.
        @pl.loop(jnp.maximum(used - tuning.stages, 0), used)
        def _(index: Array) -> None:
            plgpu.barrier_wait(smem.k_free.at[lax.rem(index, tuning.stages)])
            plgpu.barrier_wait(smem.v_free.at[lax.rem(index, tuning.stages)])

    @pl.when(warpgroup != _PRODUCER)
    def _():
        plgpu.set_max_registers(tuning.consumer_registers, action="increase")

        def attend(piece: _Piece, used: Array) -> None:
            rows = _read_rows(pieces, piece.column, warpgroup, piece.narrow)
            _Consumer(options, smem, warpgroup, piece, rows, used).attend(packed, wide, partial, lse)

        def work(piece: _Piece, used: Array) -> None:
            idle = piece.narrow & (warpgroup != 0)
            pl.when(idle)(lambda: _skip_piece(smem, tuning, piece, used))
            pl.when(jnp.logical_not(idle))(lambda: attend(piece, used))

        for_each_piece(work)


def _load_piece(smem: _Scratch, pieces, tables, k_cache, v_cache, tuning: Tuning, piece: _Piece, used: Array) -> None:
    """The producer: one TMA copy for each block of K and of V, or for a step's part of a larger block."""
    block_size = k_cache.shape[2]
    rows = min(block_size, tuning.step_keys)
    copies = tuning.step_keys // rows
    sequence = pieces[schedule.SEQUENCE, piece.column]
    first_block, last_block = lax.div(piece.first_key, block_size), lax.div(piece.end_key - 1, block_size)

    def read_blocks(step: Array) -> list[Array]:
        # A block that no row sees is replaced by one that is read anyway: each stage takes the same number of copies.
        blocks = [lax.div(step * tuning.step_keys + i * rows, block_size) for i in range(copies)]
        return [tables[sequence, jnp.clip(block, first_block, last_block)] for block in blocks]

    def load(cache, ring, full, step: Array, blocks: list[Array]) -> None:
        offset = pl.multiple_of(lax.rem(step * tuning.step_keys, block_size), rows) if rows < block_size else 0
        for i, block in enumerate(blocks):
            source = cache.at[block, piece.kv_head, pl.ds(offset, rows)]
            plgpu.copy_gmem_to_smem(source, ring.at[pl.ds(i * rows, rows)], full)

    def body(i: Array, _: None) -> None:
        stage, step = lax.rem(used + i, tuning.stages), piece.first_step + i
        blocks = read_blocks(step)  # they arrive while the stage is awaited
        recycled = used + i >= tuning.stages
        pl.when(recycled)(lambda: plgpu.barrier_wait(smem.k_free.at[stage]))
        load(k_cache, smem.k_ring.at[stage], smem.k_full.at[stage], step, blocks)
        pl.when(recycled)(lambda: plgpu.barrier_wait(smem.v_free.at[stage]))
        load(v_cache, smem.v_ring.at[stage], smem.v_full.at[stage], step, blocks)

    lax.fori_loop(0, piece.num_steps, body, None)


def _skip_piece(smem: _Scratch, tuning: Tuning, piece: _Piece, used: Array) -> None:
    """A consumer without rows in the piece: it gives back the stages as soon as they are there."""

    def body(i: Array, _: None) -> None:
        stage = lax.rem(used + i, tuning.stages)
        for full, free in ((smem.k_full, smem.k_free), (smem.v_full, smem.v_free)):
            plgpu.barrier_wait(full.at[stage])
            plgpu.barrier_arrive(free.at[stage])

    lax.fori_loop(0, piece.num_steps, body, None)


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """A consumer warpgroup and its 64 rows of a piece.

    Attributes:
      options: the static side of the kernel.
      smem: shared memory and barriers.
      warpgroup: 0 or 1.
      piece, rows: what it works on.
      used: stages that earlier pieces used.
    """

    options: Options
    smem: _Scratch
    warpgroup: Array
    piece: _Piece
    rows: _Rows
    used: Array

    @property
    def _q(self) -> Any:
        return self.smem.q_smem.at[self.warpgroup]

    def _stage(self, i: Array) -> Array:
        return lax.rem(self.used + i, self.options.tuning.stages)

    def _when_wide(self, action: Callable[[], None]) -> None:
        pl.when(jnp.logical_not(self.piece.narrow))(action)

    def attend(self, packed, wide, partial, lse) -> None:
        """From queries to results."""
        self._load_queries(packed)
        out = plgpu.layout_cast(jnp.zeros((_ROWS, packed.shape[-1]), jnp.float32), plgpu.Layout.WGMMA)
        best = plgpu.layout_cast(jnp.full((_ROWS,), _UNSEEN, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        total = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        pl.when(self.warpgroup == 1)(self._pass_turn)  # the second starts when the first has its scores under way
        out, best, total = lax.fori_loop(0, self.piece.num_steps, self._step, (out, best, total))
        pl.when(self.warpgroup == 0)(self._pass_turn)
        out = out * _across(1 / total, out)
        pl.when(self.piece.narrow)(lambda: self._store_partial(out, best + jnp.log2(total), partial, lse))
        self._when_wide(lambda: self._store_wide(out, wide))

    def _load_queries(self, packed) -> None:
        row = pl.multiple_of(self.rows.query, schedule.ROW_ALIGNMENT)
        arrived = self.smem.q_full.at[self.warpgroup]
        plgpu.copy_gmem_to_smem(packed.at[self.piece.kv_head, pl.ds(row, _ROWS)], self._q, arrived)
        plgpu.barrier_wait(arrived)

    def _step(self, i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """One stage of K and V, with the online softmax (arXiv 1805.02867) in base 2, as the hardware has it."""
        out, best, total = carry
        stage, first_key = self._stage(i), (self.piece.first_step + i) * self.options.tuning.step_keys
        k, v = self.smem.k_ring.at[stage], self.smem.v_ring.at[stage]
        plgpu.barrier_wait(self.smem.k_full.at[stage])
        scores = self._multiply_keys(k)
        plgpu.barrier_arrive(self.smem.k_free.at[stage])
        offset = self.rows.position - first_key * self.options.heads_per_kv
        scores = lax.cond(self._rows_differ(offset), lambda s: self._mask(s, offset), lambda s: s, scores)
        to_base_2 = self.options.scale * _LOG2_E
        new_best = jnp.maximum(best, scores.max(axis=1) * to_base_2)
        weights = jnp.exp2(scores * to_base_2 - _across(new_best, scores))
        shrink = jnp.exp2(best - new_best)
        total = total * shrink + weights.sum(axis=1)
        out = out * _across(shrink, out)
        plgpu.barrier_wait(self.smem.v_full.at[stage])
        unseen = self._has_unseen(first_key)
        pl.when(unseen)(lambda: self._clean(v, first_key))
        self._arrive_for_turn()
        self._await_turn()
        pl.when(unseen)(lambda: self._when_wide(lambda: plgpu.barrier_wait(self.smem.v_cleaned)))
        out = self._add_values(out, weights.astype(v.dtype), v)
        plgpu.barrier_arrive(self.smem.v_free.at[stage])
        return out, new_best, total

    def _arrive_for_turn(self) -> None:
        if self.options.tuning.take_turns:
            self._when_wide(lambda: plgpu.barrier_arrive(self.smem.turn))

    def _await_turn(self) -> None:
        if self.options.tuning.take_turns:
            self._when_wide(lambda: plgpu.barrier_wait(self.smem.turn))

    def _pass_turn(self) -> None:
        self._arrive_for_turn()
        self._await_turn()

    def _multiply_keys(self, k) -> Array:
        """``Q K^T``, f32[64, step_keys]. The turn passes to the other consumer while the product is under way."""
        if self.options.emulate_wgmma:
            product = jnp.dot(self._q[...], k[...].T, preferred_element_type=jnp.float32)
            plgpu.commit_smem()  # these were ordinary reads; those of WGMMA need no fence before the next TMA copy
            self._pass_turn()
            return product

        def multiply(accumulator) -> Array:
            plgpu.wgmma(accumulator, self._q, k.transpose((1, 0)))
            self._pass_turn()
            return accumulator[...]

        return pl.run_scoped(multiply, plgpu.ACC((_ROWS, self.options.tuning.step_keys), jnp.float32))

    def _add_values(self, out: Array, weights: Array, v) -> Array:
        """``out + P V``, f32[64, D]: P in registers, V in shared memory."""
        if self.options.emulate_wgmma:
            out = out + jnp.dot(weights, v[...], preferred_element_type=jnp.float32)
            plgpu.commit_smem()
            return out
        accumulator: Any = plgpu.ACC.init(out)
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, weights, v))(accumulator)

    def _rows_differ(self, offset: Array) -> Array:
        """Whether some row does not see some key of a step. `offset`: of row 0 from the first key, in rows."""
        heads = self.options.heads_per_kv
        differ = offset < (self.options.tuning.step_keys - 1) * heads
        if self.options.window is None:
            return differ
        return differ | (offset + _ROWS - 1 >= self.options.window * heads)

    def _mask(self, scores: Array, offset: Array) -> Array:
        """Keys out of a row's sight set to `_UNSEEN`: ``key > row // heads``, without the division."""
        heads = self.options.heads_per_kv
        rows = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA) + offset
        keys = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) * heads
        visible = keys <= rows
        if self.options.window is not None:
            visible &= keys > rows - self.options.window * heads
        return jnp.where(visible, scores, _UNSEEN)

    def _has_unseen(self, first_key: Array) -> Array:
        """Whether the step has keys that no row of the piece sees."""
        unseen = first_key + self.options.tuning.step_keys > self.piece.end_key
        return unseen if self.options.window is None else unseen | (first_key < self.piece.first_key)

    def _clean(self, v, first_key: Array) -> None:
        """Sets rows of V that no row of the piece sees to zero; both consumers do their share where both read it."""
        keys = plgpu.broadcasted_iota(jnp.int32, (_ROWS, v.shape[-1]), 0, layout=plgpu.Layout.WGMMA) + first_key
        for share in range(self.options.tuning.step_keys // _ROWS):
            first_row = share * _ROWS

            @pl.when(self.piece.narrow | (self.warpgroup == share % _CONSUMERS))
            def _(first_row=first_row):
                rows = v.at[pl.ds(first_row, _ROWS)]
                seen = (keys + first_row >= self.piece.first_key) & (keys + first_row < self.piece.end_key)
                values = plgpu.layout_cast(rows[...], plgpu.Layout.WGMMA)
                rows[...] = jnp.where(seen, values, jnp.zeros_like(values))

        plgpu.commit_smem()
        self._when_wide(lambda: plgpu.barrier_arrive(self.smem.v_cleaned))

    def _store_partial(self, out: Array, out_lse: Array, partial, lse) -> None:
        self.smem.partial_smem[...] = out
        self.smem.lse_smem[...] = out_lse
        plgpu.commit_smem()
        rows = pl.ds(0, partial.shape[2])
        plgpu.copy_smem_to_gmem(self.smem.partial_smem.at[rows], partial.at[self.piece.kv_head, self.rows.result])
        plgpu.copy_smem_to_gmem(self.smem.lse_smem.at[rows], lse.at[self.piece.kv_head, self.rows.result])
        plgpu.wait_smem_to_gmem(0)

    def _store_wide(self, out: Array, wide) -> None:
        self._q[...] = out.astype(wide.dtype)
        plgpu.commit_smem()
        row = pl.multiple_of(self.rows.result * WIDE_ROWS + self.warpgroup * _ROWS, _ROWS)
        plgpu.copy_smem_to_gmem(self._q, wide.at[self.piece.kv_head, pl.ds(row, _ROWS)])
        plgpu.wait_smem_to_gmem(0)


def _across(rows: Array, like: Array) -> Array:
    """One value a row, as wide as `like`."""
    return lax.broadcast_in_dim(rows, like.shape, [0])
