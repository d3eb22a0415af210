"""Finds the largest request rate that keeps a promised time between tokens: P99 within --slo_ms, and half of the
requests scheduled within 2 seconds.

Mistral-7B on an A100 with the paper's chat lengths, 0.1 s promised:
  PROGRAM capacity --model mistral-7b --device a100-80gb --trace chat --slo_ms 100

The same for the baseline, closely, everything kept in a folder:
  PROGRAM capacity --deployment mistral-7b-a100 --policy vllm --slo_ms 100 --tolerance 0.01 --out results/vllm

The model that ships, on this machine, in real time:
  PROGRAM capacity --engine real --trace chat --slo_ms 200 --num_requests 64 --guess 0.5

A run must last for its delays to show: with n requests a capacity c that delays bound comes out too high by a share of
about 4 c / n. Results in words go to stdout, each run as it ends to stderr.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sarathi_jax.cli.deployment_flags import SKIP, define_deployment_flags, deployment_of, describe_deployment
from sarathi_jax.cli.fields import UsageError
from sarathi_jax.cli.model_flags import model_arguments
from sarathi_jax.cli.results import finite, write_rows
from sarathi_jax.cli.workload_flags import define_workload_flags, workload_spec
from sarathi_jax.simulate import ROUTINGS
from sarathi_jax.simulate.memory import cache_of
from sarathi_jax.workloads import Workloads, WorkloadSpec

if TYPE_CHECKING:
    from sarathi_jax.simulate.capacity import Capacity, Probe, Trial

SUMMARY = "finds the largest request rate within an SLO, simulated or on the real engine"

_NUM_REQUESTS = 512
_LOWEST_REAL = 1 / 64  # of the guess: in real time, lower rates take too long


def define(values: flags.FlagValues) -> None:
    """Defines the flags: the search's, the workload's, then the deployment's."""
    flags.DEFINE_float("slo_ms", None, "P99 of the times between tokens.", flag_values=values)
    flags.DEFINE_enum(
        "engine", "simulated", ["simulated", "real"], "what serves: a simulation, or this machine.", flag_values=values
    )
    flags.DEFINE_float("tolerance", 0.05, "share by which the result may be too low.", flag_values=values)
    flags.DEFINE_integer("num_seeds", 3, "runs at each rate, pooled; from --seed on.", flag_values=values)
    flags.DEFINE_float("guess", 1.0, "requests a second to begin with.", flag_values=values)
    flags.DEFINE_float(
        "time_limit_s", None, "of a run on the real engine; what has not come counts as longer.", flag_values=values
    )
    flags.DEFINE_enum("routing", "round_robin", ROUTINGS, "which replica gets a request.", flag_values=values)
    flags.DEFINE_string("out", None, "folder for capacity.json, trials.csv and a picture.", flag_values=values)
    define_workload_flags(values, skip=("rate",))
    values["num_requests"].help = f"of each run; none: {_NUM_REQUESTS}."
    define_deployment_flags(values)


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Searches; returns the exit status: 0 also where no rate keeps the promise."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    if values.slo_ms is None or not 0 < values.slo_ms < math.inf:
        raise UsageError("--slo_ms says how long the time between tokens may be, in milliseconds: give it, above 0")
    for name in ("tolerance", "guess"):
        if not 0 < getattr(values, name) < math.inf:
            raise UsageError(f"--{name}={getattr(values, name):g} must be above 0")
    if values.num_seeds < 1:
        raise UsageError(f"--num_seeds={values.num_seeds} must be at least 1")
    spec = rated_spec(values, _NUM_REQUESTS)

    from sarathi_jax.simulate.capacity import delay_resolution, find_capacity

    with (_real if values.engine == "real" else _simulated)(values, spec) as (probe, about):
        found = find_capacity(
            probe,
            tbt_slo_s=values.slo_ms / 1e3,
            guess=values.guess,
            tolerance=values.tolerance,
            seeds=range(spec.seed, spec.seed + values.num_seeds),
            lowest=values.guess * _LOWEST_REAL if values.engine == "real" else None,
            on_trial=print_trial,
        )
    print(found)
    number = about["requests a run"]
    if "delay" in found.bound and delay_resolution(found.rate, number) > values.tolerance:
        print(
            f"with {number} requests a run this may be {delay_resolution(found.rate, number):.0%} too high: "
            f"--num_requests {math.ceil(delay_resolution(found.rate, 1) / values.tolerance)} would tell within "
            f"{values.tolerance:.0%}"
        )
    if values.out is not None:
        _write(found, Path(values.out).expanduser(), about)
    return 0


