"""Trace files: reading one, finding one by its name, and what serves where there is none."""

import csv
import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path

from sarathi_jax.workloads.lengths import Length, WorkloadError, scaled, shuffled
from sarathi_jax.workloads.quantiles import ARXIV, CHAT, LengthQuantiles, synthesise

_PROMPT, _OUTPUT, _ARRIVAL = "num_prefill_tokens", "num_decode_tokens", "arrived_at"
DATA_VARIABLE = "SARATHI_DATA"
"""Environment variable that names the folder of trace files."""

LengthSource = Callable[[int, int], list[Length]]
"""Number and seed to lengths; the same seed gives the same ones."""

SPLITWISE = LengthQuantiles(prompt=(1020, 2735), output=(129, 424), longest=14089)
"""splitwise_conv; measured in the file."""

_SHORT_NAMES = {"chat": "openchat_sharegpt4", "arxiv": "arxiv_summarization"}


class TraceError(WorkloadError):
    """A file that is no trace; the message says what it should hold."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests of a file, in its order.

    Attributes:
      lengths: of each.
      arrivals_s: of each, in seconds from the first, ascending; None where the file does not have them.
    """

    lengths: tuple[Length, ...]
    arrivals_s: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Where lengths come from.

    Attributes:
      source: in words, for whoever reads the results: the file, or that there was none and what served instead.
      longest: prompt and output together, at most.
      draw: lengths in random order.
      trace: the file; None: it was not found.
    """

    source: str
    longest: int
    draw: LengthSource
    trace: Trace | None = None


@dataclasses.dataclass(frozen=True)
class _Published:
    """What is known of a trace without its file; `longest` where the lengths are scaled to that."""

    quantiles: LengthQuantiles
    words: str
    longest: int | None = None

    def draw(self, number: int, seed: int) -> list[Length]:
        lengths = synthesise(self.quantiles, number, seed)
        return lengths if self.longest is None else scaled(lengths, self.quantiles.longest, self.longest)


_PUBLISHED = {
    "openchat_sharegpt4": _Published(CHAT, "the quantiles of the paper's Table 2"),
    "arxiv_summarization": _Published(ARXIV, "the quantiles of the paper's Table 2"),
    # Its prompts crowd below the cut as those of no log-normal do.
    "arxiv_summarization_4k": _Published(ARXIV, "the paper's quantiles of arxiv_summarization, scaled to 4096", 4096),
    "splitwise_conv": _Published(SPLITWISE, "the quantiles of the published file"),
}


def dataset(name: str, folder: str | Path | None = None) -> Dataset:
    """Finds a trace by path or by name; without the file of a known name, lengths are drawn from published quantiles.

    Args:
      name: a path, the name of a file without ``.csv``, ``chat`` or ``arxiv`` (the traces of the paper).
      folder: of trace files; None: what the environment variable SARATHI_DATA names, if anything.

    Raises:
      TraceError: there is no such file, and no such name is known; there is no such folder; or the file is no trace.
    """
    name = _SHORT_NAMES.get(name, name)
    path = find_trace(name, folder)
    if path is not None:
        trace = load_trace(path)
        longest = max(length.prompt + length.output for length in trace.lengths)
        return Dataset(str(path), longest, functools.partial(shuffled, trace.lengths), trace)
    if name not in _PUBLISHED:
        inside = _folder(folder) or f"a folder ({DATA_VARIABLE} is not set)"
        raise TraceError(
            f"there is no file {name!r}, nor {name}.csv in {inside};"
            f" known without a file are {', '.join([*_SHORT_NAMES, *_PUBLISHED])}"
        )
    published = _PUBLISHED[name]
    source = f"{name}.csv was not found: drawn from log-normals with {published.words}"
    return Dataset(source, published.longest or published.quantiles.longest, published.draw)


def find_trace(name: str, folder: str | Path | None = None) -> Path | None:
    """The file of that path, or of that name in a folder (see `dataset`); None: there is none."""
    inside = _folder(folder)
    paths = [Path(name), *([inside / name, inside / f"{name}.csv"] if inside else [])]
    return next((path for path in paths if path.is_file()), None)


def load_trace(path: Path) -> Trace:
    """Reads a CSV file with the columns num_prefill_tokens and num_decode_tokens, and arrived_at if it has that.

    Other columns are ignored; requests without a prompt or an output are left out. Arrivals are counted from the first.

    Raises:
      TraceError: it cannot be read, or holds something else.
    """
    lengths, arrivals_s = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = set(rows.fieldnames or ())
            if missing := {_PROMPT, _OUTPUT} - columns:
                raise TraceError(f"{path} has no column {', '.join(sorted(missing))} in its first line")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                prompt, output = _tokens(row, _PROMPT, where), _tokens(row, _OUTPUT, where)
                at_s = _seconds(row, where) if _ARRIVAL in columns else 0.0
                if not (prompt and output):
                    continue
                if arrivals_s and at_s < arrivals_s[-1]:
                    raise TraceError(f"{where}: {_ARRIVAL} is {at_s}, before the request above it at {arrivals_s[-1]}")
                lengths.append(Length(prompt, output))
                arrivals_s.append(at_s)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"cannot read {path}: {error}") from error
    if not lengths:
        raise TraceError(f"{path} holds no request")
    if _ARRIVAL not in columns:
        return Trace(tuple(lengths))
    return Trace(tuple(lengths), tuple(at_s - arrivals_s[0] for at_s in arrivals_s))


def read_trace(path: Path) -> list[Length]:
    """The lengths of a trace file, see `load_trace`."""
    return list(load_trace(path).lengths)


def _folder(folder: str | Path | None) -> Path | None:
    if folder is None:
        folder = os.environ.get(DATA_VARIABLE) or None
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise TraceError(f"{folder} is no folder of traces; correct {DATA_VARIABLE} or the flag that names it")
    return Path(folder)


def _tokens(row: dict[str, str | None], column: str, where: str) -> int:
    try:
        number = int(row[column] or "")
    except ValueError:
        number = -1
    if number < 0:
        raise TraceError(f"{where}: {column} is {row[column]!r}, not a number of tokens")
    return number


def _seconds(row: dict[str, str | None], where: str) -> float:
    try:
        seconds = float(row[_ARRIVAL] or "")
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise TraceError(f"{where}: {_ARRIVAL} is {row[_ARRIVAL]!r}, not a time in seconds")
    return seconds
