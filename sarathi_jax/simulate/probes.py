"""Probes of `find_capacity` on the simulator."""

import dataclasses
from collections.abc import Callable

from sarathi_jax.simulate.capacity import Probe
from sarathi_jax.simulate.cluster import Routing, Snapshot
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.simulator import simulate
from sarathi_jax.telemetry.definitions import MEDIAN_DELAY_SLO_S
from sarathi_jax.telemetry.run import Run
from sarathi_jax.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Hopeless:
    """Whether a simulation need not go on: `find_capacity` would find its delays too long whatever came.

    Most requests of the run wait at once, and the first of them has waited twice as long as half of them may.

    Attributes:
      number: of requests of the whole run.
    """

    number: int

    def __call__(self, snapshot: Snapshot) -> bool:
        # More than half, since those that wait because they were preempted have been scheduled once.
        most_wait = snapshot.num_waiting > 0.6 * self.number
        return most_wait and snapshot.oldest_waiting_s > 2 * MEDIAN_DELAY_SLO_S


def simulated(
    deployment: Deployment, workload_at: Callable[[float, int], Workload], routing: Routing = "round_robin"
) -> Probe:
    """Simulates a workload at a rate, and gives up runs without hope.

    Args:
      deployment: that serves, with all its replicas.
      workload_at: of a rate and a seed; `Workloads.at` is one.
      routing: as of `simulate`.
    """

    def probe(rate: float, seed: int) -> Run:
        requests = workload_at(rate, seed).requests()
        return simulate(
            requests, deployment, routing=routing, seed=seed, keep_steps=False, stop=Hopeless(len(requests))
        )

    return probe
