"""Text drawn from the model while it is still the trainer's: a fixed cache, one compiled step, no engine."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sarathi_jax.config import ModelConfig
from sarathi_jax.models import ModelFunction
from sarathi_jax.training.objective import Params


def draw_samples(
    config: ModelConfig, params: Params, prompts: Sequence[Sequence[int]], length: int, temperature: float, seed: int
) -> list[list[int]]:
    """Continues every prompt to `length` tokens in all; an end token ends a text.

    Args:
      config: the model.
      params: its parameters.
      prompts: token ids, begin token first, each shorter than `length`.
      length: tokens of prompt and continuation together.
      temperature: above 0; logits are divided by it.
      seed: of the draws.

    Returns:
      Token ids of each text, prompt included, end token left out.
    """
    rows = len(prompts)
    given = np.full((rows, length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        given[row, : len(prompt)] = prompt
    model = ModelFunction(config, jnp.dtype("float32")).bind(params)
    shape = (rows, length, config.num_kv_heads, config.head_dim)
    cache = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_layers)]

    @partial(jax.jit, donate_argnums=2)
    def step(tokens: jax.Array, at: jax.Array, cache: list, key: jax.Array) -> tuple[jax.Array, list]:
        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: tuple) -> tuple[jax.Array, tuple]:
            del layer
            keys, values = (old.at[:, at].set(new) for old, new in zip(state, (k, v), strict=True))
            grouped = q.reshape(rows, k.shape[1], -1, q.shape[-1]) * q.shape[-1] ** -0.5
            scores = jnp.einsum("bgrd,bsgd->bgrs", grouped, keys)
            weights = jax.nn.softmax(jnp.where(jnp.arange(length) <= at, scores, -jnp.inf), axis=-1)
            return jnp.einsum("bgrs,bsgd->bgrd", weights, values).reshape(q.shape), (keys, values)

        hidden, cache = model.hidden(tokens, jnp.full(rows, at), attend, cache)
        drawn = jax.random.categorical(jax.random.fold_in(key, at), model.logits(hidden) / temperature)
        return drawn.astype(jnp.int32), cache

    texts = [given[:, 0]]
    for at in range(length - 1):
        drawn, cache = step(jnp.asarray(texts[-1]), jnp.int32(at), cache, jax.random.key(seed))
        texts.append(np.where(given[:, at + 1] >= 0, given[:, at + 1], np.asarray(drawn)))
    return [_until_end(row, config.eos_token_ids) for row in np.stack(texts, axis=1).tolist()]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)
