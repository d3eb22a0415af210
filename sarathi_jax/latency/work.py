"""`Work`: what the time of a step depends on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does.

    Attributes:
      num_tokens: that pass through the model, padding included; of a compiled program its bucket.
      num_decodes: of these, each of a sequence of its own.
      num_decode_keys: keys that the decodes read, their own included.
      num_prefill_keys: keys that the chunks' queries read, summed over the queries (`chunk_keys`).
      num_sequences: decodes and chunks.
    """

    num_tokens: int
    num_decodes: int = 0
    num_decode_keys: int = 0
    num_prefill_keys: int = 0
    num_sequences: int = 1


def chunk_keys(start: int, length: int) -> int:
    """Keys that a chunk's queries read, summed over them: each sees all tokens before it, and itself.

    Args:
      start: tokens of the sequence before the chunk.
      length: of the chunk.
    """
    return length * start + length * (length + 1) // 2
