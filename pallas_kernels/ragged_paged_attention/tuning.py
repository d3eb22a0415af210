"""Which cut of a kernel a shape gets: what was measured on that kind of device, else the backend's heuristic.

``pallas_kernels/tuned`` holds a JSON file a device kind, written by ``python -m pallas_kernels.tune``. What a kernel
lets one choose is its backend's `Tuning`; no choice changes the result beyond rounding.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax import Array

FOLDER = Path(__file__).resolve().parents[1] / "tuned"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of a call, on which a choice may depend.

    Attributes:
      num_tokens, num_sequences: T and S.
      heads, kv_heads, head_dim: H, G and D.
      block_size: K.
      max_keys: P * K, the longest sequence.
      dtype: of the cache.
    """

    num_tokens: int
    num_sequences: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    max_keys: int
    dtype: str

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads


def problem_of(q: Array, kv_cache: tuple[Array, Array], block_tables: Array) -> Problem:
    """The sizes of these arguments of `api.ragged_paged_attention`."""
    num_tokens, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = kv_cache[0].shape
    num_sequences, max_blocks = block_tables.shape
    max_keys = max_blocks * block_size
    return Problem(num_tokens, num_sequences, heads, kv_heads, head_dim, block_size, max_keys, kv_cache[0].dtype.name)


# A measured choice holds for these exactly, and for the number of tokens that is nearest.
_EXACT = ("heads", "kv_heads", "head_dim", "block_size", "dtype")


def table_path(device_kind: str, folder: Path = FOLDER) -> Path:
    """The file of a kind of device, there or not: ``NVIDIA H200`` -> ``nvidia_h200.json``."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '_', device_kind.lower()).strip('_')}.json"


def read_entries(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The entries of a file: ``backend``, ``problem``, ``tuning`` and how they were measured; none without a file.

    Raises:
      ValueError: it is not what ``python -m pallas_kernels.tune`` writes.
    """
    if not path.exists():
        return ()
    try:
        return tuple(json.loads(path.read_text())["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of tunings ({error}): make it anew with pallas_kernels.tune") from None


def look_up(device_kind: str, backend: str, problem: Problem, folder: Path = FOLDER) -> Mapping[str, Any] | None:
    """Fields of the backend's `Tuning` as measured on this kind of device, None where nothing like it was measured.

    Raises:
      ValueError: the file of this kind of device cannot be read.
    """
    wanted = dataclasses.asdict(problem)
    found = [
        entry
        for entry in read_entries(table_path(device_kind, folder))
        if entry["backend"] == backend and all(entry["problem"][name] == wanted[name] for name in _EXACT)
    ]
    if not found:
        return None
    return min(found, key=lambda e: abs(math.log(e["problem"]["num_tokens"] / problem.num_tokens)))["tuning"]
