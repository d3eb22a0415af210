"""Corrects a measured table by what steps took in service, where the host works beside the device."""

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from sarathi_jax.latency import LatencyTable, Spread, Work
from sarathi_jax.telemetry.steps import StepRecord

_LEAST_STEPS, _LEAST_SPREAD = 5, 20  # that are taken to say something of the mean time, and of how times scatter
_PASSES = 5  # of the correction: a step with a prompt rests on timings of decodes, too, whose ratio is another
_QUANTILES = 100  # that are kept of a scatter
_AWAY = 10  # times as long as usual: then it was not the step, but the machine that was away


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
    How the steps of a bucket scatter about that is kept as well: the P99 of times between tokens is made of slow steps.

    Args:
      table: as measured.
      runs: the steps of one engine, in their order, each time that it served: with few and with many sequences, best.

    Returns:
      Another table; the same one where there are no steps.
    """
    busy, idle = list[list[tuple[Work, float]]](), list[ServedStep]()
    for run in runs:
        busy.append([])
        for before, step in itertools.pairwise(run):
            if step.scheduled_s < before.ended_s:
                busy[-1].append((step.work, step.ended_s - before.ended_s))
            else:
                idle.append(step)
    # Without overlap every step waits for its planning.
    steps = busy if any(busy) else [[(step.work, step.ended_s - step.started_s) for step in idle]]
    corrected, measured = table, _Ratios(table, steps)
    if not measured.of_all:
        return table
    for _ in range(_PASSES):
        timings = [
            dataclasses.replace(timing, seconds=timing.seconds * measured.ratio(timing.bucket, timing.num_decodes == 0))
            for timing in corrected.timings
        ]
        corrected = LatencyTable(timings, table.about)
        measured = _Ratios(corrected, steps)
    after_idleness = _usual([(step.ended_s - step.scheduled_s, corrected.step_s(step.work)) for step in idle])
    waits_s = [took_s - expected_s for took_s, expected_s in after_idleness]
    idle_s = max(0.0, statistics.fmean(waits_s)) if waits_s else 0.0
    spreads = [
        Spread(bucket, has_prompts, measured.spread(bucket, has_prompts))
        for bucket in table.buckets
        for has_prompts in (False, True)
    ]
    return LatencyTable(corrected.timings, table.about, idle_s, spreads)


def _usual[*Times](rows: Sequence[tuple[float, float, *Times]]) -> list[tuple[float, float, *Times]]:
    """Rows that begin with the seconds taken and expected, but for steps during which the machine was away."""
    if not rows:
        return []
    longest = _AWAY * statistics.median(row[0] / row[1] for row in rows)
    return [row for row in rows if row[0] <= longest * row[1]]


class _Ratios:
    """What steps took to what the table says: of a bucket, with prompts in it or none; of few steps that of their kind.

    Attributes:
      of_all: of each step the seconds measured, those tabulated, and these as slow as its whole run was.
    """

    def __init__(self, table: LatencyTable, runs: Iterable[Sequence[tuple[Work, float]]]):
        self.of_all = list[tuple[float, float, float]]()
        self._of_kind = collections.defaultdict[bool, list[tuple[float, float, float]]](list)
        self._of_bucket = collections.defaultdict[tuple[int, bool], list[tuple[float, float, float]]](list)
        for steps in runs:
            pairs = [(took_s, table.step_s(work)) for work, took_s in steps]
            slowness = _ratio(pairs) if pairs else 1.0
            for (work, _), (took_s, expected_s) in zip(steps, pairs, strict=True):
                of_bucket = self._of_bucket[work.num_tokens, work.num_prefill_keys > 0]
                of_bucket.append((took_s, expected_s, slowness * expected_s))
        for (bucket, has_prompts), pairs in self._of_bucket.items():
            self._of_bucket[bucket, has_prompts] = usual = _usual(pairs)
            self._of_kind[has_prompts] += usual
            self.of_all += usual

    def ratio(self, bucket: int, has_prompts: bool) -> float:
        """Of the times of all steps."""
        return _ratio([(took_s, expected_s) for took_s, expected_s, _ in self._like(bucket, has_prompts, _LEAST_STEPS)])

    def spread(self, bucket: int, has_prompts: bool) -> tuple[float, ...]:
        """Of each step, to the mean of its run; so many quantiles, as likely each."""
        ratios = [took_s / run_s for took_s, _, run_s in self._like(bucket, has_prompts, _LEAST_SPREAD)]
        quantiles = np.quantile(ratios, (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
        return tuple(map(float, np.round(quantiles / quantiles.mean(), 4)))

    def _like(self, bucket: int, has_prompts: bool, least: int) -> list[tuple[float, float, float]]:
        """The most like steps of which there are enough."""
        candidates = self._of_bucket.get((bucket, has_prompts), []), self._of_kind[has_prompts]
        return next((pairs for pairs in candidates if len(pairs) >= least), self.of_all)


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(took_s for took_s, _ in pairs) / sum(expected_s for _, expected_s in pairs)
