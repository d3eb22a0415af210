"""Every backend against the reference, with unused cache poisoned.

Compiling is what costs: cases that differ in their chunks alone are padded to one size and share a program.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as mosaic_gpu_interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import BACKENDS, mosaic_tpu, ragged_paged_attention, reference, triton
from pallas_kernels.ragged_paged_attention.cases import CASES, Batch, Case, Size, build, groups

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}

# How each backend runs on a machine without its device; those of Mosaic look for races.
INTERPRET: dict[str, Any] = {
    "xla": False,
    "triton": True,
    "mosaic_gpu": True,
    "mosaic_tpu": pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait"),
}

# Interpreted kernels spend their time in the compiler, and what it makes runs once.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Random batches of each backend, in tests of a length that a time limit can mean something for.
NUM_FUZZED = 200
NUM_PARTS = 5
FUZZ_SIZE = Size(num_tokens=215, num_sequences=8, max_blocks=14, num_blocks=100)


GROUPS = groups()
# These cover every block size, both head sizes and a window: in bfloat16 too, and with random chunks.
BFLOAT16 = ("one_token", "gqa_7", "gqa_8")
FUZZED = ("one_token", "window", "mqa", "gqa_8")
# In `make check`.
QUICK = ("no_padding",)


def arguments_of(batch: Batch, dtype: str) -> list:
    fields = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)) if x.dtype == np.float32 else x, fields)


@functools.cache
def compiled(backend: str, dtype: str, case: Case, size: Size, interpret: Any) -> jax.stages.Compiled:
    """The program of all cases of this shape and size; give a `case` without chunks."""
    shapes = arguments_of(build(case, size=size), dtype)
    call = functools.partial(
        ragged_paged_attention,
        scale=case.head_dim**-0.5,
        window=case.window,
        backend=backend,
        interpret=interpret,
    )
    options = COMPILER_OPTIONS if interpret else None
    return jax.jit(call).lower(*shapes).compile(compiler_options=options)


def check(case: Case, size: Size, backend: str, dtype: str, interpret: Any, seed: int = 0) -> None:
    arguments = arguments_of(build(case, seed, size=size), dtype)
    shape = dataclasses.replace(case, chunks=(), padding=0, spare_sequences=0)
    run = compiled(backend, dtype, shape, size, interpret)
    out, cache = jax.tree.map(np.asarray, run(*jax.tree.map(jnp.asarray, arguments)))
    compare(out, cache, arguments, case, TOLERANCE[dtype])
    if backend == "mosaic_gpu":
        assert not mosaic_gpu_interpreter.get_races().races_found, case


def compare(out: np.ndarray, cache: tuple, arguments: list, case: Case, tolerance: float) -> None:
    expected, expected_cache = reference.ragged_paged_attention(
        *arguments, scale=case.head_dim**-0.5, window=case.window
    )
    assert np.isfinite(expected).all()
    largest = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * largest, err_msg=str(case))
    for ours, theirs in zip(cache, expected_cache, strict=True):
        np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32), err_msg=str(case))


def dtypes_of(backend: str) -> tuple[str, ...]:
    return BACKENDS[backend].dtypes or ("float32", "bfloat16")


def marks_of(backend: str) -> list:
    """Interpreting Mosaic takes seconds a batch."""
    return [pytest.mark.kernels] if backend.startswith("mosaic") else []


def named_tests() -> list:
    return [
        pytest.param(
            backend,
            dtype,
            group,
            marks=() if group in QUICK and dtype == "float32" else (pytest.mark.slow, *marks_of(backend)),
        )
        for backend in BACKENDS
        for dtype in dtypes_of(backend)
        for group in GROUPS
        if dtype == "float32" or group in BFLOAT16 or "float32" not in dtypes_of(backend)
    ]


def random_chunks(rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    decodes = [(1, int(rng.integers(1, 200))) for _ in range(rng.integers(0, 5))]
    chunks = [(n := int(rng.integers(1, 70)), n + int(rng.integers(0, 130))) for _ in range(rng.integers(0, 4))]
    return (*decodes, *chunks)


def size_of(group: str) -> Size:
    size = functools.reduce(Size.__or__, (CASES[name].size for name in GROUPS[group]))
    return size | FUZZ_SIZE if group in FUZZED else size


@pytest.mark.parametrize(("backend", "dtype", "group"), named_tests())
def test_matches_reference(backend, dtype, group, capfd):
    for name in GROUPS[group]:
        check(CASES[name], size_of(group), backend, dtype, INTERPRET[backend])
    assert "RACE" not in capfd.readouterr().out


def random_tests() -> list:
    """CI has the first part of what Mosaic interprets, `make test-kernels` has all."""
    return [
        pytest.param(backend, group, part, marks=(*marks, pytest.mark.more_batches) if marks and part else marks)
        for backend in BACKENDS
        for marks in [marks_of(backend)]
        for group in FUZZED
        for part in range(NUM_PARTS)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "group", "part"), random_tests())
def test_fuzz(backend, group, part, capfd):
    rng = np.random.default_rng(part)
    for i in range(NUM_FUZZED // len(FUZZED) // NUM_PARTS):
        case = dataclasses.replace(CASES[group], chunks=random_chunks(rng))
        check(case, size_of(group), backend, dtypes_of(backend)[0], INTERPRET[backend], seed=100 * part + i)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_tpu_whose_copies_take_effect_at_once(capfd):
    """As the other tests but for this: there they take effect when they are waited for. A TPU may do either."""
    names = ("gqa_8", "gqa_8_decodes", "gqa_8_block_edges")
    size = functools.reduce(Size.__or__, (CASES[name].size for name in names))
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    for name in names:
        check(CASES[name], size, "mosaic_tpu", "bfloat16", interpret)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.slow
def test_tpu_race_is_found(monkeypatch, capfd):
    """The seeded bug of this backend: a kernel that does not wait for its copies."""
    make = mosaic_tpu.pltpu.make_async_copy

    class Impatient:
        def __init__(self, *arguments):
            self.start = make(*arguments).start

        def wait(self):
            pass

    monkeypatch.setattr(mosaic_tpu.pltpu, "make_async_copy", Impatient)
    case = CASES["no_padding"]
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    call = functools.partial(mosaic_tpu.ragged_paged_attention.__wrapped__, scale=1.0, window=None, interpret=interpret)
    found = ""
    try:
        jax.block_until_ready(jax.jit(call)(*arguments_of(build(case), "float32")))
    except Exception as error:  # newer releases of JAX raise, older ones print
        found = str(error)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert "race" in (found + capfd.readouterr().out).lower()


def test_enough_cases():
    assert len(CASES) >= 40
    for case in CASES.values():
        kv_len = max((kv_len for _, kv_len in case.chunks), default=0)
        assert kv_len <= case.size.max_blocks * case.block_size


@pytest.mark.slow
def test_triton_without_masks_reads_poison(monkeypatch):
    """The seeded bug of this backend: loads that forget their masks let unused cache through."""
    load = triton.plgpu.load
    monkeypatch.setattr(triton.plgpu, "load", lambda ref, mask, other: load(ref))
    case = CASES["no_padding"]
    arguments = arguments_of(build(case), "float32")
    # Not the jitted function: it may remember a trace with the right loads.
    call = functools.partial(triton.ragged_paged_attention.__wrapped__, scale=1.0, window=None, interpret=True)
    out, _ = jax.jit(call)(*arguments)
    assert math.isnan(np.asarray(out).sum())


def test_write_is_in_place():
    case = CASES["mixed_3d_2p"]
    batch = build(case, poison=0.0)
    arguments = jax.tree.map(jnp.asarray, arguments_of(batch, "float32"))
    call = jax.jit(lambda *a: ragged_paged_attention(*a, scale=1.0), donate_argnums=3)
    memory = call.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(cache.nbytes for cache in batch.kv_cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((73, 3, 64), np.float32)}, "not a multiple"),
        ({"kv_lens": np.zeros(6, np.int64)}, "expected int32"),
        ({"k_new": np.zeros((5, 2, 64), np.float32)}, "k_new has shape"),
    ],
)
def test_bad_shapes_are_named(change, message):
    batch = dataclasses.replace(build(CASES["mixed_3d_2p"]), **change)
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(*(getattr(batch, f.name) for f in dataclasses.fields(batch)), scale=1.0)


def test_unknown_backend_is_named():
    batch = build(CASES["one_token"])
    with pytest.raises(ValueError, match="not one of xla"):
        ragged_paged_attention(*(getattr(batch, f.name) for f in dataclasses.fields(batch)), scale=1.0, backend="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 80}, "'triton' does not serve head size 80 .only 64, 128.: choose xla"),
        ({"block_size": 8}, "'triton' does not serve block size 8"),
    ],
)
def test_backend_that_does_not_serve_the_shape_names_another(change, message):
    batch = build(dataclasses.replace(CASES["one_token"], **change))
    arguments = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(*arguments, scale=1.0, backend="triton", interpret=True)
