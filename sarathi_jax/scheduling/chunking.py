"""What the policies that cut prompts share: how many tokens a step may hold, and chunks that fill it."""

from collections.abc import Sequence as Seq
from typing import Unpack

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.plan import Chooser, Chunk, ChunkSchedule, FillToEdge, KeepPace, TokenBudget
from sarathi_jax.sequence import Sequence

type Newcomers = list[tuple[Sequence, int]]
"""Waiting sequences that could start now, and behind how many tokens."""


class ChunkingScheduler(Scheduler):
    """Cuts prompts into chunks that fill what a chooser allows of a step.

    Args:
      pool, **sizes: as in `Scheduler`.
      chooser: token limit of a step by its decodes and prefill demand; None: `FillToEdge(buckets)`.
      chunk_schedule: most tokens of a step with a chunk of a prompt, by how far the prompt is; None: its limit.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        chooser: Chooser | None = None,
        chunk_schedule: ChunkSchedule | None = None,
        **sizes: Unpack[Sizes],
    ):
        super().__init__(pool, **sizes)
        self._chooser = chooser or FillToEdge(self._buckets)
        self._chunk_schedule = chunk_schedule

    @property
    def keeps_pace(self) -> bool:
        return isinstance(self._chooser, KeepPace)

    def _newcomers(self, prefills: Seq[Sequence], num_decodes: int) -> Newcomers:
        """The waiting sequences that could start now, as far as pp steps can use them."""
        if not self._waiting:
            return []
        num_tokens = self._num_stages * self._buckets[-1] - num_decodes
        num_tokens -= sum(self._capped(seq.num_computed, seq.num_uncomputed) for seq in prefills)
        newcomers = []
        for seq, start in self._affordable(prefills):
            if num_tokens <= 0:
                break
            num_tokens -= self._capped(start, seq.num_tokens - start)
            newcomers.append((seq, start))
        return newcomers

    def _wanted(self, prefills: Seq[Sequence], newcomers: Newcomers) -> list[tuple[int, int]]:
        """What they could compute now, each by itself: tokens in the cache, and tokens."""
        wanted = [(seq.num_computed, self._room(seq)) for seq in prefills]
        wanted += [(start, seq.num_tokens - start) for seq, start in newcomers]
        return [(start, self._capped(start, length)) for start, length in wanted]

    def _tightest_pace_s(self, live: Seq[Sequence]) -> float | None:
        """The least that any running decode was promised."""
        paces = [seq.request.pace_s for seq in live if seq.request.pace_s is not None and seq.is_decode]
        return min(paces, default=None)

    def _plan_chunks(self, prefills: Seq[Sequence], newcomers: Newcomers, budget: TokenBudget) -> list[Chunk]:
        """Plans a chunk of every prefill, and admits and plans newcomers, as long as the budget lasts."""
        chunks: list[Chunk] = []
        for seq in prefills:
            self._plan_prefill(seq, budget, chunks, self._most(seq.num_computed))
        for seq, start in newcomers:
            most = self._most(start)
            if not budget.room(most):
                break
            self._admit(seq)
            self._plan_prefill(seq, budget, chunks, most)
        return chunks

    def _capped(self, start: int, length: int) -> int:
        """What of so many tokens behind `start` a step may hold."""
        return length if self._chunk_schedule is None else min(length, self._chunk_schedule(start))

    def _most(self, start: int) -> int | None:
        return None if self._chunk_schedule is None else self._chunk_schedule(start)
