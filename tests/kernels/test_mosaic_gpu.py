"""The Hopper backend: its work list with numpy in the kernel's place, its synchronisation, and what it refuses.

Its numbers, by interpretation with race detection, are in test_ragged_paged_attention.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter

from pallas_kernels.ragged_paged_attention import mosaic_gpu, ragged_paged_attention, reference, schedule
from pallas_kernels.ragged_paged_attention.cases import CASES, Batch, Case, Size, build, groups
from pallas_kernels.ragged_paged_attention.schedule import NARROW_ROWS, WIDE_ROWS, Bucket

GROUPS = groups()
FUZZ_SIZE = Size(num_tokens=215, num_sequences=8, max_blocks=14, num_blocks=100)
NUM_FUZZED = 40

# Interpreted kernels spend their time in the compiler, and what it makes runs once.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def arguments_of(batch: Batch) -> list:
    return [getattr(batch, field.name) for field in dataclasses.fields(batch)]


def to_bfloat16(arguments: list) -> list:
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x, arguments)


def attend_in_numpy(bucket: Bucket, plan: schedule.Schedule, packed, cache, tables, window) -> tuple:
    """What the kernel computes, piece by piece; what no piece writes is NaN, and none may write what another wrote."""
    groups, rows_per_token, head_dim = bucket.kv_heads, bucket.heads_per_kv, packed.shape[-1]
    wide = np.full((groups, bucket.wide_tiles * WIDE_ROWS, head_dim), np.nan, np.float32)
    partial = np.full((groups, bucket.partial_slots, bucket.partial_rows, head_dim), np.nan, np.float32)
    lse = np.full(partial.shape[:-1], np.nan, np.float32)
    assert plan.num_pieces[0] <= bucket.max_pieces
    for column in plan.pieces.T[: plan.num_pieces[0]]:
        narrow, sequence, query_row, position, first_key, end_key, result = column
        assert query_row % schedule.ROW_ALIGNMENT == 0
        assert 0 <= first_key < end_key
        rows = NARROW_ROWS if narrow else WIDE_ROWS
        assert query_row + rows <= bucket.packed_rows
        keys = np.arange(first_key, end_key)
        positions = ((position + np.arange(rows)) // rows_per_token)[:, None]
        visible = (keys <= positions) & (window is None or keys > positions - (window or 0))
        block_size = cache[0].shape[2]
        k, v = (c[tables[sequence, keys // block_size], :, keys % block_size].swapaxes(0, 1) for c in cache)
        scores = np.where(visible, packed[:, query_row : query_row + rows] @ k.swapaxes(1, 2), -1e30)
        best = scores.max(axis=-1)
        weights = np.exp2(scores - best[..., None])
        out = weights @ v / weights.sum(axis=-1)[..., None]
        if narrow:
            assert np.isnan(partial[:, result]).all()
            partial[:, result] = out[:, : bucket.partial_rows]
            lse[:, result] = (best + np.log2(weights.sum(axis=-1)))[:, : bucket.partial_rows]
        else:
            target = wide[:, result * WIDE_ROWS : (result + 1) * WIDE_ROWS]
            assert np.isnan(target).all()
            target[...] = out
    return wide, partial, lse


def check_schedule(bucket: Bucket, batch: Batch, window: int | None) -> int:
    """Returns the pieces that were needed."""
    arguments = arguments_of(batch)
    expected, cache = reference.ragged_paged_attention(*arguments, scale=np.log(2), window=window)
    q, chunks = arguments[0], (batch.chunk_starts, batch.kv_lens, batch.num_decodes, batch.num_chunks)
    plan, packed = jax.tree.map(np.asarray, plan_and_pack(bucket, window)(q, *chunks))
    results = attend_in_numpy(bucket, plan, packed, cache, batch.block_tables, window)
    out = gather(bucket)(plan, *results, batch.num_decodes, batch.chunk_starts[batch.num_chunks])
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
    return int(plan.num_pieces[0])


@functools.cache
def plan_and_pack(bucket: Bucket, window: int | None):
    def function(q, *chunks):
        plan = schedule.make_schedule(bucket, *chunks, window)
        return plan, schedule.pack_queries(q, bucket, plan)

    return jax.jit(function)


@functools.cache
def gather(bucket: Bucket):
    return jax.jit(functools.partial(schedule.gather_result, bucket))


def bucket_of(case: Case, size: Size, wanted_pieces: int) -> Bucket:
    return Bucket(
        num_tokens=size.num_tokens,
        num_sequences=size.num_sequences,
        kv_heads=case.kv_heads,
        heads_per_kv=case.heads // case.kv_heads,
        step_keys=64,
        wanted_pieces=wanted_pieces,
    )


@pytest.mark.parametrize(
    "group", [name if name == "no_padding" else pytest.param(name, marks=pytest.mark.slow) for name in GROUPS]
)
def test_schedule(group):
    cases = [CASES[name] for name in GROUPS[group]]
    size = functools.reduce(Size.__or__, (case.size for case in cases))
    for case in cases:
        check_schedule(bucket_of(case, size, wanted_pieces=16), build(case, size=size, poison=0), case.window)


@pytest.mark.slow
@pytest.mark.parametrize(("kv_heads", "window", "wanted_pieces"), [(1, None, 264), (2, 70, 9)])
def test_schedule_of_random_batches(kv_heads, window, wanted_pieces):
    rng = np.random.default_rng(3)
    for seed in range(NUM_FUZZED // 2):
        decodes = [(1, int(rng.integers(1, 200))) for _ in range(rng.integers(0, 5))]
        chunks = [(n := int(rng.integers(1, 70)), n + int(rng.integers(0, 130))) for _ in range(rng.integers(0, 4))]
        case = Case((*decodes, *chunks), heads=6, kv_heads=kv_heads, window=window)
        batch = build(case, seed, poison=0, size=FUZZ_SIZE)
        check_schedule(bucket_of(case, FUZZ_SIZE, wanted_pieces), batch, window)


@pytest.mark.slow
def test_long_decode_is_split_and_short_ones_are_not():
    case = Case(((1, 1500), (1, 60), (1, 30)), padding=0, spare_sequences=0)
    batch = build(case, poison=0)
    # 26 steps of 64 keys; 12 shares for each of 2 KV heads: of 3 steps at most.
    assert check_schedule(bucket_of(case, case.size, wanted_pieces=24), batch, None) == 8 + 1 + 1
    assert check_schedule(bucket_of(case, case.size, wanted_pieces=2), batch, None) == 3


def interpret(case: Case, tuning: mosaic_gpu.Tuning) -> None:
    """Runs a case as the kernel is now, and checks it; raises what is wrong."""
    arguments = to_bfloat16(arguments_of(build(case)))
    scale = case.head_dim**-0.5
    # Not the jitted function: it may remember a trace of another kernel.
    call = functools.partial(mosaic_gpu.ragged_paged_attention.__wrapped__, interpret=True, tuning=tuning)
    try:
        run = jax.jit(functools.partial(call, scale=scale, window=case.window)).lower(*arguments)
        out = np.asarray(run.compile(compiler_options=COMPILER_OPTIONS)(*arguments)[0])
        assert not interpreter.get_races().races_found, "found a race"
    finally:
        interpreter.reset_gpu_interpret_mode_state()
    expected, _ = reference.ragged_paged_attention(*arguments, scale=scale, window=case.window)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-2 * max(1, np.abs(expected).max()))


# Several pieces a program, steps in every stage twice, both kinds of pieces, unused rows of V in both.
SYNCHRONISED = Case(((1, 100), (40, 330)), heads=2, kv_heads=1, block_size=64, padding=0, spare_sequences=0)
ONE_PROGRAM = mosaic_gpu.Tuning(programs=1, wanted_pieces=1)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_synchronisation():
    interpret(SYNCHRONISED, ONE_PROGRAM)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_synchronisation_of_another_tuning():
    tuning = mosaic_gpu.Tuning(step_keys=64, stages=3, programs=2, wanted_pieces=4, take_turns=False)
    interpret(dataclasses.replace(SYNCHRONISED, window=150, block_size=128), tuning)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("forgotten", ["k_full", "v_free", "v_cleaned"])
def test_a_forgotten_wait_is_found(monkeypatch, forgotten):
    """The seeded bugs of this backend: barriers that nobody waits for."""
    wait, make, scratch = mosaic_gpu.plgpu.barrier_wait, mosaic_gpu._Scratch, []

    def remember(**references):
        scratch.append(make(**references))
        return scratch[-1]

    def wait_for_others(barrier):
        if not scratch or getattr(barrier, "ref", barrier) is not getattr(scratch[-1], forgotten):
            wait(barrier)

    monkeypatch.setattr(mosaic_gpu, "_Scratch", remember)
    monkeypatch.setattr(mosaic_gpu.plgpu, "barrier_wait", wait_for_others)
    # As a race, by what the interpreter of JAX 0.11 says about barriers that go round unseen, or, where the order of
    # the threads hid the race, by the interpreter's initial values (NaN) in the answer.
    found = "RACE DETECTED|found a race|no threads observed|is waiting at barrier|nan location mismatch"
    with pytest.raises(Exception, match=found):
        interpret(SYNCHRONISED, ONE_PROGRAM)


def test_float32_is_refused_by_name():
    batch = build(CASES["one_token"])
    with pytest.raises(ValueError, match=r"'mosaic_gpu' does not serve cache of float32 .*choose xla or triton"):
        ragged_paged_attention(*arguments_of(batch), scale=1.0, backend="mosaic_gpu", interpret=True)


@pytest.mark.parametrize(("field", "value"), [("step_keys", 96), ("stages", 1)])
def test_bad_tuning_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        mosaic_gpu.Tuning(**{field: value})
