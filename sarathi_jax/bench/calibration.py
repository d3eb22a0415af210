"""Serves requests to correct a latency table by them: `main.py profile --serve_s`, `sarathi_jax.bench.fidelity`."""

import dataclasses

from sarathi_jax.bench.replay import replay
from sarathi_jax.latency import LatencyTable
from sarathi_jax.llm import LLM
from sarathi_jax.simulate.in_service import in_service
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


def calibrate(
    llm: LLM, table: LatencyTable, workloads: Workloads, rate: float, seconds: float, *, least: int, seed: int = 0
) -> LatencyTable:
    """The table as requests bear it out that come at a rate.

    Args:
      llm: idle; nobody else may use it meanwhile.
      table: of its programs, as `sarathi_jax.timing.measure` has it.
      workloads: what is served.
      rate: requests a second; well below the throughput there are steps of every size, and some find the device idle.
      seconds: how long requests come.
      least: so many come at least.
      seed: of the requests.
    """
    own_seed = _FIRST_SEED + 1 + seed
    load = dataclasses.replace(workloads, number=max(least, round(seconds * rate))).at(rate, own_seed)
    return in_service(table, replay(llm, load.requests(), seed=own_seed, progress=False).steps[0])
