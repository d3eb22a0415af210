"""The specification: plain numpy, one sequence at a time, no blocking. Runs on the host, never in a trace."""

import numpy as np


def write_kv(
    k_new: np.ndarray, v_new: np.ndarray, kv_cache: tuple[np.ndarray, np.ndarray], write_indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Stores each new key and value at its slot in a copy; a slot outside the cache is dropped (padding)."""
    num_blocks, _, block_size, _ = np.shape(kv_cache[0])
    indices = np.asarray(write_indices)
    live = indices < num_blocks * block_size
    block, offset = indices[live] // block_size, indices[live] % block_size
    written = []
    for cache, new in zip(kv_cache, (k_new, v_new), strict=True):
        copy = np.array(cache)
        copy[block, :, offset] = np.asarray(new)[live].astype(copy.dtype)
        written.append(copy)
    return written[0], written[1]


def ragged_paged_attention(
    q: np.ndarray,
    k_new: np.ndarray,
    v_new: np.ndarray,
    kv_cache: tuple[np.ndarray, np.ndarray],
    write_indices: np.ndarray,
    chunk_starts: np.ndarray,
    kv_lens: np.ndarray,
    block_tables: np.ndarray,
    num_decodes: np.ndarray,
    num_chunks: np.ndarray,
    *,
    scale: float,
    window: int | None,
    dtype: type[np.floating] = np.float32,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """See `pallas_kernels.ragged_paged_attention.api`; numpy in, numpy out, computed in `dtype`."""
    del num_decodes  # a decode is a chunk of length 1
    k_cache, v_cache = write_kv(k_new, v_new, kv_cache, write_indices)
    q, tables = np.asarray(q).astype(dtype), np.asarray(block_tables)
    heads_per_kv, block_size = q.shape[1] // k_new.shape[1], k_cache.shape[2]
    out = np.zeros(q.shape, dtype)
    for s in range(int(num_chunks)):
        first, end, kv_len = int(chunk_starts[s]), int(chunk_starts[s + 1]), int(kv_lens[s])
        positions = np.arange(kv_len - (end - first), kv_len)[:, None]
        keys = np.arange(kv_len)
        visible = keys <= positions
        if window is not None:
            visible &= keys > positions - window
        # Keys that no row sees are left out: their memory may never have been written.
        keys, visible = keys[visible.any(axis=0)], visible[:, visible.any(axis=0)]
        blocks, offsets = tables[s, keys // block_size], keys % block_size
        k = k_cache[blocks, :, offsets].astype(dtype).repeat(heads_per_kv, axis=1)
        v = v_cache[blocks, :, offsets].astype(dtype).repeat(heads_per_kv, axis=1)
        scores = np.where(visible, np.einsum("qhd,khd->hqk", q[first:end], k) * dtype(scale), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[first:end] = np.einsum("hqk,khd->qhd", weights, v)
    return out, (k_cache, v_cache)
