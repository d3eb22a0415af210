"""How large the KV cache can be: what the device has left beside the weights and the largest program."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from sarathi_jax.config import CacheConfig, ConfigError, EngineConfig, ModelConfig
from sarathi_jax.kv.sizes import block_bytes, wanted_cache
from sarathi_jax.parallel import Stage, split_layers
from sarathi_jax.parallel.pipeline import is_local
from sarathi_jax.program_store import ProgramStore
from sarathi_jax.step_program import StepProgram, scratch_bytes


def plan_cache(
    model: ModelConfig, engine: EngineConfig, meshes: Sequence[Mesh], store: ProgramStore | None = None
) -> CacheConfig:
    """Sizes the cache; call it when the weights are on the devices.

    Without `num_blocks` the cache holds as many blocks as `max_num_seqs` sequences can use, or as many as fit.

    Args:
      model, engine: what is served, and how.
      meshes: devices of each stage.
      store: of compiled programs, as of `Runner`.

    Raises:
      ConfigError: not even one sequence of a few blocks fits, or `max_model_len` exceeds the model's.
    """
    cache = wanted_cache(model, engine)
    if engine.num_blocks is not None:
        return cache
    fits = min(
        _blocks_that_fit(model, engine, cache, stage, mesh, store)
        for stage, mesh in zip(split_layers(model, engine), meshes, strict=True)
        if is_local(mesh)
    )
    return dataclasses.replace(cache, num_blocks=min(cache.num_blocks, fits))


def _blocks_that_fit(
    model: ModelConfig,
    engine: EngineConfig,
    cache: CacheConfig,
    stage: Stage,
    mesh: Mesh,
    store: ProgramStore | None,
) -> int:
    """Blocks that the devices of one stage can hold, as many as `cache` wants or fewer."""
    program = StepProgram(model, engine, cache, stage, mesh.devices.flat[0].device_kind)
    bytes_each, free = block_bytes(program.cached_model, engine.block_size, engine.dtype), free_bytes(mesh, engine)
    if cache.num_blocks * bytes_each <= free * engine.memory_fraction / 2:
        return cache.num_blocks
    # Scratch memory does not depend on the size of the cache, which is donated.
    left = free - mesh.size * scratch_bytes(program.compile(engine.buckets[-1], mesh, store))
    fits = int(left * engine.memory_fraction) // bytes_each
    if fits < 2:
        raise ConfigError(
            f"{free / 1e9:.2f} GB are free beside the weights, too little for the scratch memory of a step of "
            f"{engine.buckets[-1]} tokens and a KV cache: lower token_budget, use more devices (tp, pp) or a smaller "
            "model"
        )
    return fits


def free_bytes(mesh: Mesh, engine: EngineConfig) -> int:
    """Memory that can be filled evenly on all devices, in all; on a CPU, the machine's, which all stages share."""
    own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    stats = [device.memory_stats() for device in own]
    if all(one and "bytes_limit" in one for one in stats):
        return mesh.size * min(one["bytes_limit"] - one["bytes_in_use"] for one in stats)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // (engine.pp * engine.dp)
    raise ConfigError("this system does not tell how much memory is free: give num_blocks")
