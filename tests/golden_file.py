"""What a golden file holds, how it is chosen from the oracle's values, and how values are compared with it."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.tiny_models import PROMPT_LENGTHS, tiny_weights

DIRECTORY = Path(__file__).parent / "golden"
TOLERANCE = 2e-4
"""Largest error allowed, relative to the largest logit of the prompt."""

TIE = 1e-4
"""Two best candidates closer than this share of the largest logit would make the greedy token a matter of rounding."""

NUM_WHOLE = 3
"""Prompts of which logits are kept at every position; of the others at the first and the last two draws."""


@dataclasses.dataclass(frozen=True)
class Expected:
    """What transformers says of one prompt.

    Attributes:
      tokens: the prompt and the greedy tokens after it.
      prompt_length: how many of `tokens` are the prompt.
      positions: i32[rows], where in `tokens` the logits stand.
      logits: f32[rows, V].
    """

    tokens: list[int]
    prompt_length: int
    positions: np.ndarray
    logits: np.ndarray

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.prompt_length]

    @property
    def greedy(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def error_of(self, logits: np.ndarray) -> float:
        """Largest absolute error of f32[len, V] at the kept positions, relative to the logits' scale.

        Args:
          logits: at every position of `tokens`.
        """
        error = np.abs(np.asarray(logits, np.float64)[self.positions] - self.logits).max()
        return float(error / np.abs(self.logits).max())


def read_expected(file: Path) -> list[Expected]:
    """Reads a golden file, or the whole values that the oracle wrote.

    Args:
      file: an npz with ``tokens_i`` and ``logits_i``, and ``positions_i`` unless every position is there.
    """
    with np.load(file) as arrays:
        expected = []
        for i, prompt_length in enumerate(PROMPT_LENGTHS):
            tokens, logits = arrays[f"tokens_{i}"], arrays[f"logits_{i}"]
            positions = arrays[f"positions_{i}"] if f"positions_{i}" in arrays else np.arange(len(tokens))
            expected.append(Expected(tokens.tolist(), prompt_length, positions, logits))
        return expected


def read_golden(name: str) -> list[Expected]:
    """The committed values of a tiny model.

    Args:
      name: a key of `tests.tiny_models.TINY`.

    Raises:
      ValueError: the values were made from other weights.
    """
    file = DIRECTORY / f"{name}.npz"
    with np.load(file) as arrays:
        if str(arrays["weights"]) != weights_digest(name):
            raise ValueError(f"{file.name} was made from other weights than tests/tiny_models.py draws: make it anew")
    return read_expected(file)


def write_golden(name: str, whole: list[Expected], directory: Path = DIRECTORY) -> int:
    """Keeps the part of the oracle's values that is committed; returns the size of the file in bytes.

    Args:
      name: a key of `tests.tiny_models.TINY`.
      whole: what the oracle wrote.
      directory: where to write.

    Raises:
      ValueError: two candidates are too close for "the same greedy tokens" to be a fair demand.
    """
    arrays: dict[str, np.ndarray] = {"weights": np.array(weights_digest(name))}
    for i, expected in enumerate(whole):
        draws = expected.logits[expected.prompt_length - 1 : -1]
        best_two = np.sort(draws, axis=-1)[:, -2:]
        if np.diff(best_two).min() < TIE * np.abs(draws).max():
            raise ValueError(f"{name}: prompt {i} meets a near tie; change the model's salt in tests/tiny_models.py")
        first, last = expected.prompt_length - 1, len(expected.tokens) - 1
        positions = range(last + 1) if i < NUM_WHOLE else (first, last - 1, last)
        arrays[f"tokens_{i}"] = np.asarray(expected.tokens, np.int32)
        arrays[f"positions_{i}"] = np.asarray(positions, np.int32)
        arrays[f"logits_{i}"] = expected.logits[arrays[f"positions_{i}"]]
    file = directory / f"{name}.npz"
    np.savez_compressed(file, **arrays)
    return file.stat().st_size


def weights_digest(name: str) -> str:
    """SHA-256 over the names and bytes of a tiny model's weights.

    Args:
      name: a key of `tests.tiny_models.TINY`.
    """
    digest = hashlib.sha256()
    weights: Mapping[str, np.ndarray] = tiny_weights(name)
    for tensor, value in sorted(weights.items()):
        digest.update(tensor.encode())
        digest.update(value.astype("<f4").tobytes())
    return digest.hexdigest()
