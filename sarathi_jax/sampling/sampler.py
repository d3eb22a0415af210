"""`sample`: one token for each row of logits, under that row's parameters."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from sarathi_jax.sampling.filters import limit_of, next_above
from sarathi_jax.sampling.logprobs import token_logprobs
from sarathi_jax.sampling.table import SamplingParamsArrays

# Vocabulary entries that share one number of the first stage of a draw.
_GROUP_SIZE = 128

# Rows whose tokens are counted at once, which bounds the memory of the counts to 2 * 32 * V int32.
_ROWS_COUNTED_AT_ONCE = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What `sample` drew.

    Attributes:
      tokens: i32[S].
      logprobs: f32[S] of the drawn tokens under the raw logits; 0 where not wanted.
      top_ids: i32[S, MAX_LOGPROBS], likeliest first under the raw logits; -1 past the end of the vocabulary; 0 where
        not wanted.
      top_logprobs: f32[S, MAX_LOGPROBS] of `top_ids`; -inf past the end of the vocabulary; 0 where not wanted.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(
    logits: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    history: jax.Array,
    params: SamplingParamsArrays,
    active: jax.Array,
) -> Drawn:
    """Draws one token for each row of logits.

    The order is vLLM's, but for the mask, which comes last of what changes logits: logit bias and the ban of stop
    tokens below `min_tokens`; repetition penalty (prompt and output), then frequency and presence penalties (output
    only); the mask of a grammar, so that nothing brings back a token that it excludes; greedy rows take the argmax
    here; the others divide by the temperature and apply min-p, top-k, top-p, in this order (Hugging Face applies min-p
    last), and draw. Log-probabilities are of the raw logits, before all of this.

    A draw depends on the request's seed, the sample's index, the position and the row's logits, on nothing else:
    neither on the other rows nor on their number. Steps that need nothing of a part do not run it. Whatever the logits,
    infinite or NaN included, every token lies in the vocabulary.

    Args:
      logits: f32[S, V].
      rows: i32[S] row of the sampling table and of `history` that each row of logits belongs to.
      positions: i32[S] index in its sequence of the token to draw, so the number of tokens known before it.
      history: i32[R, L] tokens of the sequences, prompt and output; entries from `positions` on are not read.
      params: the sampling table.
      active: bool[S]; the other rows are padding, for which any token is returned.

    Returns:
      The tokens, and the log-probabilities that active rows want.
    """
    logits = logits.astype(jnp.float32)
    temperature, biased, banned, penalised, masked = _needs(rows, positions, params, active)

    def adjust():
        scores = _ban(_bias(logits, rows, biased, params), rows, banned, params)
        scores = lax.cond(
            jnp.any(penalised),
            lambda scores: _penalise(scores, rows, jnp.where(penalised, positions, 0), history, params),
            lambda scores: scores,
            scores,
        )
        return lax.cond(
            jnp.any(masked), lambda scores: _exclude(scores, rows, masked, params), lambda scores: scores, scores
        )

    def adjust_and_draw():
        scores = lax.cond(jnp.any(biased | banned | penalised | masked), adjust, lambda: logits)
        greedy = first_argmax(scores)
        drawn = lax.cond(
            jnp.any(temperature > 0),
            lambda: _draw(scores, rows, positions, temperature, params),
            lambda: greedy,
        )
        return jnp.where(temperature > 0, drawn, greedy)

    # The greedy step without adjustments is a branch of its own, so that it never copies the logits.
    tokens = lax.cond(
        jnp.any((temperature > 0) | biased | banned | penalised | masked),
        adjust_and_draw,
        lambda: first_argmax(logits),
    )
    num_wanted = jnp.where(active, params.wants_logprobs[rows], -1)
    return Drawn(tokens, *token_logprobs(logits, tokens, num_wanted))


def is_argmax(rows: jax.Array, positions: jax.Array, params: SamplingParamsArrays, active: jax.Array) -> jax.Array:
    """Whether the likeliest tokens are all that the rows ask for: bool scalar. Arguments as of `sample`."""
    temperature, biased, banned, penalised, masked = _needs(rows, positions, params, active)
    wants_logprobs = active & (params.wants_logprobs[rows] >= 0)
    return ~jnp.any((temperature > 0) | biased | banned | penalised | masked | wants_logprobs)


def _needs(
    rows: jax.Array, positions: jax.Array, params: SamplingParamsArrays, active: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of each row: its temperature (0: greedy), whether it has a bias, a ban, a penalty, a mask."""
    temperature = jnp.where(active, params.temperature[rows], 0)
    biased = active & (params.bias_ids[rows, 0] >= 0)
    banned = active & (positions - params.num_prompt[rows] < params.min_tokens[rows])
    penalised = active & (
        (params.repetition_penalty[rows] != 1)
        | (params.presence_penalty[rows] != 0)
        | (params.frequency_penalty[rows] != 0)
    )
    return temperature, biased, banned, penalised, active & (params.is_masked[rows] != 0)


