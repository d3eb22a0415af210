"""Pieces that every architecture is built from.

Weights are stored (out, in); activations between products are float32.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from pallas_kernels.one_row import one_row_matmul
from pallas_kernels.quantized_matmul import Mode, quantized_matmul
from sarathi_jax.config import ModelConfig, Quantization, RopeConfig

LayerState = Any
"""What attention keeps for a layer: its blocks of the KV cache when serving, None when training."""

Attend = Callable[[int, jax.Array, jax.Array, jax.Array, LayerState], tuple[jax.Array, LayerState]]
"""``(layer, q[T, H, D], k[T, G, D], v[T, G, D], state) -> (out[T, H, D], state)``; owns masking, cache and windows."""


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """``x @ weight.T`` with float32 accumulation and a float32 result.

    A bfloat16 *result* takes a path on CPU that is 10-30 times slower, and so does a single row of bfloat16, which has
    a form of its own there (``docs/decisions/cpu-products.md``).

    Args:
      x: f32[T, in], rounded to the type of the weight.
      weight: [out..., in].

    Returns:
      f32[T, out...].
    """
    x, flat = x.astype(weight.dtype), weight.reshape(-1, weight.shape[-1])
    if x.shape[0] == 1 and weight.dtype == jnp.bfloat16:
        out = lax.platform_dependent(x, flat, cpu=one_row_matmul, default=_dot)
    else:
        out = _dot(x, flat)
    return out.reshape(x.shape[0], *weight.shape[:-1])


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
    return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def all_sum(x: jax.Array, axis: str | None) -> jax.Array:
    """The sum over the devices of a mesh axis; without one, `x`."""
    return x if axis is None else lax.psum(x, axis)


class Linear(nnx.Module):
    """A product with an optional bias: f32[T, in] -> f32[T, out...].

    Where devices hold parts of the inputs, each of them has a share of the product: `share` on every device, `all_sum`
    over them, then `add_bias`.
    """

    def __init__(self, shape: tuple[int, ...], dtype: jnp.dtype, bias: bool = False):
        self.weight = nnx.Param(jnp.zeros(shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape[:-1], dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.add_bias(self.share(x))

    def share(self, x: jax.Array) -> jax.Array:
        """The product, without the bias."""
        return product(x, self.weight[...])

    def add_bias(self, out: jax.Array) -> jax.Array:
        return out if self.bias is None else out + self.bias[...].astype(jnp.float32)


class QuantizedLinear(Linear):
    """A `Linear` whose weight is 8 bits wide, with one scale for each output."""

    def __init__(self, linear: Linear, quantization: Quantization):
        shape = linear.weight.shape
        self.weight = nnx.Param(jnp.zeros(shape, jnp.float8_e4m3fn if quantization == "w8_fp8" else jnp.int8))
        self.scale = nnx.Param(jnp.ones(shape[:-1], jnp.float32))
        self.bias = linear.bias
        self.mode: Mode = "w8a8" if quantization == "w8a8" else "w8"

    def share(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        flat = weight.reshape(-1, weight.shape[-1])
        out = quantized_matmul(x, flat, self.scale[...].reshape(-1), mode=self.mode)
        return out.reshape(x.shape[0], *weight.shape[:-1])


class Embedding(nnx.Module):
    """Token embedding: i32[T] -> f32[T, E]. The devices of `axis` hold the rows of consecutive tokens."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: jnp.dtype, axis: str | None):
        self.weight = nnx.Param(jnp.zeros((vocab_size, hidden_size), dtype))
        self.axis = axis

    def __call__(self, tokens: jax.Array) -> jax.Array:
        weight = self.weight[...]
        if self.axis is None:
            return weight[tokens].astype(jnp.float32)
        own = tokens - lax.axis_index(self.axis) * weight.shape[0]
        is_own = (own >= 0) & (own < weight.shape[0])
        rows = weight[jnp.where(is_own, own, 0)].astype(jnp.float32)
        return all_sum(jnp.where(is_own[:, None], rows, 0), self.axis)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight[...].astype(jnp.float32)


class LayerNorm(nnx.Module):
    """Layer norm with bias over the last axis."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones(size, dtype))
        self.bias = nnx.Param(jnp.zeros(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        scale = lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


class Attention(nnx.Module):
    """Projections, head norms and rotation around `Attend`; its result is the share of `out`, to be summed.

    The three input projections are one product. Its weight is grouped by KV head, [G, R + 2, D, E]: the group's R query
    heads, then its key head, then its value head, so that a split over KV heads is a split of the first axis.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        groups, heads_per_kv, size = config.num_kv_heads, config.heads_per_kv, config.head_dim
        self.qkv = Linear((groups, heads_per_kv + 2, size, config.hidden_size), dtype, bias=config.qkv_bias)
        self.out = Linear((config.hidden_size, config.num_heads * size), dtype, bias=config.out_bias)
        self.q_norm = RMSNorm(size, config.norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.norm_eps, dtype) if config.qk_norm else None
        self.heads_per_kv = heads_per_kv

    def __call__(
        self, x: jax.Array, rotation: jax.Array, attend: Attend, layer: int, state: LayerState
    ) -> tuple[jax.Array, LayerState]:
        rows = x.shape[0]
        qkv = self.qkv(x)
        q, k, v = qkv[:, :, : self.heads_per_kv], qkv[:, :, self.heads_per_kv], qkv[:, :, self.heads_per_kv + 1]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q.reshape(rows, -1, q.shape[-1]), rotation)
        out, state = attend(layer, q, rotate(k, rotation), v, state)
        return self.out.share(out.reshape(rows, -1)), state


def rope_frequencies(config: RopeConfig, head_dim: int, max_position: int) -> tuple[np.ndarray, float]:
    """Angular frequencies of the rotation and the factor on cos and sin.

    Sources: RoFormer (arXiv 2104.09864); ``linear`` position interpolation (2306.15595); ``yarn`` (2309.00071);
    ``llama3`` as published with Llama 3.1. In float32 steps as Hugging Face takes them, so that long positions agree.

    Args:
      config: base and scaling.
      head_dim: even size of a head.
      max_position: the model's context length, for a ``yarn`` without an original one.

    Returns:
      f32[head_dim / 2] radians a position, and the factor.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (np.float32(1) / np.power(np.float32(config.theta), exponents)).astype(np.float32)
    if config.scaling is None:
        return plain, 1.0
    stretched = (plain / np.float32(config.factor)).astype(np.float32)
    if config.scaling == "linear":
        return stretched, 1.0
    original = config.original_max_position or max_position
    if config.scaling == "llama3":
        turns = original * plain / (2 * np.float32(math.pi))
        keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        keep = np.clip(keep, 0, 1)
        return (keep * plain + (1 - keep) * stretched).astype(np.float32), 1.0

    def dim_of(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dim_of(config.beta_fast), dim_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 1e-3), 0, 1)
    factor = config.attention_factor
    if factor is None:
        factor = 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0
    return (stretched * ramp + plain * (1 - ramp)).astype(np.float32), factor


def rotation_table(config: ModelConfig, positions: jax.Array) -> jax.Array:
    """cos and sin of every position: i32[T] -> f32[2, T, 1, D / 2]."""
    frequencies, factor = rope_frequencies(config.rope, config.head_dim, config.max_position)
    angles = positions.astype(jnp.float32)[:, None, None] * jnp.asarray(frequencies)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * factor


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + D / 2) of each head: [T, heads, D] with f32[2, T, 1, D / 2]."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = rotation
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
