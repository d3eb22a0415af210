"""What the engine tells its observers: one `StepRecord` a step, and every request's end."""

import dataclasses
from typing import Protocol

from sarathi_jax.request import RequestOutput
from sarathi_jax.scheduling.plan import SchedulerState, StepPlan


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """A step that has ended. Times in seconds on the engine's clock.

    Attributes:
      plan: what it computed.
      request_ids: whose each chunk of the plan was; empty for one that had ended meanwhile.
      scheduled_s: when its planning began.
      launched_s: when it was handed to the device.
      started_s: when the device could begin with it: it had been launched and the step before it had ended.
      ended_s: when its tokens were known here.
      num_drawn: tokens that it drew for requests that were still there.
      ttfts_s: of each request that got its first token, the time since it came.
      tbts_s: of each token of a sample that had one, the time since that one.
      state: of the scheduler, once the step had ended.
    """

    plan: StepPlan
    request_ids: tuple[str, ...]
    scheduled_s: float
    launched_s: float
    started_s: float
    ended_s: float
    num_drawn: int
    ttfts_s: tuple[float, ...]
    tbts_s: tuple[float, ...]
    state: SchedulerState

    @property
    def duration_s(self) -> float:
        """How long it kept the device, or the last stage of the pipeline, from the next one."""
        return self.ended_s - self.started_s

    @property
    def host_s(self) -> float:
        """Planning, packing and launching."""
        return self.launched_s - self.scheduled_s


class Observer(Protocol):
    """Sees what an engine does; called in its thread, so it must be quick and must not raise."""

    def on_step(self, record: StepRecord) -> None:
        """A step has ended."""
        ...

    def on_end(self, output: RequestOutput) -> None:
        """A request has finished or was aborted."""
        ...
