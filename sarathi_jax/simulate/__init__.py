"""The engine without a device: what a deployment does with a workload, how much it can take, which to choose."""

from sarathi_jax.simulate.capacity import Capacity, find_capacity
from sarathi_jax.simulate.choices import PRICES, Choice, Demand, Options, Plan
from sarathi_jax.simulate.cluster import ROUTINGS, Routing, Snapshot
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.planner import plan
from sarathi_jax.simulate.probes import simulated
from sarathi_jax.simulate.simulator import Disaggregated, simulate, simulate_disaggregated

__all__ = [
    "PRICES",
    "ROUTINGS",
    "Capacity",
    "Choice",
    "Demand",
    "Deployment",
    "Disaggregated",
    "Options",
    "Plan",
    "Routing",
    "Snapshot",
    "find_capacity",
    "plan",
    "simulate",
    "simulate_disaggregated",
    "simulated",
]
