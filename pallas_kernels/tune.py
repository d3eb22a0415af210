"""Measures how attention kernels are best cut on the device at hand, and writes it where they look it up.

  python -m pallas_kernels.tune                                   # the heads of well-known models, all buckets
  python -m pallas_kernels.tune --heads 32/8 --head_dim 128 --num_tokens 64,512 --backend mosaic_gpu

From the backend's heuristic on, every field is tried in turn with the others as they are (coordinate descent), on a
batch that is half decodes and half a prefill chunk. A cut that does not compile, or gives another result than the
heuristic's, is left out. The table is written after every shape, so a run that was stopped goes on where it was.
"""

import dataclasses
import datetime
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax import Array
from tqdm import tqdm

from pallas_kernels.ragged_paged_attention import BACKENDS, check_platform, tuning
from pallas_kernels.ragged_paged_attention.cases import draw_cache, draw_chunks
from pallas_kernels.ragged_paged_attention.tuning import Problem

_BACKENDS = flags.DEFINE_list("backend", None, "comma-separated; without it all kernels for this device")
_HEADS = flags.DEFINE_list("heads", "32/8,56/8,64/8", "query heads / KV heads, comma-separated")
_HEAD_DIMS = flags.DEFINE_list("head_dim", "128", "sizes of a head, comma-separated")
_BLOCK_SIZES = flags.DEFINE_list("block_size", "64", "tokens of a cache block, comma-separated")
_NUM_TOKENS = flags.DEFINE_list("num_tokens", "1,8,32,64,128,512,2048", "token buckets, comma-separated")
_NUM_SEQUENCES = flags.DEFINE_integer("num_sequences", 128, "most sequences of a step", lower_bound=2)
_MAX_KEYS = flags.DEFINE_integer("max_keys", 4096, "tokens of the longest sequence", lower_bound=128)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the cache")
_OUT = flags.DEFINE_string("out", str(tuning.FOLDER), "folder of the tables")
_REPEAT = flags.DEFINE_bool("repeat", False, "measures again what the table has")

MIN_GAIN = 0.02
"""A cut must be faster than the best so far by this share: less is noise."""

TOLERANCE = 1e-2
"""Largest difference from the heuristic's result, as a share of the largest value."""

NUM_ROUNDS = 7
NUM_CALLS = 20
"""A time is the median of so many rounds of so many calls."""

Entry = Mapping[str, Any]
Choices = Mapping[str, Sequence[Any]]


def search(heuristic: Any, choices: Choices, measure: Callable[[Any], float]) -> tuple[Any, float, float]:
    """Coordinate descent over the fields of a tuning.

    Args:
      heuristic: where it starts, a dataclass that can be measured.
      choices: for each field what to try.
      measure: seconds of a tuning; infinite for one that does not work.

    Returns:
      The best tuning, its seconds, and the heuristic's.
    """
    heuristic_s = measure(heuristic)
    best, best_s = heuristic, heuristic_s
    for name, values in choices.items():
        for value in values:
            if value == getattr(best, name):
                continue
            try:
                candidate = dataclasses.replace(best, **{name: value})
            except ValueError:
                continue  # the other fields rule it out
            seconds = measure(candidate)
            if seconds < best_s * (1 - MIN_GAIN):
                best, best_s = candidate, seconds
    return best, best_s, heuristic_s


class Bench:
    """Times tunings of one backend on one problem; the first one measured is what others must agree with.

    Args:
      backend: a name in `BACKENDS`.
      problem: the sizes.
      interpret: True runs one call without the device, and its time means nothing.
    """

    def __init__(self, backend: str, problem: Problem, interpret: bool = False):
        self._module = BACKENDS[backend].module
        self._options = {"scale": problem.head_dim**-0.5, "window": None, "interpret": interpret}
        self._cache = draw_cache(problem)
        q, k, v, *chunks = draw_chunks(problem, chunks_of(problem))
        self._rows, self._chunks = (q, k, v), chunks
        self._expected: np.ndarray | None = None

    def measure(self, candidate: Any) -> float:
        """Seconds of a call; infinite if it does not compile, or gives another result than the first one measured.

        Raises:
          Exception: the first one does not run.
        """
        attend = functools.partial(self._module.ragged_paged_attention, tuning=candidate, **self._options)
        run = jax.jit(attend, donate_argnums=3)
        try:
            out = np.asarray(self._call(run))
        except Exception as error:  # compilers raise whatever they like
            if self._expected is None:
                raise
            _leave_out(candidate, (str(error).splitlines() or [repr(error)])[0][:200])
            return math.inf
        if self._expected is None:
            self._expected = out
        error = np.abs(out - self._expected).max() / max(1.0, np.abs(self._expected).max())
        if not error <= TOLERANCE:  # NaN is not <=
            _leave_out(candidate, f"its result differs from the heuristic's by {error:.2g}")
            return math.inf
        num_rounds, num_calls = (1, 1) if self._options["interpret"] else (NUM_ROUNDS, NUM_CALLS)
        return statistics.median(self._time(run, num_calls) for _ in range(num_rounds))

    def _time(self, run: Callable[..., Any], num_calls: int) -> float:
        start_s = time.perf_counter()
        for _ in range(num_calls - 1):
            self._call(run)
        jax.block_until_ready(self._call(run))
        return (time.perf_counter() - start_s) / num_calls

    def _call(self, run: Callable[..., Any]) -> Array:
        out, self._cache = run(*self._rows, self._cache, *self._chunks)
        return out


