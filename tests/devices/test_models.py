"""Whole model steps, compiled for each device that they are for: embedding to sampling, with some of the layers."""

import dataclasses

import pytest

from pallas_kernels.ragged_paged_attention import BACKENDS
from sarathi_jax.config import CacheConfig, EngineConfig
from sarathi_jax.runner import StepProgram
from sarathi_jax.weights.directory import load_model_yaml
from tests.devices.compiling import compile_lowered, device_of, sharding_of

# All layers are alike, and 80 of them take the compilers many minutes.
NUM_LAYERS = 8


@pytest.mark.parametrize(
    ("name", "target", "backend"),
    [
        ("mistral-7b", "H200", "triton"),
        ("mistral-7b", "H200", "mosaic_gpu"),
        ("falcon-180b", "H200", "triton"),
        ("falcon-180b", "H200", "mosaic_gpu"),
        ("mistral-7b", "TPU v5e", "mosaic_tpu"),
        ("mistral-7b", "TPU v6e", "mosaic_tpu"),
    ],
)
def test_step(repo, tables, name, target, backend):
    model = load_model_yaml(repo / "configs" / "models" / f"{name}.yaml")
    model = dataclasses.replace(model, num_layers=NUM_LAYERS, windows=model.windows[:NUM_LAYERS])
    engine = EngineConfig(token_budget=512, token_buckets=(512,), attention_backend=backend)
    cache = CacheConfig(num_blocks=1024, block_size=32, max_model_len=4096)
    with device_of(backend):
        lowered = StepProgram(model, engine, cache).trace(512, sharding_of(target)).lower()
    compiled = compile_lowered(lowered, BACKENDS[backend].platform)
    memory = compiled.executable.memory_analysis()
    size = 2 * 2 * model.num_layers * model.num_kv_heads * 1024 * 32 * model.head_dim
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size
    assert all(kernel.spilled_bytes == 0 for kernel in compiled.kernels)
    numbers = (
        f"{memory.argument_size_in_bytes / 2**30:.1f} | {memory.alias_size_in_bytes / 2**30:.1f} | "
        f"{memory.temp_size_in_bytes / 2**20:.0f}"
    )
    tables["Model steps"].append(f"| {name}, {NUM_LAYERS} layers | {target} | {backend} | {numbers} |")
