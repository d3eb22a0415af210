"""Batches as a pure function of the step number: nothing to save, and a resumed run sees what it would have seen."""

import numpy as np

from sarathi_jax.training.settings import TrainConfig


def batch_at(tokens: np.ndarray, config: TrainConfig, step: int) -> np.ndarray:
    """The batch of a step.

    Within a phase the stream is cut into windows, each seen once an epoch in random order; every epoch shifts the cuts.

    Args:
      tokens: i32[N], the training stream.
      config: phases and seed.
      step: number of the optimiser step.

    Returns:
      i32[batch, length + 1].

    Raises:
      ValueError: the stream is shorter than two windows.
    """
    phase, step_in_phase = config.phase_at(step)
    # One window is given up to the shift, and targets reach one token beyond a window.
    count = (len(tokens) - 1) // phase.length - 1
    if count < 1:
        raise ValueError(f"the corpus has {len(tokens)} tokens, too few for sequences of {phase.length}")
    rows = []
    for index in range(step_in_phase * phase.batch, (step_in_phase + 1) * phase.batch):
        epoch, place = divmod(index, count)
        draw = np.random.default_rng([config.seed, phase.length, epoch])
        shift = int(draw.integers(phase.length))
        start = shift + int(draw.permutation(count)[place]) * phase.length
        rows.append(tokens[start : start + phase.length + 1])
    return np.stack(rows)
