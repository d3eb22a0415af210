"""Lengths drawn so that they have the quantiles that are published of a trace."""

import dataclasses
import functools
import random
from statistics import NormalDist

import numpy as np

from sarathi_jax.workloads.lengths import Length, WorkloadError

_Z90 = NormalDist().inv_cdf(0.9)
_SHARES = np.array([0.5, 0.9])
_NUM_ROUNDS = 500
_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class LengthQuantiles:
    """What is published of a trace (the paper's Table 2).

    Attributes:
      prompt, output: median and 90th percentile, in tokens.
      longest: prompt and output together; longer requests are left out, and the quantiles are of those that remain.
    """

    prompt: tuple[int, int]
    output: tuple[int, int]
    longest: int

    def __post_init__(self) -> None:
        for name, (median, p90) in (("prompt", self.prompt), ("output", self.output)):
            if not 1 <= median < p90 < self.longest:
                raise WorkloadError(
                    f"{name}: a median of {median} and a P90 of {p90} tokens are impossible in requests of at most "
                    f"{self.longest}; they must rise, from 1 to below that"
                )


CHAT = LengthQuantiles(prompt=(1730, 5696), output=(415, 834), longest=8192)
"""openchat_sharegpt4."""

ARXIV = LengthQuantiles(prompt=(7059, 12985), output=(208, 371), longest=16384)
"""arxiv_summarization."""


def synthesise(quantiles: LengthQuantiles, number: int, seed: int) -> list[Length]:
    """Draws prompt and output from log-normal distributions; a request longer than `quantiles.longest` is drawn anew.

    What remains has the given quantiles. Prompt and output are independent but for the cut.

    Args:
      quantiles: of the trace.
      number: of requests.
      seed: the same one gives the same lengths.

    Raises:
      WorkloadError: no log-normal distributions have these quantiles.
    """
    prompt, output = fitted(quantiles)
    generator, lengths = random.Random(seed), []
    while len(lengths) < number:
        length = Length(
            max(1, round(generator.lognormvariate(*prompt))), max(1, round(generator.lognormvariate(*output)))
        )
        if length.prompt + length.output <= quantiles.longest:
            lengths.append(length)
    return lengths


@functools.cache
def fitted(quantiles: LengthQuantiles) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean and standard deviation of the logarithms of prompts and of outputs, before long requests are left out.

    Found by moving both until the quantiles of what remains, summed over all whole lengths, are the wanted ones.

    Raises:
      WorkloadError: it does not come to an end, because no log-normal distributions have these quantiles.
    """
    wanted = np.log(np.array([quantiles.prompt, quantiles.output], float))  # [prompt or output, median or P90]
    logs = np.log(np.arange(1, quantiles.longest, dtype=float))
    mean, deviation = wanted[:, 0].copy(), (wanted[:, 1] - wanted[:, 0]) / _Z90
    for _ in range(_NUM_ROUNDS):
        density = np.exp(-0.5 * ((logs - mean[:, None]) / deviation[:, None]) ** 2 - logs)
        density /= density.sum(axis=1, keepdims=True)
        # How likely a request of this prompt (output) is not too long: its output (prompt) is at most longest - prompt.
        fits = np.cumsum(density[::-1], axis=1)[:, ::-1]
        remaining = np.cumsum(density * fits, axis=1)
        remaining /= remaining[:, -1:]
        found = np.stack([np.interp(_SHARES, row, logs) for row in remaining])
        error = wanted - found
        if np.abs(error).max() < _TOLERANCE:
            (prompt_mean, output_mean), (prompt_deviation, output_deviation) = mean.tolist(), deviation.tolist()
            return (prompt_mean, prompt_deviation), (output_mean, output_deviation)
        mean += error[:, 0]
        deviation *= np.exp(error[:, 1] - error[:, 0])
        if deviation.max() > logs[-1]:
            break
    raise WorkloadError(
        f"no log-normal lengths of at most {quantiles.longest} tokens have these quantiles: {quantiles}"
    )
