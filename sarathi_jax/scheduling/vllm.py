"""Prefill first (vLLM, as the Sarathi-Serve paper describes it): whole prompts alone, else all decodes.

The baseline that stalls: while prompts come in, nobody who generates gets a token.
"""

from typing import Unpack

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.scheduling.base import Scheduler, Sizes, decodes_first
from sarathi_jax.scheduling.plan import Chunk, StepPlan, TokenBudget
from sarathi_jax.sequence import Sequence


class VllmScheduler(Scheduler):
    """Admits whole prompts, first come first served, as long as blocks, rows and the largest bucket allow; a step that
    admits any holds nothing else, and only a step that can admit none decodes.

    A prompt is never cut, so it must fit into the largest bucket. Only a preempted sequence that outgrew the bucket is
    computed again in pieces of it, in steps without decodes.

    In a pipeline of pp stages the sequences are dealt out to pp groups as they are admitted, as evenly as their number
    allows, and the groups enter in turn: each with its new prompts alone or with all its decodes (vLLM keeps such a
    group a stage, its "virtual engines"). Micro-batches in flight have the bucket that each of them needs, so they
    keep the stages waiting for each other.

    Args:
      pool, **sizes: as in `Scheduler`.
    """

    def __init__(self, pool: BlockPool, **sizes: Unpack[Sizes]):
        super().__init__(pool, **sizes)
        self._turn = 0
        self._groups: dict[int, int] = {}  # of the running sequences: in whose turn they enter

    @property
    def longest_prompt(self) -> int:
        return min(super().longest_prompt, self._buckets[-1])

    def add(self, seq: Sequence) -> None:
        if seq.num_prompt > self._buckets[-1]:
            raise ValueError(
                f"a prompt of {seq.num_prompt} tokens exceeds the largest step of {self._buckets[-1]}, and the policy "
                f"vllm never cuts prompts: raise token_budget to {seq.num_prompt}, or serve with the policy sarathi"
            )
        super().add(seq)

    def schedule(self) -> StepPlan | None:
        live = self._live()
        self._groups = {seq.seq_id: self._groups[seq.seq_id] for seq in live}
        preempted: list[int] = []
        alone, chunks = decodes_first(self._plan_prompts(live))
        if not alone and not chunks:
            away = {seq_id for seq_id, group in self._groups.items() if group != self._turn}
            alone, _ = self._plan_decodes(live, away, self._buckets[-1], preempted)
        self._turn = (self._turn + 1) % self._num_stages
        if not alone and not chunks:
            return None
        bucket = self._bucket(len(alone) + sum(chunk.length for chunk in chunks))
        return StepPlan((*alone, *chunks), bucket, len(alone), tuple(preempted))

    def _plan_prompts(self, live: list[Sequence]) -> list[Chunk]:
        """Plans the prompts that start now, after what is left of one that is computed in pieces."""
        budget, chunks = TokenBudget(self._buckets[-1]), []
        for seq in live:
            if not seq.is_decode:
                self._plan_prefill(seq, budget, chunks)
        for seq in self._newcomers(budget.left):
            self._admit(seq)
            self._plan_prefill(seq, budget, chunks)
        self._groups |= {chunk.seq_id: self._turn for chunk in chunks}
        return chunks

    def _newcomers(self, num_tokens: int) -> list[Sequence]:
        """The waiting sequences that start now: those that fit whole into so many tokens, up to an even share of all
        for the group whose turn it is."""
        largest = self._buckets[-1]
        share = -(-min(self._max_running, self.num_running + self.num_waiting) // self._num_stages)
        num_places = share - sum(group == self._turn for group in self._groups.values())
        newcomers = []
        # A prompt in pieces leaves room beside its last one, which needs no blocks.
        for seq, start in self._affordable(()):
            length = seq.num_tokens - start
            is_too_long = length > largest == num_tokens  # for any step: the first piece, in an empty one
            if len(newcomers) >= num_places or not (length <= num_tokens or is_too_long):
                break
            num_tokens -= min(length, num_tokens)
            newcomers.append(seq)
        return newcomers
