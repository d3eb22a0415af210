"""Times of attention and of products against the two roofs of the same run, beside what JAX itself offers.

A program runs attention several times in a chain, over several caches, as the layers of a model do: what is computed
once a step (the list of work) counts once, launches follow each other as they do when serving, and no cache is found
in the L2 of the device. Batches of one shape share a program, which fixes the longest sequence: a short one does not
get a kernel of its own, as it does not when serving.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.ragged_paged_attention import BACKENDS, ragged_paged_attention
from pallas_kernels.ragged_paged_attention.cases import draw_cache, draw_chunks
from pallas_kernels.ragged_paged_attention.tuning import Problem
from sarathi_jax.bench.gpu_suite.attention import Shape, Workload, workloads
from sarathi_jax.bench.gpu_suite.results import Results, Skipped
from sarathi_jax.bench.gpu_suite.timing import Roofs, kernel_times, measure_roofs, roofs_of, time_calls

NUM_CACHES = 4
NUM_CALLS = 8
"""Attention calls of a program, over `NUM_CACHES` caches in turn; a dry run has one of each."""

ROOFS_ROW = "roofs"

Cache = tuple[Array, Array]


def run(results: Results, backends: Sequence[str], dry_run: bool) -> bool:
    """Roofs, attention of every backend and of cuDNN, products; stops early when the device is lost.

    Returns:
      Whether every row was reached.
    """
    roofs = current_roofs(results, dry_run)
    for workload in workloads(dry_run):
        for backend in backends:
            measured = functools.partial(time_attention, workload, backend, roofs, dry_run)
            if not results.measure(
                f"attention {backend} {workload.name}", measured, backend=backend, **workload.fields()
            ):
                return False
        if workload.kind != "mixed":
            measured = functools.partial(time_cudnn, workload, roofs, dry_run)
            if not results.measure(f"attention cudnn {workload.name}", measured, backend="cudnn", **workload.fields()):
                return False
    for rows, width, out in [(2, 64, 96)] if dry_run else [(r, 8192, 28672) for r in (8, 64, 512)]:
        for kind in ("bfloat16", "w8", "w8_fp8", "w8a8"):
            measured = functools.partial(time_product, kind, rows, width, out, roofs, dry_run)
            fields = {"backend": kind, "kind": "product", "workload": f"{rows} x {width} -> {out}"}
            if not results.measure(f"product {kind} {rows} x {width} -> {out}", measured, **fields):
                return False
    return True


def current_roofs(results: Results, dry_run: bool) -> Roofs:
    """Measures the roofs in this process; the file keeps those of its first run beside those of later ones."""
    row = measure_roofs(dry_run)
    number = 1 + sum(key.startswith(ROOFS_ROW) for key in results.rows)
    results.measure(f"{ROOFS_ROW} {number}", lambda: row, kind="roofs")
    return roofs_of(row)


def time_attention(workload: Workload, backend: str, roofs: Roofs, dry_run: bool) -> dict[str, Any]:
    """One backend of ours on one batch."""
    shape = workload.shape
    served = BACKENDS[backend]
    if served.platform not in (None, "cuda"):
        raise Skipped(f"for {served.platform}")
    if refusals := served.refusals(shape.head_dim, shape.block_size, jnp.bfloat16):
        raise Skipped(f"does not serve {', '.join(refusals)}")
    problem = _problem(shape)
    caches = [draw_cache(problem, seed) for seed in range(1 if dry_run else NUM_CACHES)]
    arguments = draw_chunks(problem, workload.chunks)
    program = _program(shape, backend, dry_run)
    state = {"q": arguments[0], "caches": caches}

    def step() -> Array:
        state["q"], state["caches"] = program(state["q"], state["caches"], *arguments[1:])
        return state["q"]

    timing = time_calls(step, dry_run=dry_run)
    num_calls = 1 if dry_run else NUM_CALLS
    row = timing.row(num_calls)
    row |= roofs.percent(timing.seconds / num_calls, workload.num_bytes, workload.flops)
    if not dry_run:
        q, k, v, *rest = arguments
        attend = jax.jit(_call(shape, backend, False))
        try:
            row["kernels"] = kernel_times(attend, q, k, v, state["caches"][0], *rest)
        except RuntimeError as error:
            row["kernels"] = f"no device clock: {error}"[:300]
    return row


def time_cudnn(workload: Workload, roofs: Roofs, dry_run: bool) -> dict[str, Any]:
    """cuDNN through JAX on dense keys and values, all in bfloat16: no block tables, no cache written, no padding.

    A chunk behind a context is computed without a mask, which cuDNN through JAX has no form of here: percentages count
    what it really computes.
    """
    if dry_run:
        raise Skipped("cuDNN needs a GPU")
    shape, (length, kv_len) = workload.shape, workload.chunks[0]
    causal = length == kv_len
    keys = jax.random.split(jax.random.key(0), 2 * NUM_CACHES)
    size = (len(workload.chunks), kv_len, shape.kv_heads, shape.head_dim)
    draw = jax.jit(lambda key: jax.random.normal(key, size, jnp.bfloat16))
    pairs = [(draw(keys[2 * i]), draw(keys[2 * i + 1])) for i in range(NUM_CACHES)]
    q = jax.random.normal(jax.random.key(1), (len(workload.chunks), length, shape.heads, shape.head_dim), jnp.bfloat16)
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")

    @jax.jit
    def program(q: Array, pairs: list[Cache]) -> Array:
        for i in range(NUM_CALLS):
            q = attend(q, *pairs[i % NUM_CACHES])
        return q

    timing = time_calls(lambda: program(q, pairs), dry_run=False)
    flops = workload.flops if causal else 4 * shape.heads * shape.head_dim * length * kv_len * len(workload.chunks)
    num_bytes = 2 * 2 * math.prod(size) + 2 * 2 * q.size
    return timing.row(NUM_CALLS) | roofs.percent(timing.seconds / NUM_CALLS, num_bytes, flops)


def time_product(kind: str, rows: int, width: int, out: int, roofs: Roofs, dry_run: bool) -> dict[str, Any]:
    """``x @ weight.T`` as a model step runs it: float32 in and out, weights in bfloat16 or 8 bits."""
    dtype = {"bfloat16": jnp.bfloat16, "w8_fp8": jnp.float8_e4m3fn}.get(kind, jnp.int8)
    weights = [_weight(jax.random.key(i), (out, width), dtype) for i in range(NUM_CACHES)]
    scale = jnp.full(out, width**-0.5, jnp.float32)

    @jax.jit
    def program(x: Array, weights: list[Array]) -> Array:
        for i in range(NUM_CALLS):
            weight = weights[i % NUM_CACHES]
            if kind == "bfloat16":
                dimensions = (((1,), (1,)), ((), ()))
                y = jax.lax.dot_general(x.astype(dtype), weight, dimensions, preferred_element_type=jnp.float32)
                y = y * scale
            else:
                y = quantized_matmul(x, weight, scale, mode="w8a8" if kind == "w8a8" else "w8")
            # The next product waits for all of this one, whose columns it could otherwise leave out.
            x = x + 1e-6 * jnp.sum(y, axis=1, keepdims=True)
        return x

    x = jax.random.normal(jax.random.key(9), (rows, width))
    timing = time_calls(lambda: program(x, weights), dry_run=dry_run)
    num_bytes = weights[0].nbytes + 4 * rows * (width + out)
    return timing.row(NUM_CALLS) | roofs.percent(timing.seconds / NUM_CALLS, num_bytes, 2 * rows * width * out)


def _weight(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16).astype(dtype))(key)


def _call(shape: Shape, backend: str, interpret: bool) -> Callable[..., tuple[Array, Cache]]:
    """Attention as a function of ``q, k_new, v_new, kv_cache, write_indices, ...``."""
    return functools.partial(
        ragged_paged_attention,
        scale=shape.head_dim**-0.5,
        backend=backend,
        interpret=interpret,
        device_kind=jax.devices()[0].device_kind,
    )


@functools.lru_cache(maxsize=8)
def _program(shape: Shape, backend: str, dry_run: bool) -> Callable[..., tuple[Array, list[Cache]]]:
    """``(q, caches, k_new, v_new, write_indices, ...) -> (q, caches)``: a chain of calls, as of a model's layers."""
    num_calls = 1 if dry_run else NUM_CALLS
    # Traced once, compiled once, called several times.
    attend = jax.jit(_call(shape, backend, dry_run))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def program(q: Array, caches: list[Cache], k: Array, v: Array, *chunks: Array) -> tuple[Array, list[Cache]]:
        caches = list(caches)
        for i in range(num_calls):
            # The mean of many values is small: each layer's queries are drawn anew, in effect.
            layer = i % len(caches)
            out, caches[layer] = attend(q, k, v, caches[layer], *chunks)
            q = q + 1e-3 * out
        return q, caches

    return program


def _problem(shape: Shape) -> Problem:
    return Problem(
        num_tokens=shape.num_tokens,
        num_sequences=shape.num_sequences,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        max_keys=-(-shape.max_kv // shape.block_size) * shape.block_size,
        dtype="bfloat16",
    )
