"""Prefill first (vLLM, as the Sarathi-Serve paper describes it): whole prompts alone, else all decodes.

The baseline that stalls: while prompts come in, nobody who generates gets a token.
"""

from typing import Unpack

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.plan import Chunk, StepPlan, TokenBudget
from sarathi_jax.scheduling.turns import Turns
from sarathi_jax.sequence import Sequence


class VllmScheduler(Scheduler):
    """Admits whole prompts, first come first served, as long as blocks, rows and the largest bucket allow; a step that
    admits any holds nothing else, and only a step that can admit none decodes.

    A prompt is never cut, so it must fit into the largest bucket. Only a preempted sequence that outgrew the bucket is
    computed again in pieces of it, in steps without decodes.

    In a pipeline the sequences are dealt out to groups that enter by turns (`Turns`), each with its new prompts alone
    or with all its decodes.

    Args:
      pool, **sizes: as in `Scheduler`.
    """

    _cuts_prompts = False

    def __init__(self, pool: BlockPool, **sizes: Unpack[Sizes]):
        super().__init__(pool, **sizes)
        self._turns = Turns(self._num_stages)

    def schedule(self) -> StepPlan | None:
        live = self._live()
        self._turns.begin(live)
        decodes, preempted = [], []
        chunks = self._plan_prompts(live)
        if not chunks:
            decodes, _ = self._plan_decodes(live, self._turns.others, self._buckets[-1], preempted)
        self._turns.end()
        return self._step(decodes, chunks, preempted)

    def _plan_prompts(self, live: list[Sequence]) -> list[Chunk]:
        """Plans the prompts that start now, after what is left of one that is computed in pieces."""
        prefills = [seq for seq in live if not seq.is_decode]
        budget, chunks = TokenBudget(self._buckets[-1]), []
        num_places = self._turns.num_places(min(self._max_running, self.num_running + self.num_waiting))
        newcomers = [seq for seq, _ in self._whole_newcomers(prefills, budget.left, num_places)]
        for seq in prefills:
            self._plan_prefill(seq, budget, chunks)
        for seq in newcomers:
            self._admit(seq)
            self._plan_prefill(seq, budget, chunks)
        self._turns.join([*prefills, *newcomers])
        return chunks
