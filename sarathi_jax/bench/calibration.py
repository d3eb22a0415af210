"""Serves requests to correct a latency table by them: `main.py profile --serve_s`, `sarathi_jax.bench.fidelity`."""

import dataclasses

from sarathi_jax.bench.replay import replay
from sarathi_jax.llm import LLM
from sarathi_jax.simulate.in_service import ServedStep
from sarathi_jax.workloads import Workloads, static

_FIRST_SEED = 100  # other requests than anybody measures


def throughput(llm: LLM, workloads: Workloads) -> float:
    """Requests a second that are done when all of them come at once.

    Args:
      llm: idle; nobody else may use it meanwhile.
      workloads: what is served.
    """
    num_seqs, done = llm.engine_config.max_num_seqs, 0.0
    for times in (1, 2):  # what runs first takes longer
        rush = dataclasses.replace(workloads, number=times * num_seqs).at(1.0, _FIRST_SEED)
        run = replay(llm, dataclasses.replace(rush, arrivals=static).requests(), seed=times, progress=False)
        done = run.throughput.requests_per_s
    return done


def served_steps(
    llm: LLM, workloads: Workloads, rate: float, seconds: float, *, least: int, seed: int = 0
) -> list[ServedStep]:
    """The steps by which requests were served that came at a rate, to correct a table by (`in_service`).

    Args:
      llm: idle; nobody else may use it meanwhile.
      workloads: what is served.
      rate: requests a second.
      seconds: how long requests come.
      least: so many come at least.
      seed: of the requests.
    """
    own_seed = _FIRST_SEED + 1 + seed
    load = dataclasses.replace(workloads, number=max(least, round(seconds * rate))).at(rate, own_seed)
    (steps,) = ServedStep.of_run(replay(llm, load.requests(), seed=own_seed, progress=False))
    return steps
