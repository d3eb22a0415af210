"""Corrects a measured table by what steps took in service, where the host works beside the device."""

import collections
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from sarathi_jax.latency import LatencyTable, Spread, Work
from sarathi_jax.telemetry.run import Run

_LEAST_STEPS, _LEAST_SPREAD = 5, 20  # that are taken to say something of the mean time, and of how times scatter
_PASSES = 5  # of the correction: a step with a prompt rests on timings of decodes, too, whose ratio is another
_QUANTILES = 100  # that are kept of a scatter
_LARGEST = 3.0  # factor of a pass: least squares know no bounds
_AWAY = 10  # times as long as usual: then it was not the step, but the machine that was away


@dataclasses.dataclass(frozen=True)
class ServedStep:
    """When a step was served, in seconds, as `StepRecord` has it.

    Attributes:
      work: what it computed.
      scheduled_s: when its planning began.
      started_s: when the device could begin with it.
      ended_s: when its tokens were known.
      asked_s: when the first of the requests that it begins with came; None: it begins with none.
    """

    work: Work
    scheduled_s: float
    started_s: float
    ended_s: float
    asked_s: float | None = None

    @classmethod
    def of_run(cls, run: Run) -> list[list[Self]]:
        """The steps of each engine of a run, as far as they matter here."""
        asked_s = dict[float, float]()  # by when it was first planned
        for sample in run.samples:
            if sample.first_scheduled_s is not None:
                at_s = sample.first_scheduled_s
                asked_s[at_s] = min(sample.arrival_s, asked_s.get(at_s, math.inf))
        return [
            [
                cls(step.plan.work, step.scheduled_s, step.started_s, step.ended_s, asked_s.get(step.scheduled_s))
                for step in steps
            ]
            for steps in run.steps
        ]


