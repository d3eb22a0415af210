"""`LatencyTable`: measured times of the compiled programs, each at some fills of the cache, and what lies between them.

A step's time has three parts: its bucket, which fixes the products; its decodes and the keys that they read; and the
keys that its prefill chunks read. The table holds each bucket with one decode, full of decodes and full of one prompt,
at several fills of the cache; a step of decodes and prompts costs what either adds to the emptiest one. (The paper
profiles likewise to set its token budget, section 4.3.)
"""

import bisect
import collections
import dataclasses
import itertools
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sarathi_jax.latency.work import Work

FORMAT = 4  # 1 had no steps of one decode, and no idle_s; 2 no spreads; 3 spreads as ratios


class TableError(ValueError):
    """A file that is no latency table of this format; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one program at one fill of the cache.

    Attributes:
      bucket: tokens of the program.
      num_decodes: of the step; the rest of the bucket is a chunk of one prompt, or padding where there are decodes.
      num_decode_keys: keys that the decodes read, their own included.
      num_prefill_keys: keys that the chunk's queries read, summed over the queries (`chunk_keys`).
      seconds: from one step's tokens to the next one's while the device is kept busy.
    """

    bucket: int
    num_decodes: int
    num_decode_keys: int
    num_prefill_keys: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Spread:
    """How the steps of a program scatter about their expected time.

    Attributes:
      bucket: tokens of the program.
      has_prompts: they compute chunks of prompts; False: decodes alone.
      excess_s: how much longer than expected they take, each as likely as the others.
    """

    bucket: int
    has_prompts: bool
    excess_s: tuple[float, ...]


class LatencyTable:
    """`Work` -> seconds, by interpolation between measurements and along the last two beyond them.

    Of decodes the mean length of their sequences and their number count: a single one of 2,000 keys is quicker than
    eight of 250. A chunk that leaves part of its bucket as padding lies between the emptiest step and a full chunk.

    Args:
      timings: of each bucket at least one of decodes alone and one of a prompt alone; better, of few decodes and of
        many.
      about: what was measured, as text by key: device, model, versions.
      idle_s: how much longer a step takes that finds the device idle, and so waits for its own planning and launch, and
        for whoever slept until it was asked for.
      spreads: of steps in service; programs that are not named always take the expected time.

    Raises:
      TableError: a bucket lacks one of them, or times that are not positive.
    """

    def __init__(
        self,
        timings: Iterable[Timing],
        about: Mapping[str, Any] | None = None,
        idle_s: float = 0.0,
        spreads: Iterable[Spread] = (),
    ):
        self.timings = tuple(timings)
        self.about = dict(about or {})
        self.idle_s = idle_s
        self.spreads = tuple(spreads)
        self._excess_s = {(spread.bucket, spread.has_prompts): spread.excess_s for spread in self.spreads}
        if not self.timings or not all(timing.seconds > 0 for timing in self.timings):
            raise TableError("a latency table needs timings above 0: measure again")
        self.buckets = tuple(sorted({timing.bucket for timing in self.timings}))
        self._of_bucket = {bucket: _Bucket(bucket, self.timings) for bucket in self.buckets}

    def __repr__(self) -> str:
        return f"LatencyTable({len(self.timings)} timings of buckets {', '.join(map(str, self.buckets))})"

    def step_s(self, work: Work) -> float:
        """Expected seconds of a step.

        Args:
          work: of the step; its `num_tokens` is one of `buckets`.

        Raises:
          KeyError: no such bucket.
        """
        of_bucket = self._of_bucket[work.num_tokens]
        seconds = 0.0
        if work.num_decodes or not work.num_prefill_keys:
            seconds = sum(of_bucket.decodes(work.num_decodes, work.num_decode_keys).values())
        if not work.num_prefill_keys:
            return seconds
        prefills_s = of_bucket.prefills(work.num_prefill_keys)
        return seconds + prefills_s - of_bucket.empty_s if work.num_decodes else prefills_s

    def parts(self, work: Work) -> dict[int, float]:
        """What `step_s` adds up: seconds by the number of decodes of the timings that they rest on, 0 of a prompt's.

        Where all timings of such a number were twice as long, the step would take so much longer; less than nothing,
        where they are what is subtracted. Args and errors as of `step_s`.
        """
        of_bucket = self._of_bucket[work.num_tokens]
        parts = collections.defaultdict[int, float](float)
        if work.num_decodes or not work.num_prefill_keys:
            parts |= of_bucket.decodes(work.num_decodes, work.num_decode_keys)
        if work.num_prefill_keys:
            for number, seconds in of_bucket.prompt(work.num_prefill_keys):
                parts[number] += seconds
            if work.num_decodes:
                parts[of_bucket.emptiest] -= of_bucket.empty_s
        return dict(parts)

    def excess_s(self, work: Work) -> tuple[float, ...]:
        """By how much a step's actual seconds exceed the expected ones, each as likely as the others."""
        return self._excess_s.get((work.num_tokens, work.num_prefill_keys > 0), (0.0,))

    def save(self, path: Path) -> None:
        """Writes the table as JSON, all at once or not at all."""
        timings, spreads = ([dataclasses.asdict(row) for row in rows] for rows in (self.timings, self.spreads))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        document = {
            "format": FORMAT,
            "about": self.about,
            "idle_s": self.idle_s,
            "timings": timings,
            "spreads": spreads,
        }
        partial.write_text(json.dumps(document, indent=1))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> "LatencyTable":
        """Reads what `save` wrote.

        Raises:
          OSError: it cannot be read.
          TableError: it is something else.
        """
        try:
            document = json.loads(path.read_text())
            if document["format"] != FORMAT:
                raise TableError(f"{path} has format {document['format']}, this version reads {FORMAT}: measure again")
            timings = [Timing(**row) for row in document["timings"]]
            spreads = [Spread(**row | {"excess_s": tuple(row["excess_s"])}) for row in document["spreads"]]
            return cls(timings, document["about"], document["idle_s"], spreads)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, TableError):
                raise
            raise TableError(f"{path} is no latency table ({error}): remove it, it is measured again") from error


