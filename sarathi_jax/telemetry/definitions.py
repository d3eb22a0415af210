"""The metrics of a run, each defined once. Those of steps are in `summary`.

A run that is cut off leaves samples that were still waiting. To leave them out would flatter a server that is too slow,
so each counts as longer than what was waited (`Observations`).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from sarathi_jax.request import RequestOutput

MEDIAN_DELAY_SLO_S = 2.0
"""What the paper allows, beside the promised time between tokens, at the capacity of a server."""


def gaps_s(token_s: Sequence[float]) -> list[float]:
    """Times between tokens, one fewer than tokens. The paper's harness adds a zero for the first; this does not."""
    return [later - earlier for earlier, later in itertools.pairwise(token_s)]


def quantile(values: Sequence[float], share: float, longer_than: Sequence[float] = ()) -> float:
    """The smallest value that at least so large a share does not exceed.

    Values of which only a lower bound is known count by the estimator of Kaplan and Meier: what was cut off would have
    gone on like the others that waited as long. Where waits grow over the run, that is too kind to it: let such a run
    drain, or last long beside the waits that matter. Without bounds this is the nearest rank.

    Args:
      values: in any order.
      share: above 0, up to 1.
      longer_than: lower bounds of further values.

    Returns:
      Infinity where it is beyond what was waited; NaN of nothing.

    Raises:
      ValueError: another share.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a quantile is of a share above 0 and up to 1, not {share}")
    if not len(values) + len(longer_than):
        return math.nan
    seconds, remain = survival(values, longer_than)
    reached = np.flatnonzero(remain <= 1 - share + 1e-9)
    return float(seconds[reached[0]]) if len(reached) else math.inf


def survival(values: Sequence[float], longer_than: Sequence[float] = ()) -> tuple[np.ndarray, np.ndarray]:
    """How many took longer: arguments and estimate as of `quantile`.

    Returns:
      f64[n] of all of them, ascending, and f64[n], the share that took longer than each.
    """
    seconds = np.array([*values, *longer_than])
    is_bound = np.arange(len(seconds)) >= len(values)
    order = np.lexsort((is_bound, seconds))  # of equals the values first: a bound says longer
    waiting = np.arange(len(seconds), 0, -1)
    return seconds[order], np.cumprod(np.where(is_bound[order], 1.0, 1.0 - 1.0 / waiting))


@dataclasses.dataclass(frozen=True)
class Observations:
    """Values of one metric over a run.

    Attributes:
      values: known.
      longer_than: of samples that had not come so far when they were given up or the run ended, what they had waited.
    """

    values: tuple[float, ...]
    longer_than: tuple[float, ...] = ()

    def quantile(self, share: float) -> float:
        """See `quantile`."""
        return quantile(self.values, share, self.longer_than)


@dataclasses.dataclass(frozen=True)
class SampleTimes:
    """What happened to one sample of a request. Times in seconds on one clock; None where it has not happened.

    Attributes:
      request_id: whose.
      arrival_s: when the request came.
      token_s: when each output token was known, ascending.
      first_scheduled_s: when the first step with a part of the request was planned; None too where it is not known.
      finished_s: when the sample had ended by itself.
      given_up_s: when it was aborted, by the client or an error.
      num_prompt_tokens: of the request.
      num_preemptions: how often it lost its blocks.
      preempted_s: how long it waited without blocks, in all.
    """

    request_id: str
    arrival_s: float
    token_s: tuple[float, ...] = ()
    first_scheduled_s: float | None = None
    finished_s: float | None = None
    given_up_s: float | None = None
    num_prompt_tokens: int = 0
    num_preemptions: int = 0
    preempted_s: float = 0.0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: arrival to the first output token."""
        return self.token_s[0] - self.arrival_s if self.token_s else None

    @property
    def tbts_s(self) -> list[float]:
        """Times between tokens, see `gaps_s`."""
        return gaps_s(self.token_s)

    @property
    def scheduling_delay_s(self) -> float | None:
        """Arrival to first scheduled."""
        return None if self.first_scheduled_s is None else self.first_scheduled_s - self.arrival_s

    @property
    def latency_s(self) -> float | None:
        """Arrival to the end."""
        return None if self.finished_s is None else self.finished_s - self.arrival_s

    @property
    def normalised_latency_s(self) -> float | None:
        """Arrival to the end, for each output token."""
        return self.latency_s / len(self.token_s) if self.latency_s is not None and self.token_s else None

    @property
    def normalised_execution_s(self) -> float | None:
        """First scheduled to the end without the time of preemption, for each output token."""
        if self.finished_s is None or self.first_scheduled_s is None or not self.token_s:
            return None
        return (self.finished_s - self.first_scheduled_s - self.preempted_s) / len(self.token_s)

    @property
    def normalised_decode_s(self) -> float | None:
        """First token to the last, for each token after the first: the mean time between tokens."""
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1) if len(self.token_s) > 1 else None

    def waited_until_s(self, end_s: float) -> float:
        """How long it was watched, if it has not finished: until it was given up, or the run ended."""
        return end_s if self.given_up_s is None else min(self.given_up_s, end_s)


