"""The largest request rate that a server keeps its promises at, by bracketing and bisection, whoever is served by whom.

The promise is the paper's: 99 % of the times between tokens within the SLO, half of the scheduling delays within 2 s.
Runs of several seeds at one rate count as one longer run: their observations are pooled. The same seed at another rate
has the same requests, closer together (`sarathi_jax.workloads.arrivals`), so that two rates differ by the rate alone.

A run must last for the delays to show: beyond the capacity c they grow with the run, and half of n requests wait longer
than 2 s only if the rate is above c by a share of about 4 c / n (`delay_resolution`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from sarathi_jax.telemetry.definitions import MEDIAN_DELAY_SLO_S, Observations, broken_promises
from sarathi_jax.telemetry.run import Run

Probe = Callable[[float, int], Run]
"""Serves the workload at a rate (requests a second) with a seed."""

_AT_ONCE_S = 0.1  # requests that all come within it come at once: a higher rate changes nothing
_COARSE = 4  # times the tolerance: so near the first seed alone leads


class CapacityError(ValueError):
    """A search that cannot be; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
      rate: requests a second.
      seed: of the workload.
      p50_ttft_s, p99_ttft_s, p50_tbt_s, p99_tbt_s, median_delay_s: of the run.
      least_tbt_s: of the run; NaN without any.
      output_tokens_per_s: of the run.
      broken: which promises it broke by itself, "tbt" or "delay".
    """

    rate: float
    seed: int
    p50_ttft_s: float
    p99_ttft_s: float
    p50_tbt_s: float
    p99_tbt_s: float
    least_tbt_s: float
    median_delay_s: float
    output_tokens_per_s: float
    broken: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Level:
    """All runs at one rate, pooled.

    Attributes:
      rate: requests a second.
      trials: one a seed.
      p99_tbt_s, median_delay_s: of all runs together.
      broken: which promises they broke together.
    """

    rate: float
    trials: tuple[Trial, ...]
    p99_tbt_s: float
    median_delay_s: float
    broken: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a search found.

    Attributes:
      rate: the largest found at which the promises are kept, requests a second; 0: none.
      below: the smallest found at which they are broken; infinite: none.
      bound: what breaks there: "tbt", "delay" or "tbt, delay"; "" where nothing does.
      tbt_slo_s: what was promised.
      levels: every rate that was tried, ascending.
      spread: the largest rate at which every seed keeps the promises by itself, the smallest at which none does.
    """

    rate: float
    below: float
    bound: str
    tbt_slo_s: float
    levels: tuple[Level, ...]
    spread: tuple[float, float]

    @property
    def at_capacity(self) -> Level | None:
        """The runs at `rate`."""
        return next((level for level in self.levels if level.rate == self.rate), None)

    def __str__(self) -> str:
        slo = f"P99 TBT of {self.tbt_slo_s * 1e3:.4g} ms and median delay of {MEDIAN_DELAY_SLO_S:g} s"
        if not self.rate:
            idle = self.levels[0]
            least_s = min((trial.least_tbt_s for level in self.levels for trial in level.trials), default=math.nan)
            return (
                f"no rate meets it ({slo}): at {idle.rate:.3g} requests/s P99 TBT is {idle.p99_tbt_s * 1e3:.4g} ms and "
                f"the median delay {idle.median_delay_s:.3g} s; the shortest TBT of all is {least_s * 1e3:.4g} ms"
            )
        if math.isinf(self.below):
            return f"every rate meets it ({slo}), up to {self.rate:.4g} requests/s: give more requests to tell"
        low, high = self.spread
        return (
            f"{self.rate:.4g} requests/s; from {self.below:.4g} on the {self.bound} is too long ({slo}; every seed "
            f"keeps it at {low:.4g}, none at {high:.4g})"
        )


def delay_resolution(rate: float, number: int) -> float:
    """By which share a capacity that delays bound comes out too high, with so many requests a run."""
    return 2 * MEDIAN_DELAY_SLO_S * rate / number


