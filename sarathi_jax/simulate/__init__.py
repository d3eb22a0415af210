"""The engine without a device: what a deployment does with a workload, how much it can take, which to choose."""

from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.simulator import ROUTINGS, Routing, Snapshot, simulate

__all__ = ["ROUTINGS", "Deployment", "Routing", "Snapshot", "simulate"]
