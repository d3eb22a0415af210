"""What is told of a run: a table to read, and a folder of tables, a trace and pictures."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarathi_jax.telemetry import plots
from sarathi_jax.telemetry.definitions import MEDIAN_DELAY_SLO_S, Observations, latencies
from sarathi_jax.telemetry.run import Run
from sarathi_jax.telemetry.summary import summarise
from sarathi_jax.telemetry.tables import write_samples, write_steps
from sarathi_jax.telemetry.trace import write_trace

_LABELS = {
    "ttft": "time to first token",
    "tbt": "time between tokens",
    "scheduling_delay": "scheduling delay",
    "latency": "latency",
    "normalised_latency": "normalised latency",
    "normalised_execution": "normalised execution",
    "normalised_decode": "normalised decode",
    "preempted": "preempted",
}
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_FEW_STEPS = 100_000  # a trace of more is too large to be looked at


def metrics(run: Run) -> dict[str, Observations]:
    """Every metric of requests by name; definitions are those of `definitions`."""
    samples = run.samples

    def known(name: str) -> Observations:
        return Observations(tuple(v for sample in samples if (v := getattr(sample, name)) is not None))

    return {
        "ttft": run.ttfts,
        "tbt": run.tbts,
        "scheduling_delay": run.scheduling_delays,
        "latency": latencies(samples, run.end_s),
        "normalised_latency": known("normalised_latency_s"),
        "normalised_execution": known("normalised_execution_s"),
        "normalised_decode": known("normalised_decode_s"),
        "preempted": Observations(tuple(sample.preempted_s for sample in samples if sample.num_preemptions)),
    }


def summary(run: Run) -> dict[str, Any]:
    """All numbers of a run, ready for JSON: seconds, counts, and of steps what `StepSummary` has, by replica.

    A quantile beyond what anybody waited, or of nothing, is null.
    """
    ended = sum(sample.finished_s is not None and sample.finished_s <= run.end_s for sample in run.samples)
    given_up = sum(sample.given_up_s is not None for sample in run.samples)
    return {
        "seconds": run.end_s,
        "requests": {
            "arrived": len(run.samples),
            "ended": ended,
            "given_up": given_up,
            "unfinished": len(run.samples) - ended - given_up,
            "preemptions": sum(sample.num_preemptions for sample in run.samples),
        },
        "metrics_s": {name: _quantiles(observed) for name, observed in metrics(run).items()},
        "throughput": dataclasses.asdict(run.throughput) if run.end_s > 0 else None,
        "replicas": [dataclasses.asdict(summarise(steps)) for steps in run.steps if steps],
    }


def report(run: Run, tbt_slo_s: float | None = None) -> str:
    """A table of every metric, and lines of throughput, batches and time.

    Args:
      run: to be told of.
      tbt_slo_s: promised time between tokens, to say whether it was kept; None: nothing is said.
    """
    numbers = summary(run)
    lines = [f"{'milliseconds':<22}{'P50':>11}{'P90':>11}{'P99':>11}{'longest':>11}{'of':>9}"]
    for name, row in numbers["metrics_s"].items():
        if row["count"] or name == "ttft":
            cells = [_milliseconds(row[key]) for key in (*_SHARES, "longest")]
            count = f"{row['count']}" + (f"+{row['cut_off']}" if row["cut_off"] else "")
            lines.append(f"{_LABELS[name]:<22}" + "".join(f"{cell:>11}" for cell in cells) + f"{count:>9}")
    if any(row["cut_off"] for row in numbers["metrics_s"].values()):
        lines.append("(+n: that had not come when the run was cut off; counted as longer than they had waited)")
    requests = numbers["requests"]
    lines += [
        "",
        f"requests    {requests['arrived']} arrived, {requests['ended']} ended, {requests['given_up']} failed or given "
        f"up, {requests['unfinished']} unfinished after {run.end_s:.1f} s; {requests['preemptions']} preemptions",
    ]
    if run.end_s > 0:
        done = run.throughput
        lines.append(
            f"throughput  {done.requests_per_s:.3f} requests/s, {done.output_tokens_per_s:,.1f} output tokens/s, "
            f"{done.prompt_tokens_per_s:,.1f} prompt tokens/s"
        )
    lines += [line for steps in run.steps if steps for line in _step_lines(steps)]
    if tbt_slo_s is not None:
        lines.append(_promise_line(run, tbt_slo_s))
    return "\n".join(lines)


def write_run(
    run: Run, folder: Path, about: Mapping[str, Any], *, name: str = "run", tbt_slo_s: float | None = None
) -> list[Path]:
    """Writes samples.csv, steps.csv, summary.json, trace.json and, where matplotlib is installed, pictures.

    Args:
      run: to be kept.
      folder: made if absent; files of these names are written anew. With several replicas, their steps are
        steps-0.csv, steps-1.csv and so on.
      about: what was run, kept in summary.json.
      name: of the run in the pictures, such as the policy.
      tbt_slo_s: drawn as a line.

    Returns:
      The files.

    Raises:
      OSError: they cannot be written.
      PlotError: matplotlib is not installed; everything else is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "samples.csv", folder / "summary.json"]
    write_samples(written[0], run.samples)
    document = {"about": dict(about), **summary(run)}
    written[1].write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")
    for replica, steps in enumerate(run.steps):
        written.append(folder / ("steps.csv" if len(run.steps) == 1 else f"steps-{replica}.csv"))
        write_steps(written[-1], steps)
    if 0 < sum(map(len, run.steps)) <= _FEW_STEPS:
        written.append(folder / "trace.json")
        write_trace(written[-1], run)
    return written + _draw(run, folder, name, tbt_slo_s)


