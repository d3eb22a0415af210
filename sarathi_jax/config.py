"""Frozen configuration of the model and of the engine; knows no device.

A model is described by the fields of its published Hugging Face ``config.json``; ``configs/models/*.yaml`` holds the
same fields in YAML, so one parser (`sarathi_jax.weights.hf_config`) serves both.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
Quantization = Literal["w8", "w8_fp8", "w8a8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("w8", "w8_fp8", "w8a8")
Policy = Literal["sarathi", "vllm", "orca", "faster_transformer", "chunked_only", "hybrid_only", "fastserve"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
CHUNKING: tuple[Policy, ...] = ("sarathi", "chunked_only")
"""Those that cut prompts into chunks, so that a step may be as short as one likes."""


class ConfigError(ValueError):
    """A configuration that cannot be served; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base and, for long contexts, how its frequencies are scaled.

    Attributes:
      theta: base of the geometric series of frequencies.
      scaling: None, or the published method that stretches the frequencies.
      factor: context extension factor of the method.
      original_max_position: context length of pre-training (``llama3``, ``yarn``).
      low_freq_factor, high_freq_factor: band limits of ``llama3``.
      beta_fast, beta_slow, attention_factor, truncate: of ``yarn``; ``attention_factor`` multiplies cos and sin
        (None: ``0.1 ln(factor) + 1``).
    """

    theta: float = 10000.0
    scaling: Literal["linear", "llama3", "yarn"] | None = None
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything the maths of a decoder-only model depends on.

    Attributes:
      architecture: ``decoder`` (LLaMA, Mistral, Yi, Qwen: sequential pre-norm blocks, RMSNorm, SwiGLU) or ``falcon``
        (parallel attention and MLP, LayerNorm, GELU).
      windows: for each layer the sliding window in tokens (a query sees itself and ``window - 1`` tokens before it),
        or None for full attention.
      qkv_bias, out_bias, mlp_bias: which projections carry a bias.
      qk_norm: RMSNorm of each query and key head before the rotation (Qwen3).
      num_parallel_norms: Falcon only: 1 norm shared by attention and MLP, or 2.
      eos_token_ids: tokens that end a text unless ``ignore_eos``.
    """

    architecture: Literal["decoder", "falcon"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    num_parallel_norms: int = 2
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "every KV head must serve the same number of query heads"
            )
        if len(self.windows) != self.num_layers:
            raise ConfigError(f"windows has {len(self.windows)} entries for num_layers={self.num_layers}")

    @property
    def heads_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def cache_window(self) -> int | None:
        """Tokens that the cache must keep: the widest window, or None as soon as one layer sees everything."""
        return None if None in self.windows else max(w for w in self.windows if w is not None)

    def with_layers(self, layers: range) -> "ModelConfig":
        """A model of these consecutive layers alone."""
        return dataclasses.replace(self, num_layers=len(layers), windows=self.windows[layers.start : layers.stop])


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How a model is served. What follows from measuring the device (the number of blocks) is `CacheConfig`.

    Attributes:
      dtype: of weights, cache and products; activations between products are float32.
      max_model_len: longest prompt + output in tokens; None: what the model was trained for.
      max_num_seqs: sequences that may run at once.
      token_budget: most tokens of a step (the paper's tau, section 4.3): the largest compiled bucket.
      token_buckets: compiled step sizes, ascending; None: `default_buckets(token_budget)`.
      block_size: tokens of a KV-cache block.
      num_blocks: blocks of the KV cache; None: what memory allows, at most what `max_num_seqs` can use.
      memory_fraction: share of the free memory that the cache may take when `num_blocks` is None.
      quantization: 8-bit weights in place of `dtype`'s, one scale an output channel, made while loading: ``w8`` (int8
        weights, bfloat16 activations), ``w8_fp8`` (float8_e4m3fn weights) or ``w8a8`` (int8 weights and activations:
        the fast one on CPU); None: weights as they are. Embedding, norms and biases keep `dtype`.
      attention_backend: ``xla`` (anywhere); on its own platform one of the kernels, experimental until measured there:
        ``triton`` (NVIDIA, Ampere on), ``mosaic_gpu`` (NVIDIA Hopper, bfloat16) or ``mosaic_tpu`` (TPU).
      tp: devices over which every layer is split (tensor parallelism).
      pp: stages, each of some layers, on devices of its own; as many steps are in flight (pipeline parallelism).
      pp_layers: layers of each stage; None: balanced by their cost.
      dp: replicas, each with its own weights and cache, which share the requests (data parallelism).
      hosts: processes, usually one a machine, that serve one replica together: start the same command in each. The
        first one takes the requests, the others serve it until it ends.
      host_id: which of them this is, from 0; None: as the cluster says (SLURM, TPU pod, ...).
      coordinator: ADDRESS:PORT of the first of them, a free port; None: as the cluster says.
      policy: what enters a step: ``sarathi`` (every decode, then chunks of prompts: nobody who generates waits) or one
        to compare it with: ``vllm`` (whole prompts first), ``orca`` (every decode, then whole prompts, with memory kept
        for the longest answer), ``faster_transformer`` (a batch of requests until all of it has ended),
        ``chunked_only`` (chunks and decodes by turns), ``hybrid_only`` (every decode, then whole prompts) or
        ``fastserve`` (who has had little goes first and preempts). Whole prompts must fit into the largest bucket.
      chunk_schedule: HIGH, LOW, STAGES, TOKENS: the chunks of a prompt, which cost more the later they come, shrink
        from HIGH to LOW tokens a step in so many equal stages over its first TOKENS tokens (the paper's dynamic chunks;
        for the policies sarathi and chunked_only); None: every chunk may fill the budget.
      prefix_caching: keep the blocks of finished requests, as long as nobody needs the room, for requests that begin
        with the same tokens.
      tbt_slo_ms: longest time between two tokens of a request, in milliseconds: every step takes the largest bucket
        that keeps it, by the measured times of the programs; None: nothing is promised.
      ttft_slo_ms: longest time from a request to its first token, in milliseconds; a server refuses requests that it
        would keep waiting longer; None: nothing is promised.
      overlap: schedule step k+1 while step k runs.
      seed: where requests without a seed draw theirs from; None: from the operating system.
    """

    dtype: Dtype = "bfloat16"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    token_budget: int = 512
    token_buckets: tuple[int, ...] | None = None
    block_size: int = 32
    num_blocks: int | None = None
    memory_fraction: float = 0.9
    quantization: Quantization | None = None
    attention_backend: str = "xla"
    tp: int = 1
    pp: int = 1
    pp_layers: tuple[int, ...] | None = None
    dp: int = 1
    hosts: int = 1
    host_id: int | None = None
    coordinator: str | None = None
    policy: Policy = "sarathi"
    chunk_schedule: tuple[int, ...] | None = None
    prefix_caching: bool = True
    tbt_slo_ms: float | None = None
    ttft_slo_ms: float | None = None
    overlap: bool = True
    seed: int | None = None

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ConfigError(f"quantization={self.quantization!r} is not one of {', '.join(QUANTIZATIONS)}")
        for name in ("max_num_seqs", "token_budget", "block_size", "tp", "pp", "dp", "hosts"):
            if not _is_count(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a positive integer")
        for name in ("max_model_len", "num_blocks"):
            if getattr(self, name) is not None and not _is_count(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a positive integer or None")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy={self.policy!r} is not one of {', '.join(POLICIES)}")
        for name in ("tbt_slo_ms", "ttft_slo_ms"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value!r} must be a positive number of milliseconds or None")
        for name, purpose in (("tbt_slo_ms", "keep a time between tokens"), ("chunk_schedule", "cut prompts")):
            if getattr(self, name) is not None and self.policy not in CHUNKING:
                raise ConfigError(
                    f"{name}={getattr(self, name)} with policy={self.policy!r}: only the policies "
                    f"{' and '.join(CHUNKING)} can {purpose}; leave one of them out"
                )
        if not (math.isfinite(self.memory_fraction) and 0 < self.memory_fraction <= 1):
            raise ConfigError(f"memory_fraction={self.memory_fraction!r} must lie in (0, 1]")
        if self.dp > 1 and self.hosts > 1:
            raise ConfigError(
                f"dp={self.dp} with hosts={self.hosts}: a replica over several hosts stands alone; start each by "
                "itself and put a load balancer before them"
            )
        if self.hosts == 1 and not (self.host_id is None and self.coordinator is None):
            raise ConfigError("host_id and coordinator are for several hosts: say how many with hosts")
        if self.host_id is not None and self.host_id not in range(self.hosts):
            raise ConfigError(
                f"host_id={self.host_id} must be one of 0 to {self.hosts - 1}: there are {self.hosts} hosts"
            )
        if self.pp_layers is not None and not all(map(_is_count, self.pp_layers)):
            raise ConfigError(f"pp_layers={self.pp_layers!r} must be positive integers, the layers of each stage")
        buckets = self.buckets
        if not buckets or list(buckets) != sorted(set(buckets)) or not all(map(_is_count, buckets)):
            raise ConfigError(f"token_buckets={buckets!r} must be ascending positive integers")
        if self.chunk_schedule is not None:
            _check_chunk_schedule(self.chunk_schedule, buckets[-1], -(-self.max_running // self.pp))

    @property
    def buckets(self) -> tuple[int, ...]:
        return default_buckets(self.token_budget) if self.token_buckets is None else tuple(self.token_buckets)

    @property
    def max_running(self) -> int:
        """Sequences that may run at once: each must fit a decode into the largest bucket of a step in flight."""
        return min(self.max_num_seqs, self.pp * self.buckets[-1])


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """The KV cache as built: derived from `EngineConfig`, the model and the device's memory."""

    num_blocks: int
    block_size: int
    max_model_len: int

    @property
    def max_blocks_per_seq(self) -> int:
        return -(-self.max_model_len // self.block_size)


def read_yaml(path: Path) -> Mapping[Any, Any]:
    """The keys and values of a YAML file.

    Raises:
      ConfigError: it cannot be read, or holds something else.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, Mapping):
        raise ConfigError(f"{path} must hold keys and values, it holds {document!r:.80}")
    return document


def default_buckets(token_budget: int) -> tuple[int, ...]:
    """1, the powers of two from 8 on below the budget, and the budget itself.

    2 and 4 are left out: a step of 8 costs hardly more, and every bucket is a program to compile.

    Args:
      token_budget: tokens of the largest step.
    """
    powers = [1 << i for i in range(token_budget.bit_length()) if i not in (1, 2) and 1 << i < token_budget]
    return (*powers, token_budget)


def _check_chunk_schedule(values: tuple[int, ...], largest: int, most_decodes: int) -> None:
    if len(values) != 4 or not all(map(_is_count, values)):
        raise ConfigError(f"chunk_schedule={values!r} must be four positive integers: HIGH, LOW, STAGES, TOKENS")
    high, low = values[:2]
    if not most_decodes < low <= high <= largest:
        raise ConfigError(
            f"chunk_schedule={values!r}: LOW={low} must exceed the {most_decodes} decodes of a step, which go first, "
            f"and HIGH={high} must lie between LOW and the largest step of {largest}"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
