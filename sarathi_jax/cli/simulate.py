"""Simulates a workload on devices that need not be at hand, with the scheduler and the block pool of the server.

Mistral-7B on an A100, the paper's chat lengths at 2 requests a second:
  PROGRAM simulate --model mistral-7b --device a100-80gb --trace chat --rate 2 --num_requests 500

A deployment of the paper, as the stack that it measured would do it; everything kept in a folder:
  PROGRAM simulate --deployment yi-34b-2xa100 --host published --rate 0.5 --out results/yi

Eight replicas, each request to the one with the least work, arrivals as recorded:
  PROGRAM simulate --model mistral-7b --dp 8 --routing least_work --trace splitwise_conv --arrivals recorded

This machine, by the times that PROGRAM profile measured here:
  PROGRAM simulate --table table.json --device cpu --token_budget 256 --rate 1

The same command gives the same numbers.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sarathi_jax.cli.deployment_flags import define_deployment_flags, deployment_of, describe_deployment
from sarathi_jax.cli.fields import UsageError
from sarathi_jax.cli.workload_flags import define_workload_flags, workload_spec
from sarathi_jax.simulate import ROUTINGS, Snapshot
from sarathi_jax.simulate.memory import cache_of

SUMMARY = "serves a workload in simulated time on devices that need not be at hand"


def define(values: flags.FlagValues) -> None:
    """Defines the flags: the workload's, those of the run, then the deployment's."""
    define_workload_flags(values)
    flags.DEFINE_enum("routing", "round_robin", ROUTINGS, "which replica gets a request.", flag_values=values)
    flags.DEFINE_float(
        "time_limit_s", None, "ends the run; what has not come counts as longer than it waited.", flag_values=values
    )
    flags.DEFINE_float("slo_ms", None, "time between tokens to judge the run by.", flag_values=values)
    flags.DEFINE_string("out", None, "folder for tables, a trace and pictures.", flag_values=values)
    define_deployment_flags(values)


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Simulates; returns the exit status."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    spec = workload_spec(values)
    if spec.has_rate and spec.rate is None:
        raise UsageError("--rate is missing: how many requests a second; or say --arrivals static")
    for name in ("time_limit_s", "slo_ms"):
        value = getattr(values, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name}={value:g} must be above 0")
    deployment = deployment_of(values)
    cache = cache_of(deployment)
    workloads = spec.open(min(cache.max_model_len, cache.num_blocks * cache.block_size))
    requests = workloads.at(spec.rate, spec.seed).requests()
    print(f"{len(requests)} requests, {workloads.source}", file=sys.stderr)
    print(describe_deployment(deployment), file=sys.stderr)

    from tqdm import tqdm

    from sarathi_jax.simulate import simulate
    from sarathi_jax.telemetry.plots import PlotError
    from sarathi_jax.telemetry.report import report, write_run

    last_s = requests[-1].arrival_s
    with tqdm(total=round(last_s), unit="s", desc="simulated", disable=not sys.stderr.isatty()) as bar:

        def look(snapshot: Snapshot) -> bool:
            bar.total = max(bar.total, round(snapshot.now_s))
            bar.update(round(snapshot.now_s) - bar.n)
            return False

        measured = simulate(
            requests,
            deployment,
            routing=values.routing,
            seed=spec.seed,
            limit_s=values.time_limit_s,
            stop=look,
        )
    slo_ms = values.slo_ms if values.slo_ms is not None else deployment.engine.tbt_slo_ms
    slo_s = None if slo_ms is None else slo_ms / 1e3
    print(report(measured, slo_s))
    if values.out is not None:
        folder = Path(values.out).expanduser()
        about = {
            "deployment": describe_deployment(deployment),
            "lengths": workloads.source,
            "arrivals": spec.arrivals,
            "rate": spec.rate,
            "seed": spec.seed,
            "routing": values.routing,
        }
        try:
            written = write_run(measured, folder, about, name=deployment.engine.policy, tbt_slo_s=slo_s)
        except PlotError as error:
            logging.warning("%s; the tables are in %s", error, folder)
        else:
            print(f"\nwritten to {folder}: {', '.join(path.name for path in written)}")
    return 0
