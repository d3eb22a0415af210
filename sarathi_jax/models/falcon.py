"""A layer of Falcon: attention and MLP side by side behind one or two LayerNorms; MQA (7B) and GQA (40B, 180B)."""

import jax
import jax.numpy as jnp
from flax import nnx

from sarathi_jax.config import ModelConfig
from sarathi_jax.models.layers import Attend, Attention, LayerNorm, LayerState, Linear, all_sum


class MLP(nnx.Module):
    """Two products around an exact GELU; its result is the share of `down`, to be summed."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        self.up = Linear((config.intermediate_size, config.hidden_size), dtype, bias=config.mlp_bias)
        self.down = Linear((config.hidden_size, config.intermediate_size), dtype, bias=config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down.share(jax.nn.gelu(self.up(x), approximate=False))


class FalconLayer(nnx.Module):
    """``x + attention(norm(x)) + mlp(norm'(x))``; with one norm, norm' is norm. One sum over devices serves both."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, axis: str | None):
        self.axis = axis
        two = config.num_parallel_norms == 2
        self.attn_norm = LayerNorm(config.hidden_size, config.norm_eps, dtype)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps, dtype) if two else None
        self.attn = Attention(config, dtype)
        self.mlp = MLP(config, dtype)

    def __call__(
        self, x: jax.Array, rotation: jax.Array, attend: Attend, layer: int, state: LayerState
    ) -> tuple[jax.Array, LayerState]:
        attn_input = self.attn_norm(x)
        mlp_input = attn_input if self.mlp_norm is None else self.mlp_norm(x)
        share, state = self.attn(attn_input, rotation, attend, layer, state)
        out = all_sum(share + self.mlp(mlp_input), self.axis)
        return x + self.mlp.down.add_bias(self.attn.out.add_bias(out)), state
