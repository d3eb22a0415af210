"""`StepTimes`: what steps take now: the table, corrected by what was measured since."""

from sarathi_jax.latency.table import LatencyTable

_GAIN = 0.05  # of each new measurement
_NUM_DEVIATIONS = 2.0
_LARGEST_RATIO = 4.0  # counted: one hiccup must not make every later step look slow


class StepTimes:
    """Expected step times, corrected online when measured ones drift from the table.

    The ratio of measured to tabulated times is followed as TCP follows its round trips: a running mean and a running
    mean deviation.

    Args:
      table: as measured at start.
    """

    def __init__(self, table: LatencyTable):
        self.table = table
        self._mean = 1.0
        self._deviation = 0.05

    def __repr__(self) -> str:
        return f"StepTimes({self.table}, x {self._mean:.2f} +- {self._deviation:.2f})"

    @property
    def drift(self) -> float:
        """How many times as long as in the table steps take now."""
        return self._mean

    def expected_s(self, bucket: int, num_decode_keys: int, num_prefill_keys: int) -> float:
        """What such a step takes on average; arguments as of `LatencyTable.step_s`."""
        return self._mean * self.table.step_s(bucket, num_decode_keys, num_prefill_keys)

    def bound_s(self, bucket: int, num_decode_keys: int, num_prefill_keys: int) -> float:
        """What such a step seldom exceeds: what a promise can rest on."""
        factor = self._mean + _NUM_DEVIATIONS * self._deviation
        return factor * self.table.step_s(bucket, num_decode_keys, num_prefill_keys)

    def observe(self, bucket: int, num_decode_keys: int, num_prefill_keys: int, measured_s: float) -> None:
        """Learns from a step that ran."""
        ratio = min(measured_s / self.table.step_s(bucket, num_decode_keys, num_prefill_keys), _LARGEST_RATIO)
        self._deviation += _GAIN * (abs(ratio - self._mean) - self._deviation)
        self._mean += _GAIN * (ratio - self._mean)
