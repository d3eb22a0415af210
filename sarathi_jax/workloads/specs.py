"""`WorkloadSpec`: a workload in words, as a command line or a file of an experiment writes it."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from sarathi_jax.workloads.arrivals import ArrivalSource, bursts, gamma, poisson, recorded, static
from sarathi_jax.workloads.lengths import (
    WorkloadError,
    check_above_zero,
    check_range,
    fixed,
    in_order,
    uniform,
    zipf,
)
from sarathi_jax.workloads.traces import Dataset, dataset
from sarathi_jax.workloads.workload import Workload, check_groups

_LENGTHS = "fixed:512:64, uniform:100-1000:10-100 (prompt, output) or zipf:64-2048:4 (total, prompt tokens a token)"
_ARRIVALS = "poisson, static, gamma:2, bursts:5:5 or recorded"
_DEFAULT_TRACE, _DEFAULT_NUMBER = "chat", 128


@dataclasses.dataclass(frozen=True)
class WorkloadSpec:
    """A workload that is not drawn yet.

    Attributes:
      trace: chat, arxiv, another known trace, or a CSV file of lengths; None: chat, unless lengths are given.
      trace_folder: folder of trace files; None: what the environment variable SARATHI_DATA names, if anything.
      lengths: in place of a trace: fixed:PROMPT:OUTPUT; uniform:LEAST-MOST:LEAST-MOST, prompt and output; or
        zipf:LEAST-MOST:RATIO, prompt and output together and tokens of prompt for each of output, and after another
        colon the exponent.
      rate: requests a second, on average.
      arrivals: poisson; static, all at once; gamma:VARIATION, above 1 burstier than poisson; bursts:ON_S:OFF_S; or
        recorded, as the trace has them, recorded:0.5 in half the time.
      num_requests: None: all of recorded arrivals, otherwise 128.
      seed: the same one gives the same lengths, arrivals and prompts.
      context: tokens to which all lengths are scaled by one factor; None: the model's, where the longest exceeds it.
      groups: each request is in one of so many, whose prompts begin alike; None: no prompts do.
      shared_tokens: so many tokens at the beginning of a group's prompts are equal.

    Raises:
      WorkloadError: one of them makes no sense.
    """

    trace: str | None = None
    trace_folder: Path | None = None
    lengths: str | None = None
    rate: float | None = None
    arrivals: str = "poisson"
    num_requests: int | None = None
    seed: int = 0
    context: int | None = None
    groups: int | None = None
    shared_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.trace is not None and self.lengths is not None:
            raise WorkloadError("trace and lengths both say how long requests are: leave one out")
        if self.lengths is not None:
            lengths_of(self.lengths)
        if self.rate is not None:
            check_above_zero("rate", self.rate)
        arrivals_of(self.arrivals)
        if self.rate is not None and not self.has_rate:
            raise WorkloadError(f"{self.arrivals} arrivals have no rate: leave rate out, or choose other arrivals")
        if self.num_requests is not None and self.num_requests < 1:
            raise WorkloadError(f"num_requests must be at least 1, not {self.num_requests}")
        if self.context is not None:
            check_range("context", self.context, self.context, at_least=2)
        check_groups(self.groups, self.shared_tokens)

    @property
    def has_rate(self) -> bool:
        """Whether these arrivals come at a rate that can be chosen."""
        return self.arrivals.split(":")[0] not in ("static", "recorded")

    def open(self, model_context: int | None = None) -> "Workloads":
        """Finds the trace and decides on the scale.

        Args:
          model_context: most tokens of a request that can be served; None: any number.

        Raises:
          WorkloadError: no such trace, no recorded arrivals, or lengths that the model cannot serve.
        """
        if self.lengths is not None:
            lengths = lengths_of(self.lengths)
        else:
            lengths = dataset(self.trace or _DEFAULT_TRACE, self.trace_folder)
        arrivals = arrivals_of(self.arrivals)
        number = self.num_requests or _DEFAULT_NUMBER
        if self.arrivals.split(":")[0] == "recorded":
            if lengths.trace is None or lengths.trace.arrivals_s is None:
                raise WorkloadError(f"{lengths.source}: there are no arrivals to replay; choose a rate")
            arrivals = functools.partial(arrivals, lengths.trace.arrivals_s)
            number = self.num_requests or len(lengths.trace.lengths)
            lengths = dataclasses.replace(lengths, draw=functools.partial(in_order, lengths.trace.lengths))
        if self.context is not None and model_context is not None and self.context > model_context:
            raise WorkloadError(f"context={self.context}, but the model serves {model_context} tokens: lower it")
        context = self.context
        if context is None and model_context is not None and lengths.longest > model_context:
            context = model_context
        return Workloads(lengths, arrivals, number, context, self.groups, self.shared_tokens)


@dataclasses.dataclass(frozen=True)
class Workloads:
    """One workload at any rate and seed.

    Attributes:
      lengths: where they come from.
      arrivals: makes a source of arrivals of a rate, which static and recorded ones do not look at.
      number: of requests.
      context: to which lengths are scaled; None: they are left as they are.
      groups, shared_tokens: of `Workload`.
    """

    lengths: Dataset
    arrivals: Callable[[float | None], ArrivalSource]
    number: int
    context: int | None
    groups: int | None = None
    shared_tokens: int | None = None

    @property
    def source(self) -> str:
        """Lengths in words, for whoever reads the results."""
        if self.context is None:
            return self.lengths.source
        return f"{self.lengths.source}; lengths scaled from {self.lengths.longest} to {self.context} tokens"

    def at(self, rate: float | None, seed: int = 0) -> Workload:
        """The workload at a rate.

        Raises:
          WorkloadError: arrivals that need a rate, and none is given.
        """
        longest = None if self.context is None else self.lengths.longest
        return Workload(
            self.lengths.draw,
            self.arrivals(rate),
            self.number,
            seed,
            self.context,
            longest,
            self.groups,
            self.shared_tokens,
        )


def lengths_of(spec: str) -> Dataset:
    """Lengths in words: see `WorkloadSpec`.

    Raises:
      WorkloadError: other words.
    """
    match spec.split(":"):
        case ["fixed", prompt, output]:
            tokens = _whole(spec, prompt), _whole(spec, output)
            found = Dataset(spec, sum(tokens), functools.partial(fixed, *tokens))
        case ["uniform", prompt, output]:
            ranges = _range(spec, prompt), _range(spec, output)
            found = Dataset(spec, ranges[0][1] + ranges[1][1], functools.partial(uniform, *ranges))
        case ["zipf", total, ratio, *exponent] if len(exponent) < 2:
            least, most = _range(spec, total)
            power = _number(_lengths_error(spec), exponent[0]) if exponent else 1.0
            draw = functools.partial(zipf, (least, most), _number(_lengths_error(spec), ratio), exponent=power)
            found = Dataset(spec, most, draw)
        case _:
            raise _lengths_error(spec)
    found.draw(1, 0)
    return found


def arrivals_of(spec: str) -> Callable[..., ArrivalSource]:
    """Arrivals in words, see `WorkloadSpec`: a source of a rate, or of recorded times and a rate nobody looks at.

    Raises:
      WorkloadError: other words.
    """
    error = WorkloadError(f"arrivals {spec!r} are not known: write {_ARRIVALS}")
    match spec.split(":"):
        case ["static"]:
            return lambda rate: static
        case ["recorded", *scale] if len(scale) < 2:
            time_scale = _number(error, scale[0]) if scale else 1.0
            return lambda times, rate: functools.partial(recorded, times, time_scale)
        case ["poisson"]:
            return lambda rate: functools.partial(poisson, _given(rate))
        case ["gamma", variation]:
            of_gaps = _number(error, variation)
            return lambda rate: functools.partial(gamma, _given(rate), of_gaps)
        case ["bursts", on_s, off_s]:
            on, off = _number(error, on_s), _number(error, off_s, least=0.0)
            return lambda rate: functools.partial(bursts, _given(rate), on, off)
    raise error


def _given(rate: float | None) -> float:
    if rate is None:
        raise WorkloadError("rate is missing: say how many requests a second, or let them arrive static")
    check_above_zero("rate", rate)
    return rate


def _lengths_error(spec: str) -> WorkloadError:
    return WorkloadError(f"lengths {spec!r} are not known: write {_LENGTHS}")


def _whole(spec: str, text: str) -> int:
    if not text.isdecimal():
        raise _lengths_error(spec)
    return int(text)


def _range(spec: str, text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    return _whole(spec, least), _whole(spec, most if dash else least)


def _number(error: WorkloadError, text: str, least: float | None = None) -> float:
    try:
        value = float(text)
    except ValueError:
        raise error from None
    if not (value > 0 if least is None else value >= least) or value == float("inf"):
        raise error
    return value