def chunks_of(problem: Problem) -> list[tuple[int, int]]:
    """Half of the tokens decodes of the longest sequences, the others a chunk at the end of one more."""
    longest, tokens = problem.max_keys, problem.num_tokens
    decodes = 1 if tokens == 1 else min(problem.num_sequences - 1, tokens // 2)
    chunk = min(tokens - decodes, longest)
    return [(1, longest)] * decodes + ([(chunk, longest)] if chunk else [])


def tune(backend: str, problem: Problem, interpret: bool = False, choices: Choices | None = None) -> Entry:
    """The entry of a backend and a problem.

    Args:
      backend: a name in `BACKENDS`.
      problem: the sizes.
      interpret: True runs without the device, and the times mean nothing.
      choices: for each field what to try; None: the backend's own.
    """
    module = BACKENDS[backend].module
    bench = Bench(backend, problem, interpret)
    tried = module.CHOICES if choices is None else choices
    best, best_s, heuristic_s = search(module.choose_tuning(problem), tried, bench.measure)
    return {
        "backend": backend,
        "problem": dataclasses.asdict(problem),
        "tuning": dataclasses.asdict(best),
        "time_us": round(best_s * 1e6, 2),
        "heuristic_us": round(heuristic_s * 1e6, 2),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def fill_table(
    path: Path, device_kind: str, wanted: Sequence[tuple[str, Problem]], measure: Callable[[str, Problem], Entry]
) -> None:
    """Adds what a table lacks, and writes it after each entry.

    Args:
      path: of the table, there or not.
      device_kind: of the device that measures.
      wanted: backends and problems.
      measure: gives an entry, as `tune`.
    """
    entries = list(tuning.read_entries(path))
    known = [(entry["backend"], Problem(**entry["problem"])) for entry in entries]
    for backend, problem in tqdm([pair for pair in wanted if pair not in known], "tune", unit="shape"):
        entries.append(measure(backend, problem))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"device_kind": device_kind, "entries": entries}, indent=1) + "\n")
        unfinished.replace(path)


def combinations() -> list[Problem]:
    """What the flags ask for."""
    head_dims, block_sizes, buckets = (list(map(int, flag.value)) for flag in (_HEAD_DIMS, _BLOCK_SIZES, _NUM_TOKENS))
    heads = [tuple(map(int, pair.split("/"))) for pair in _HEADS.value]
    return [
        Problem(
            num_tokens=num_tokens,
            num_sequences=_NUM_SEQUENCES.value,
            heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            max_keys=-(-_MAX_KEYS.value // block_size) * block_size,
            dtype=_DTYPE.value,
        )
        for (query_heads, kv_heads), head_dim, block_size in itertools.product(heads, head_dims, block_sizes)
        for num_tokens in buckets
    ]


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    platform, device_kind = jax.default_backend(), jax.devices()[0].device_kind
    here = "cuda" if platform == "gpu" else platform
    backends = _BACKENDS.value or [name for name, backend in BACKENDS.items() if backend.platform == here]
    if not backends:
        sys.exit(f"there is no kernel for {device_kind}: they are for GPUs and TPUs, a CPU runs XLA's attention")
    try:
        for name in backends:
            check_platform(name, platform)
        problems = combinations()
    except ValueError as error:
        sys.exit(f"cannot tune: {error}")
    path = tuning.table_path(device_kind, Path(_OUT.value))
    if _REPEAT.value:
        path.unlink(missing_ok=True)
    wanted = [
        (name, problem)
        for name in backends
        for problem in problems
        if not BACKENDS[name].refusals(problem.head_dim, problem.block_size, problem.dtype)
    ]
    fill_table(path, device_kind, wanted, tune)
    print(path)


def _leave_out(candidate: Any, reason: str) -> None:
    print(f"left out {candidate}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
