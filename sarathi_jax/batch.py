"""`StepPlan` -> `StepBatch`: the padded arrays of a step, packed on the host into one buffer, hence one transfer.

Legend of the shapes, here and everywhere: T step tokens (the bucket), S sequences of a step, P blocks a sequence,
N pool blocks, K block size, R device rows, L longest sequence, H/G query/KV heads, D head size, E hidden size,
V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from sarathi_jax.config import CacheConfig
from sarathi_jax.kv.blocks import BlockTable
from sarathi_jax.scheduling.plan import StepPlan
from sarathi_jax.sequence import Sequence

ON_DEVICE = -1
"""In `StepBatch.tokens`: the token was drawn by a step that the host has not seen yet; read it from the history."""


@dataclasses.dataclass(frozen=True)
class StepBatch[A: (jax.Array, np.ndarray)]:
    """What the device sees of a step; decodes come first. Padding is such that it writes nowhere and samples nothing.

    In numpy while it is packed, traced inside the program.

    Attributes:
      tokens: i32[T]; `ON_DEVICE` where only the device knows.
      positions: i32[T], index of each token in its sequence.
      token_rows: i32[T], device row of each token's sequence; R for padding.
      write_indices: i32[T], block * K + offset where K and V go; N * K for padding.
      targets: i32[T], the following prompt token where its log-probability is wanted, else -1.
      chunk_starts: i32[S + 1], cumulative chunk lengths.
      kv_lens: i32[S], tokens of each sequence once the step is done; also the position of the token to draw.
      rows: i32[S], device row of each sequence.
      samples: i32[S], 1 where the chunk draws a token.
      block_tables: i32[S, P].
      num_decodes, num_chunks: i32[1].
    """

    tokens: A
    positions: A
    token_rows: A
    write_indices: A
    targets: A
    chunk_starts: A
    kv_lens: A
    rows: A
    samples: A
    block_tables: A
    num_decodes: A
    num_chunks: A


class BatchLayout:
    """How a `StepBatch` of one bucket lies in its buffer.

    Args:
      bucket: T.
      num_rows: R; a step holds at most ``min(T, R)`` sequences.
      cache: the pool and the longest sequence.
    """

    def __init__(self, bucket: int, num_rows: int, cache: CacheConfig):
        self.bucket = bucket
        self.num_seqs = min(bucket, num_rows)
        self._num_rows = num_rows
        self._cache = cache
        per_token, per_seq = (bucket,), (self.num_seqs,)
        self._shapes: dict[str, tuple[int, ...]] = {
            "tokens": per_token,
            "positions": per_token,
            "token_rows": per_token,
            "write_indices": per_token,
            "targets": per_token,
            "chunk_starts": (self.num_seqs + 1,),
            "kv_lens": per_seq,
            "rows": per_seq,
            "samples": per_seq,
            "block_tables": (self.num_seqs, cache.max_blocks_per_seq),
            "num_decodes": (1,),
            "num_chunks": (1,),
        }
        ends = np.cumsum([math.prod(shape) for shape in self._shapes.values()])
        self.size = int(ends[-1])
        self._slices = {
            name: slice(int(end) - math.prod(shape), int(end))
            for (name, shape), end in zip(self._shapes.items(), ends, strict=True)
        }

    def unpack[A: (jax.Array, np.ndarray)](self, buffer: A) -> StepBatch[A]:
        """Views of the buffer i32[size]; inside or outside of a trace."""
        return StepBatch(**{name: buffer[self._slices[name]].reshape(shape) for name, shape in self._shapes.items()})

    def pack(
        self, plan: StepPlan, sequences: Mapping[int, Sequence], table_of: Callable[[int], BlockTable]
    ) -> np.ndarray:
        """Fills a new buffer.

        Args:
          plan: at most `bucket` tokens.
          sequences: of the plan's chunks, after `Sequence.advance`.
          table_of: blocks of a sequence, grown to hold its chunk.

        Returns:
          i32[size], never written again: the device may alias it.
        """
        buffer = np.zeros(self.size, np.int32)
        batch = self.unpack(buffer)
        block_size = self._cache.block_size
        tokens, positions, rows, writes, kv_lens, samples = [], [], [], [], [], []
        for i, chunk in enumerate(plan.chunks):
            seq, ids = sequences[chunk.seq_id], table_of(chunk.seq_id).ids
            end = chunk.start + chunk.length
            batch.block_tables[i, : len(ids)] = ids
            rows.append(seq.row)
            kv_lens.append(end)
            samples.append(chunk.samples)
            if chunk.length == 1:
                known = chunk.start < len(seq.tokens)
                tokens.append(seq.tokens[chunk.start] if known else ON_DEVICE)
                positions.append(chunk.start)
                writes.append(ids[chunk.start // block_size] * block_size + chunk.start % block_size)
                continue
            known = seq.tokens[chunk.start : end]
            tokens += known + [ON_DEVICE] * (chunk.length - len(known))
            span = range(chunk.start, end)
            positions += span
            writes += [ids[position // block_size] * block_size + position % block_size for position in span]
        lengths = [chunk.length for chunk in plan.chunks]
        num_tokens, num_chunks = len(tokens), len(lengths)
        batch.tokens[:num_tokens] = tokens
        batch.positions[:num_tokens] = positions
        batch.token_rows[:num_tokens] = np.repeat(rows, lengths)
        batch.token_rows[num_tokens:] = self._num_rows
        batch.write_indices[:num_tokens] = writes
        batch.write_indices[num_tokens:] = self._cache.num_blocks * block_size
        batch.chunk_starts[1 : num_chunks + 1] = np.cumsum(lengths)
        batch.chunk_starts[num_chunks + 1 :] = num_tokens
        batch.kv_lens[:num_chunks] = kv_lens
        batch.rows[:num_chunks] = rows
        batch.samples[:num_chunks] = samples
        batch.num_decodes[0] = plan.num_decodes
        batch.num_chunks[0] = num_chunks
        self._set_targets(batch, plan, sequences)
        buffer.setflags(write=False)
        return buffer

    def _set_targets(self, batch: StepBatch[np.ndarray], plan: StepPlan, sequences: Mapping[int, Sequence]) -> None:
        """Asks for the log-probability of every prompt token that follows a token of the step, where wanted."""
        batch.targets[:] = -1
        first = 0
        for chunk in plan.chunks:
            seq = sequences[chunk.seq_id]
            if seq.request.params.prompt_logprobs is not None:
                following = seq.tokens[chunk.start + 1 : min(chunk.start + chunk.length + 1, seq.num_prompt)]
                batch.targets[first : first + len(following)] = following
            first += chunk.length
