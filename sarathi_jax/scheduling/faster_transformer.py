"""Request-level batching (FasterTransformer): a batch of requests is decoded until all of it has ended.

The baseline before Orca: nobody who generates ever waits for a prompt, but whoever comes waits for a whole batch, and
the rows of those that ended stay empty.
"""

import itertools
from typing import Unpack

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.plan import StepPlan, TokenBudget
from sarathi_jax.scheduling.turns import Turns
from sarathi_jax.sequence import Sequence


class FasterTransformerScheduler(Scheduler):
    """Admits as many requests as rows and memory allow, computes their prompts, whole, in as few steps of the largest
    bucket as they need, then decodes until the last of them has ended; only then it admits again.

    Memory for the longest sequence that the model allows is reserved for every request, so nobody is ever preempted.
    A prompt is never cut, so it must fit into the largest bucket. In a pipeline every stage has a batch of its own
    (`Turns`).

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
        self._turns.begin(self._running)  # one whose last token is on its way still belongs to its batch
        others = self._turns.others
        if len(others) == self.num_running:
            self._begin_batch([seq for seq in live if not seq.is_decode])
        budget, chunks = TokenBudget(self._buckets[-1]), []
        for seq in self.running:
            if seq.seq_id not in others and not seq.is_decode and seq.is_runnable:
                if seq.num_uncomputed > budget.left:
                    break
                self._plan_prefill(seq, budget, chunks)
        decodes = [] if chunks else self._plan_decodes(live, others, self._buckets[-1], [])[0]
        self._turns.end()
        return self._step(decodes, chunks)

    def _begin_batch(self, prefills: list[Sequence]) -> None:
        """Admits the next batch, beside the prompts of other batches that run."""
        num_places = self._turns.num_places(min(self._max_running, self.num_running + self.num_waiting))
        batch = [seq for seq, _ in itertools.islice(self._affordable(prefills), num_places)]
        for seq in batch:
            self._admit(seq)
        self._turns.join(batch)
