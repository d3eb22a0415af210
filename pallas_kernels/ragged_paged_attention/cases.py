"""Batches, once for tests, benchmarks and tuning: named ones in numpy, large ones drawn on the device."""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.ragged_paged_attention.tuning import Problem


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

    @property
    def size(self) -> "Size":
        """The smallest batch that holds the case with its padding."""
        blocks = [-(-kv_len // self.block_size) for _, kv_len in self.chunks]
        return Size(
            num_tokens=sum(length for length, _ in self.chunks) + self.padding,
            num_sequences=len(self.chunks) + self.spare_sequences,
            max_blocks=max(blocks, default=0) + 1,
            num_blocks=sum(blocks) + 2,
        )


@dataclasses.dataclass(frozen=True)
class Size:
    """The dimensions that a compiled program fixes and a batch fills as far as it goes.

    Attributes:
      num_tokens, num_sequences: T and S.
      max_blocks: P, blocks of a sequence.
      num_blocks: N, blocks of the cache.
    """

    num_tokens: int
    num_sequences: int
    max_blocks: int
    num_blocks: int

    def __or__(self, other: "Size") -> "Size":
        """The smallest that holds both."""
        return Size(*map(max, dataclasses.astuple(self), dataclasses.astuple(other)))


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


def build(case: Case, seed: int = 0, poison: float = np.nan, size: Size | None = None) -> Batch:
    """Draws a batch: random blocks in random order, everything that no row may see set to `poison`.

    Args:
      case: what is in it.
      seed: of the values and of the blocks' order.
      poison: stands in the cache wherever no row may look.
      size: of the arrays; None: as small as the case allows. Cases of equal shapes can share a compiled program.
    """
    size = case.size if size is None else size | case.size
    rng = np.random.default_rng(seed)
    kv_lens = [kv_len for _, kv_len in case.chunks]
    tokens, sequences, num_blocks = size.num_tokens, size.num_sequences, size.num_blocks
    per_sequence = [-(-kv_len // case.block_size) for kv_len in kv_lens]
    ids = iter(rng.permutation(num_blocks))
    tables = np.zeros((sequences, size.max_blocks), np.int32)
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
        kv_lens=np.asarray(kv_lens + [0] * (sequences - len(kv_lens)), np.int32),
        block_tables=tables,
        num_decodes=np.asarray(case.num_decodes, np.int32),
        num_chunks=np.asarray(len(case.chunks), np.int32),
    )


def draw_cache(problem: Problem, seed: int = 0) -> tuple[Array, Array]:
    """Random keys and values on the device, blocks for `num_sequences` sequences of `max_keys` each."""
    num_blocks = problem.max_keys // problem.block_size * problem.num_sequences
    shape = (num_blocks, problem.kv_heads, problem.block_size, problem.head_dim)
    k, v = jax.random.split(jax.random.key(seed))
    return _draw(k, shape, problem.dtype), _draw(v, shape, problem.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: Array, shape: tuple[int, ...], dtype: str) -> Array:
    return jax.random.normal(key, shape, dtype)


def draw_chunks(problem: Problem, chunks: Sequence[tuple[int, int]]) -> list[Array]:
    """Everything but the cache, on the device: ``q, k_new, v_new, write_indices, ...``.

    Args:
      problem: sizes of the arrays; the cache is `draw_cache`'s.
      chunks: ``(chunk length, KV length)`` of each sequence, decodes first; each reads blocks of its own, in random
        order.
    """
    per_sequence = problem.max_keys // problem.block_size
    tables = np.random.default_rng(0).permutation(per_sequence * problem.num_sequences).astype(np.int32)
    tables = tables.reshape(problem.num_sequences, per_sequence)
    lengths = np.zeros(problem.num_sequences, np.int32)
    kv_lens = np.zeros(problem.num_sequences, np.int32)
    lengths[: len(chunks)], kv_lens[: len(chunks)] = zip(*chunks, strict=True)
    writes = np.full(problem.num_tokens, tables.size * problem.block_size, np.int32)
    for s, end in enumerate(np.cumsum(lengths)[: len(chunks)]):
        positions = np.arange(kv_lens[s] - lengths[s], kv_lens[s])
        blocks, offsets = tables[s, positions // problem.block_size], positions % problem.block_size
        writes[end - lengths[s] : end] = blocks * problem.block_size + offsets
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    num_decodes = sum(length == 1 for length, _ in chunks)
    host = (writes, starts, kv_lens, tables, np.int32(num_decodes), np.int32(len(chunks)))
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    keys = jax.random.split(jax.random.key(5), len(heads))
    drawn = [
        _draw(key, (problem.num_tokens, n, problem.head_dim), "float32") for key, n in zip(keys, heads, strict=True)
    ]
    return [*drawn, *map(jnp.asarray, host)]


CASES: dict[str, Case] = {
    # One sequence.
    "one_token": Case(((1, 1),)),
    "one_decode": Case(((1, 50),)),
    "one_row": Case(((1, 37),), padding=0, spare_sequences=0),
    "one_prefill": Case(((40, 40),)),
    "two_tokens": Case(((2, 2),)),
    "second_chunk": Case(((30, 75),)),
    "starts_on_block": Case(((20, 52),)),
    "fills_block": Case(((10, 32),)),
    "tile": Case(((64, 64),)),
    "tile_and_one": Case(((65, 65),)),
    "two_tiles_later": Case(((128, 300),)),
    "one_token_into_block": Case(((16, 49),)),
    # Several of a kind.
    "decodes": Case(((1, 1), (1, 16), (1, 17), (1, 100), (1, 33))),
    "decodes_at_block_edges": Case(((1, 15), (1, 16), (1, 17), (1, 31), (1, 32), (1, 33), (1, 48))),
    "first_tokens": Case(((1, 1), (1, 1), (1, 1))),
    "long_and_short_decodes": Case(((1, 600), (1, 1), (1, 599), (1, 2))),
    "equal_decodes": Case(tuple((1, 64) for _ in range(8))),
    "ends_on_block": Case(((16, 32), (16, 16))),
    "many_short_prefills": Case(((2, 2), (3, 3), (5, 5), (7, 30))),
    "many_short_chunks": Case(tuple((2, 20 + i) for i in range(8))),
    # Mixed.
    "mixed_3d_2p": Case(((1, 40), (1, 7), (1, 129), (70, 70), (20, 90))),
    "one_decode_one_prefill": Case(((1, 80), (90, 90))),
    "seven_decodes_one_chunk": Case((*((1, 10 * i + 5) for i in range(7)), (50, 150))),
    "last_token_of_prompt": Case(((1, 9), (5, 12), (1, 40))),
    "long_context": Case(((1, 600), (33, 530))),
    # Padding.
    "no_padding": Case(((1, 9), (6, 20)), padding=0, spare_sequences=0),
    "much_padding": Case(((1, 20), (6, 20)), padding=60, spare_sequences=5),
    "only_padding": Case((), padding=4),
    # Windows.
    "window": Case(((1, 100), (1, 10), (40, 90)), window=24),
    "window_decodes": Case(((1, 24), (1, 25), (1, 48), (1, 49), (1, 200)), window=24),
    "window_not_reached": Case(((1, 10), (12, 20)), window=24),
    "window_within_chunk": Case(((90, 90), (33, 133)), window=24),
    # Rows that see nothing of the first 128 keys, which others of their tile see.
    "window_within_tile": Case(((45, 163), (67, 161)), window=24),
    "window_of_one": Case(((1, 20), (9, 9)), window=1),
    # Heads and blocks; a combination costs every test a program.
    "mha": Case(((1, 130), (40, 300)), heads=4, kv_heads=4, block_size=128),
    "mha_short": Case(((1, 3), (1, 128), (10, 20)), heads=4, kv_heads=4, block_size=128),
    "mqa": Case(((1, 65), (40, 100)), heads=8, kv_heads=1, block_size=32),
    "mqa_block_edges": Case(((1, 32), (1, 33), (32, 64), (31, 95)), heads=8, kv_heads=1, block_size=32),
    "mqa_71": Case(((1, 40), (20, 50)), heads=71, kv_heads=1, window=300),
    "mqa_71_long_window": Case(((1, 700), (30, 600)), heads=71, kv_heads=1, window=300),
    "gqa_7": Case(((1, 65), (30, 60)), heads=14, kv_heads=2, head_dim=128, block_size=32, window=40),
    "gqa_7_decodes": Case(((1, 39), (1, 40), (1, 41)), heads=14, kv_heads=2, head_dim=128, block_size=32, window=40),
    "gqa_8": Case(((1, 65), (70, 130)), heads=16, kv_heads=2, head_dim=128, block_size=64),
    "gqa_8_decodes": Case(((1, 65), (1, 130), (1, 2)), heads=16, kv_heads=2, head_dim=128, block_size=64),
    "gqa_8_block_edges": Case(
        ((1, 64), (1, 128), (1, 129), (64, 64)), heads=16, kv_heads=2, head_dim=128, block_size=64
    ),
}


def groups() -> dict[str, list[str]]:
    """Names of the cases that can share a compiled program once padded to one `Size`, by the first of them.

    Cases without padding keep their own size.
    """
    by_shape = collections.defaultdict(list)
    for name, case in CASES.items():
        own = case.chunks if case.padding == 0 else ()
        by_shape[dataclasses.replace(case, chunks=own, padding=0, spare_sequences=0)].append(name)
    return {names[0]: names for names in by_shape.values()}
