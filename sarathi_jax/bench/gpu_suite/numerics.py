"""Every backend on every named case against float64 in numpy, and the products with 8-bit weights."""

import dataclasses
import functools
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.quantized_matmul import quantize_weight, quantized_matmul
from pallas_kernels.quantized_matmul import reference as product_reference
from pallas_kernels.ragged_paged_attention import BACKENDS, ragged_paged_attention
from pallas_kernels.ragged_paged_attention import reference as attention_reference
from pallas_kernels.ragged_paged_attention.cases import CASES, Case, Size, build, groups
from sarathi_jax.bench.gpu_suite.results import Results, Skipped

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
"""Largest error of attention, as a share of the largest value."""

PRODUCT_TOLERANCE = 1e-3
"""Of the norm. Rows of `w8a8` are quantised in float32: a value between two steps may go to either."""

DRY_RUN_CASES = ("no_padding",)


def run(results: Results, backends: Sequence[str], dry_run: bool) -> bool:
    """All backends, dtypes and cases; a case that fails its tolerance is measured, with ``ok`` false.

    Returns:
      Whether every row was reached.
    """
    for dtype in ("bfloat16", "float32"):
        for names in groups().values():
            size = functools.reduce(Size.__or__, (CASES[name].size for name in names))
            for name in (name for name in names if not dry_run or name in DRY_RUN_CASES):
                for backend in backends:
                    measured = functools.partial(check_attention, CASES[name], size, backend, dtype, dry_run)
                    key = f"numerics {backend} {dtype} {name}"
                    if not results.measure(key, measured, backend=backend, dtype=dtype, case=name, kind="numerics"):
                        return False
    for rows, width, out in [(3, 256, 24)] if dry_run else [(r, 8192, 4096) for r in (1, 8, 64, 512)]:
        for mode, stored in (("w8", "int8"), ("w8", "float8_e4m3fn"), ("w8a8", "int8")):
            measured = functools.partial(check_product, mode, stored, rows, width, out)
            key = f"numerics product {mode} {stored} {rows} x {width} -> {out}"
            fields = {
                "backend": mode,
                "dtype": stored,
                "case": f"{rows} x {width} -> {out}",
                "kind": "numerics product",
            }
            if not results.measure(key, measured, **fields):
                return False
    return True


def check_attention(case: Case, size: Size, backend: str, dtype: str, dry_run: bool) -> dict[str, Any]:
    """Runs a case twice, unused cache poisoned with NaN.

    Returns:
      error (largest, as a share of the largest value), norm_error (of all, by norm), cache_equal (the cache is exactly
      what it should be), repeatable (both runs gave the same bits) and ok.
    """
    served = BACKENDS[backend]
    refusals = served.refusals(case.head_dim, case.block_size, dtype)
    if served.platform not in (None, "cuda") or refusals:
        raise Skipped(f"does not serve {', '.join(refusals)}" if refusals else f"for {served.platform}")
    seed = secrets.randbelow(2**32)  # drawn anew for every check
    batch = build(case, seed, size=size)
    fields = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    arguments = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)) if x.dtype == np.float32 else x, fields)
    shape = dataclasses.replace(case, chunks=(), padding=0, spare_sequences=0)
    program = _program(shape, backend, dry_run)
    (out, cache), (again, _) = (jax.tree.map(np.asarray, program(*map(_to_device, arguments))) for _ in range(2))
    expected, expected_cache = attention_reference.ragged_paged_attention(
        *arguments, scale=case.head_dim**-0.5, window=case.window, dtype=np.float64
    )
    pairs = [
        (ours.astype(np.float32), theirs.astype(np.float32)) for ours, theirs in zip(cache, expected_cache, strict=True)
    ]
    error = float(np.abs(out - expected).max(initial=0) / max(1.0, np.abs(expected).max(initial=0)))
    cache_equal = all(np.array_equal(ours, theirs, equal_nan=True) for ours, theirs in pairs)
    return {
        "seed": seed,
        "error": error,
        "norm_error": float(np.linalg.norm(out - expected) / max(1e-30, np.linalg.norm(expected))),
        "cache_equal": cache_equal,
        "repeatable": np.array_equal(out, again),
        "ok": bool(cache_equal and error <= TOLERANCE[dtype]),  # NaN is not <=
    }


def check_product(mode: Any, stored: str, rows: int, width: int, out: int) -> dict[str, Any]:
    """A product with 8-bit weights, by the norm of its error against float64."""
    rng = np.random.default_rng()
    x = rng.standard_normal((rows, width), np.float32)
    dtype = np.dtype(np.int8) if stored == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)
    values, scale = quantize_weight(rng.standard_normal((out, width), np.float32), dtype)
    multiply = jax.jit(functools.partial(quantized_matmul, mode=mode))
    ours = np.asarray(multiply(jnp.asarray(x), jnp.asarray(values), jnp.asarray(scale)))
    expected = product_reference.quantized_matmul(x, values, scale, mode=mode)
    error = float(np.linalg.norm(ours - expected) / np.linalg.norm(expected))
    return {"norm_error": error, "ok": error <= PRODUCT_TOLERANCE}


@functools.lru_cache(maxsize=8)
def _program(shape: Case, backend: str, dry_run: bool) -> Callable[..., Any]:
    call = functools.partial(
        ragged_paged_attention,
        scale=shape.head_dim**-0.5,
        window=shape.window,
        backend=backend,
        interpret=dry_run,
    )
    return jax.jit(call)


def _to_device(arguments: Any) -> Any:
    return jax.tree.map(jnp.asarray, arguments)
