"""What a step will do (`StepPlan`), what came of it (`StepResult`), and how many tokens it may hold (`TokenBudget`)."""

import bisect
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence, computed in one step; a decode is a chunk of length 1.

    Attributes:
      seq_id: whose tokens.
      start: index of the first token in the sequence.
      length: number of tokens.
      samples: the chunk reaches the newest token, so the step draws the next one.
    """

    seq_id: int
    start: int
    length: int
    samples: bool


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step: chunks of at most `bucket` tokens in all, those of length 1 that sample (decodes) first.

    Attributes:
      chunks: at most one a sequence.
      bucket: compiled step size; ``bucket - num_tokens`` tokens are padding.
      num_decodes: leading chunks of length 1.
      preempted: ids of the sequences that lost their blocks so that this step could run.
    """

    chunks: tuple[Chunk, ...]
    bucket: int
    num_decodes: int
    preempted: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step drew, one row a chunk of its plan (rows of chunks that do not sample hold nothing).

    Attributes:
      tokens: i32[chunks], the drawn tokens.
      logprobs: f32[chunks], their log-probabilities under the unmodified distribution.
      top_ids, top_logprobs: [chunks, k], the most likely tokens, or None where no request of the step asked.
      prompt_logprobs: f32[num_tokens], of the token that follows each token of the step, or None.
      prompt_top_ids, prompt_top_logprobs: [num_tokens, k], or None.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    prompt_logprobs: np.ndarray | None = None
    prompt_top_ids: np.ndarray | None = None
    prompt_top_logprobs: np.ndarray | None = None
