"""What a device of a deployment holds: weights, scratch memory, and as many blocks of the cache as are left.

Weights and blocks follow from the model's shapes. Scratch memory is an estimate: the engine reads it from its compiled
programs (`sarathi_jax.sizing`), of which there are none here; it is 0.1 to 0.3 GiB in the paper's deployments.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from sarathi_jax.config import CacheConfig, ConfigError, Dtype, EngineConfig, ModelConfig, Quantization
from sarathi_jax.kv.sizes import DTYPE_BYTES, block_bytes, wanted_cache
from sarathi_jax.latency import Device
from sarathi_jax.partition import Stage, TensorSplit, split_layers
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.weights.mapping import parameter_shapes

_GIB = 1 << 30
_LEAST_BLOCKS = 2  # as in `sarathi_jax.sizing`
_PROMPT_ROWS = 64  # of logits for log-probabilities of a prompt
_MOST_STAGES = 16  # of a hint
_QUANTIZED = ("qkv.weight", "out.weight", "gate_up.weight", "up.weight", "down.weight", "head.weight")


@dataclasses.dataclass(frozen=True)
class StageMemory:
    """What one device of a stage needs, in bytes.

    Attributes:
      weights: its part of the parameters.
      scratch: of the largest step, estimated.
      block: its part of a block of the cache.
    """

    weights: int
    scratch: int
    block: int


def stage_memories(model: ModelConfig, engine: EngineConfig) -> tuple[StageMemory, ...]:
    """What a device of each stage needs.

    Raises:
      ConfigError: the model cannot be split by this tp or pp; says what would work.
    """
    local = TensorSplit(model, engine.tp).local
    stages = split_layers(model, engine)
    weights = weights_bytes(model, engine)
    return tuple(
        StageMemory(
            held,
            _scratch_bytes(model, engine, stage),
            block_bytes(local.with_layers(stage.layers), engine.block_size, engine.dtype),
        )
        for stage, held in zip(stages, weights, strict=True)
    )


def weights_bytes(model: ModelConfig, engine: EngineConfig) -> tuple[int, ...]:
    """Bytes of the parameters on one device of each stage; all devices of a stage have the same.

    Raises:
      ConfigError: the model cannot be split by this tp or pp; says what would work.
    """
    layers, embedding, end = _held_bytes(TensorSplit(model, engine.tp).local, engine.dtype, engine.quantization)
    # As `LanguageModel` places them; a tied head is the embedding.
    return tuple(
        sum(layers[stage.layers.start : stage.layers.stop])
        + embedding * (stage.is_first or (stage.is_last and model.tie_embeddings))
        + end * stage.is_last
        for stage in split_layers(model, engine)
    )


def num_blocks(deployment: Deployment) -> int:
    """Blocks of the cache: those that are wanted, or as many as fit into the stage that has the least room.

    Raises:
      ConfigError: the model does not fit, or the `num_blocks` that are asked for; says what is missing and what fits.
    """
    return cache_of(deployment).num_blocks


def cache_of(deployment: Deployment) -> CacheConfig:
    """The cache that the engine would build; see `num_blocks`."""
    model, engine, device = deployment.model, deployment.engine, deployment.device
    wanted = wanted_cache(model, engine)
    fits = _blocks_that_fit(model, engine, device)
    if fits < _LEAST_BLOCKS:
        raise ConfigError(_misfit(model, engine, device))
    if engine.num_blocks is not None:
        most = _blocks_that_fit(model, dataclasses.replace(engine, memory_fraction=1.0), device)
        if engine.num_blocks > most:
            raise ConfigError(
                f"num_blocks={engine.num_blocks} does not fit beside the weights into {device.memory_bytes / _GIB:.1f} "
                f"GiB of {device.name}: at most {most} do; lower it, or leave it out"
            )
        return wanted
    return dataclasses.replace(wanted, num_blocks=min(wanted.num_blocks, fits))


def splits_that_fit(
    model: ModelConfig, engine: EngineConfig, device: Device, max_stages: int = _MOST_STAGES
) -> Iterator[tuple[int, int]]:
    """(tp, pp) with room for one sequence of `max_model_len`, the fewest devices first, of equals the larger tp."""
    per_seq = wanted_cache(model, dataclasses.replace(engine, num_blocks=None, max_num_seqs=1)).num_blocks
    tps = [tp for tp in TensorSplit.sizes(model) if tp <= device.links[-1][0]]
    splits = itertools.product(tps, range(1, min(max_stages, model.num_layers) + 1))
    for tp, pp in sorted(splits, key=lambda split: (split[0] * split[1], split[1])):
        if _blocks_that_fit(model, dataclasses.replace(engine, tp=tp, pp=pp, pp_layers=None), device) >= per_seq:
            yield tp, pp


def _blocks_that_fit(model: ModelConfig, engine: EngineConfig, device: Device) -> int:
    """Of the stage that has the least room; negative where the weights alone are too large."""
    return min(
        math.floor((device.memory_bytes - one.weights - one.scratch) * engine.memory_fraction / one.block)
        for one in stage_memories(model, engine)
    )


def _misfit(model: ModelConfig, engine: EngineConfig, device: Device) -> str:
    """What is missing, and what would fit."""
    stage, largest = max(enumerate(stage_memories(model, engine)), key=lambda pair: pair[1].weights + pair[1].scratch)
    needed = largest.weights + largest.scratch + _LEAST_BLOCKS * largest.block / engine.memory_fraction
    where = f"a device of stage {stage}" if engine.pp > 1 else "a device"
    hints = []
    for quantization, words in ((engine.quantization, ""), ("w8", " quantization=w8")):
        split = next(splits_that_fit(model, dataclasses.replace(engine, quantization=quantization), device), None)
        if split is not None:
            hints.append(f"tp={split[0]} pp={split[1]}{words}")
        if engine.quantization is not None:
            break
    return (
        f"the model does not fit: with tp={engine.tp} pp={engine.pp} {where} needs {largest.weights / _GIB:.2f} GiB "
        f"for weights and about {largest.scratch / _GIB:.2f} GiB for a step of {engine.buckets[-1]} tokens; "
        f"{device.name} has {device.memory_bytes / _GIB:.2f} GiB, {(needed - device.memory_bytes) / _GIB:.2f} GiB too "
        "little; "
        + (f"what fits: {' or '.join(hints)}" if hints else "no tp and pp fit on this device: take a larger one")
    )


@functools.cache
def _held_bytes(local: ModelConfig, dtype: Dtype, quantization: Quantization | None) -> tuple[list[int], int, int]:
    """Bytes of each layer, of the embedding, of norm and head, on one device."""
    layers, embedding, end = [0] * local.num_layers, 0, 0
    for path, shape in parameter_shapes(local).items():
        if quantization is not None and path.endswith(_QUANTIZED):
            size = math.prod(shape) + DTYPE_BYTES["float32"] * math.prod(shape[:-1])  # a byte each, a scale a row
        else:
            size = math.prod(shape) * DTYPE_BYTES[dtype]
        if path.startswith("layers."):
            layers[int(path.split(".")[1])] += size
        elif path.startswith("embed."):
            embedding += size
        else:
            end += size
    return layers, embedding, end


def _scratch_bytes(model: ModelConfig, engine: EngineConfig, stage: Stage) -> int:
    """Hidden rows and the MLP's inner rows, in float32 and once more; in the last stage logits."""
    local = TensorSplit(model, engine.tp).local
    ups = 1 if model.architecture == "falcon" else 2
    values = 2 * engine.buckets[-1] * (model.hidden_size + ups * local.intermediate_size)
    if stage.is_last:
        values += 3 * (min(engine.max_running, engine.buckets[-1]) + _PROMPT_ROWS) * model.vocab_size // 2
    return DTYPE_BYTES["float32"] * values
