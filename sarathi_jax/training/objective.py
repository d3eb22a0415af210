"""Loss of a batch as a function of parameters: plain causal attention, no cache, float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sarathi_jax.config import ModelConfig
from sarathi_jax.models import ModelFunction

Params = dict[str, jax.Array]
"""Dotted path -> array, as in a saved checkpoint."""

_QUERY_ROWS = 256


class Objective:
    """Binds a model's structure once; parameters come in as a flat dict."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self._model = ModelFunction(config, jnp.dtype("float32"))

    def init(self, seed: int) -> Params:
        """Normal weights of variance 1 / inputs; norms are one; what ends a residual branch starts at zero.

        Args:
          seed: of the draw.
        """
        params = {}
        for i, (name, leaf) in enumerate(self._model.shapes.items()):
            if len(leaf.shape) == 1:
                params[name] = jnp.ones(leaf.shape)
            elif name.endswith(("attn.out.weight", "mlp.down.weight")):
                params[name] = jnp.zeros(leaf.shape)
            else:
                scale = 0.02 if name == "embed.weight" else leaf.shape[-1] ** -0.5
                params[name] = scale * jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), leaf.shape)
        return params

    def token_losses(self, params: Params, tokens: jax.Array, noisy: Params | None = None) -> jax.Array:
        """Negative log probability, in nats, of each token after the first.

        Args:
          params: parameters.
          tokens: i32[B, L + 1].
          noisy: the same parameters with some weights dropped, for the layers; the head always takes `params`.

        Returns:
          f32[B, L].
        """
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        positions = jnp.tile(jnp.arange(length), batch)
        flat = tokens[:, :-1].reshape(-1)
        layers = self._model.bind(params if noisy is None else noisy)
        hidden, _ = layers.hidden(flat, positions, causal_attention(batch), [None] * self.config.num_layers)
        logits = self._model.bind(params).logits(hidden)
        wanted = jnp.take_along_axis(logits, tokens[:, 1:].reshape(-1, 1), axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - wanted).reshape(batch, length)


def causal_attention(batch: int) -> Callable:
    """An `Attend` over `batch` sequences of equal length laid end to end.

    Query rows are taken some hundred at a time, each against the keys up to its own end: half the products and none of
    the [L, L] score matrices of one large masked product.
    """

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, None]:
        del layer
        length, groups, size, shape = q.shape[0] // batch, k.shape[1], k.shape[2], q.shape

        def heads_first(x: jax.Array) -> jax.Array:
            # [T, heads, D] -> [B, G, heads / G, L, D]: plain batched products, three times faster on CPU than einsum.
            return x.reshape(batch, length, groups, -1, size).transpose(0, 2, 3, 1, 4)

        q, k, v = heads_first(q * size**-0.5), heads_first(k)[:, :, 0], heads_first(v)[:, :, 0]
        outs = []
        for start in range(0, length, _QUERY_ROWS):
            end = min(start + _QUERY_ROWS, length)
            rows = q[:, :, :, start:end].reshape(batch, groups, -1, size)
            scores = rows @ k[:, :, :end].swapaxes(-1, -2)
            visible = jnp.arange(start, end)[:, None] >= jnp.arange(end)
            scores = jnp.where(jnp.tile(visible, (q.shape[2], 1)), scores, -1e30)
            out = jax.nn.softmax(scores, axis=-1) @ v[:, :, :end]
            outs.append(out.reshape(batch, groups, -1, end - start, size))
        return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(shape), state

    return attend


def drop_weights(params: Params, rate: float, key: jax.Array) -> Params:
    """DropConnect (Wan et al. 2013): zeroes a share of the matrices' weights and scales the rest up.

    Rows of the embedding go as a whole (a token unseen for a step), as in AWD-LSTM (Merity et al. 2017).

    Args:
      params: parameters; norms pass unchanged.
      rate: share dropped; 0 returns `params`.
      key: of this step.
    """
    if rate == 0:
        return params
    result = {}
    for i, (name, weight) in enumerate(sorted(params.items())):
        if weight.ndim > 1:
            shape = (weight.shape[0], 1) if name == "embed.weight" else weight.shape
            keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, shape)
            weight = jnp.where(keep, weight / (1 - rate), 0.0)
        result[name] = weight
    return result
