"""Tables as CSV: a row a sample, a row a step. What has not happened is an empty cell."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sarathi_jax.telemetry.definitions import SampleTimes
from sarathi_jax.telemetry.steps import StepRecord


def write_samples(path: Path, samples: Iterable[SampleTimes]) -> None:
    """A row a sample: its times and the metrics that `definitions` gives of it.

    Args:
      path: of the file; its folder must exist.
      samples: in any order.
    """
    _write(path, _SAMPLE_COLUMNS, map(_sample_row, samples))


def write_steps(path: Path, steps: Iterable[StepRecord]) -> None:
    """A row a step: what it held, and when.

    Args:
      path: of the file; its folder must exist.
      steps: of one engine.
    """
    _write(path, _STEP_COLUMNS, map(_step_row, steps))


_SAMPLE_COLUMNS = (
    "request_id",
    "arrival_s",
    "first_scheduled_s",
    "first_token_s",
    "finished_s",
    "given_up_s",
    "num_prompt_tokens",
    "num_output_tokens",
    "ttft_s",
    "tbt_max_s",
    "scheduling_delay_s",
    "num_preemptions",
    "preempted_s",
    "latency_s",
    "normalised_latency_s",
    "normalised_execution_s",
    "normalised_decode_s",
)

_STEP_COLUMNS = (
    "scheduled_s",
    "launched_s",
    "started_s",
    "ended_s",
    "bucket",
    "num_sequences",
    "decode_tokens",
    "prefill_tokens",
    "padding_tokens",
    "num_preempted",
    "num_running",
    "num_waiting",
    "num_free_blocks",
)


def _sample_row(sample: SampleTimes) -> dict[str, Any]:
    own = {name: getattr(sample, name) for name in _SAMPLE_COLUMNS if hasattr(sample, name)}
    return own | {
        "first_token_s": next(iter(sample.token_s), None),
        "num_output_tokens": len(sample.token_s),
        "tbt_max_s": max(sample.tbts_s, default=None),
    }


def _step_row(step: StepRecord) -> dict[str, Any]:
    plan, state = step.plan, step.state
    return {
        "scheduled_s": step.scheduled_s,
        "launched_s": step.launched_s,
        "started_s": step.started_s,
        "ended_s": step.ended_s,
        "bucket": plan.bucket,
        "num_sequences": len(plan.chunks),
        "decode_tokens": plan.num_decodes,
        "prefill_tokens": plan.num_tokens - plan.num_decodes,
        "padding_tokens": plan.bucket - plan.num_tokens,
        "num_preempted": len(plan.preempted),
        "num_running": state.num_running,
        "num_waiting": state.num_waiting,
        "num_free_blocks": state.num_free_blocks,
    }


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