def _bias(scores: jax.Array, rows: jax.Array, biased: jax.Array, params: SamplingParamsArrays) -> jax.Array:
    """Adds the logit biases of rows that have some."""
    ids = _droppable(params.bias_ids[rows], biased, scores.shape[1])
    return scores.at[jnp.arange(len(rows))[:, None], ids].add(params.bias_values[rows], mode="drop")


def _ban(scores: jax.Array, rows: jax.Array, banned: jax.Array, params: SamplingParamsArrays) -> jax.Array:
    """Makes the stop tokens of rows below their `min_tokens` impossible."""
    ids = _droppable(params.stop_ids[rows], banned, scores.shape[1])
    return scores.at[jnp.arange(len(rows))[:, None], ids].set(-jnp.inf, mode="drop")


def _exclude(scores: jax.Array, rows: jax.Array, masked: jax.Array, params: SamplingParamsArrays) -> jax.Array:
    """Makes the tokens impossible that masked rows do not allow. Those that they do allow stay finite, so that one of
    them is drawn whatever the logits."""
    bits = params.allowed[rows][:, :, None] >> jnp.arange(32) & 1
    allowed = bits.reshape(len(rows), -1)[:, : scores.shape[1]] != 0
    within = jnp.where(allowed, jnp.maximum(scores, jnp.finfo(jnp.float32).min), -jnp.inf)
    return jnp.where(masked[:, None], within, scores)


def _droppable(ids: jax.Array, used: jax.Array, vocab_size: int) -> jax.Array:
    """i32[S, X] ids with unused ones past the vocabulary, where a scatter drops them (a negative one would wrap)."""
    return jnp.where(used[:, None] & (ids >= 0), ids, vocab_size)


def _penalise(
    scores: jax.Array, rows: jax.Array, num_known: jax.Array, history: jax.Array, params: SamplingParamsArrays
) -> jax.Array:
    """Applies the penalties for the first `num_known[s]` tokens of each row's history; none where that is 0."""
    vocab_size = scores.shape[1]
    index = jnp.arange(history.shape[1])

    def penalise_row(args):
        scores, row, num_known = args
        is_output = index >= params.num_prompt[row]
        tokens = jnp.where(index < num_known, history[row], vocab_size)
        counts = jnp.zeros((2, vocab_size), jnp.int32)
        counts = counts.at[is_output.astype(jnp.int32), tokens].add(1, mode="drop")
        seen, num_output = jnp.any(counts > 0, 0), counts[1]
        factor = params.repetition_penalty[row]
        scores = jnp.where(seen, jnp.where(scores > 0, scores / factor, scores * factor), scores)
        scores = scores - params.frequency_penalty[row] * num_output
        scores = scores - params.presence_penalty[row] * (num_output > 0)
        # A tiny repetition penalty may overflow; infinities would leave nothing to compare.
        return jnp.minimum(scores, jnp.finfo(jnp.float32).max)

    return lax.map(penalise_row, (scores, rows, num_known), batch_size=min(_ROWS_COUNTED_AT_ONCE, len(rows)))


