"""Keeps the expected step times true while the engine runs."""

from sarathi_jax.latency import StepTimes
from sarathi_jax.request import RequestOutput
from sarathi_jax.telemetry.steps import StepRecord


class DriftObserver:
    """Tells the step times of an engine how long its steps took.

    Args:
      times: to correct.
      num_stages: pp. While not every stage has a step, one takes the time of all stages, of which each has its share.
    """

    def __init__(self, times: StepTimes, num_stages: int = 1):
        self._times = times
        self._num_stages = num_stages

    def on_step(self, record: StepRecord) -> None:
        stage_s = min(record.duration_s, (record.ended_s - record.launched_s) / self._num_stages)
        self._times.observe(record.plan.work, stage_s)

    def on_end(self, output: RequestOutput) -> None:
        pass