class _Bucket:
    """The times of one program.

    Attributes:
      empty_s: of the emptiest step measured.
      emptiest: how many decodes that had.
      prefills: seconds by the keys that chunks read.
    """

    def __init__(self, bucket: int, timings: Iterable[Timing]):
        of_decodes, of_prompts = dict[int, list[tuple[int, float]]](), list[tuple[int, float]]()
        for timing in timings:
            if timing.bucket == bucket and timing.num_decodes:
                points = of_decodes.setdefault(timing.num_decodes, [])
                points.append((timing.num_decode_keys, timing.seconds))
            elif timing.bucket == bucket:
                of_prompts.append((timing.num_prefill_keys, timing.seconds))
        for kind, points in (("decodes", of_decodes), ("a prompt", of_prompts)):
            if not points:
                raise TableError(f"the latency table has no timing of {kind} in bucket {bucket}: measure again")
        self._numbers = sorted(of_decodes)
        self._decodes = [_Curve(of_decodes[number]) for number in self._numbers]
        self._first_keys, first_s = min(of_prompts)
        firsts = dict(zip(self._numbers, (curve.first for curve in self._decodes), strict=True)) | {0: first_s}
        self.empty_s, self.emptiest = min((seconds, number) for number, seconds in firsts.items())
        self.prefills = _Curve([(0, self.empty_s), *of_prompts])

    def decodes(self, number: int, num_keys: int) -> dict[int, float]:
        """Seconds of a step of decodes alone, by the measured numbers of them between which it lies.

        Args:
          number: of decodes.
          num_keys: that they read, all together.
        """
        index = min(bisect.bisect_left(self._numbers, number), len(self._numbers) - 1)
        high = self._numbers[index]
        if index == 0 or number >= high:
            return {high: self._decodes[index](num_keys)}
        low, length = self._numbers[index - 1], num_keys / number
        share = (number - low) / (high - low)
        few_s, many_s = self._decodes[index - 1](low * length), self._decodes[index](high * length)
        return {low: (1 - share) * few_s, high: share * many_s}

    def prompt(self, num_keys: int) -> tuple[tuple[int, float], ...]:
        """Seconds of a step of a prompt alone, each beside the number of decodes of the timings that they rest on.

        Args:
          num_keys: that the chunk reads.
        """
        seconds = self.prefills(num_keys)
        empty_s = max(0.0, 1 - num_keys / self._first_keys) * self.empty_s if self._first_keys else 0.0
        return (self.emptiest, empty_s), (0, seconds - empty_s)


class _Curve:
    """Straight lines through points; a fuller cache is never quicker, whatever the noise of the measurement."""

    def __init__(self, points: list[tuple[int, float]]):
        # Of several times for the same work, the longest.
        keys, seconds = zip(*dict(sorted(points)).items(), strict=True)
        self._keys = keys
        self._seconds = tuple(itertools.accumulate(seconds, max))
        self.first = seconds[0]

    def __call__(self, num_keys: float) -> float:
        keys, seconds = self._keys, self._seconds
        if num_keys <= keys[0] or len(keys) == 1:
            return seconds[0]
        i = next((i for i in range(1, len(keys)) if num_keys <= keys[i]), len(keys) - 1)
        slope = (seconds[i] - seconds[i - 1]) / (keys[i] - keys[i - 1])
        return seconds[i] + (num_keys - keys[i]) * slope
