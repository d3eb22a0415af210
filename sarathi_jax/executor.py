"""Who runs a plan: `launch` starts a step, `collect` waits for it. The engine cannot tell which executor it has."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from sarathi_jax.kv.blocks import BlockTable
from sarathi_jax.runner import MicroBatch, Runner, StepOutput
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.scheduling.plan import StepPlan, StepResult
from sarathi_jax.sequence import Sequence


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


@dataclasses.dataclass
class Launched:
    """A step under way.

    Attributes:
      plan: the step.
      wants_logprobs, wants_prompt_logprobs: which parts of its output anybody wants.
      output: the arrays that will hold it; None until it has reached the last stage.
    """

    plan: StepPlan
    wants_logprobs: bool
    wants_prompt_logprobs: bool
    output: StepOutput | None = None


class DeviceExecutor:
    """Packs plans and runs them on the device.

    Args:
      runner: the compiled programs.
      sampling: parameters of the running sequences.
      sequences: live sequences by id; the engine's own mapping, read here.
      table_of: blocks of a running sequence.
    """

    def __init__(
        self,
        runner: Runner,
        sampling: SamplingTable,
        sequences: Mapping[int, Sequence],
        table_of: Callable[[int], BlockTable],
    ):
        self._runner = runner
        self._sampling = sampling
        self._sequences = sequences
        self._table_of = table_of
        self._row_owners: dict[int, int] = {}
        # What stands in each stage, the last one leftmost.
        self._in_stages: collections.deque[Launched | None] = collections.deque([None] * runner.num_stages)

    def launch(self, plan: StepPlan | None) -> Launched | None:
        launched, batch = (None, None) if plan is None else self._pack(plan)
        self._in_stages.popleft()
        self._in_stages.append(launched)
        output = self._runner.tick(batch)
        if self._in_stages[0] is not None:
            self._in_stages[0].output = output
        return launched

    def _pack(self, plan: StepPlan) -> tuple[Launched, MicroBatch]:
        params = []
        for chunk in plan.chunks:
            seq = self._sequences[chunk.seq_id]
            params.append(seq.request.params)
            assert seq.row is not None
            if self._row_owners.get(seq.row) != seq.seq_id:
                self._row_owners[seq.row] = seq.seq_id
                self._sampling.set_row(seq.row, seq)
        launched = Launched(
            plan,
            wants_logprobs=any(p.logprobs is not None for p in params),
            wants_prompt_logprobs=any(p.prompt_logprobs is not None for p in params),
        )
        buffer = self._runner.layouts[plan.bucket].pack(plan, self._sequences, self._table_of)
        return launched, MicroBatch(plan.bucket, buffer, self._sampling.changes())

    def collect(self, handle: Launched) -> StepResult:
        assert handle.output is not None
        num_chunks, num_tokens = len(handle.plan.chunks), handle.plan.num_tokens
        drawn, prompt = handle.output.drawn, handle.output.prompt
        wanted: list[tuple[jax.Array, int]] = [(drawn.tokens, num_chunks)]
        if handle.wants_logprobs:
            wanted += [(array, num_chunks) for array in (drawn.logprobs, drawn.top_ids, drawn.top_logprobs)]
        if handle.wants_prompt_logprobs:
            wanted += [(array, num_tokens) for array in prompt]
        arrays = [np.asarray(array)[:rows] for array, rows in wanted]
        of_drawn = arrays[1:4] if handle.wants_logprobs else [None] * 3
        of_prompt = arrays[-3:] if handle.wants_prompt_logprobs else [None] * 3
        return StepResult(arrays[0], *of_drawn, *of_prompt)
