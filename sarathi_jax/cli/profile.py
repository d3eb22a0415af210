"""Measures how long the compiled programs of a model take on this device, at several fills of the cache.

  PROGRAM profile --out table.json
  PROGRAM profile --model ~/models/qwen3-0.6b --token_budget 1024 --out table.json --picture table.svg

The table is what a simulation of this device goes by:
  PROGRAM simulate --table table.json --trace chat --rate 2
It holds one program for each bucket: give the flags of the model and the engine that shall be simulated. Nothing else
should run meanwhile.

In service the host has work beside the device, which matters where steps are short. To have the table corrected by what
steps take while requests are served for about half a minute:
  PROGRAM profile --out table.json --serve_s 30
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sarathi_jax.cli.fields import UsageError
from sarathi_jax.cli.model_flags import ModelArguments, define_model_flags, model_arguments
from sarathi_jax.cli.streams import keep_stdout
from sarathi_jax.latency import LatencyTable
from sarathi_jax.workloads import WorkloadSpec

SUMMARY = "measures the step times of a model on this device"

_SKIP = ("seed",)
_LEAST_SERVED = 20
_LOADS = (0.4, 0.7)  # of the throughput: steps with few sequences, that find the device idle, and with many


def define(values: flags.FlagValues) -> None:
    """Defines the flags: where the table goes, then the model's."""
    flags.DEFINE_string("out", None, "file for the table (.json).", flag_values=values)
    flags.DEFINE_string("picture", None, "file for a picture of it (.svg or .png).", flag_values=values)
    flags.DEFINE_float(
        "serve_s",
        0.0,
        "serves chat requests for about so long, and corrects the table by what steps took; 0: does not.",
        lower_bound=0.0,
        flag_values=values,
    )
    define_model_flags(values, _SKIP)


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Measures; returns the exit status."""
    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; everything is given by flags")
    if values.out is None:
        raise UsageError("--out is missing: the file for the table, such as table.json")
    if values.picture is not None and not values.picture.endswith((".svg", ".png")):
        raise UsageError(f"--picture={values.picture} must end with .svg or .png")
    model = model_arguments(values, _SKIP)
    if values.serve_s and model.engine.get("hosts", 1) > 1:
        raise UsageError("--serve_s is of one process: leave out --hosts, or --serve_s")
    # Here, so that --help and wrong flags are answered without waiting for jax.
    from sarathi_jax.loading import load
    from sarathi_jax.telemetry.plots import latency_curves
    from sarathi_jax.timing import about_table, measure

    progress = sys.stderr.isatty()
    if model.engine.get("hosts", 1) > 1:
        keep_stdout()
    loaded = load(model.model, model.dtype, progress, model.engine)
    own, engine, cache = loaded.model_config, loaded.engine_config, loaded.cache_config
    about = about_table(own, engine, cache)
    runner = loaded.replicas[0].runner
    table = measure(engine, cache, runner, own.vocab_size, loaded.hosts, about=about, progress=progress)
    loaded.close()
    if values.serve_s:
        table = _corrected(model, table, values.serve_s)
    out = Path(values.out).expanduser()
    table.save(out)
    print(f"{about['device']}, {loaded.path.name}, {engine.dtype}, {cache.num_blocks} blocks of {cache.block_size}\n")
    print(table_text(table))
    print(f"\nwritten to {out}")
    if values.picture is not None:
        latency_curves(table, Path(values.picture).expanduser())
    return 0


def _corrected(model: ModelArguments, table: LatencyTable, seconds: float) -> LatencyTable:
    """The table as it is in service."""
    from sarathi_jax.bench.calibration import served_steps, throughput
    from sarathi_jax.llm import LLM
    from sarathi_jax.simulate.in_service import in_service

    with LLM(model.model, dtype=model.dtype, progress=False, **model.engine) as llm:
        cache = llm.cache_config
        longest = min(cache.max_model_len, cache.num_blocks * cache.block_size)
        workloads = WorkloadSpec(trace="chat").open(longest)
        done = throughput(llm, workloads)
        each = {"seconds": seconds / len(_LOADS), "least": _LEAST_SERVED}
        corrected = in_service(table, [served_steps(llm, workloads, load * done, **each) for load in _LOADS])
    print(
        f"in service: {done:.3g} requests/s at most; a step after idleness takes {1e3 * corrected.idle_s:.3g} ms more"
    )
    return corrected


def table_text(table: LatencyTable) -> str:
    """A line a program: milliseconds with an empty and a full cache, of decodes and of one prompt, and the speed."""
    head = (("", "decodes", "prompt"), ("bucket", "empty", "full", "empty", "full", "tokens/s"))
    lines = [
        f"{'':>8}{head[0][1]:>20}{head[0][2]:>20}",
        "".join(f"{name:>{8 if i == 0 else 10}}" for i, name in enumerate(head[1])),
    ]
    for bucket in table.buckets:
        cells = []
        for is_decodes in (True, False):
            its = [
                timing for timing in table.timings if timing.bucket == bucket and bool(timing.num_decodes) == is_decodes
            ]
            its.sort(key=lambda timing: timing.num_decode_keys + timing.num_prefill_keys)
            cells += [its[0].seconds, its[-1].seconds]
        times = "".join(f"{1e3 * seconds:>10.2f}" for seconds in cells)
        lines.append(f"{bucket:>8}{times}{bucket / cells[2]:>10,.0f}")
    return "\n".join(lines)
