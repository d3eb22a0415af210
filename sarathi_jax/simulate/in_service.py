"""Corrects a measured table by what steps took in service, where the host works beside the device."""

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Self

from sarathi_jax.latency import LatencyTable, Work
from sarathi_jax.telemetry.steps import StepRecord

_LEAST_STEPS = 5  # that are taken to say something


@dataclasses.dataclass(frozen=True)
class ServedStep:
    """When a step was served, in seconds, as `StepRecord` has it.

    Attributes:
      work: what it computed.
      scheduled_s: when its planning began.
      started_s: when the device could begin with it.
      ended_s: when its tokens were known.
    """

    work: Work
    scheduled_s: float
    started_s: float
    ended_s: float

    @classmethod
    def of(cls, record: StepRecord) -> Self:
        """What matters here of a record."""
        return cls(record.plan.work, record.scheduled_s, record.started_s, record.ended_s)


def in_service(table: LatencyTable, runs: Iterable[Sequence[ServedStep]]) -> LatencyTable:
    """The table as the steps of some runs bear it out.

    `sarathi_jax.timing.measure` runs each program over and over. In service planning, packing and what the caller does
    take their share of the processor meanwhile; a quick step is over before the next one is planned, and one that finds
    the device idle waits for all of it. The times of each bucket, with prompts and without, are multiplied by the times
    from one step's tokens to the next one's, to what the table says; `idle_s` is what steps after idleness took longer.

    Args:
      table: as measured.
      runs: the steps of one engine, in their order, each time that it served: with few and with many sequences, best.

    Returns:
      Another table; the same one where there are no steps.
    """
    busy, idle = list[tuple[Work, float]](), list[ServedStep]()
    for before, step in itertools.chain.from_iterable(map(itertools.pairwise, runs)):
        if step.scheduled_s < before.ended_s:
            busy.append((step.work, step.ended_s - before.ended_s))
        else:
            idle.append(step)
    # Without overlap every step waits for its planning.
    measured = _Ratios(table, busy or [(step.work, step.ended_s - step.started_s) for step in idle])
    if not measured.of_all:
        return table
    timings = [
        dataclasses.replace(timing, seconds=timing.seconds * measured.ratio(timing.bucket, timing.num_decodes == 0))
        for timing in table.timings
    ]
    corrected = LatencyTable(timings, table.about)
    waits_s = [step.ended_s - step.scheduled_s - corrected.step_s(step.work) for step in idle]
    return LatencyTable(timings, table.about, max(0.0, statistics.fmean(waits_s)) if waits_s else 0.0)


class _Ratios:
    """What steps took to what the table says: of a bucket, with prompts in it or none; of few steps that of their kind.

    Attributes:
      of_all: seconds measured and tabulated of each step.
    """

    def __init__(self, table: LatencyTable, steps: Iterable[tuple[Work, float]]):
        self.of_all = list[tuple[float, float]]()
        self._of_kind = collections.defaultdict[bool, list[tuple[float, float]]](list)
        self._of_bucket = collections.defaultdict[tuple[int, bool], list[tuple[float, float]]](list)
        for work, took_s in steps:
            pair, has_prompts = (took_s, table.step_s(work)), work.num_prefill_keys > 0
            self.of_all.append(pair)
            self._of_kind[has_prompts].append(pair)
            self._of_bucket[work.num_tokens, has_prompts].append(pair)

    def ratio(self, bucket: int, has_prompts: bool) -> float:
        """Of the most like steps of which there are enough."""
        candidates = self._of_bucket[bucket, has_prompts], self._of_kind[has_prompts]
        pairs = next((pairs for pairs in candidates if len(pairs) >= _LEAST_STEPS), self.of_all)
        return sum(took_s for took_s, _ in pairs) / sum(expected_s for _, expected_s in pairs)
