"""Stall-free batching (Sarathi-Serve, Algorithm 3): every running decode, then prefill chunks, then new requests.

Where the paper is silent (admission, preemption, the bucket of a step) see docs/decisions/scheduler.md; for pipelines,
docs/decisions/pipeline-parallel.md.
"""

import collections
from collections.abc import Sequence as Seq
from typing import Unpack

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.scheduling.base import Scheduler, Sizes, decodes_first
from sarathi_jax.scheduling.plan import Chooser, Chunk, Demand, FillToEdge, KeepPace, StepPlan, TokenBudget
from sarathi_jax.sequence import Sequence

SMALLEST_SHARE = 64  # tokens of prompts that a micro-batch takes before it leaves some to the next ones


class SarathiScheduler(Scheduler):
    """Never lets a decode wait for a prefill: prompts are cut into chunks that fill what the decodes leave of a step.

    In a pipeline of pp stages decodes and prompts are shared out evenly among the micro-batches in flight, which use
    one bucket; the chunks of a prompt follow each other at once.

    Args:
      pool, **sizes: as in `Scheduler`.
      chooser: token limit of a step by its decodes and prefill demand; None: `FillToEdge(buckets)`.
    """

    def __init__(self, pool: BlockPool, *, chooser: Chooser | None = None, **sizes: Unpack[Sizes]):
        super().__init__(pool, **sizes)
        self._chooser = chooser or FillToEdge(self._buckets)
        # Sequences whose newest token is still on its way through the stages, for each of the last pp - 1 calls.
        self._away: collections.deque[frozenset[int]] = collections.deque(maxlen=self._num_stages - 1)
        # Token limit of the micro-batches in flight, and how many may still follow before it is chosen again.
        self._limit, self._num_following = 0, 0

    @property
    def keeps_pace(self) -> bool:
        return isinstance(self._chooser, KeepPace)

    def schedule(self) -> StepPlan | None:
        live = self._live()
        preempted: list[int] = []
        most_decodes, largest_share = self._shares(live)
        away = frozenset().union(*self._away)
        decodes, prefills = self._plan_decodes(live, away, most_decodes, preempted)
        # Without blocks for everyone who runs there are none for newcomers, the preempted ones first of all.
        newcomers = [] if preempted else self._newcomers(prefills, len(decodes))

        if self._num_following == 0:
            wanted = [(seq.num_computed, self._room(seq)) for seq in prefills]
            wanted += [(start, seq.num_tokens - start) for seq, start in newcomers]
            self._choose(live, decodes, largest_share, wanted)
        budget = TokenBudget(self._limit)
        budget.take(len(decodes))
        chunks: list[Chunk] = []
        for seq in prefills:
            self._plan_prefill(seq, budget, chunks)
        for seq, _ in newcomers:
            if not budget.left:
                break
            self._admit(seq)
            self._plan_prefill(seq, budget, chunks)

        alone, chunks = decodes_first(chunks)
        decodes += alone
        self._away.append(frozenset(chunk.seq_id for chunk in (*decodes, *chunks) if chunk.samples))
        if not decodes and not chunks:
            self._num_following = 0
            return None
        self._num_following -= 1
        num_tokens = len(decodes) + sum(chunk.length for chunk in chunks)
        bucket = self._bucket(num_tokens if self._num_stages == 1 else self._limit)
        return StepPlan((*decodes, *chunks), bucket, len(decodes), tuple(preempted))

    def _shares(self, live: list[Sequence]) -> tuple[int, int]:
        """An even share of the decodes for the next micro-batch, at most what its bucket has room for where that is
        chosen already, and the largest share that any micro-batch takes."""
        if self._num_stages == 1:
            return len(live), len(live)
        ids = {seq.seq_id for seq in live if seq.is_decode}
        share, num_larger = divmod(len(ids), self._num_stages)
        # Of any pp micro-batches in a row so many take one more.
        num_larger -= sum(len(ids & group) > share for group in self._away)
        most, largest = share + (num_larger > 0), -(-len(ids) // self._num_stages)
        return min(most, self._limit) if self._num_following else most, largest

    def _newcomers(self, prefills: list[Sequence], num_decodes: int) -> list[tuple[Sequence, int]]:
        """The waiting sequences that could start now, and behind how many tokens, as far as pp steps can use them."""
        num_tokens = self._num_stages * self._buckets[-1] - num_decodes - sum(seq.num_uncomputed for seq in prefills)
        newcomers = []
        for seq, start in self._affordable(prefills):
            if num_tokens <= 0:
                break
            num_tokens -= seq.num_tokens - start
            newcomers.append((seq, start))
        return newcomers

    def _choose(
        self, live: Seq[Sequence], decodes: Seq[Chunk], largest_share: int, prefills: Seq[tuple[int, int]]
    ) -> None:
        """Sets the token limit of the next pp micro-batches, among which the prompts are shared out."""
        num_decodes = len(decodes) if self._num_stages == 1 else largest_share
        num_keys = sum(chunk.start + 1 for chunk in decodes) * num_decodes // max(1, len(decodes))
        paces = [seq.request.pace_s for seq in live if seq.is_decode and seq.request.pace_s is not None]
        num_tokens = sum(length for _, length in prefills)
        share = TokenBudget(max(SMALLEST_SHARE, -(-num_tokens // self._num_stages)))
        own = tuple((start, taken) for start, length in prefills if (taken := share.take(length)))
        limit = self._chooser(Demand(num_decodes, own, num_keys, min(paces, default=None)))
        self._limit = max(self._buckets[0], min(limit, self._buckets[-1]))
        if self._num_stages > 1:
            self._limit = max(self._limit, num_decodes)  # the bucket of all must hold them
        self._num_following = self._num_stages
