"""Keeps the expected step times true while the engine runs."""

from sarathi_jax.latency import StepTimes
from sarathi_jax.request import RequestOutput
from sarathi_jax.telemetry.steps import StepRecord


class DriftObserver:
    """Tells the step times of an engine how long its steps took.

    Args:
      times: to correct.
    """

    def __init__(self, times: StepTimes):
        self._times = times

    def on_step(self, record: StepRecord) -> None:
        plan = record.plan
        self._times.observe(plan.bucket, plan.num_decode_keys, plan.num_prefill_keys, record.duration_s)

    def on_end(self, output: RequestOutput) -> None:
        pass
