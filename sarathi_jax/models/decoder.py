"""A layer of the sequential pre-norm decoder: LLaMA, Mistral, Yi, Qwen2.5 and Qwen3."""

import jax
import jax.numpy as jnp
from flax import nnx

from sarathi_jax.config import ModelConfig
from sarathi_jax.models.layers import Attend, Attention, LayerState, Linear, RMSNorm, all_sum


class GatedMLP(nnx.Module):
    """SwiGLU; gate and up are one product, [2, I, E]. Its result is the share of `down`, to be summed."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_up = Linear((2, inner, size), dtype, bias=config.mlp_bias)
        self.down = Linear((size, inner), dtype, bias=config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up = self.gate_up(x)
        return self.down.share(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1])


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each behind its norm and beside a residual."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, axis: str | None):
        self.axis = axis
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.attn = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype)
        self.mlp = GatedMLP(config, dtype)

    def __call__(
        self, x: jax.Array, rotation: jax.Array, attend: Attend, layer: int, state: LayerState
    ) -> tuple[jax.Array, LayerState]:
        share, state = self.attn(self.attn_norm(x), rotation, attend, layer, state)
        x = x + self.attn.out.add_bias(all_sum(share, self.axis))
        share = self.mlp(self.mlp_norm(x))
        return x + self.mlp.down.add_bias(all_sum(share, self.axis)), state
