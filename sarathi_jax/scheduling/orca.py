"""Iteration-level batching with whole prompts (Orca): every running decode, and whole new prompts beside them.

The baseline of mixed steps: a long prompt makes the decodes beside it wait for all of it.
"""

from typing import Unpack

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.plan import StepPlan, TokenBudget
from sarathi_jax.scheduling.turns import Turns


class OrcaScheduler(Scheduler):
    """Runs every decode in every step, and admits whole prompts, first come first served, as long as rows, memory and
    the largest bucket allow.

    Memory for the longest sequence that the model allows is reserved for every request, so nobody is ever preempted,
    and few run: as many as there are such reserves in the pool.

    A prompt is never cut, so it must fit into the largest bucket; while more decodes run than leave it room there, it
    waits, and whoever came after it too. In a pipeline groups of sequences enter by turns (`Turns`).

    Args:
      pool, **sizes: as in `Scheduler`.
    """

    _cuts_prompts = False

    def __init__(self, pool: BlockPool, **sizes: Unpack[Sizes]):
        super().__init__(pool, **sizes)
        self._reserve()
        self._turns = Turns(self._num_stages)

    def schedule(self) -> StepPlan | None:
        live = self._live()
        self._turns.begin(live)
        decodes, _ = self._plan_decodes(live, self._turns.others, self._buckets[-1], [])
        budget, chunks = TokenBudget(self._buckets[-1] - len(decodes)), []
        num_places = self._turns.num_places(min(self._max_running, self.num_running + self.num_waiting))
        newcomers = [seq for seq, _ in self._whole_newcomers((), budget.left, num_places)]
        for seq in newcomers:
            self._admit(seq)
            self._plan_prefill(seq, budget, chunks)
        self._turns.join(newcomers)
        self._turns.end()
        return self._step(decodes, chunks)
