"""Lengths of requests: recorded in a file, or drawn so that they have a trace's published quantiles."""

import csv
import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

_PROMPT, _OUTPUT = "num_prefill_tokens", "num_decode_tokens"
_Z90 = NormalDist().inv_cdf(0.9)


class TraceError(ValueError):
    """A file that is no trace; the message says what it should hold."""


@dataclasses.dataclass(frozen=True)
class Length:
    """Of one request, in tokens.

    Attributes:
      prompt, output: both at least 1.
    """

    prompt: int
    output: int


@dataclasses.dataclass(frozen=True)
class LengthQuantiles:
    """What is published of a trace (the paper's Table 2).

    Attributes:
      prompt, output: median and 90th percentile, in tokens.
      longest: prompt and output together; longer requests are left out.
    """

    prompt: tuple[int, int]
    output: tuple[int, int]
    longest: int


CHAT = LengthQuantiles(prompt=(1730, 5696), output=(415, 834), longest=8192)
"""openchat_sharegpt4."""


def read_trace(path: Path) -> list[Length]:
    """Reads a CSV file with the columns num_prefill_tokens and num_decode_tokens; others are ignored.

    Requests without a prompt or an output are left out.

    Raises:
      TraceError: it cannot be read, or holds something else.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = {_PROMPT, _OUTPUT} - set(rows.fieldnames or ())
            if missing:
                raise TraceError(f"{path} has no column {', '.join(sorted(missing))} in its first line")
            lengths = [Length(_tokens(row, _PROMPT, rows, path), _tokens(row, _OUTPUT, rows, path)) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"cannot read {path}: {error}") from error
    lengths = [length for length in lengths if length.prompt and length.output]
    if not lengths:
        raise TraceError(f"{path} holds no request")
    return lengths


def synthesise(quantiles: LengthQuantiles, number: int, seed: int) -> list[Length]:
    """Draws lengths from log-normal distributions with the given quantiles, prompt and output independently.

    A request longer than `quantiles.longest` is drawn anew, so that the upper quantiles come out somewhat lower.

    Args:
      quantiles: of the trace.
      number: of requests.
      seed: the same one gives the same lengths.
    """
    generator, lengths = random.Random(seed), []
    while len(lengths) < number:
        length = Length(_draw(quantiles.prompt, generator), _draw(quantiles.output, generator))
        if length.prompt + length.output <= quantiles.longest:
            lengths.append(length)
    return lengths


def scaled(lengths: Sequence[Length], longest: int, context: int) -> list[Length]:
    """The same requests for a model of another context, every length by the same factor.

    Args:
      lengths: of requests.
      longest: prompt and output together, in the trace.
      context: of the model, at least 2.

    Returns:
      Requests of at least one token of each kind that fit into the context.
    """
    factor, fitting = context / longest, []
    for length in lengths:
        prompt = min(max(1, round(factor * length.prompt)), context - 1)
        fitting.append(Length(prompt, min(max(1, round(factor * length.output)), context - prompt)))
    return fitting


def _tokens(row: dict[str, str | None], column: str, rows: csv.DictReader, path: Path) -> int:
    try:
        number = int(row[column] or "")
    except ValueError:
        number = -1
    if number < 0:
        raise TraceError(f"{path}:{rows.line_num}: {column} is {row[column]!r}, not a number of tokens")
    return number


def _draw(median_and_p90: tuple[int, int], generator: random.Random) -> int:
    median, p90 = median_and_p90
    return max(1, round(generator.lognormvariate(math.log(median), math.log(p90 / median) / _Z90)))
