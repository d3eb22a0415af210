"""Whole model steps, compiled for each device that they are for: embedding to sampling, with some of the layers."""

import dataclasses
import re

import pytest

from pallas_kernels.ragged_paged_attention import BACKENDS
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.step_program import StepProgram
from sarathi_jax.weights.directory import load_model_yaml
from tests.devices.compiling import compile_lowered, device_of, mesh_of

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
        ("llama2-70b", "8 x H200", "mosaic_gpu"),
        ("falcon-180b", "8 x H200", "triton"),
    ],
)
def test_step(repo, tables, name, target, backend):
    model = load_model_yaml(repo / "configs" / "models" / f"{name}.yaml")
    model = dataclasses.replace(model, num_layers=NUM_LAYERS, windows=model.windows[:NUM_LAYERS])
    mesh = mesh_of(target)
    engine = EngineConfig(token_budget=512, token_buckets=(512,), attention_backend=backend, tp=mesh.size)
    cache = CacheConfig(num_blocks=1024 * mesh.size, block_size=32, max_model_len=4096)
    with device_of(backend):
        lowered = StepProgram(model, engine, cache).trace(512, mesh).lower()
    compiled = compile_lowered(lowered, BACKENDS[backend].platform)
    memory = compiled.executable.memory_analysis()
    # Of a device: as many blocks as there are devices, of a part of the heads each.
    size = 2 * 2 * model.num_layers * model.num_kv_heads * 1024 * 32 * model.head_dim
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size
    if mesh.size > 1:
        check_collectives(compiled.executable.as_text(), model)
    assert all(kernel.spilled_bytes == 0 for kernel in compiled.kernels)
    numbers = (
        f"{memory.argument_size_in_bytes / 2**30:.1f} | {memory.alias_size_in_bytes / 2**30:.1f} | "
        f"{memory.temp_size_in_bytes / 2**20:.0f}"
    )
    tables["Model steps"].append(f"| {name}, {NUM_LAYERS} layers | {target} | {backend} | {numbers} |")


def check_collectives(text: str, model: ModelConfig) -> None:
    """A sum a pair of products (Falcon's layers have one for both pairs) and one for the embedding; logits gathered."""
    sums = len(re.findall(r" all-reduce(?:-start)?\(", text))
    assert sums == model.num_layers * (1 if model.architecture == "falcon" else 2) + 1
    gathered = [line for line in text.splitlines() if re.search(r" all-gather(?:-start)?\(", line)]
    assert gathered
    assert all("gather_logits" in line or "gather_candidates" in line for line in gathered), gathered
