"""Named batches, once for tests, benchmarks and tuning."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: ``(chunk length, KV length)`` of each sequence, decodes first, and the shapes around them.

    Attributes:
      padding: rows behind the last chunk.
      spare_sequences: unused rows of the block tables.
    """

    chunks: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    padding: int = 3
    spare_sequences: int = 1

    @property
    def num_decodes(self) -> int:
        return next((i for i, (length, _) in enumerate(self.chunks) if length > 1), len(self.chunks))


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of `ragged_paged_attention` in numpy, float32; unused cache holds `poison`."""

    q: np.ndarray
    k_new: np.ndarray
    v_new: np.ndarray
    kv_cache: tuple[np.ndarray, np.ndarray]
    write_indices: np.ndarray
    chunk_starts: np.ndarray
    kv_lens: np.ndarray
    block_tables: np.ndarray
    num_decodes: np.ndarray
    num_chunks: np.ndarray


def build(case: Case, seed: int = 0, poison: float = np.nan) -> Batch:
    """Draws a batch: random blocks in random order, everything that no row may see set to `poison`."""
    rng = np.random.default_rng(seed)
    lengths = [length for length, _ in case.chunks]
    kv_lens = [kv_len for _, kv_len in case.chunks]
    tokens, sequences = sum(lengths) + case.padding, len(case.chunks) + case.spare_sequences
    per_sequence = [-(-kv_len // case.block_size) for kv_len in kv_lens]
    num_blocks = sum(per_sequence) + 2
    ids = iter(rng.permutation(num_blocks))
    tables = np.zeros((sequences, max(per_sequence, default=0) + 1), np.int32)
    shape = (num_blocks, case.kv_heads, case.block_size, case.head_dim)
    k_cache, v_cache = np.full(shape, poison, np.float32), np.full(shape, poison, np.float32)
    writes = np.full(tokens, num_blocks * case.block_size, np.int32)
    starts = np.zeros(sequences + 1, np.int32)
    for s, (length, kv_len) in enumerate(case.chunks):
        tables[s, : per_sequence[s]] = [next(ids) for _ in range(per_sequence[s])]
        starts[s + 1] = starts[s] + length
        slots = tables[s, np.arange(kv_len) // case.block_size] * case.block_size + np.arange(kv_len) % case.block_size
        writes[starts[s] : starts[s + 1]] = slots[kv_len - length :]
        first = 0 if case.window is None else max(0, kv_len - length - case.window + 1)
        old = slots[first : kv_len - length]
        for cache in (k_cache, v_cache):
            cache[old // case.block_size, :, old % case.block_size] = rng.standard_normal(
                (len(old), case.kv_heads, case.head_dim), np.float32
            )
    starts[len(case.chunks) + 1 :] = starts[len(case.chunks)]
    return Batch(
        q=rng.standard_normal((tokens, case.heads, case.head_dim), np.float32),
        k_new=rng.standard_normal((tokens, case.kv_heads, case.head_dim), np.float32),
        v_new=rng.standard_normal((tokens, case.kv_heads, case.head_dim), np.float32),
        kv_cache=(k_cache, v_cache),
        write_indices=writes,
        chunk_starts=starts,
        kv_lens=np.asarray(kv_lens + [0] * case.spare_sequences, np.int32),
        block_tables=tables,
        num_decodes=np.asarray(case.num_decodes, np.int32),
        num_chunks=np.asarray(len(case.chunks), np.int32),
    )


CASES: dict[str, Case] = {
    "one_token": Case(((1, 1),)),
    "one_decode": Case(((1, 50),)),
    "decodes": Case(((1, 1), (1, 16), (1, 17), (1, 100), (1, 33))),
    "one_prefill": Case(((40, 40),)),
    "tile_and_one": Case(((65, 65),)),
    "second_chunk": Case(((30, 75),)),
    "ends_on_block": Case(((16, 32), (16, 16))),
    "mixed_3d_2p": Case(((1, 40), (1, 7), (1, 129), (70, 70), (20, 90))),
    "many_short_prefills": Case(((2, 2), (3, 3), (5, 5), (7, 30))),
    "long_context": Case(((1, 600), (33, 530))),
    "window": Case(((1, 100), (1, 10), (40, 90)), window=24),
    "window_long": Case(((1, 700), (80, 600)), window=300),
    "window_of_one": Case(((1, 20), (9, 9)), window=1),
    "mha": Case(((1, 20), (12, 30)), heads=4, kv_heads=4),
    "mqa": Case(((1, 20), (12, 30)), heads=8, kv_heads=1),
    "gqa_8": Case(((1, 65), (70, 130)), heads=16, kv_heads=2, head_dim=128),
    "block_32": Case(((1, 65), (40, 100)), block_size=32),
    "block_64": Case(((1, 65), (40, 100)), block_size=64),
    "block_128": Case(((1, 130), (40, 300)), block_size=128),
    "no_padding": Case(((1, 9), (6, 20)), padding=0, spare_sequences=0),
    "only_padding": Case((), padding=4),
}