def rated_spec(values: flags.FlagValues, number: int) -> WorkloadSpec:
    """The workload of the command line, which must have a rate that can be looked for.

    Args:
      values: with the flags of the workload, without --rate.
      number: of requests where the command line does not say.
    """
    spec = workload_spec(values, skip=("rate",))
    if not spec.has_rate:
        raise UsageError(f"--arrivals={spec.arrivals} have no rate to look for: choose poisson, gamma or bursts")
    return spec if spec.num_requests is not None else dataclasses.replace(spec, num_requests=number)


def print_trial(trial: "Trial") -> None:
    """A run in a line."""
    kept = f"too long: {', '.join(trial.broken)}" if trial.broken else "kept"
    print(
        f"{trial.rate:9.4f}/s seed {trial.seed}: P99 TBT {1e3 * trial.p99_tbt_s:8.1f} ms, median delay "
        f"{trial.median_delay_s:7.2f} s, {trial.output_tokens_per_s:8.1f} tokens/s  {kept}",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def _simulated(values: flags.FlagValues, spec: WorkloadSpec) -> Iterator[tuple["Probe", dict[str, Any]]]:
    from sarathi_jax.simulate.probes import simulated

    deployment = deployment_of(values)
    cache = cache_of(deployment)
    workloads = spec.open(min(cache.max_model_len, cache.num_blocks * cache.block_size))
    about = _about(workloads, spec, describe_deployment(deployment))
    yield simulated(deployment, workloads.at, values.routing), about


@contextlib.contextmanager
def _real(values: flags.FlagValues, spec: WorkloadSpec) -> Iterator[tuple["Probe", dict[str, Any]]]:
    for name in ("device", "table", "host", "pads", "routing"):
        if values[name].present:
            raise UsageError(f"--{name} is of simulations: leave it out with --engine real")
    model = model_arguments(values, SKIP)
    from sarathi_jax.bench.replay import replay
    from sarathi_jax.llm import LLM
    from sarathi_jax.telemetry.run import Run

    with LLM(model.model, dtype=model.dtype, progress=sys.stderr.isatty(), **model.engine) as llm:
        cache = llm.cache_config
        workloads = spec.open(min(cache.max_model_len, cache.num_blocks * cache.block_size))
        salts = itertools.count(spec.seed)

        def probe(rate: float, seed: int) -> Run:
            # Other prompts than in the runs before, which would be found in the prefix cache.
            requests, salt = workloads.at(rate, seed).requests(), next(salts)
            return replay(llm, requests, seed=salt, limit_s=values.time_limit_s, progress=sys.stderr.isatty())

        yield probe, _about(workloads, spec, repr(llm))


def _about(workloads: Workloads, spec: WorkloadSpec, who: str) -> dict[str, Any]:
    print(f"{workloads.number} requests a run, {workloads.source}\n{who}", file=sys.stderr)
    return {
        "served by": who,
        "lengths": workloads.source,
        "arrivals": spec.arrivals,
        "requests a run": workloads.number,
    }


def _write(found: "Capacity", folder: Path, about: dict[str, Any]) -> None:
    from sarathi_jax.telemetry.plots import PlotError, throughput_latency

    folder.mkdir(parents=True, exist_ok=True)
    document = {"about": about, "in words": str(found), **dataclasses.asdict(found)}
    (folder / "capacity.json").write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")
    trials = [dataclasses.asdict(trial) for level in found.levels for trial in level.trials]
    write_rows(folder / "trials.csv", [{**row, "broken": " ".join(row["broken"])} for row in trials])
    curve = [(level.rate, level.p99_tbt_s) for level in found.levels]
    slo = {f"{1e3 * found.tbt_slo_s:g} ms": found.tbt_slo_s}
    try:
        throughput_latency({"P99": curve}, slo, folder / "capacity.svg")
    except PlotError as error:
        logging.warning("%s", error)
    print(f"written to {folder}")
