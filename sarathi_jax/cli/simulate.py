"""Simulates a workload on devices that need not be at hand, with the scheduler and the block pool of the server.

Mistral-7B on an A100, the paper's chat lengths at 2 requests a second:
  PROGRAM simulate --model mistral-7b --device a100-80gb --trace chat --rate 2 --num_requests 500

A deployment of the paper, as the stack that it measured would do it; everything kept in a folder:
  PROGRAM simulate --deployment yi-34b-2xa100 --host published --rate 0.5 --out results/yi

Eight replicas, each request to the one with the least work, arrivals as recorded:
  PROGRAM simulate --model mistral-7b --dp 8 --routing least_work --trace splitwise_conv --arrivals recorded

A hundred groups whose prompts begin with the same 1,000 tokens, each group to the replica that knows them:
  PROGRAM simulate --model mistral-7b --dp 4 --rate 8 --groups 100 --shared_tokens 1000 --routing prefix_affinity

Prompts on two devices, answers on two others, keys and values sent between them:
  PROGRAM simulate --model mistral-7b --prefill_replicas 2 --decode_replicas 2 --rate 6 --slo_ms 50

This machine, by the times that PROGRAM profile measured here:
  PROGRAM simulate --table table.json --device cpu --token_budget 256 --rate 1

The same command gives the same numbers.
"""

import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sarathi_jax.cli.deployment_flags import define_deployment_flags, deployment_of, describe_deployment
from sarathi_jax.cli.fields import UsageError
from sarathi_jax.cli.workload_flags import define_workload_flags, workload_spec
from sarathi_jax.latency import DeviceError, Link, device_of
from sarathi_jax.simulate import ROUTINGS, Deployment, Disaggregated, Snapshot
from sarathi_jax.simulate.memory import cache_of

SUMMARY = "serves a workload in simulated time on devices that need not be at hand"

_APART = ("prefill_replicas", "decode_replicas")
_OF_POOLS = ("kv_link_gb_s", "kv_link_latency_ms", "decode_device", "decode_tp")


def define(values: flags.FlagValues) -> None:
    """Defines the flags: the workload's, those of the run, then the deployment's."""
    define_workload_flags(values)
    flags.DEFINE_enum("routing", "round_robin", ROUTINGS, "which replica gets a request.", flag_values=values)
    flags.DEFINE_float(
        "time_limit_s", None, "ends the run; what has not come counts as longer than it waited.", flag_values=values
    )
    flags.DEFINE_float("slo_ms", None, "time between tokens to judge the run by.", flag_values=values)
    flags.DEFINE_integer(
        "prefill_replicas",
        None,
        "replicas that only compute prompts and draw first tokens, with --decode_replicas; none: prompts and answers "
        "share --dp replicas.",
        flag_values=values,
    )
    flags.DEFINE_integer("decode_replicas", None, "replicas that only draw the other tokens.", flag_values=values)
    flags.DEFINE_float(
        "kv_link_gb_s", 25.0, "keys and values from a prefill replica, in 10^9 bytes a second.", flag_values=values
    )
    flags.DEFINE_float("kv_link_latency_ms", 1.0, "of the keys and values of a prompt.", flag_values=values)
    flags.DEFINE_string("decode_device", None, "of the decode replicas; none: --device.", flag_values=values)
    flags.DEFINE_integer("decode_tp", None, "of the decode replicas; none: --tp.", flag_values=values)
    flags.DEFINE_string("out", None, "folder for tables, a trace and pictures.", flag_values=values)
    define_deployment_flags(values)


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Simulates; returns the exit status."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    spec = workload_spec(values)
    for name in ("time_limit_s", "slo_ms"):
        value = getattr(values, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name}={value:g} must be above 0")
    deployment = deployment_of(values)
    pools = _pools(values, deployment)
    served = (deployment,) if pools is None else (pools.prefill, pools.decode)
    caches = [cache_of(one) for one in served]
    workloads = spec.open(min(min(cache.max_model_len, cache.num_blocks * cache.block_size) for cache in caches))
    requests = workloads.at(spec.rate, spec.seed).requests()
    print(f"{len(requests)} requests, {workloads.source}", file=sys.stderr)
    described = [describe_deployment(one) for one in served]
    if pools is not None:
        described = [f"{name}: {words}" for name, words in zip(("prefill", "decode"), described, strict=True)]
    print("\n".join(described), file=sys.stderr)

    from tqdm import tqdm

    from sarathi_jax.simulate import simulate, simulate_disaggregated
    from sarathi_jax.telemetry.plots import PlotError
    from sarathi_jax.telemetry.report import report, write_run

    last_s = requests[-1].arrival_s
    with tqdm(total=round(last_s), unit="s", desc="simulated", disable=not sys.stderr.isatty()) as bar:

        def look(snapshot: Snapshot) -> bool:
            bar.total = max(bar.total, round(snapshot.now_s))
            bar.update(round(snapshot.now_s) - bar.n)
            return False

        if pools is not None:
            measured = simulate_disaggregated(requests, pools, routing=values.routing, seed=spec.seed)
        else:
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
            "deployment": "; ".join(described),
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


def _pools(values: flags.FlagValues, deployment: Deployment) -> Disaggregated | None:
    """The prefill and decode replicas of the command line; None: they are the same."""
    given = [name for name in _APART if getattr(values, name) is not None]
    if not given:
        for name in _OF_POOLS:
            if values[name].present:
                raise UsageError(f"--{name} needs --prefill_replicas and --decode_replicas")
        return None
    if len(given) < len(_APART):
        raise UsageError("--prefill_replicas and --decode_replicas go together: how many of each?")
    for name, reason in (("dp", "--prefill_replicas and --decode_replicas"), ("time_limit_s", "no limit")):
        if values[name].present:
            raise UsageError(f"--{name} does not go with prefill and decode apart: give {reason}")
    for name in (*_APART, "kv_link_gb_s"):
        if not 0 < getattr(values, name) < math.inf:
            raise UsageError(f"--{name}={getattr(values, name):g} must be above 0")
    if not 0 <= values.kv_link_latency_ms < math.inf:
        raise UsageError(f"--kv_link_latency_ms={values.kv_link_latency_ms:g} must be at least 0")
    if deployment.table is not None and (values.decode_device is not None or values.decode_tp is not None):
        raise UsageError("--table has the times of one device: leave out --decode_device and --decode_tp")
    engine = deployment.engine
    try:
        decode = dataclasses.replace(
            deployment,
            device=deployment.device if values.decode_device is None else device_of(values.decode_device),
            engine=dataclasses.replace(
                engine, dp=values.decode_replicas, tp=engine.tp if values.decode_tp is None else values.decode_tp
            ),
        )
        cache_of(decode)
        if decode.table is None:
            decode.roofline()
    except DeviceError as error:
        raise UsageError(f"--decode_device: {error}") from None
    except ValueError as error:
        raise UsageError(f"the decode replicas: {error}") from None
    prefill = dataclasses.replace(deployment, engine=dataclasses.replace(engine, dp=values.prefill_replicas))
    return Disaggregated(prefill, decode, Link(values.kv_link_latency_ms / 1e3, values.kv_link_gb_s * 1e9))
