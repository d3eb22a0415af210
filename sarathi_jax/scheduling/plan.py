"""What a step will do (`StepPlan`), who does it (`Executor`), what came of it, how much it may hold (`TokenBudget`)."""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from sarathi_jax.latency import Backlog, StepTimes, Work, chunk_keys


class Chunk(NamedTuple):
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

    @property
    def num_decode_keys(self) -> int:
        """Keys that the decodes read, their own included."""
        return sum(chunk.start + 1 for chunk in self.chunks[: self.num_decodes])

    @property
    def num_prefill_keys(self) -> int:
        """Keys that the other chunks' tokens read, summed over the tokens."""
        return sum(chunk_keys(chunk.start, chunk.length) for chunk in self.chunks[self.num_decodes :])

    @property
    def work(self) -> Work:
        """What its time depends on, padding included."""
        return Work(self.bucket, self.num_decodes, self.num_decode_keys, self.num_prefill_keys, len(self.chunks))


@dataclasses.dataclass(frozen=True)
class SchedulerState:
    """What a scheduler has in hand.

    Attributes:
      num_running, num_waiting: sequences.
      num_blocks, num_free_blocks: of the KV cache.
      backlog: what a new request would find before it.
      num_prefix_queries, num_prefix_hits: prompt tokens looked up in the prefix cache since the start, and found there.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    backlog: Backlog
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step drew, one row a chunk of its plan (rows of chunks that do not sample hold nothing).

    Attributes:
      tokens: i32[chunks], the drawn tokens.
      logprobs: f32[chunks], their log-probabilities under the unmodified distribution; None where nobody asked.
      top_ids, top_logprobs: [chunks, k], the most likely tokens, or None.
      prompt_logprobs: f32[num_tokens], of the token that follows each token of the step, or None.
      prompt_top_ids, prompt_top_logprobs: [num_tokens, k], or None.
    """

    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    prompt_logprobs: np.ndarray | None = None
    prompt_top_ids: np.ndarray | None = None
    prompt_top_logprobs: np.ndarray | None = None


class TokenBudget:
    """Tokens that may still go into a step; never negative.

    Args:
      limit: tokens of the step (the paper's tau, section 4.3).
    """

    def __init__(self, limit: int):
        self.left = max(0, limit)
        self.taken = 0

    def room(self, most: int | None = None) -> int:
        """Tokens that may still be taken, up to `most` in the whole step if that is less."""
        return self.left if most is None else max(0, min(self.left, most - self.taken))

    def take(self, wanted: int, most: int | None = None) -> int:
        """Takes up to `wanted` tokens, as far as there is `room`, and returns how many there were."""
        num_tokens = max(0, min(wanted, self.room(most)))
        self.left -= num_tokens
        self.taken += num_tokens
        return num_tokens


@dataclasses.dataclass(frozen=True)
class ChunkSchedule:
    """Chunks that shrink while a prompt progresses, since the later ones read more keys: the paper's dynamic chunks.

    Attributes:
      high, low: most tokens of a step with a first chunk, and with a last one.
      num_stages: equal stages in which they fall.
      num_tokens: of the prompt, over which they fall; later chunks stay at `low`.
    """

    high: int
    low: int
    num_stages: int
    num_tokens: int

    def __call__(self, start: int) -> int:
        """Most tokens of a step with a chunk that begins behind `start` tokens."""
        stage = min(start * self.num_stages // self.num_tokens, self.num_stages - 1)
        return self.high - (self.high - self.low) * stage // max(1, self.num_stages - 1)


@dataclasses.dataclass(frozen=True)
class Demand:
    """What could enter a step, for the choice of its bucket.

    Attributes:
      num_decodes: of the step; in a pipeline the most of any micro-batch in flight.
      prefills: of each prefill that has something to compute, first come first served: tokens of it that are in the
        cache, and tokens that could be computed now.
      num_decode_keys: keys that the decodes read, themselves included.
      pace_s: the least `Request.pace_s` of all running decodes; None: nobody was promised anything.
      alternates: the decodes do not enter this step but the next one, alone.
      behind: in a pipeline, the last pp steps, among them those under way; None for one that held nothing. Empty: they
        are as long as this one.
    """

    num_decodes: int
    prefills: tuple[tuple[int, int], ...] = ()
    num_decode_keys: int = 0
    pace_s: float | None = None
    alternates: bool = False
    behind: tuple[StepPlan | None, ...] = ()

    @property
    def num_beside(self) -> int:
        """Decodes in the same step."""
        return 0 if self.alternates else self.num_decodes

    @property
    def num_prefill_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.prefills)


Chooser = Callable[[Demand], int]
"""``demand -> limit`` of the step's `TokenBudget`.

The scheduler clamps it to the range of the buckets and runs every decode whatever it is: a limit of at most
`num_decodes` keeps prefills out of the step, except from the padding of the smallest bucket.
"""