def samples_of(output: RequestOutput, preempted_s: float = 0.0) -> list[SampleTimes]:
    """What an engine reports of a request, sample by sample; counts and time of preemption are those of the request.

    Args:
      output: of the request, finished or not.
      preempted_s: of the request, see `preemption_times`.
    """
    metrics, samples = output.metrics, []
    for completion, token_s in itertools.zip_longest(output.outputs, metrics.token_s, fillvalue=None):
        assert completion is not None
        reason, times = completion.finish_reason, token_s or ()
        ended_s = metrics.finished_s if len(output.outputs) == 1 or not times else times[-1]
        samples.append(
            SampleTimes(
                request_id=output.request_id,
                arrival_s=metrics.arrival_s,
                token_s=times,
                first_scheduled_s=metrics.first_scheduled_s,
                finished_s=ended_s if reason in ("stop", "length") else None,
                given_up_s=metrics.finished_s if reason == "abort" else None,
                num_prompt_tokens=len(output.prompt_token_ids),
                num_preemptions=metrics.num_preemptions,
                preempted_s=preempted_s,
            )
        )
    return samples


def ttfts(samples: Iterable[SampleTimes], end_s: float) -> Observations:
    """Times to first token; a sample without one counts as longer than it waited.

    Args:
      samples: all that arrived.
      end_s: when the run ended or was cut off.
    """
    return _observe(((sample, sample.ttft_s) for sample in samples), end_s)


def scheduling_delays(samples: Iterable[SampleTimes], end_s: float) -> Observations:
    """Times from arrival to first scheduled; a sample that was not counts as longer than it waited.

    Samples that have tokens, but of which it is not known when they were scheduled, are left out.
    """
    known = ((s, s.scheduling_delay_s) for s in samples if s.first_scheduled_s is not None or not s.token_s)
    return _observe(known, end_s)


def latencies(samples: Iterable[SampleTimes], end_s: float) -> Observations:
    """Times from arrival to the end; a sample that has not ended counts as longer than it waited."""
    return _observe(((sample, sample.latency_s) for sample in samples), end_s)


def tbts(samples: Iterable[SampleTimes], end_s: float) -> Observations:
    """Times between tokens of all samples together; one under way counts as longer than since its last token."""
    values, longer_than = [], []
    for sample in samples:
        token_s = [at_s for at_s in sample.token_s if at_s <= end_s]
        values += gaps_s(token_s)
        over = sample.finished_s is not None and sample.finished_s <= end_s
        if token_s and not over:
            longer_than.append(max(0.0, sample.waited_until_s(end_s) - token_s[-1]))
    return Observations(tuple(values), tuple(longer_than))


def keeps_promise(samples: Sequence[SampleTimes], end_s: float, tbt_slo_s: float) -> bool:
    """Whether a load is within the capacity, as the paper defines it.

    99 % of the times between tokens are at most `tbt_slo_s`, and half of the scheduling delays at most 2 seconds.
    """
    return not broken_promises(tbts(samples, end_s), scheduling_delays(samples, end_s), tbt_slo_s)


def broken_promises(
    tbts: Observations, scheduling_delays: Observations, tbt_slo_s: float
) -> tuple[Literal["tbt", "delay"], ...]:
    """Which of the two parts of `keeps_promise` do not hold; nothing observed breaks nothing."""
    is_slow, is_late = tbts.quantile(0.99) > tbt_slo_s, scheduling_delays.quantile(0.5) > MEDIAN_DELAY_SLO_S
    return (("tbt",) if is_slow else ()) + (("delay",) if is_late else ())


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What was done in each second.

    Attributes:
      requests_per_s: samples that ended.
      output_tokens_per_s: tokens drawn.
      prompt_tokens_per_s: of the samples that got their first token, all at that moment.
    """

    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float


def throughput(samples: Sequence[SampleTimes], begin_s: float, end_s: float) -> Throughput:
    """Of the time after `begin_s`, up to `end_s`.

    Raises:
      ValueError: there is no time between them.
    """
    if not begin_s < end_s:
        raise ValueError(f"throughput needs a time that ends after it begins, not {begin_s} to {end_s}")

    def within(at_s: float | None) -> bool:
        return at_s is not None and begin_s < at_s <= end_s

    seconds = end_s - begin_s
    return Throughput(
        sum(within(sample.finished_s) for sample in samples) / seconds,
        sum(within(at_s) for sample in samples for at_s in sample.token_s) / seconds,
        sum(sample.num_prompt_tokens for sample in samples if within(next(iter(sample.token_s), None))) / seconds,
    )


def _observe(pairs: Iterable[tuple[SampleTimes, float | None]], end_s: float) -> Observations:
    """Values that were there before the end; of the others, how long they had waited. Later arrivals are left out."""
    values, longer_than = [], []
    for sample, value in pairs:
        if value is not None and sample.arrival_s + value <= end_s:
            values.append(value)
        elif sample.arrival_s < end_s:
            longer_than.append(max(0.0, sample.waited_until_s(end_s) - sample.arrival_s))
    return Observations(tuple(values), tuple(longer_than))
