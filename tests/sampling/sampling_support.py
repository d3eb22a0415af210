"""Sequences, tables and the plain reference that the sampling tests compare with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sarathi_jax.request import Request, SamplingParams
from sarathi_jax.sampling import Drawn, SamplingMirror, SamplingParamsArrays, SamplingTable, sample
from sarathi_jax.sequence import Sequence

jit_sample = jax.jit(sample)

NUM_ROWS = 10
HISTORY_LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a step: its logits, parameters, and the tokens known so far."""

    logits: np.ndarray  # f32[V]
    params: SamplingParams
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    seed: int = 0
    index: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    allowed: frozenset[int] | None = None  # of a grammar

    def fill(self, table: SamplingTable, row: int) -> None:
        """Writes it to a row of the table."""
        table.set_row(row, self.sequence)
        if self.allowed is not None:
            table.set_mask(row, mask_of(self.allowed, len(self.logits)))

    @property
    def sequence(self) -> Sequence:
        request = Request("r", self.prompt, self.params, 1 << 20, self.seed, self.stop_token_ids, 0.0)
        return Sequence(0, request, self.index)


def mask_of(allowed: frozenset[int], vocab_size: int) -> np.ndarray:
    """i32[ceil(V / 32)], a bit for each token, the lowest first."""
    bits = np.isin(np.arange(-(-vocab_size // 32) * 32), list(allowed))
    return np.packbits(bits, bitorder="little").view(np.int32)


def on_device(table: SamplingTable) -> SamplingParamsArrays:
    """A table that nobody has asked for its changes yet."""
    return SamplingMirror(jnp.asarray).update(table.changes())


def draw(cases: list[Case], rows: list[int] | None = None, size: int = 8) -> Drawn:
    """Runs one step of `size` rows with the cases in the given rows of the table, and padding after them.

    The rest of the table is neutral, and everything that must not matter is garbage: histories past the known tokens,
    and the logits, rows and positions of the padding.
    """
    rows = list(range(len(cases))) if rows is None else rows
    vocab_size = len(cases[0].logits)
    table = SamplingTable(NUM_ROWS, vocab_size)
    history = np.full((NUM_ROWS, HISTORY_LENGTH), vocab_size - 1, np.int32)
    logits = np.full((size, vocab_size), np.nan, np.float32)
    positions = np.full(size, 5, np.int32)
    for i, (row, case) in enumerate(zip(rows, cases, strict=True)):
        case.fill(table, row)
        known = case.prompt + case.output
        history[row] = np.argmax(case.logits)  # the token whose penalty would show most
        history[row, : len(known)] = known
        logits[i] = case.logits
        positions[i] = len(known)
    drawn = jit_sample(
        jnp.asarray(logits),
        jnp.asarray(np.pad(rows, (0, size - len(rows))), jnp.int32),
        jnp.asarray(positions),
        jnp.asarray(history),
        on_device(table),
        jnp.arange(size) < len(cases),
    )
    return jax.tree.map(lambda x: np.asarray(x)[: len(cases)], drawn)


@functools.cache
def _many():
    def step(logits, positions, history, arrays):
        num_positions = len(positions)
        return sample(
            jnp.broadcast_to(logits, (num_positions, len(logits))),
            jnp.zeros(num_positions, jnp.int32),
            positions,
            history,
            arrays,
            jnp.ones(num_positions, bool),
        ).tokens

    return jax.jit(step)


def draw_at_many_positions(case: Case, num_positions: int) -> np.ndarray:
    """The tokens that one sequence draws from the same logits at positions 1, 2, ...: i32[num_positions]."""
    table = SamplingTable(1, len(case.logits))
    case.fill(table, 0)
    positions = jnp.arange(1, num_positions + 1, dtype=jnp.int32)
    history = jnp.zeros((1, 1), jnp.int32)
    return np.asarray(_many()(jnp.asarray(case.logits, jnp.float32), positions, history, on_device(table)))


def reference_scores(case: Case) -> np.ndarray:
    """f64[V]: the logits after bias, ban, penalties and mask, in the plainest form."""
    params = case.params
    scores = case.logits.astype(np.float64).copy()
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    if len(case.output) < params.min_tokens:
        for token in case.stop_token_ids:
            scores[token] = -np.inf
    for token in set(case.prompt + case.output):
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(case.output):
        scores[token] -= params.frequency_penalty * case.output.count(token) + params.presence_penalty
    if case.allowed is not None:
        scores[[token for token in range(len(scores)) if token not in case.allowed]] = -np.inf
    return scores


def reference_probabilities(case: Case, slack: float = 0.0) -> np.ndarray:
    """f64[V]: what each token should be drawn with, by a full sort.

    Args:
      case: with a temperature above 0.
      slack: moves every limit by this much (relative; positive keeps more), to bracket rounding.
    """
    params = case.params
    scores = reference_scores(case) / params.temperature
    weights = np.exp(scores - scores.max())
    weights[weights < params.min_p * (1 - slack)] = 0
    order = np.argsort(-weights, kind="stable")
    if 0 < params.top_k < len(weights):
        weights[weights < weights[order[params.top_k - 1]] * (1 - slack)] = 0
    if params.top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        last = order[np.flatnonzero(before < params.top_p * weights.sum() * (1 + slack))[-1]]
        weights[weights < weights[last] * (1 - abs(slack))] = 0
    return weights / weights.sum()
