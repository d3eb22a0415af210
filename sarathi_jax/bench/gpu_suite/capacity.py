"""Capacity of the scheduling policies on the chat trace: says what is missing for it today."""

import importlib.util

from sarathi_jax.bench.gpu_suite.results import Results, Skipped

POLICIES = ("sarathi", "vllm", "orca")


def run(results: Results) -> bool:
    """One row a policy, each skipped with its reason until policies, traces and arrivals exist.

    Returns:
      True: every row was reached.
    """
    for policy in POLICIES:
        results.measure(f"capacity {policy}", lambda policy=policy: _refuse(policy), kind="capacity", policy=policy)
    return True


def _refuse(policy: str) -> dict[str, float]:
    if importlib.util.find_spec(f"sarathi_jax.scheduling.{policy}") is None:
        raise Skipped(f"there is no policy {policy!r} yet")
    raise Skipped("the policy is there, but no trace of requests with their arrivals to serve yet")
