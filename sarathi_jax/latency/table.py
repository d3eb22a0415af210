"""`LatencyTable`: measured times of the compiled programs, each at some fills of the cache, and what lies between them.

A step's time has three parts: its bucket, which fixes the products; the keys that its decodes read; and the keys that
its prefill chunks read. The table holds each bucket full of decodes and full of one prompt, at several fills of the
cache; a step of both costs what either adds to the empty one. (The paper profiles likewise to set its token budget,
section 4.3.)
"""

import dataclasses
import itertools
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1


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


def chunk_keys(start: int, length: int) -> int:
    """Keys that a chunk's queries read, summed over them: each sees all tokens before it, and itself.

    Args:
      start: tokens of the sequence before the chunk.
      length: of the chunk.
    """
    return length * start + length * (length + 1) // 2


class LatencyTable:
    """Bucket and work -> seconds, by interpolation between measurements and along the last two beyond them.

    Args:
      timings: of each bucket at least one of decodes alone and one of a prompt alone.
      about: what was measured, as text by key: device, model, versions.

    Raises:
      TableError: a bucket lacks one of them, or times that are not positive.
    """

    def __init__(self, timings: Iterable[Timing], about: Mapping[str, Any] | None = None):
        self.timings = tuple(timings)
        self.about = dict(about or {})
        if not self.timings or not all(timing.seconds > 0 for timing in self.timings):
            raise TableError("a latency table needs timings above 0: measure again")
        self.buckets = tuple(sorted({timing.bucket for timing in self.timings}))
        self._decodes = {b: _Curve(self._points(b, True)) for b in self.buckets}
        self._prefills = {b: _Curve(self._points(b, False)) for b in self.buckets}

    def __repr__(self) -> str:
        return f"LatencyTable({len(self.timings)} timings of buckets {', '.join(map(str, self.buckets))})"

    def step_s(self, bucket: int, num_decode_keys: int, num_prefill_keys: int) -> float:
        """Expected seconds of a step.

        Args:
          bucket: one of `buckets`.
          num_decode_keys, num_prefill_keys: as of `Timing`; 0 where the step has no decodes, no prompts.

        Raises:
          KeyError: no such bucket.
        """
        decodes, prefills = self._decodes[bucket], self._prefills[bucket]
        if not num_prefill_keys:
            return decodes(num_decode_keys)
        if not num_decode_keys:
            return prefills(num_prefill_keys)
        return decodes(num_decode_keys) + prefills(num_prefill_keys) - min(decodes.first, prefills.first)

    def save(self, path: Path) -> None:
        """Writes the table as JSON, all at once or not at all."""
        rows = [dataclasses.asdict(timing) for timing in self.timings]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        partial.write_text(json.dumps({"format": FORMAT, "about": self.about, "timings": rows}, indent=1))
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
            return cls((Timing(**row) for row in document["timings"]), document["about"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, TableError):
                raise
            raise TableError(f"{path} is no latency table ({error}): remove it, it is measured again") from error

    def _points(self, bucket: int, decodes: bool) -> list[tuple[int, float]]:
        points = [
            (timing.num_decode_keys if decodes else timing.num_prefill_keys, timing.seconds)
            for timing in self.timings
            if timing.bucket == bucket and bool(timing.num_decodes) == decodes
        ]
        if not points:
            kind = "decodes" if decodes else "a prompt"
            raise TableError(f"the latency table has no timing of {kind} in bucket {bucket}: measure again")
        return points


class _Curve:
    """Straight lines through points; a fuller cache is never quicker, whatever the noise of the measurement."""

    def __init__(self, points: list[tuple[int, float]]):
        # Of several times for the same work, the longest.
        keys, seconds = zip(*dict(sorted(points)).items(), strict=True)
        self._keys = keys
        self._seconds = tuple(itertools.accumulate(seconds, max))
        self.first = seconds[0]

    def __call__(self, num_keys: int) -> float:
        keys, seconds = self._keys, self._seconds
        if num_keys <= keys[0] or len(keys) == 1:
            return seconds[0]
        i = next((i for i in range(1, len(keys)) if num_keys <= keys[i]), len(keys) - 1)
        slope = (seconds[i] - seconds[i - 1]) / (keys[i] - keys[i - 1])
        return seconds[i] + (num_keys - keys[i]) * slope