def find_capacity(
    probe: Probe,
    *,
    tbt_slo_s: float,
    guess: float = 1.0,
    step: float = 2.0,
    tolerance: float = 0.05,
    seeds: Sequence[int] = (0, 1, 2),
    lowest: float | None = None,
    highest: float | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Capacity:
    """Searches the largest rate at which the promises are kept.

    The first seed finds where to look, by large steps and then bisection; what counts is found with all of
    them. Noise that contradicts the first seed moves the bracket until its lower end is kept and its upper end is not.

    Args:
      probe: serves the workload at a rate with a seed; a run that was cut off counts what waited as longer than that,
        and with more than half of its requests waiting as too slow.
      tbt_slo_s: P99 of the times between tokens.
      guess: rate to begin with.
      step: factor up from there until the promises break; its square down until they are kept.
      tolerance: of the result: `below` exceeds `rate` by at most this share.
      seeds: of the workload, at least one.
      lowest, highest: rates beyond which nothing is tried; None: a factor of 4096 from `guess`.
      on_trial: told of every run.

    Raises:
      CapacityError: arguments other than these.
    """
    search = _Search(probe, tbt_slo_s, tuple(seeds), on_trial)
    lowest = guess / 4096 if lowest is None else lowest
    highest = guess * 4096 if highest is None else highest
    for name, value in (("tbt_slo_s", tbt_slo_s), ("lowest", lowest), ("guess", guess), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise CapacityError(f"{name} must be a number above 0, not {value}")
    if not 1 < step < math.inf:
        raise CapacityError(f"step must be a factor above 1, not {step}")
    if not lowest <= guess <= highest:
        raise CapacityError(f"guess={guess} must lie within lowest={lowest} and highest={highest}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise CapacityError(f"seeds must be different numbers, at least one, not {list(seeds)}")
    low, high = search.bracket(guess, step, lowest, highest)
    if low is None or high is None:
        return search.result(low, high)
    low, high = search.bisect(low, high, 1 + _COARSE * tolerance, 1)
    low, high = search.confirm(low, high, 1 + tolerance, lowest, highest)
    if low is not None and high is not None:
        low, high = search.bisect(low, high, 1 + tolerance, len(seeds))
    return search.result(low, high)


class _Search:
    """Runs that were made, and what follows from them."""

    def __init__(
        self, probe: Probe, tbt_slo_s: float, seeds: tuple[int, ...], on_trial: Callable[[Trial], None] | None
    ):
        self._probe, self._tbt_slo_s, self._seeds, self._on_trial = probe, tbt_slo_s, seeds, on_trial
        self._observed: dict[tuple[float, int], _Observed] = {}

    def bracket(self, guess: float, step: float, lowest: float, highest: float) -> tuple[float | None, float | None]:
        """A rate that the first seed keeps and one that it breaks; None where there is none."""
        rate, kept = guess, None
        while self._keeps(rate, 1):
            kept = rate
            if rate >= highest or self._observed[rate, self._seeds[0]].is_at_once:
                return rate, None
            rate = min(step * rate, highest)
        if kept is not None:
            return kept, rate
        # Where every time between tokens is too long, none may be short enough even with nobody else there.
        if self._observed[rate, self._seeds[0]].trial.least_tbt_s > self._tbt_slo_s and not self._keeps(lowest, 1):
            return None, lowest
        broken = rate
        while broken > lowest:
            rate = max(broken / step**2, lowest)
            if self._keeps(rate, 1):
                return rate, broken
            broken = rate
        return None, broken

    def bisect(self, low: float, high: float, ratio: float, num_seeds: int) -> tuple[float, float]:
        """Halves the bracket, on a scale of ratios, until its ends are within `ratio`."""
        while high > low * ratio:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._keeps(middle, num_seeds) else (low, middle)
        return low, high

    def confirm(
        self, low: float, high: float, ratio: float, lowest: float, highest: float
    ) -> tuple[float | None, float | None]:
        """Moves the ends of a bracket until all seeds together keep the lower and break the upper."""
        step = ratio
        while not self._keeps(low, len(self._seeds)):
            if low <= lowest:
                return None, low
            low, high, step = max(low / step, lowest), low, step**2
        step = ratio
        while self._keeps(high, len(self._seeds)):
            if high >= highest or self._observed[high, self._seeds[0]].is_at_once:
                return high, None
            low, high, step = high, min(high * step, highest), step**2
        return low, high

    def result(self, low: float | None, high: float | None) -> Capacity:
        """What was found."""
        rates = sorted({rate for rate, _ in self._observed})
        levels = tuple(map(self._level, rates))
        bound = "" if high is None else ", ".join(self._level(high).broken)
        whole = [level for level in levels if len(level.trials) == len(self._seeds)] or levels
        all_keep = [level.rate for level in whole if not any(trial.broken for trial in level.trials)]
        none_keep = [level.rate for level in whole if all(trial.broken for trial in level.trials)]
        return Capacity(
            rate=0.0 if low is None else low,
            below=math.inf if high is None else high,
            bound=bound,
            tbt_slo_s=self._tbt_slo_s,
            levels=levels,
            spread=(max(all_keep, default=0.0), min(none_keep, default=math.inf)),
        )

    def _keeps(self, rate: float, num_seeds: int) -> bool:
        for seed in self._seeds[:num_seeds]:
            if (rate, seed) not in self._observed:
                observed = _observe(self._probe(rate, seed), rate, seed, self._tbt_slo_s)
                self._observed[rate, seed] = observed
                if self._on_trial is not None:
                    self._on_trial(observed.trial)
        return not self._level(rate, num_seeds).broken

    def _level(self, rate: float, num_seeds: int | None = None) -> Level:
        seeds = self._seeds[:num_seeds]
        observed = [self._observed[rate, seed] for seed in seeds if (rate, seed) in self._observed]
        tbts, delays = _pooled([one.tbts for one in observed]), _pooled([one.delays for one in observed])
        broken = broken_promises(tbts, delays, self._tbt_slo_s)
        # Most of the seeds were cut off with most requests waiting: what is known flatters them.
        if "delay" not in broken and 2 * sum(one.is_stuck for one in observed) > len(observed):
            broken = (*broken, "delay")
        return Level(rate, tuple(one.trial for one in observed), tbts.quantile(0.99), delays.quantile(0.5), broken)


@dataclasses.dataclass(frozen=True)
class _Observed:
    """What is kept of a run.

    Attributes:
      trial: its numbers.
      tbts, delays: its observations, as arrays, a quarter of the size: values, lower bounds.
      is_stuck: more than half of the requests that came were never scheduled.
      is_at_once: they all came at once.
    """

    trial: Trial
    tbts: tuple[np.ndarray, np.ndarray]
    delays: tuple[np.ndarray, np.ndarray]
    is_stuck: bool
    is_at_once: bool


def _observe(run: Run, rate: float, seed: int, tbt_slo_s: float) -> _Observed:
    if not run.samples:
        raise CapacityError(f"a probe at {rate} requests/s served nothing: give it at least one request")
    tbts, delays, ttfts = run.tbts, run.scheduling_delays, run.ttfts
    broken: tuple[str, ...] = broken_promises(tbts, delays, tbt_slo_s)
    is_stuck = len(delays.longer_than) > len(delays.values)
    if is_stuck and "delay" not in broken:
        broken = (*broken, "delay")
    trial = Trial(
        rate=rate,
        seed=seed,
        p50_ttft_s=ttfts.quantile(0.5),
        p99_ttft_s=ttfts.quantile(0.99),
        p50_tbt_s=tbts.quantile(0.5),
        p99_tbt_s=tbts.quantile(0.99),
        least_tbt_s=min(tbts.values, default=math.nan),
        median_delay_s=delays.quantile(0.5),
        output_tokens_per_s=run.throughput.output_tokens_per_s,
        broken=broken,
    )
    arrivals_s = [sample.arrival_s for sample in run.samples]
    return _Observed(
        trial,
        (np.array(tbts.values), np.array(tbts.longer_than)),
        (np.array(delays.values), np.array(delays.longer_than)),
        is_stuck,
        is_at_once=max(arrivals_s) - min(arrivals_s) <= _AT_ONCE_S,
    )


def _pooled(observed: Sequence[tuple[np.ndarray, np.ndarray]]) -> Observations:
    values, longer_than = zip(*observed, strict=True)
    return Observations(tuple(np.concatenate(values).tolist()), tuple(np.concatenate(longer_than).tolist()))
