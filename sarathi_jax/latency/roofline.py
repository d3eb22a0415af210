"""`Roofline`: the time of a step from its flops and bytes, for models and devices that are not at hand.

Every product takes a soft maximum of the time its flops take and the time its bytes take (`Kernels`): where the two are
near each other, at 64 to 512 tokens, the sizes of chunks, a hard maximum is wrong by half as much again.
"""

import collections
import copy
import dataclasses
import math
from typing import Any

import numpy as np

from sarathi_jax.config import ModelConfig
from sarathi_jax.latency.devices import Device, HostTerm, Kernels, Link
from sarathi_jax.latency.work import Work

_NO_HOST = HostTerm()


@dataclasses.dataclass(frozen=True)
class Gemm:
    """A product [m, k] x [k, n]; arrays stand for many products at once (`sarathi_jax.latency.fit`)."""

    m: Any
    k: Any
    n: Any


def gemm_s(gemm: Gemm, device: Device, kernels: Kernels, value_bytes: float = 2, weight_bytes: float = 2) -> Any:
    """Seconds of a product: a float, or an array where `gemm` holds arrays.

    Args:
      gemm: its sizes.
      device: whose peaks.
      kernels: which share of them is reached.
      value_bytes, weight_bytes: of one activation, one weight.
    """
    m, k, n = gemm.m, gemm.k, gemm.n
    tiles = -(-m // kernels.tile) * kernels.tile / m
    flops_s = 2 * m * k * n * tiles**kernels.tile_share / device.peak_flops
    bytes_s = (value_bytes * (m * k + m * n) + weight_bytes * k * n) / device.bandwidth
    seconds = _soft_max(flops_s / kernels.flops, bytes_s / kernels.bytes, kernels.sharpness) + kernels.launch_s
    if not kernels.by_tokens:
        return seconds
    rows, factors = zip(*kernels.by_tokens, strict=True)
    return seconds * np.interp(np.log(m), np.log(rows), factors)


def layer_gemms(model: ModelConfig, tp: int, num_tokens: int) -> tuple[Gemm, Gemm, Gemm, Gemm]:
    """The four products of a layer on one of `tp` devices: queries, keys and values; out; up (and gate); down."""
    heads, kv_heads = math.ceil(model.num_heads / tp), math.ceil(model.num_kv_heads / tp)
    inner = math.ceil(model.intermediate_size / tp)
    return (
        Gemm(num_tokens, model.hidden_size, (heads + 2 * kv_heads) * model.head_dim),
        Gemm(num_tokens, heads * model.head_dim, model.hidden_size),
        Gemm(num_tokens, model.hidden_size, _num_ups(model) * inner),
        Gemm(num_tokens, inner, model.hidden_size),
    )


class Roofline:
    """Time of a model's step on devices that share it.

    Args:
      model: what is computed.
      device: where.
      tp, pp: devices of a stage, stages.
      pp_layers: layers of each stage; None: as even as they can be.
      tp_link, pp_link: of the devices of a stage, of two stages; None: `device.links`, `device.send`.
      host: what the serving stack adds; None: nothing.
      value_bytes, weight_bytes: of an activation or a cached key, of a weight.

    Raises:
      ValueError: layers that do not add up, or too many devices for the device's links.
    """

    def __init__(
        self,
        model: ModelConfig,
        device: Device,
        tp: int = 1,
        pp: int = 1,
        *,
        pp_layers: tuple[int, ...] | None = None,
        tp_link: Link | None = None,
        pp_link: Link | None = None,
        host: HostTerm | None = None,
        value_bytes: float = 2,
        weight_bytes: float = 2,
    ):
        layers = pp_layers or tuple(
            (stage + 1) * model.num_layers // pp - stage * model.num_layers // pp for stage in range(pp)
        )
        if len(layers) != pp or sum(layers) != model.num_layers:
            raise ValueError(f"pp_layers={layers} must be {pp} counts that add up to {model.num_layers} layers")
        self.model, self.device, self.tp, self.pp, self.pp_layers = model, device, tp, pp, layers
        self.host = host or _NO_HOST
        self._tp_link = tp_link or device.link(tp)
        self._pp_link = pp_link or device.send
        self._value_bytes, self._weight_bytes = value_bytes, weight_bytes
        self._attention = self._attention_kernels(self.host)
        starts = [sum(layers[:stage]) for stage in range(pp)]
        self._windows = [
            collections.Counter(model.windows[start : start + length])
            for start, length in zip(starts, layers, strict=True)
        ]
        self._dense: dict[int, float] = {}
        self._logits: dict[int, float] = {}

    def __repr__(self) -> str:
        return f"Roofline({self.device.name}, tp={self.tp}, pp={self.pp})"

    def with_host(self, host: HostTerm) -> "Roofline":
        """The same with another host term."""
        other = copy.copy(self)
        other.host, other._attention = host, self._attention_kernels(host)
        return other

    def work_s(self, work: Work) -> float:
        """Expected seconds from one step to the next while every stage is busy: those of the slowest stage."""
        return max(self.stage_s(work, stage) for stage in range(self.pp)) + self.send_s(work.num_tokens)

    def stage_s(self, work: Work, stage: int = 0) -> float:
        """Seconds of a stage: its layers; the embedding in the first, the logits in the last; the host's share."""
        model, host = self.model, self.host
        seconds = self.pp_layers[stage] * self._dense_s(work.num_tokens)
        for window, num_layers in self._windows[stage].items():
            seconds += num_layers * self.attention_s(work, window)
        if stage == 0:
            seconds += self._stream_s(2 * work.num_tokens * model.hidden_size)
        if stage == self.pp - 1:
            seconds += self._logits_s(max(1, work.num_sequences))
            seconds += self._stream_s(2 * work.num_tokens * model.hidden_size)
        return max(seconds, self.pp_layers[stage] * host.launch_s) + host.step_s + host.sequence_s * work.num_sequences

    def send_s(self, num_tokens: int) -> float:
        """Seconds from one stage to the next; 0 without stages."""
        return self._pp_link.send_s(self._value_bytes * num_tokens * self.model.hidden_size) if self.pp > 1 else 0.0

    def gemms_s(self, num_tokens: int) -> float:
        """Seconds of a layer's four products."""
        return sum(map(self._gemm_s, layer_gemms(self.model, self.tp, num_tokens)))

    def attention_s(self, work: Work, window: int | None = None) -> float:
        """Seconds of a layer's attention: chunks by their flops, decodes by the keys and values they read.

        Args:
          work: of the step.
          window: of the layer in tokens; None: everything before a token.
        """
        model = self.model
        num_queries = work.num_tokens - work.num_decodes
        num_chunks = max(1, work.num_sequences - work.num_decodes)
        # Half of the square of a chunk lies behind the mask.
        masked = self.host.masked_share * num_queries * (num_queries / num_chunks - 1) / 2
        pairs, keys = work.num_prefill_keys, work.num_decode_keys
        if window is not None:
            pairs = min(pairs, num_queries * window)
            # Who does not know how many decodes there are (`step_s`) gets no bound of theirs.
            keys = min(keys, work.num_decodes * window) if work.num_decodes else keys
        heads, kv_heads = math.ceil(model.num_heads / self.tp), math.ceil(model.num_kv_heads / self.tp)
        pair_flops, key_bytes = 4 * heads * model.head_dim, 2 * self._value_bytes * kv_heads * model.head_dim
        seconds = 0.0
        if pairs:
            # Keys of a chunk: those of its middle query, and half of its own after that.
            chunk_bytes = key_bytes * (pairs / num_queries + num_queries / 2)
            seconds += self._attention_kernel_s((pairs + masked) * pair_flops, chunk_bytes)
        if keys:
            seconds += self._attention_kernel_s(keys * pair_flops, keys * key_bytes)
        return seconds

    def _attention_kernels(self, host: HostTerm) -> Kernels:
        kernels = self.device.kernels
        return dataclasses.replace(kernels, flops=host.attention_flops or kernels.attention_flops)

    def _attention_kernel_s(self, num_flops: float, num_bytes: float) -> float:
        device, kernels = self.device, self._attention
        flops_s = num_flops / device.peak_flops / kernels.flops
        bytes_s = num_bytes / device.bandwidth / kernels.bytes
        return _soft_max(flops_s, bytes_s, kernels.sharpness) + kernels.launch_s

    def _dense_s(self, num_tokens: int) -> float:
        """A layer without attention. Simulators ask for the same few sizes again and again."""
        if num_tokens not in self._dense:
            self._dense[num_tokens] = self.gemms_s(num_tokens) + self._others_s(num_tokens)
        return self._dense[num_tokens]

    def _logits_s(self, num_sequences: int) -> float:
        if num_sequences not in self._logits:
            vocab = math.ceil(self.model.vocab_size / self.tp)
            self._logits[num_sequences] = self._gemm_s(Gemm(num_sequences, self.model.hidden_size, vocab))
        return self._logits[num_sequences]

    def _others_s(self, num_tokens: int) -> float:
        """Norms, rotation, activation, residual sums and all-reduces of a layer."""
        model, tp = self.model, self.tp
        parallel = model.architecture == "falcon"
        heads = math.ceil(model.num_heads / tp) + math.ceil(model.num_kv_heads / tp)
        num_norms = model.num_parallel_norms if parallel else 2
        # Attention and MLP side by side are summed at once, over the devices too.
        num_sums = 1 if parallel else 2
        streams = [2 * model.hidden_size] * num_norms
        streams += [2 * heads * model.head_dim]
        streams += [(_num_ups(model) + 1) * math.ceil(model.intermediate_size / tp)]
        streams += [3 * model.hidden_size] * num_sums
        message = self._value_bytes * num_tokens * model.hidden_size
        return sum(
            self._stream_s(num_tokens * num_values) for num_values in streams
        ) + num_sums * self._tp_link.all_reduce_s(message, tp)

    def _gemm_s(self, gemm: Gemm) -> float:
        return float(gemm_s(gemm, self.device, self.device.kernels, self._value_bytes, self._weight_bytes))

    def _stream_s(self, num_values: float) -> float:
        kernels = self.device.kernels
        bytes_s = self._value_bytes * num_values / self.device.bandwidth
        return bytes_s / kernels.stream_bytes + kernels.stream_launch_s


def _num_ups(model: ModelConfig) -> int:
    """Products from the hidden size to the MLP's: SwiGLU has a gate beside it."""
    return 1 if model.architecture == "falcon" else 2


def _soft_max(a: Any, b: Any, sharpness: float) -> Any:
    return (a**sharpness + b**sharpness) ** (1 / sharpness)