def _draw(
    scores: jax.Array, rows: jax.Array, positions: jax.Array, temperature: jax.Array, params: SamplingParamsArrays
) -> jax.Array:
    """Random tokens i32[S] for rows with a temperature (the others get any token).

    Top-p is kept by rejection. A token is of the nucleus if the tokens likelier than it weigh less than `top_p`
    together; where one is drawn that is not, the row draws again among the tokens likelier than that. What is accepted
    is distributed as by a draw from the nucleus, which is never computed: the cost is about 1 / top_p draws, whatever
    the shape of the distribution.
    """
    is_random = temperature > 0
    # Relative to the best, so that no temperature overflows: the best stays 0, the others go to -inf at worst.
    scores = (scores - scores.max(1, keepdims=True)) / jnp.where(is_random, temperature, 1)[:, None]
    top_k = jnp.where(is_random, params.top_k[rows], 0)
    top_p = jnp.where(is_random, params.top_p[rows], 1)
    min_p = jnp.where(is_random, params.min_p[rows], 0)
    no_limit = jnp.full(len(rows), -jnp.inf)
    limit = lax.cond(jnp.any((top_k > 0) | (min_p > 0)), lambda: limit_of(scores, top_k, min_p), lambda: no_limit)
    nucleus_mass = lax.cond(
        jnp.any(top_p < 1), lambda: top_p * _mass(scores, scores >= limit[:, None]), lambda: jnp.zeros_like(top_p)
    )
    keys = jax.vmap(_key)(params.seed[rows], params.sample_index[rows], positions)

    def draw_round(state):
        index, limit, tokens, is_pending = state
        drawn = _draw_above(scores, limit, jax.vmap(jax.random.fold_in, (0, None))(keys, index))
        tokens = jnp.where(is_pending, drawn, tokens)
        score = jnp.take_along_axis(scores, tokens[:, None], 1)[:, 0]

        def rejected():
            likelier_mass = _mass(scores, scores > score[:, None])
            # The best token is accepted whatever rounding does to the masses, and so is any token of a NaN row.
            return is_pending & (top_p < 1) & (likelier_mass > 0) & (likelier_mass >= nucleus_mass)

        is_pending = lax.cond(jnp.any(is_pending & (top_p < 1)), rejected, lambda: jnp.zeros_like(is_pending))
        return index + 1, jnp.where(is_pending, next_above(score), limit), tokens, is_pending

    start = (jnp.int32(0), limit, jnp.zeros_like(rows), is_random)
    return lax.while_loop(lambda state: jnp.any(state[3]), draw_round, start)[2]


def _mass(scores: jax.Array, is_counted: jax.Array) -> jax.Array:
    """f32[S]: the weight of the counted tokens, in units of the best token's."""
    return jnp.where(is_counted, jnp.exp(scores), 0).sum(1)


def _draw_above(scores: jax.Array, limit: jax.Array, keys: jax.Array) -> jax.Array:
    """Tokens i32[S] whose scores reach the limit, drawn in proportion to exp(score).

    In two stages, each by the Gumbel-max trick: first a group of tokens by its mass, then a token of that group. The
    distribution is exactly that of one Gumbel-max over the vocabulary, for V / 128 + 128 random numbers in place of V,
    which on a CPU cost more than all else.
    """
    vocab_size = scores.shape[1]
    num_groups = -(-vocab_size // _GROUP_SIZE)
    noise = jax.vmap(lambda key: _gumbel(key, num_groups + _GROUP_SIZE))(keys)
    scores = jnp.where(scores >= limit[:, None], scores, -jnp.inf)
    scores = jnp.pad(scores, ((0, 0), (0, num_groups * _GROUP_SIZE - vocab_size)), constant_values=-jnp.inf)
    # Token i is in group i % num_groups: the sum then runs across vectors, in an order that no batch changes.
    masses = jnp.exp(scores).reshape(-1, _GROUP_SIZE, num_groups).sum(1)
    group = first_argmax(jnp.log(masses) + noise[:, :num_groups])
    members = jnp.arange(_GROUP_SIZE) * num_groups + group[:, None]
    member = first_argmax(jnp.take_along_axis(scores, members, 1) + noise[:, num_groups:])
    return jnp.minimum(member * num_groups + group, vocab_size - 1)


def _key(seed: jax.Array, sample_index: jax.Array, position: jax.Array) -> jax.Array:
    """The key of one draw."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, sample_index), position)


def _gumbel(key: jax.Array, size: int) -> jax.Array:
    """f32[size] standard Gumbel numbers from all 32 random bits: the upper tail, which decides, is fine-grained."""
    bits = jax.random.bits(key, (size,), jnp.uint32).astype(jnp.float32)
    uniform = jnp.minimum((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def first_argmax(scores: jax.Array) -> jax.Array:
    """i32[S]: the first index of the maximum of each row; 0 where there is none (NaN).

    On a CPU up to twice as fast as `jnp.argmax`, whose reduction carries two values.
    """
    vocab_size = scores.shape[1]
    index = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    first = jnp.where(scores >= scores.max(1, keepdims=True), index, vocab_size).min(1)
    return jnp.where(first < vocab_size, first, 0)