def _draw(run: Run, folder: Path, name: str, tbt_slo_s: float | None) -> list[Path]:
    """Pictures of whatever the run has values of."""
    written = []
    for file, what, observed in (
        ("ttft", "time to first token", run.ttfts),
        ("tbt", "time between tokens", run.tbts),
        ("delay", "scheduling delay", run.scheduling_delays),
    ):
        if any(value > 0 for value in observed.values):
            written.append(folder / f"{file}.svg")
            slo_s = tbt_slo_s if file == "tbt" else None
            plots.quantiles({name: observed}, written[-1], what=what, slo_s=slo_s)
    if any(len(sample.token_s) > 1 for sample in run.samples):
        written.append(folder / "stall.svg")
        plots.generation_stall({name: run}, written[-1])
    if run.steps and run.steps[0]:
        written.append(folder / "batches.svg")
        plots.batch_composition(run, written[-1])
    return written


def _quantiles(observed: Observations) -> dict[str, float | int | None]:
    values = {name: observed.quantile(share) for name, share in _SHARES.items()}
    values["longest"] = max(observed.values, default=math.nan)
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return known | {"count": len(observed.values), "cut_off": len(observed.longer_than)}


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.1f}"


def _promise_line(run: Run, tbt_slo_s: float) -> str:
    """Whether it was kept; of a server that does not tell its scheduling delays, by the time between tokens alone."""
    is_kept, words = run.tbts.quantile(0.99) <= tbt_slo_s, f"{1e3 * tbt_slo_s:g} ms between tokens in 99 %"
    if run.scheduling_delays.values:
        is_kept, words = (
            run.keeps_promise(tbt_slo_s),
            words + f" and a median scheduling delay of {MEDIAN_DELAY_SLO_S:g} s",
        )
    return f"promise     {words}: {'kept' if is_kept else 'not kept'}"


def _step_lines(steps: Any) -> list[str]:
    """Batch composition, and host against device time, of one replica."""
    held = summarise(steps)
    tokens = held.decode_tokens + held.prefill_tokens
    span_s = steps[-1].ended_s - steps[0].started_s
    return [
        f"steps       {held.num_steps}: {held.num_mixed} mixed, {held.num_decode_only} of decodes, "
        f"{held.num_prefill_only} of prompts; {held.sequences_a_step:.1f} sequences each",
        f"tokens      {held.decode_tokens:,} of decodes, {held.prefill_tokens:,} of prompts, {held.padding_tokens:,} "
        f"padding ({held.padding_tokens / max(1, tokens + held.padding_tokens):.1%})",
        f"time        device busy {held.device_s:.2f} s of {span_s:.2f} s, host {held.host_s:.2f} s "
        f"({1e3 * held.host_s / held.num_steps:.2f} ms a step, most of it beside the device)",
    ]
