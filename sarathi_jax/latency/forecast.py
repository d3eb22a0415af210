"""When a request that came now would get its first token, if everything before it goes by the table."""

import dataclasses
import math

from sarathi_jax.latency.times import StepTimes
from sarathi_jax.latency.work import Work, chunk_keys


@dataclasses.dataclass(frozen=True)
class Backlog:
    """What an engine has before it.

    Attributes:
      num_prefill_tokens: of prompts that run or wait, not computed yet.
      num_decodes: requests that generate.
      num_decode_keys: tokens of theirs in the cache.
      num_free_rows: requests that could start now.
      num_waiting: requests that have not started.
      steps_to_free_row: the fewest tokens that any running request may still draw.
      pace_s: the least of all running requests (`Request.pace_s`).
    """

    num_prefill_tokens: int = 0
    num_decodes: int = 0
    num_decode_keys: int = 0
    num_free_rows: int = 1
    num_waiting: int = 0
    steps_to_free_row: int = 0
    pace_s: float | None = None


def time_to_first_token_s(backlog: Backlog, num_prompt_tokens: int, times: StepTimes, num_stages: int) -> float:
    """Expected seconds until a request that came now had its first token.

    Prompts are computed first come first served, in steps of the largest bucket that keeps the pace of those who
    generate. Who finds no free place waits until the running ones have drawn what they may, as many at a time as there
    are places: the least that it can be, since nobody knows when they end by themselves.

    Args:
      backlog: what is before it.
      num_prompt_tokens: of its own that are not in the cache.
      times: of the steps.
      num_stages: pp.
    """
    num_tokens = backlog.num_prefill_tokens + num_prompt_tokens
    bucket, room = _chunk(backlog, times, num_stages)
    num_steps = math.ceil(num_tokens / room)
    keys = chunk_keys(num_prompt_tokens // 2, min(room, num_tokens))
    # The last step passes all stages before its token is known.
    seconds = (num_steps + num_stages - 1) * times.expected_s(_work(bucket, backlog, keys))
    num_behind = backlog.num_waiting - backlog.num_free_rows + 1
    if num_behind > 0:
        decode_bucket = next((b for b in times.table.buckets if b >= backlog.num_decodes), times.table.buckets[-1])
        seconds += backlog.steps_to_free_row * times.expected_s(_work(decode_bucket, backlog, 0))
    return seconds


def _chunk(backlog: Backlog, times: StepTimes, num_stages: int) -> tuple[int, int]:
    """The bucket that steps with prompts take, and what it leaves for prompts."""
    fitting = [b for b in times.table.buckets if b > backlog.num_decodes] or [times.table.buckets[-1]]
    best = fitting[0]
    for bucket in fitting:
        keys = chunk_keys(0, bucket - backlog.num_decodes)
        bound_s = num_stages * times.bound_s(_work(bucket, backlog, keys))
        if backlog.pace_s is None or bound_s <= backlog.pace_s:
            best = bucket
    return best, max(1, best - backlog.num_decodes)


def _work(bucket: int, backlog: Backlog, num_prefill_keys: int) -> Work:
    """A step of everybody who generates, and of prompts."""
    return Work(bucket, backlog.num_decodes, backlog.num_decode_keys, num_prefill_keys)
