"""`SimulatedExecutor`: runs plans on a clock that jumps; the engine cannot tell it from a device."""

import collections
import dataclasses
import random
from collections.abc import Callable, Sequence

import numpy as np

from sarathi_jax.latency import StepTimes
from sarathi_jax.scheduling.plan import StepPlan, StepResult
from sarathi_jax.simulate.deployment import Deployment

_QUICKEST = 0.5  # of the expected time: a step may be shorter than others by more than it takes
StageTimes = Callable[[StepPlan], tuple[Sequence[float], float]]
"""Seconds of each stage for a plan, and of a send from one to the next."""


class SimulatedClock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def wait_until(self, at_s: float) -> None:
        """Passes the time up to `at_s`, if it is not over already."""
        self._now_s = max(self._now_s, at_s)


def stage_times(deployment: Deployment, seed: int = 0) -> StageTimes:
    """How long the steps of a deployment take: by its measured table, or else by its roofline.

    Args:
      deployment: that computes them.
      seed: of how the times of a measured table scatter (`LatencyTable.excess_s`).

    Raises:
      ValueError: layers or links that do not fit the devices.
    """
    table, pads = deployment.table, deployment.pads
    if table is not None:
        draws = random.Random(seed)

        def scattered(plan: StepPlan) -> tuple[Sequence[float], float]:
            expected_s = table.step_s(plan.work)
            return (max(_QUICKEST * expected_s, expected_s + draws.choice(table.excess_s(plan.work))),), 0.0

        return scattered
    roofline = deployment.roofline()

    def times(plan: StepPlan) -> tuple[Sequence[float], float]:
        work = plan.work if pads else dataclasses.replace(plan.work, num_tokens=plan.num_tokens)
        return [roofline.stage_s(work, stage) for stage in range(roofline.pp)], roofline.send_s(work.num_tokens)

    return times


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A step under way.

    Attributes:
      num_chunks: of its plan.
      done_s: when its tokens are known.
    """

    num_chunks: int
    done_s: float


class SimulatedExecutor:
    """Lets every plan take the time that it is said to take.

    A stage begins a micro-batch when it has ended the one before and the stage before has sent this one on; the first
    stage, when the tokens of the micro-batch pp steps ago are back, which its decodes go on from.

    Args:
      times: of the stages.
      clock: of the engine.
      num_stages: pp.
      learns: told how long steps took, as `DriftObserver` does it; None: nobody.
      idle_s: of `LatencyTable`.
    """

    def __init__(
        self,
        times: StageTimes,
        clock: SimulatedClock,
        num_stages: int,
        learns: StepTimes | None = None,
        idle_s: float = 0.0,
    ):
        self._times = times
        self._clock = clock
        self._idle_s = idle_s
        self._learns = learns
        self._free_s = [0.0] * num_stages
        self._done_s = collections.deque([0.0] * num_stages, maxlen=num_stages)
        self.num_steps = 0
        self.busy_s = [0.0] * num_stages

    def launch(self, plan: StepPlan | None) -> Simulated | None:
        if plan is None:
            return None
        self.num_steps += 1
        seconds, send_s = self._times(plan)
        launched_s = self._clock.now_s()
        waits_s = self._idle_s if launched_s >= self._free_s[0] else 0.0
        at_s = max(launched_s + waits_s, self._done_s[0], self._free_s[0])
        for stage, stage_s in enumerate(seconds):
            at_s = max(at_s + send_s * (stage > 0), self._free_s[stage]) + stage_s
            self._free_s[stage] = at_s
            self.busy_s[stage] += stage_s
        if self._learns is not None:
            stage_s = min(at_s - max(launched_s, self._done_s[-1]), (at_s - launched_s) / len(seconds))
            self._learns.observe(plan.work, stage_s)
        self._done_s.append(at_s)
        return Simulated(len(plan.chunks), at_s)

    def collect(self, handle: Simulated) -> StepResult:
        self._clock.wait_until(handle.done_s)
        return StepResult(np.zeros(handle.num_chunks, np.int32))
