"""The deployments of the paper with their true shapes: lowered for their GPUs by JAX alone, and what a device holds.

What the GPU's compiler makes of them is in tests/devices.
"""

import dataclasses
import re

import jax.numpy as jnp
import pytest

from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.deployment import load_deployment
from sarathi_jax.kv.sizes import block_bytes
from sarathi_jax.models import ModelFunction
from sarathi_jax.parallel import TensorSplit, split_layers
from sarathi_jax.step_program import StepProgram
from sarathi_jax.weights.directory import load_model_yaml
from tests.kernels.abstract import on_gpu

NAMES = ("mistral-7b-a100", "yi-34b-2xa100", "llama2-70b-8xa40", "falcon-180b-2x4xa100")
MESHES = {"mistral-7b-a100": (1, 1), "yi-34b-2xa100": (2, 1)} | dict.fromkeys(NAMES[2:], (4, 2))


def load(name: str) -> tuple[ModelConfig, EngineConfig]:
    """Model and settings, with an attention kernel for these GPUs and the largest step alone."""
    settings = load_deployment(name)
    model = load_model_yaml(settings.pop("model"))
    engine = EngineConfig(**settings | {"hosts": 1, "attention_backend": "triton"})
    return model, dataclasses.replace(engine, token_buckets=(engine.token_budget,))


@pytest.mark.parametrize("name", [n if n == NAMES[2] else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_every_stage_lowers(name: str):
    """All layers; as many collectives as the split says, none of them of weights or cache."""
    model, engine = load(name)
    assert (engine.tp, engine.pp) == MESHES[name]
    cache = CacheConfig(1024, engine.block_size, engine.max_model_len or model.max_position)
    for stage in split_layers(model, engine):
        with on_gpu("NVIDIA A100", 108, engine.tp):
            traced = StepProgram(model, engine, cache, stage).trace(engine.token_budget)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "__gpu$xla.gpu.triton" in text
        # A pair of products has one sum, Falcon's layers have one for both pairs; the embedding has one.
        sums = len(stage.layers) * (1 if model.architecture == "falcon" else 2) + stage.is_first
        # Hidden rows come in as parts; candidates are two numbers; logits are drawn from, and scored for prompts.
        gathers = (not stage.is_first) + 4 * stage.is_last
        assert len(re.findall(r"stablehlo\.all_reduce", text)) == sums * (engine.tp > 1)
        assert len(re.findall(r"stablehlo\.all_gather", text)) == gathers * (engine.tp > 1)
        assert not re.search(r"stablehlo\.(all_to_all|collective_permute|reduce_scatter)", text)


@pytest.mark.parametrize("name", NAMES)
def test_devices_hold_their_parts(name: str):
    """Weights of layers and cache of a device: those of all, divided by tp times pp; norms are on every device."""
    model, engine = load(name)
    local, share = TensorSplit(model, engine.tp).local, engine.tp * engine.pp
    expected = _layer_bytes(model, range(model.num_layers)) / share
    for stage in split_layers(model, engine):
        assert _layer_bytes(local, stage.layers) == pytest.approx(expected, rel=0.02)
        token_bytes = block_bytes(local.with_layers(stage.layers), 1, engine.dtype)
        assert token_bytes * share == block_bytes(model, 1, engine.dtype)


def _layer_bytes(model: ModelConfig, layers: range) -> int:
    shapes = ModelFunction(model, jnp.dtype("bfloat16"), layers=layers).shapes
    return sum(2 * leaf.size for name, leaf in shapes.items() if name.startswith("layers."))
