"""Preemptive scheduling by what a request has had (FastServe: Wu et al., "Fast Distributed Inference Serving for Large
Language Models"): a skip-join multi-level feedback queue.
"""

import collections
import dataclasses
from collections.abc import Sequence as Seq
from typing import Unpack

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.latency import StepTimes, Work, chunk_keys
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.plan import Chunk, StepPlan, TokenBudget
from sarathi_jax.sequence import Sequence

PATIENCE = 256  # steps without a token after which a sequence goes to the first level


@dataclasses.dataclass
class _Place:
    """Where a sequence stands.

    Attributes:
      num_prompt: of the sequence.
      level: its queue; less goes first.
      used: work that it has had there.
      since: number of the step in which it was last served, or came.
    """

    num_prompt: int
    level: int
    used: float
    since: int


class FastServeScheduler(Scheduler):
    """Serves the levels in order, first come first served within each. Every step takes the decodes and whole prompts
    of the first sequences that fit into the largest bucket, wherever they are: what waits on a better level preempts
    what runs on a worse one.

    Level i gives a quantum of 2^i units of work; who has used it up goes a level down. The unit is that of a decode: a
    token, or with `times` the expected time of a step of one. A new sequence skips the levels whose quantum is less
    than the work of its prompt. Who was not served for `patience` steps goes to the first level, so nobody starves.
    Requests of a lower `priority` number go before all levels.

    A prompt is never cut, so it must fit into the largest bucket; only a preempted sequence that outgrew the bucket
    runs in pieces. Who is not in a step keeps row and blocks as long as nobody better lacks them. There is no swap to
    host memory, unlike FastServe's: who loses them is computed again, with `prefix_caching` only as far as its blocks
    have been overwritten meanwhile.

    Args:
      pool, **sizes: as in `Scheduler`.
      times: of steps; None: work is counted in tokens.
      patience: steps.
    """

    _cuts_prompts = False

    def __init__(
        self, pool: BlockPool, *, times: StepTimes | None = None, patience: int = PATIENCE, **sizes: Unpack[Sizes]
    ):
        super().__init__(pool, **sizes)
        self._times = times
        self._patience = patience
        self._unit = 1.0 if times is None else times.expected_s(Work(self._buckets[0], 1, 1))
        self._places: dict[int, _Place] = {}
        self._num_steps = 0

    def add(self, seq: Sequence) -> None:
        super().add(seq)
        work, level = float(seq.num_prompt), 0
        if self._times is not None:
            num_keys = chunk_keys(0, seq.num_prompt)
            work = self._times.expected_s(Work(self._bucket(seq.num_prompt), num_prefill_keys=num_keys))
        while self._quantum(level) < work:
            level += 1
        self._places[seq.seq_id] = _Place(seq.num_prompt, level, 0.0, self._num_steps)

    def remove(self, seq: Sequence) -> None:
        super().remove(seq)
        self._places.pop(seq.seq_id, None)

    def schedule(self) -> StepPlan | None:
        live = self._live()
        for seq in (*live, *self._waiting):
            place = self._places[seq.seq_id]
            if self._num_steps - place.since > self._patience:
                place.level, place.used, place.since = 0, 0.0, self._num_steps
        runners = sorted(live, key=self._order)
        queue = sorted((*live, *self._waiting), key=self._order)
        away = frozenset().union(*self._away)
        most_decodes = -(-sum(seq.is_decode for seq in live) // self._num_stages)

        preempted: list[int] = []
        decodes: list[Chunk] = []
        chunks: list[Chunk] = []
        budget, may_start = TokenBudget(self._buckets[-1]), True
        for seq in queue:
            if seq.row is None:
                if may_start and seq.seq_id not in preempted:
                    may_start = self._start(seq, budget, runners, preempted, chunks)
            elif not seq.is_decode:
                self._make_room(seq, seq.num_computed + min(seq.num_uncomputed, budget.left), runners, preempted)
                self._plan_prefill(seq, budget, chunks)
            elif (
                seq.seq_id not in away
                and not seq.is_held
                and len(decodes) < most_decodes
                and budget.left
                and self._make_room(seq, seq.num_computed + 1, runners, preempted)
            ):
                self._plan_prefill(seq, budget, decodes)
        plan = self._step(decodes, chunks, preempted)
        self._charge(plan)
        return plan

    def _order(self, seq: Sequence) -> tuple[int, int, int]:
        return seq.request.priority, self._places[seq.seq_id].level, seq.seq_id

    def _quantum(self, level: int) -> float:
        return self._unit * 2**level

    def _start(
        self, seq: Sequence, budget: TokenBudget, runners: list[Sequence], preempted: list[int], chunks: list[Chunk]
    ) -> bool:
        """Starts a waiting sequence, if need be in the place of the worst runners behind it.

        Returns:
          Whether it could; if not, nobody behind it may start either.
        """
        # A preempted sequence's token in flight lives in a row that it lost: wait until the host knows it.
        if seq.num_in_flight or not budget.left:
            return False
        num_blocks, start = self._blocks_to_start(seq)
        if budget.left < seq.num_tokens - start <= self._buckets[-1]:
            return False
        if not self._fits(num_blocks, []):
            num_blocks = self.max_blocks(seq.num_tokens)  # whom it shares blocks with may be preempted
            if not self._fits(num_blocks, self._worse(seq, runners)):
                return False
            while not self._fits(num_blocks, []):
                self._preempt_last(runners, preempted)
        self._admit(seq)
        self._plan_prefill(seq, budget, chunks)
        return True

    def _make_room(self, seq: Sequence, num_tokens: int, runners: list[Sequence], preempted: list[int]) -> bool:
        """Grows a runner's table to so many tokens, if need be with the blocks of the worst runners behind it."""
        table = self._tables[seq.seq_id]
        if table.ensure(num_tokens):
            return True
        if table.blocks_needed(num_tokens) > self._pool.num_free + self._num_freed(self._worse(seq, runners)):
            return False
        while not table.ensure(num_tokens):
            self._preempt_last(runners, preempted)
        return True

    def _fits(self, num_blocks: int, victims: Seq[Sequence]) -> bool:
        """Whether a sequence could start with so many blocks if these were preempted."""
        prefills = [seq for seq in self._running if not seq.is_decode and seq.is_runnable and seq not in victims]
        num_others = self.num_running - len(victims)
        num_blocks += self._watermark if num_others else 0
        num_spare = self._num_spare(prefills)
        if self._window is None:
            num_spare += self._num_freed(victims)
        else:  # no block counts as shared there
            num_spare += sum(self._tables[seq.seq_id].num_owned for seq in victims)
        return num_others < self._max_running and num_blocks <= num_spare

    def _num_freed(self, victims: Seq[Sequence]) -> int:
        """Blocks that nobody else holds."""
        held = collections.Counter(i for seq in victims for i in self._tables[seq.seq_id].owned_ids)
        return sum(self._pool.num_owners(block_id) == num_held for block_id, num_held in held.items())

    def _worse(self, seq: Sequence, runners: list[Sequence]) -> list[Sequence]:
        return [runner for runner in runners if self._order(runner) > self._order(seq)]

    def _preempt_last(self, runners: list[Sequence], preempted: list[int]) -> None:
        victim = runners.pop()
        self._preempt(victim)
        preempted.append(victim.seq_id)

    def _charge(self, plan: StepPlan | None) -> None:
        """Counts a step as had by those that get a token from it; what is computed again is not their fault."""
        self._num_steps += 1
        if plan is None:
            return
        step_s = None if self._times is None else self._times.expected_s(plan.work)
        for chunk in plan.chunks:
            if not chunk.samples:
                continue
            place = self._places[chunk.seq_id]
            is_prompt = chunk.start + chunk.length == place.num_prompt
            place.used += step_s or (chunk.length if is_prompt else 1)
            place.since = self._num_steps
            if place.used >= self._quantum(place.level):
                place.level, place.used = place.level + 1, 0.0
