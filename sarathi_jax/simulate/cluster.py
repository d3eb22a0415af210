"""`Cluster`: replicas that share the requests, each on its own clock, driven in the order of arrivals."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

from sarathi_jax.config import ConfigError
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.replica import SimulatedReplica
from sarathi_jax.telemetry.definitions import SampleTimes, samples_of
from sarathi_jax.telemetry.run import Run
from sarathi_jax.telemetry.summary import preemption_times

Routing = Literal["round_robin", "least_work", "prefix_affinity"]
ROUTINGS: tuple[Routing, ...] = ("round_robin", "least_work", "prefix_affinity")
_OVERLOADED = 2.0  # times the mean work: then a request leaves the replica that knows its prefix
_LOOK_EVERY_S = 1.0


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A simulation under way.

    Attributes:
      now_s: simulated seconds since the start.
      num_waiting: sequences that have not been admitted, or were preempted, of all replicas.
      oldest_waiting_s: how long the first of those has waited since it came; 0 if none waits.
    """

    now_s: float
    num_waiting: int
    oldest_waiting_s: float


@dataclasses.dataclass(frozen=True)
class Job:
    """A request as the replicas see it.

    Attributes:
      job_id: unique.
      arrival_s: when it comes.
      tokens: its prompt.
      num_output: tokens that it draws.
      group: of `TimedRequest`.
      num_received: leading tokens of the prompt whose keys and values come with it.
    """

    job_id: str
    arrival_s: float
    tokens: tuple[int, ...]
    num_output: int
    group: int | None = None
    num_received: int = 0


class Cluster:
    """Replicas of a deployment.

    Args:
      deployment: `engine.dp` replicas of it.
      routing: which of them gets a job, see `simulate`.
      seed: of the engines.
      keep_steps: records every step, which takes longer.

    Attributes:
      replicas: in their order.
      owners: of the jobs that came, in the order of their arrival.

    Raises:
      ConfigError: the model does not fit, or there is no such routing; the message says what to do.
    """

    def __init__(self, deployment: Deployment, routing: Routing, seed: int, keep_steps: bool):
        if routing not in ROUTINGS:
            raise ConfigError(f"routing={routing!r} is not one of {', '.join(ROUTINGS)}")
        alone = dataclasses.replace(deployment, engine=dataclasses.replace(deployment.engine, dp=1))
        self.replicas = [SimulatedReplica(alone, seed + i, keep_steps) for i in range(deployment.engine.dp)]
        self.owners = dict[str, int]()
        self._routing, self._homes = routing, dict[int, int]()

    def serve(
        self, jobs: Sequence[Job], limit_s: float | None = None, stop: Callable[[Snapshot], bool] | None = None
    ) -> Run:
        """Serves jobs in the order of their arrival; arguments as of `simulate`."""
        end_s, look_s = math.inf if limit_s is None else limit_s, math.inf if stop is None else _LOOK_EVERY_S
        for job in jobs:
            end_s, look_s = self._run_until(min(job.arrival_s, end_s), end_s, look_s, stop)
            if job.arrival_s >= end_s:
                break
            index = self.owners[job.job_id] = self._choose(job)
            replica = self.replicas[index]
            replica.scheduler.receive(job.tokens[: job.num_received])
            replica.add(job.job_id, job.tokens, job.num_output, job.arrival_s)
        end_s, _ = self._run_until(end_s, end_s, look_s, stop)
        return self._gather(end_s)

    def _run_until(
        self, until_s: float, end_s: float, look_s: float, stop: Callable[[Snapshot], bool] | None
    ) -> tuple[float, float]:
        """Lets all replicas run, and looks at them now and then; returns when the run ends and the next look is due."""
        while look_s < until_s and stop is not None:
            for replica in self.replicas:
                replica.run_until(look_s)
            if stop(self._snapshot(look_s)):
                return look_s, math.inf
            look_s += _LOOK_EVERY_S
            if math.isinf(until_s) and not any(replica.engine.has_work for replica in self.replicas):
                break
        for replica in self.replicas:
            replica.run_until(until_s)
        return end_s, look_s

    def _choose(self, job: Job) -> int:
        if self._routing == "round_robin":
            return len(self.owners) % len(self.replicas)
        work = [replica.num_prompt_tokens for replica in self.replicas]
        least = work.index(min(work))
        if self._routing == "least_work" or job.group is None:
            return least
        home = self._homes.setdefault(job.group, least)
        if work[home] > _OVERLOADED * sum(work) / len(work):
            home = self._homes[job.group] = least
        return home

    def _snapshot(self, now_s: float) -> Snapshot:
        waiting = [seq for replica in self.replicas for seq in replica.scheduler.waiting]
        oldest_s = min((seq.request.arrival_s for seq in waiting), default=now_s)
        return Snapshot(now_s, len(waiting), max(0.0, now_s - oldest_s))

    def _gather(self, end_s: float) -> Run:
        for index, replica in enumerate(self.replicas):
            replica.give_up([job_id for job_id, owner in self.owners.items() if owner == index])
        if math.isinf(end_s):
            end_s = max((one.metrics.finished_s or 0.0 for r in self.replicas for one in r.outputs), default=0.0)
        samples = dict[str, SampleTimes]()
        for replica in self.replicas:
            lost_s = preemption_times(replica.steps, end_s)
            for output in replica.outputs:
                samples[output.request_id] = samples_of(output, lost_s.get(output.request_id, 0.0))[0]
        steps = tuple(tuple(replica.steps) for replica in self.replicas)
        return Run(tuple(samples[job_id] for job_id in self.owners), end_s, steps)
