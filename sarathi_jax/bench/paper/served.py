"""What the paper compares at one capacity: a deployment, its promises, and how each policy is set."""

import dataclasses
import functools
from typing import Any, Literal

from sarathi_jax.bench.paper.deployments import TRACES, DeploymentSettings, Trace
from sarathi_jax.simulate import Deployment
from sarathi_jax.workloads import Workload, poisson, synthesise

Level = Literal["strict", "relaxed"]


@dataclasses.dataclass(frozen=True)
class Served:
    """A deployment of the paper's Table 1, with the promises of its Table 3.

    Attributes:
      title: in tables.
      deployment: that serves; its context is that of the trace.
      slo_s: P99 of the times between tokens, by level.
      budget: of Sarathi, in tokens, by level.
      orca_max_num_seqs: sequences that Orca has room for, since it reserves the longest for each.
    """

    title: str
    deployment: DeploymentSettings
    slo_s: dict[Level, float]
    budget: dict[Level, int]
    orca_max_num_seqs: int

    def build(self, policy: str, trace: Trace, level: Level) -> Deployment:
        """The deployment under a policy, with its settings of the paper.

        vLLM computes up to a context of prompts in a step. Orca has no limit of its own; two contexts are more than its
        steps ever held in the runs of the paper's rates, and leave the memory to the cache.
        """
        settings = dataclasses.replace(self.deployment, context=TRACES[trace].longest)
        match policy:
            case "sarathi":
                return settings.build(**fixed_budget(self.budget[level]))
            case "vllm":
                return settings.build(policy=policy, **fixed_budget(settings.context))
            case "orca":
                limit = fixed_budget(2 * settings.context)
                return settings.build(policy=policy, max_num_seqs=self.orca_max_num_seqs, **limit)
            case _:
                raise ValueError(f"policy {policy!r} is none of sarathi, vllm, orca")


def fixed_budget(num_tokens: int) -> dict[str, Any]:
    """Fields of `EngineConfig` for steps of at most so many tokens, of whatever size an eager stack likes."""
    return {"token_budget": num_tokens, "token_buckets": (num_tokens,)}


def workload(trace: Trace, number: int, rate: float, seed: int) -> Workload:
    """Requests as long as the trace's, at Poisson arrivals that are not cut (the paper's harness cuts them)."""
    return Workload(functools.partial(synthesise, TRACES[trace]), functools.partial(poisson, rate), number, seed)
