"""Numbers of the steps of one engine: what they held, how long host and device took, and who waited for blocks."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from sarathi_jax.telemetry.steps import StepRecord


@dataclasses.dataclass(frozen=True)
class StepSummary:
    """Of the steps of a run.

    Attributes:
      num_steps: of any kind.
      num_mixed, num_decode_only, num_prefill_only: steps that held decodes and prefills, or one of them.
      decode_tokens, prefill_tokens, padding_tokens: computed in all steps together.
      sequences_a_step: on average.
      device_s: that steps kept the device (in a pipeline, its last stage), summed.
      idle_s: between steps, while the device had none that could begin, be it that nobody asked for anything. Bubbles
        of a pipeline before its last stage are in `device_s`.
      host_s: of planning, packing and launching, summed; most of it while the device runs the step before.
    """

    num_steps: int
    num_mixed: int
    num_decode_only: int
    num_prefill_only: int
    decode_tokens: int
    prefill_tokens: int
    padding_tokens: int
    sequences_a_step: float
    device_s: float
    idle_s: float
    host_s: float


def summarise(steps: Sequence[StepRecord]) -> StepSummary:
    """Batch composition, and host against device time.

    Args:
      steps: of one engine, in their order.

    Raises:
      ValueError: there are none.
    """
    if not steps:
        raise ValueError("there are no steps to summarise")
    plans = [step.plan for step in steps]
    kinds = collections.Counter((plan.num_decodes > 0, plan.num_tokens > plan.num_decodes) for plan in plans)
    decode_tokens, tokens = sum(plan.num_decodes for plan in plans), sum(plan.num_tokens for plan in plans)
    return StepSummary(
        num_steps=len(steps),
        num_mixed=kinds[True, True],
        num_decode_only=kinds[True, False],
        num_prefill_only=kinds[False, True],
        decode_tokens=decode_tokens,
        prefill_tokens=tokens - decode_tokens,
        padding_tokens=sum(plan.bucket for plan in plans) - tokens,
        sequences_a_step=sum(len(plan.chunks) for plan in plans) / len(plans),
        device_s=sum(step.duration_s for step in steps),
        idle_s=sum(max(0.0, later.started_s - step.ended_s) for step, later in itertools.pairwise(steps)),
        host_s=sum(step.host_s for step in steps),
    )


def preemption_times(steps: Sequence[StepRecord], end_s: float) -> dict[str, float]:
    """Preemption time of each request that had any: how long its sequences were without blocks, summed.

    A sequence loses its blocks when the step that needed them is planned, and has some again when the next step with a
    part of it is planned. What it has to compute again is not counted: it runs.

    Args:
      steps: of one engine, in their order.
      end_s: when the run ended; so long waits who never got blocks again.
    """
    request_of, lost_s = dict[int, str](), dict[int, float]()
    seconds = collections.defaultdict[str, float](float)
    for step in steps:
        for chunk, request_id in zip(step.plan.chunks, step.request_ids, strict=True):
            if request_id:
                request_of[chunk.seq_id] = request_id
            if chunk.seq_id in lost_s:
                began_s = lost_s.pop(chunk.seq_id)
                if chunk.seq_id in request_of:
                    seconds[request_of[chunk.seq_id]] += step.scheduled_s - began_s
        lost_s |= dict.fromkeys(step.plan.preempted, step.scheduled_s)
    for seq_id, began_s in lost_s.items():
        if seq_id in request_of:
            seconds[request_of[seq_id]] += max(0.0, end_s - began_s)
    return dict(seconds)
