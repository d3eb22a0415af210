"""The engine without a device: what a deployment does with a workload, how much it can take, which to choose."""

from sarathi_jax.simulate.cluster import ROUTINGS, Routing, Snapshot
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.simulator import Disaggregated, simulate, simulate_disaggregated

__all__ = [
    "ROUTINGS",
    "Deployment",
    "Disaggregated",
    "Routing",
    "Snapshot",
    "simulate",
    "simulate_disaggregated",
]
