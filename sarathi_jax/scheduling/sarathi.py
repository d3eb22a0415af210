"""Stall-free batching (Sarathi-Serve, Algorithm 3): every running decode, then prefill chunks, then new requests.

Where the paper is silent (admission, preemption, the bucket of a step) see docs/decisions/scheduler.md; for pipelines,
docs/decisions/pipeline-parallel.md.
"""

from collections.abc import Sequence as Seq
from typing import Unpack

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.scheduling.base import Sizes
from sarathi_jax.scheduling.chunking import ChunkingScheduler, Newcomers
from sarathi_jax.scheduling.plan import Chooser, Chunk, ChunkSchedule, Demand, StepPlan, TokenBudget
from sarathi_jax.sequence import Sequence

SMALLEST_SHARE = 64  # tokens of prompts that a micro-batch takes before it leaves some to the next ones


class SarathiScheduler(ChunkingScheduler):
    """Never lets a decode wait for a prefill: prompts are cut into chunks that fill what the decodes leave of a step.

    In a pipeline of pp stages decodes and prompts are shared out evenly among the micro-batches in flight, which use
    one bucket; the chunks of a prompt follow each other at once.

    Args:
      pool, chooser, chunk_schedule, **sizes: as in `ChunkingScheduler`.
      cuts_prompts: False: the chunk size is the maximum length (hybrid batching only, of the paper's ablation): a
        prompt enters only whole, beside the decodes, so it must fit into the largest bucket, which is every step's
        limit. While more decodes run than leave it room there, it waits, and whoever came after it too. Only a
        preempted sequence that outgrew the bucket runs in pieces.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        chooser: Chooser | None = None,
        chunk_schedule: ChunkSchedule | None = None,
        cuts_prompts: bool = True,
        **sizes: Unpack[Sizes],
    ):
        super().__init__(pool, chooser=chooser, chunk_schedule=chunk_schedule, **sizes)
        self._cuts_prompts = cuts_prompts
        # Token limit of the micro-batches in flight, and how many may still follow before it is chosen again.
        self._limit, self._num_following = 0, 0

    def schedule(self) -> StepPlan | None:
        live = self._live()
        preempted: list[int] = []
        most_decodes, largest_share = self._shares(live)
        away = frozenset().union(*self._away)
        decodes, prefills = self._plan_decodes(live, away, most_decodes, preempted)
        newcomers: Newcomers = []
        # Without blocks for everyone who runs there are none for newcomers, the preempted ones first of all.
        if not preempted and self._cuts_prompts:
            newcomers = self._newcomers(prefills, len(decodes))
        elif not preempted:
            newcomers = self._whole_newcomers(prefills, self._buckets[-1] - len(decodes))

        chunks: list[Chunk] = []
        if prefills or newcomers or self._num_stages > 1:  # else there is nothing to choose
            if self._num_following == 0:
                self._choose(live, decodes, largest_share, self._wanted(prefills, newcomers))
            self._num_following -= 1
            budget = TokenBudget(self._limit)
            budget.take(len(decodes))
            chunks = self._plan_chunks(prefills, newcomers, budget)
        has_own_bucket = self._num_stages == 1 or not self._cuts_prompts
        plan = self._step(decodes, chunks, preempted, None if has_own_bucket else self._bucket(self._limit))
        if plan is None:
            self._num_following = 0
        return plan

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

    def _choose(
        self, live: Seq[Sequence], decodes: Seq[Chunk], largest_share: int, prefills: Seq[tuple[int, int]]
    ) -> None:
        """Sets the token limit of the next pp micro-batches, among which the prompts are shared out."""
        self._num_following = self._num_stages
        if not self._cuts_prompts:
            self._limit = self._buckets[-1]
            return
        num_decodes = len(decodes) if self._num_stages == 1 else largest_share
        num_keys = sum(chunk.start + 1 for chunk in decodes) * num_decodes // max(1, len(decodes))
        num_tokens = sum(length for _, length in prefills)
        share = TokenBudget(max(SMALLEST_SHARE, -(-num_tokens // self._num_stages)))
        own = tuple((start, taken) for start, length in prefills if (taken := share.take(length)))
        behind = () if self._num_stages == 1 else tuple(self._behind)
        limit = self._chooser(Demand(num_decodes, own, num_keys, self._tightest_pace_s(live), behind=behind))
        self._limit = max(self._buckets[0], min(limit, self._buckets[-1]))
        if self._num_stages > 1:
            self._limit = max(self._limit, num_decodes)  # the bucket of all must hold them
