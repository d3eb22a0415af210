"""`StepTimes`: what steps take now: the table, corrected by what was measured since."""

import dataclasses

from sarathi_jax.latency.table import LatencyTable
from sarathi_jax.latency.work import Work

_GAIN = 0.05  # of each new measurement
_NUM_DEVIATIONS = 2.0
_FORGOTTEN = 1 / 2000  # of what is known of a bucket, with every step of another one
_LARGEST_RATIO = 4.0  # counted: one hiccup must not make every later step look slow


@dataclasses.dataclass
class _Drift:
    """Running mean of the ratios of measured to tabulated times, and of how far they lie from it."""

    mean: float = 1.0
    deviation: float = 0.05

    @property
    def bound(self) -> float:
        return self.mean + _NUM_DEVIATIONS * self.deviation

    def observe(self, ratio: float) -> None:
        self.deviation += _GAIN * (abs(ratio - self.mean) - self.deviation)
        self.mean += _GAIN * (ratio - self.mean)

    def forget(self, common: "_Drift") -> None:
        """Comes a little nearer to what all steps have in common."""
        self.deviation += _FORGOTTEN * (common.deviation - self.deviation)
        self.mean += _FORGOTTEN * (common.mean - self.mean)


class StepTimes:
    """Expected step times, corrected online when measured ones drift from the table.

    The ratio of measured to tabulated times is followed as TCP follows its round trips: a running mean and a running
    mean deviation; of all steps together, and of each bucket. A promise rests on the slower of the two: all steps tell
    soon that the device became slower, but most of them are small, and large ones, in which the prompts are, may be as
    slow as the table says where small ones are quicker. What is known of a bucket fades while others run, or one that
    was slow once would never be tried again.

    Args:
      table: as measured at start.
    """

    def __init__(self, table: LatencyTable):
        self.table = table
        self._all = _Drift()
        self._of_bucket = dict[int, _Drift]()  # of those that ran

    def __repr__(self) -> str:
        return f"StepTimes({self.table}, x {self._all.mean:.2f} +- {self._all.deviation:.2f})"

    @property
    def drift(self) -> float:
        """How many times as long as in the table steps take now."""
        return self._all.mean

    def expected_s(self, work: Work) -> float:
        """What such a step takes on average; `work` as of `LatencyTable.step_s`."""
        return self._all.mean * self.table.step_s(work)

    def bound_s(self, work: Work) -> float:
        """What such a step seldom exceeds: what a promise can rest on."""
        factor = max(self._all.bound, self._of_bucket.get(work.num_tokens, self._all).bound)
        return factor * self.table.step_s(work)

    def observe(self, work: Work, measured_s: float) -> None:
        """Learns from a step that ran."""
        ratio = min(measured_s / self.table.step_s(work), _LARGEST_RATIO)
        self._of_bucket.setdefault(work.num_tokens, dataclasses.replace(self._all)).observe(ratio)
        self._all.observe(ratio)
        for other, drift in self._of_bucket.items():
            if other != work.num_tokens:
                drift.forget(self._all)
