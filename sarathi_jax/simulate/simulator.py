"""`simulate`: what a deployment would do with a workload."""

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
from sarathi_jax.workloads import TimedRequest

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


def simulate(
    requests: Sequence[TimedRequest],
    deployment: Deployment,
    *,
    routing: Routing = "round_robin",
    seed: int = 0,
    limit_s: float | None = None,
    keep_steps: bool = True,
    stop: Callable[[Snapshot], bool] | None = None,
) -> Run:
    """Serves a workload in simulated time, with the scheduler, block pool and engine of the server.

    The same arguments give the same run.

    Args:
      requests: in the order of their arrival.
      deployment: `engine.dp` replicas of it.
      routing: which replica gets a request: each in turn; the one with the fewest prompt tokens of unfinished requests;
        or the one that had the request's group before, as long as it has not more than twice the mean of them.
      seed: of the engines.
      limit_s: when the run is cut off; what has not ended by then counts as longer. None: it ends by itself.
      keep_steps: records every step, which takes longer.
      stop: asked about every simulated second; True cuts the run off.

    Raises:
      ConfigError: the model does not fit, or there is no such routing; the message says what to do.
      RequestError: a request can never be served.
    """
    if routing not in ROUTINGS:
        raise ConfigError(f"routing={routing!r} is not one of {', '.join(ROUTINGS)}")
    engine = deployment.engine
    if engine.prefix_caching and not any(request.shared for request in requests):
        engine = dataclasses.replace(engine, prefix_caching=False)  # without equal prompts it only costs time
    alone = dataclasses.replace(deployment, engine=dataclasses.replace(engine, dp=1))
    replicas = [SimulatedReplica(alone, seed + i, keep_steps) for i in range(engine.dp)]
    end_s = math.inf if limit_s is None else limit_s
    owners, arrived = dict[str, SimulatedReplica](), list[str]()
    router, look_s = _Router(routing, replicas), _LOOK_EVERY_S
    for number, request in enumerate(requests):
        if request.arrival_s >= end_s:
            break
        while stop is not None and look_s < request.arrival_s and look_s < end_s:
            _run_until(replicas, look_s)
            end_s = look_s if stop(_snapshot(replicas, look_s)) else end_s
            look_s += _LOOK_EVERY_S
        if request.arrival_s >= end_s:
            break
        _run_until(replicas, request.arrival_s)
        request_id, replica = str(number), router.choose(request)
        tokens = prompt_tokens(number, request, deployment.model.vocab_size)
        replica.add(request_id, tokens, request.output, request.arrival_s)
        owners[request_id] = replica
        arrived.append(request_id)
    while stop is not None and look_s < end_s and any(replica.engine.has_work for replica in replicas):
        _run_until(replicas, look_s)
        end_s = look_s if stop(_snapshot(replicas, look_s)) else end_s
        look_s += _LOOK_EVERY_S
    _run_until(replicas, end_s)
    return _gather(replicas, owners, arrived, end_s)


def prompt_tokens(number: int, request: TimedRequest, vocab_size: int) -> tuple[int, ...]:
    """Made-up tokens that begin like those of other requests only as far as the group shares them."""
    shared = min(request.shared, request.prompt) if request.group is not None else 0
    own = (number // vocab_size % vocab_size, number % vocab_size, *(0,) * request.prompt)
    return (*((request.group or 0) % vocab_size,) * shared, *own[: request.prompt - shared])


class _Router:
    """Chooses replicas; see `simulate`."""

    def __init__(self, routing: Routing, replicas: Sequence[SimulatedReplica]):
        self._routing = routing
        self._replicas = replicas
        self._number = -1
        self._homes: dict[int, SimulatedReplica] = {}

    def choose(self, request: TimedRequest) -> SimulatedReplica:
        """The replica for a request that comes now."""
        if self._routing == "round_robin":
            self._number = (self._number + 1) % len(self._replicas)
            return self._replicas[self._number]
        least = min(self._replicas, key=lambda replica: replica.num_prompt_tokens)
        if self._routing == "least_work" or request.group is None:
            return least
        home = self._homes.setdefault(request.group, least)
        mean = sum(replica.num_prompt_tokens for replica in self._replicas) / len(self._replicas)
        if home.num_prompt_tokens > _OVERLOADED * mean:
            home = self._homes[request.group] = least
        return home


def _run_until(replicas: Sequence[SimulatedReplica], until_s: float) -> None:
    for replica in replicas:
        replica.run_until(until_s)


def _snapshot(replicas: Sequence[SimulatedReplica], now_s: float) -> Snapshot:
    waiting = [seq for replica in replicas for seq in replica.scheduler.waiting]
    oldest_s = min((seq.request.arrival_s for seq in waiting), default=now_s)
    return Snapshot(now_s, len(waiting), max(0.0, now_s - oldest_s))


def _gather(
    replicas: Sequence[SimulatedReplica],
    owners: dict[str, SimulatedReplica],
    arrived: Sequence[str],
    end_s: float,
) -> Run:
    for replica in replicas:
        replica.give_up([request_id for request_id, owner in owners.items() if owner is replica])
    if math.isinf(end_s):
        end_s = max((output.metrics.finished_s or 0.0 for r in replicas for output in r.outputs), default=0.0)
    samples = dict[str, SampleTimes]()
    for replica in replicas:
        lost_s = preemption_times(replica.steps, end_s)
        for output in replica.outputs:
            samples[output.request_id] = samples_of(output, lost_s.get(output.request_id, 0.0))[0]
    return Run(tuple(samples[request_id] for request_id in arrived), end_s, tuple(tuple(r.steps) for r in replicas))