@dataclasses.dataclass(frozen=True)
class FillToEdge:
    """Chooses the bucket by demand: pad a nearly full step, else fill the next lower bucket exactly to its edge.

    What does not fit into the lower bucket follows in the next step, so padding becomes prefill work. The higher
    bucket is used where the demand fills `min_fill` of it, and where the decodes would leave the lower bucket room for
    less than half of the prefill, which would then drip into many steps.

    Attributes:
      buckets: compiled step sizes, ascending.
      min_fill: share of a bucket from which padding it is better than a step more.
      flat_tokens: buckets up to this size are padded always: so small a step reads every weight for a few tokens, so
        that its time hardly depends on their number and a step more costs as much as the padding of many.
    """

    buckets: tuple[int, ...]
    min_fill: float = 0.75
    flat_tokens: int = 64

    def __call__(self, demand: Demand) -> int:
        num_decodes, num_prefill_tokens = demand.num_beside, demand.num_prefill_tokens
        num_tokens = num_decodes + num_prefill_tokens
        index = bisect.bisect_left(self.buckets, num_tokens)
        if index == len(self.buckets):
            return self.buckets[-1]
        higher = self.buckets[index]
        if index == 0 or higher <= self.flat_tokens or num_tokens >= self.min_fill * higher:
            return higher
        lower = self.buckets[index - 1]
        return lower if 2 * (lower - num_decodes) >= num_prefill_tokens else higher


class KeepPace:
    """Chooses the largest bucket whose time keeps what the tightest running request was promised (`Demand.pace_s`).

    The paper sets its budget once, by hand, from a profile (section 4.3), and leaves a dynamic one to future work. Here
    steps are programs of fixed shape with known times, so it is chosen anew for every step. Where only the decodes fit,
    or not even they, no prompt enters: it waits until some of them have ended, which none can replace meanwhile.

    Args:
      times: of the programs.
      buckets: compiled step sizes, ascending.
      num_stages: pp; a token comes round after as many steps, and later where they are longer than those behind them
        (docs/decisions/promised-times.md).
    """

    def __init__(self, times: StepTimes, buckets: tuple[int, ...], num_stages: int = 1):
        self._times = times
        self._buckets = buckets
        self._num_stages = num_stages
        self._fill = [FillToEdge(buckets[: i + 1]) for i in range(len(buckets))]

    def __call__(self, demand: Demand) -> int:
        if demand.pace_s is None or not demand.num_decodes:
            return self._fill[-1](demand)
        allowed_s = self._allowed_s(demand, demand.pace_s)
        for i in reversed(range(len(self._buckets))):
            if self._buckets[i] > demand.num_beside and self._fits(self._buckets[i], demand, allowed_s):
                return self._fill[i](demand)
        return demand.num_beside

    def _allowed_s(self, demand: Demand, pace_s: float) -> float:
        """What pp steps in a row may take.

        Longer ones than those behind them find the later stages idle, and leave them waiting: a token that the steps
        behind drew comes round after 2 pp - 1 of them, less the pp - 1 that passed the later stages meanwhile.
        """
        if not demand.behind:
            return pace_s
        num_more = self._num_stages - 1
        shortest_s = min(0.0 if plan is None else self._times.expected_s(plan.work) for plan in demand.behind)
        return min(pace_s, (pace_s + num_more * shortest_s) * self._num_stages / (self._num_stages + num_more))

    def _fits(self, bucket: int, demand: Demand, allowed_s: float) -> bool:
        left, num_keys = bucket - demand.num_beside, 0
        for start, num_tokens in demand.prefills:
            length = min(left, num_tokens)
            num_keys += chunk_keys(start, length)
            left -= length
            if not left:
                break
        if not demand.alternates:
            work = Work(bucket, demand.num_decodes, demand.num_decode_keys, num_keys)
            return self._num_stages * self._times.bound_s(work) <= allowed_s
        # A step of prompts and one of decodes, as often as it takes a token to come round and find one of decodes.
        decode_bucket = self._buckets[bisect.bisect_left(self._buckets, demand.num_decodes, hi=len(self._buckets) - 1)]
        pair_s = self._times.bound_s(Work(bucket, num_prefill_keys=num_keys))
        pair_s += self._times.bound_s(Work(decode_bucket, demand.num_decodes, demand.num_decode_keys))
        return (self._num_stages + 1) // 2 * pair_s <= allowed_s


class Executor(Protocol):
    """Runs steps in the order in which they are launched.

    With a pipeline of pp stages a step takes pp launches: each lets its own step in, if any, and those before it move
    on by one stage.
    """

    def launch(self, plan: StepPlan | None) -> Any:
        """Starts a step, or none, and returns at once; what comes back is only for `collect`."""
        ...

    def collect(self, handle: Any) -> StepResult:
        """Waits for a step that was launched, at least pp - 1 launches ago."""
        ...