def in_service(table: LatencyTable, runs: Iterable[Sequence[ServedStep]]) -> LatencyTable:
    """The table as the steps of some runs bear it out.

    `sarathi_jax.timing.measure` runs each program over and over. In service planning, packing and what the caller does
    take their share of the processor meanwhile; a quick step is over before the next one is planned, and one that finds
    the device idle waits for all of it, and until whoever slept has woken up. Each bucket's times of few decodes, of
    many and of a prompt are multiplied by the times from one step's tokens to the next one's, to what the table says of
    the steps that rest on them; `idle_s` is what steps after idleness took longer, from when their first request came.
    How the steps of a bucket scatter about that is kept as well: the P99 of times between tokens is made of slow steps.

    Args:
      table: as measured.
      runs: the steps of one engine, in their order, each time that it served: with few and with many sequences, best.

    Returns:
      Another table; the same one where there are no steps.
    """
    busy, idle, alone = list[list[tuple[Work, float]]](), list[tuple[Work, float]](), list[tuple[Work, float]]()
    for run in runs:
        busy.append([])
        for before, step in itertools.pairwise(run):
            if step.scheduled_s < before.ended_s:
                busy[-1].append((step.work, step.ended_s - before.ended_s))
            else:
                asked_s = step.scheduled_s if step.asked_s is None else max(step.asked_s, before.ended_s)
                idle.append((step.work, step.ended_s - asked_s))
                alone.append((step.work, step.ended_s - step.started_s))
    # Without overlap every step waits for its planning.
    steps = busy if any(busy) else [alone]
    corrected, measured = table, _Ratios(table, steps)
    if not measured.of_all:
        return table
    for _ in range(_PASSES):
        factors = {bucket: measured.factors(bucket) for bucket in table.buckets}
        timings = [
            dataclasses.replace(timing, seconds=timing.seconds * factors[timing.bucket][timing.num_decodes])
            for timing in corrected.timings
        ]
        corrected = LatencyTable(timings, table.about)
        measured = _Ratios(corrected, steps)
    after_idleness = _Ratios(corrected, [idle]).of_all
    waits_s = [step.took_s - step.expected_s for step in after_idleness]
    idle_s = max(0.0, statistics.fmean(waits_s)) if waits_s else 0.0
    spreads = [
        Spread(bucket, has_prompts, measured.excess_s(bucket, has_prompts))
        for bucket in table.buckets
        for has_prompts in (False, True)
    ]
    return LatencyTable(corrected.timings, table.about, idle_s, spreads)


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A step beside the table.

    Attributes:
      took_s: measured.
      parts: of the table, see `LatencyTable.parts`.
      slowness: of its whole run: the time that all steps took to what the table says.
    """

    took_s: float
    parts: Mapping[int, float]
    slowness: float = 1.0

    @functools.cached_property
    def expected_s(self) -> float:
        return sum(self.parts.values())


def _usual(steps: Sequence[_Timed]) -> list[_Timed]:
    """Steps but for those during which the machine was away."""
    if not steps:
        return []
    longest = _AWAY * statistics.median(step.took_s / step.expected_s for step in steps)
    return [step for step in steps if step.took_s <= longest * step.expected_s]


class _Ratios:
    """What steps took to what the table says.

    Attributes:
      of_all: steps.
    """

    def __init__(self, table: LatencyTable, runs: Iterable[Sequence[tuple[Work, float]]]):
        self._table = table
        self.of_all = list[_Timed]()
        self._of_kind = collections.defaultdict[bool, list[_Timed]](list)
        self._of_bucket = collections.defaultdict[tuple[int, bool], list[_Timed]](list)
        for steps in runs:
            timed = [_Timed(took_s, table.parts(work)) for work, took_s in steps]
            slowness = _ratio(timed) if timed else 1.0
            for (work, _), step in zip(steps, timed, strict=True):
                of_bucket = self._of_bucket[work.num_tokens, work.num_prefill_keys > 0]
                of_bucket.append(dataclasses.replace(step, slowness=slowness))
        for (bucket, has_prompts), timed in self._of_bucket.items():
            self._of_bucket[bucket, has_prompts] = usual = _usual(timed)
            self._of_kind[has_prompts] += usual
            self.of_all += usual

    def factors(self, bucket: int) -> dict[int, float]:
        """By which to multiply the timings of a bucket, by their number of decodes, to come nearest to its steps.

        Least squares, in which a step counts as long as it takes, and a few more steps are what all of the kind are.
        """
        numbers = sorted({timing.num_decodes for timing in self._table.timings if timing.bucket == bucket})
        steps = [step for has_prompts in (False, True) for step in self._of_bucket.get((bucket, has_prompts), ())]
        expected_s = np.array([step.expected_s for step in steps])
        parts = np.array([[step.parts.get(number, 0.0) for number in numbers] for step in steps])
        usual = np.array([_ratio(self._of_kind[number == 0] or self.of_all) for number in numbers])
        scale = np.sqrt(expected_s)[:, None]
        prior = math.sqrt(_LEAST_STEPS * (expected_s.mean() if steps else 1.0))
        rows = np.concatenate([parts.reshape(-1, len(numbers)) / scale, prior * np.eye(len(numbers))])
        wanted = np.concatenate([np.array([step.took_s for step in steps]) / scale[:, 0], prior * usual])
        found, *_ = np.linalg.lstsq(rows, wanted)
        return dict(zip(numbers, np.clip(found, 1 / _LARGEST, _LARGEST).tolist(), strict=True))

    def excess_s(self, bucket: int, has_prompts: bool) -> tuple[float, ...]:
        """Seconds that steps took longer than expected, as slow as their run was; so many quantiles, as likely each."""
        candidates = self._of_bucket.get((bucket, has_prompts), []), self._of_kind[has_prompts]
        steps = next((steps for steps in candidates if len(steps) >= _LEAST_SPREAD), self.of_all)
        excess_s = [step.took_s - step.slowness * step.expected_s for step in steps]
        quantiles = np.quantile(excess_s, (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
        return tuple(map(float, np.round(quantiles - quantiles.mean(), 7)))


def _ratio(steps: Sequence[_Timed]) -> float:
    return sum(step.took_s for step in steps) / sum(step.expected_s for step in steps)
