"""Lengths of requests: drawn from a plain distribution, taken from a record, scaled to a model's context.

Every source of lengths ends with ``(number, seed)``, so that ``functools.partial`` makes of it what a `Workload` takes.
"""

import bisect
import dataclasses
import itertools
import random
from collections.abc import Sequence


class WorkloadError(ValueError):
    """A workload that cannot be; the message says what it should be."""


@dataclasses.dataclass(frozen=True)
class Length:
    """Of one request, in tokens.

    Attributes:
      prompt, output: both at least 1.
    """

    prompt: int
    output: int


def fixed(prompt: int, output: int, number: int, seed: int = 0) -> list[Length]:
    """The same length every time; the seed changes nothing.

    Raises:
      WorkloadError: a length below 1.
    """
    del seed
    check_range("prompt", prompt, prompt)
    check_range("output", output, output)
    return [Length(prompt, output)] * number


def uniform(prompt: tuple[int, int], output: tuple[int, int], number: int, seed: int) -> list[Length]:
    """Every length of a range equally likely, prompt and output independently.

    Args:
      prompt, output: least and greatest, both included.
      number: of requests.
      seed: the same one gives the same lengths.

    Raises:
      WorkloadError: a range that is empty or begins below 1.
    """
    check_range("prompt", *prompt)
    check_range("output", *output)
    generator = random.Random(seed)
    return [Length(generator.randint(*prompt), generator.randint(*output)) for _ in range(number)]


def zipf(
    total: tuple[int, int], prompts_per_output: float, number: int, seed: int, *, exponent: float = 1.0
) -> list[Length]:
    """Few long requests and many short ones: a total of n tokens is n**-exponent times as likely as one of 1.

    Args:
      total: least and greatest sum of prompt and output, both included.
      prompts_per_output: tokens of prompt for each token of output; a total is divided so, at least one of each kind.
      number: of requests.
      seed: the same one gives the same lengths.
      exponent: the higher, the fewer long requests; above 0.

    Raises:
      WorkloadError: a range that is empty or begins below 2; a ratio or an exponent that is not above 0.
    """
    least, greatest = total
    check_range("total", least, greatest, at_least=2)
    check_above_zero("prompts_per_output", prompts_per_output)
    check_above_zero("exponent", exponent)
    sums = list(itertools.accumulate((n / least) ** -exponent for n in range(least, greatest + 1)))
    generator, lengths = random.Random(seed), []
    for _ in range(number):
        tokens = least + bisect.bisect(sums, generator.random() * sums[-1], hi=len(sums) - 1)
        prompt = min(max(1, round(tokens * prompts_per_output / (1 + prompts_per_output))), tokens - 1)
        lengths.append(Length(prompt, tokens - prompt))
    return lengths


def shuffled(lengths: Sequence[Length], number: int, seed: int) -> list[Length]:
    """Requests of a record in random order, none twice before each had its turn.

    Raises:
      WorkloadError: there are none.
    """
    if not lengths:
        raise WorkloadError("there are no recorded lengths to draw from")
    generator, drawn = random.Random(seed), []
    while len(drawn) < number:
        drawn += generator.sample(lengths, len(lengths))
    return drawn[:number]


def in_order(lengths: Sequence[Length], number: int, seed: int = 0) -> list[Length]:
    """The first requests of a record, as `arrivals.recorded` takes the first times; the seed changes nothing.

    Raises:
      WorkloadError: there are fewer.
    """
    del seed
    if number > len(lengths):
        raise WorkloadError(f"{number} requests are asked for, but {len(lengths)} are recorded")
    return list(lengths[:number])


def scaled(lengths: Sequence[Length], longest: int, context: int) -> list[Length]:
    """The same requests for a model of another context, every length by the same factor.

    Args:
      lengths: of requests.
      longest: prompt and output together, in the trace.
      context: of the model, at least 2.

    Returns:
      Requests of at least one token of each kind that fit into the context.

    Raises:
      WorkloadError: `longest` or `context` below 2.
    """
    check_range("longest", longest, longest, at_least=2)
    check_range("context", context, context, at_least=2)
    factor, fitting = context / longest, []
    for length in lengths:
        prompt = min(max(1, round(factor * length.prompt)), context - 1)
        fitting.append(Length(prompt, min(max(1, round(factor * length.output)), context - prompt)))
    return fitting


def check_range(name: str, least: int, greatest: int, at_least: int = 1) -> None:
    """Raises WorkloadError for a range of tokens that is empty or begins too low."""
    if least < at_least:
        raise WorkloadError(f"{name} must be at least {at_least} token{'s' * (at_least > 1)}, not {least}")
    if greatest < least:
        raise WorkloadError(f"{name}: the greatest length, {greatest}, is below the least, {least}")


def check_above_zero(name: str, value: float) -> None:
    """Raises WorkloadError for a number that is not finite and above 0."""
    if not 0 < value < float("inf"):
        raise WorkloadError(f"{name} must be a number above 0, not {value}")
