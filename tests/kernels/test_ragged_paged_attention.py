"""Every backend against the reference, with unused cache poisoned."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import BACKENDS, ragged_paged_attention, reference
from pallas_kernels.ragged_paged_attention.cases import CASES, Batch, Case, build

# Compiling a case costs a second or two: these show most of what can break.
QUICK = ("mixed_3d_2p", "window", "mqa", "only_padding")
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


def arguments_of(batch: Batch, dtype: str) -> list:
    fields = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)) if x.dtype == np.float32 else x, fields)


def check(case: Case, batch: Batch, backend: str, dtype: str) -> None:
    arguments, scale = arguments_of(batch, dtype), case.head_dim**-0.5
    expected, expected_cache = reference.ragged_paged_attention(*arguments, scale=scale, window=case.window)
    call = functools.partial(ragged_paged_attention, scale=scale, window=case.window, backend=backend)
    out, cache = jax.tree.map(np.asarray, jax.jit(call)(*jax.tree.map(jnp.asarray, arguments)))
    assert np.isfinite(expected).all()
    largest = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE[dtype] * largest, err_msg=str(case))
    for ours, theirs in zip(cache, expected_cache, strict=True):
        np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend, name, dtype):
    check(CASES[name], build(CASES[name]), backend, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz(backend):
    rng = np.random.default_rng(7)
    for seed in range(20):
        decodes = [(1, int(rng.integers(1, 200))) for _ in range(rng.integers(0, 5))]
        chunks = [(n := int(rng.integers(2, 90)), n + int(rng.integers(0, 200))) for _ in range(rng.integers(0, 4))]
        window = [None, int(rng.integers(1, 150))][int(rng.integers(2))]
        case = Case((*decodes, *chunks), window=window, head_dim=16, padding=int(rng.integers(1, 9)))
        check(case, build(case, seed), backend, "float32")


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
