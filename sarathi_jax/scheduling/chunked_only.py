"""Chunked prefills without hybrid batches (the paper's ablation): steps of chunks and steps of decodes by turns."""

from collections.abc import Sequence as Seq

from sarathi_jax.scheduling.chunking import ChunkingScheduler
from sarathi_jax.scheduling.plan import Chunk, Demand, StepPlan, TokenBudget
from sarathi_jax.sequence import Sequence


class ChunkedOnlyScheduler(ChunkingScheduler):
    """Cuts prompts into chunks that fill a step, but never mixes them with decodes: where there is work of both kinds,
    a step of the one follows a step of the other.

    So nobody who generates waits longer than a chunk, and every weight is read twice as often. In a pipeline of pp
    stages the decodes are shared out among those of any pp micro-batches in a row whose turn is theirs.
    """

    _is_turn_of_prompts = True

    def schedule(self) -> StepPlan | None:
        live = self._live()
        prefills = [seq for seq in live if not seq.is_decode]
        preempted: list[int] = []
        decodes: list[Chunk] = []
        chunks = self._plan_prompts(live, prefills) if self._is_turn_of_prompts else []
        if not chunks:
            away = frozenset().union(*self._away)
            num_turns = -(-self._num_stages // 2) if prefills else self._num_stages
            most = min(self._buckets[-1], -(-(len(live) - len(prefills)) // num_turns))
            decodes, prefills = self._plan_decodes(live, away, most, preempted)
        if not chunks and not decodes:
            chunks = self._plan_prompts(live, prefills)
        self._is_turn_of_prompts = not chunks
        return self._step(decodes, chunks, preempted)

    def _plan_prompts(self, live: Seq[Sequence], prefills: Seq[Sequence]) -> list[Chunk]:
        newcomers = self._newcomers(prefills, 0)
        wanted = self._wanted(prefills, newcomers)
        if not wanted:
            return []
        decodes = [seq for seq in live if seq.is_decode]
        num_keys = sum(seq.num_computed + 1 for seq in decodes)
        limit = self._chooser(
            Demand(len(decodes), tuple(wanted), num_keys, self._tightest_pace_s(live), alternates=True)
        )
        limit = max(limit, 0 if decodes else self._buckets[0])
        return self._plan_chunks(prefills, newcomers, TokenBudget(min(limit, self._buckets[-1])))
