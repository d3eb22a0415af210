"""The public call: checks shapes, picks the backend by name."""

import dataclasses
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.ragged_paged_attention import mosaic_gpu, mosaic_tpu, triton, tuning, xla


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation and what it serves; None: anything.

    Attributes:
      module: has the implementation, `ragged_paged_attention`. That of a Pallas kernel takes the keywords `interpret`
        and `tuning`, and stands beside `Tuning`, `CHOICES` and `choose_tuning`.
      platform: where it runs (``jax.default_backend()`` there is ``gpu`` for ``cuda``); anywhere by interpretation.
      head_dims: sizes of a head.
      block_sizes: tokens of a cache block.
      dtypes: of the cache.
    """

    module: ModuleType
    platform: str | None = None
    head_dims: tuple[int, ...] | None = None
    block_sizes: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None

    def refusals(self, head_dim: int, block_size: int, dtype: Any) -> list[str]:
        """What it cannot serve, in words; empty when it can serve everything asked for."""
        asked = (
            ("head size", head_dim, self.head_dims),
            ("block size", block_size, self.block_sizes),
            ("cache of", jnp.dtype(dtype).name, self.dtypes),
        )
        return [
            f"{what} {value} (only {', '.join(map(str, served))})"
            for what, value, served in asked
            if served is not None and value not in served
        ]


def _kernel(module: ModuleType, platform: str) -> Backend:
    return Backend(module, platform, module.HEAD_DIMS, module.BLOCK_SIZES, module.DTYPES)


# Experimental but for `xla`: they compile for their devices, which have not run them yet.
BACKENDS: dict[str, Backend] = {
    "xla": Backend(xla),
    "triton": _kernel(triton, "cuda"),
    "mosaic_gpu": _kernel(mosaic_gpu, "cuda"),
    "mosaic_tpu": _kernel(mosaic_tpu, "tpu"),
}


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
    window: int | None = None,
    backend: str = "xla",
    interpret: Any = False,
    device_kind: str | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Causal attention of a mixed batch of chunks over a paged KV cache that it extends by the batch's keys and values.

    Row t of chunk s stands at position ``kv_lens[s] - (chunk_starts[s + 1] - chunk_starts[s]) + t - chunk_starts[s]``
    of its sequence and sees every key up to its own, at most `window` of them. Keys and values of the step are written
    first, so the cache holds ``kv_lens[s]`` of each when attention reads it. Sarathi-Serve, section 4: prefill chunks
    and decodes in one batch; PagedAttention (arXiv 2309.06180): the block tables.

    Args:
      q: [T, H, D]; rows from ``chunk_starts[num_chunks]`` on are padding, and so is their result (zero).
      k_new: [T, G, D], keys; G divides H.
      v_new: [T, G, D], values.
      kv_cache: keys and values, [N, G, K, D] each; donate them and the write happens in place.
      write_indices: i32[T], block * K + offset for each token; N * K or more: not written.
      chunk_starts: i32[S + 1], ascending; chunk s is rows ``chunk_starts[s]:chunk_starts[s + 1]``.
      kv_lens: i32[S], tokens of each sequence, the chunk's own included.
      block_tables: i32[S, P], every entry in [0, N); those that no visible key needs may hold anything in range.
      num_decodes: i32 scalar, leading chunks of length 1.
      num_chunks: i32 scalar, chunks in use.
      scale: multiplies the scores.
      window: a row sees itself and ``window - 1`` keys before it; None: all.
      backend: a name in `BACKENDS`.
      interpret: True runs a Pallas kernel by interpretation, slowly but on any platform; or what Pallas itself takes
        for that backend, such as ``pltpu.InterpretParams(detect_races=True)``.
      device_kind: as ``jax.Device.device_kind`` names it: kernels are cut as was measured best on such a device
        (`tuning`); None: by heuristic.

    Returns:
      f32[T, H, D] and the new cache.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown backend, or one that does not serve this head size,
        block size or dtype; named.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    _validate(q, k_new, v_new, kv_cache, write_indices, chunk_starts, kv_lens, block_tables, window)
    _, _, block_size, head_dim = kv_cache[0].shape
    check_backend(backend, head_dim, block_size, kv_cache[0].dtype)
    chosen = BACKENDS[backend]
    options = {}
    if chosen.platform is not None:
        fields = None
        if device_kind is not None:
            fields = tuning.look_up(device_kind, backend, tuning.problem_of(q, kv_cache, block_tables))
        options = {"interpret": interpret, "tuning": None if fields is None else chosen.module.Tuning(**fields)}
    chunks = (write_indices, chunk_starts, kv_lens, block_tables, num_decodes, num_chunks)
    return chosen.module.ragged_paged_attention(
        q, k_new, v_new, kv_cache, *chunks, scale=scale, window=window, **options
    )


def check_backend(backend: str, head_dim: int, block_size: int, dtype: Any) -> None:
    """Refuses a backend that does not serve these shapes.

    Args:
      backend: a name in `BACKENDS`.
      head_dim: size of a head.
      block_size: tokens of a cache block.
      dtype: of the cache.

    Raises:
      ValueError: it does not; names what, and the backends that do.
    """
    refusals = BACKENDS[backend].refusals(head_dim, block_size, dtype)
    if refusals:
        serving = [name for name, other in BACKENDS.items() if not other.refusals(head_dim, block_size, dtype)]
        raise ValueError(
            f"attention backend {backend!r} does not serve {', '.join(refusals)}: choose {' or '.join(serving)}"
        )


def check_platform(backend: str, platform: str) -> None:
    """Refuses a backend whose kernels this platform cannot run.

    Args:
      backend: a name in `BACKENDS`.
      platform: as ``jax.default_backend()`` names it.

    Raises:
      ValueError: unknown backend, or one for another platform; names those that run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
    here = "cuda" if platform == "gpu" else platform
    running = [name for name, other in BACKENDS.items() if other.platform in (None, here)]
    if backend not in running:
        raise ValueError(
            f"attention backend {backend!r} needs {BACKENDS[backend].platform}, this is {here}: "
            f"choose {' or '.join(running)}"
        )


def _validate(q, k_new, v_new, kv_cache, write_indices, chunk_starts, kv_lens, block_tables, window) -> None:
    tokens, heads, head_dim = q.shape
    kv_heads, sequences = k_new.shape[1], kv_lens.shape[0]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    for name, array, shape in (
        ("k_new", k_new, (tokens, kv_heads, head_dim)),
        ("v_new", v_new, (tokens, kv_heads, head_dim)),
        ("k_cache", kv_cache[0], (None, kv_heads, None, head_dim)),
        ("v_cache", kv_cache[1], kv_cache[0].shape),
        ("write_indices", write_indices, (tokens,)),
        ("chunk_starts", chunk_starts, (sequences + 1,)),
        ("block_tables", block_tables, (sequences, None)),
    ):
        fits = array.ndim == len(shape) and all(w in (None, n) for n, w in zip(array.shape, shape, strict=True))
        if not fits:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    for name, array in (("write_indices", write_indices), ("chunk_starts", chunk_starts), ("kv_lens", kv_lens)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} is {array.dtype}, expected int32")
    if kv_cache[0].dtype != kv_cache[1].dtype:
        raise ValueError(f"k_cache is {kv_cache[0].dtype} and v_cache {kv_cache[1].dtype}: they must agree")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be positive or None")
