"""The paper's deployments in their true shapes, lowered for a GPU by JAX alone; tests/devices compiles them."""

import jax
import pytest

from sarathi_jax.config import CacheConfig, EngineConfig
from sarathi_jax.deployment import load_deployment
from sarathi_jax.parallel import make_meshes, split_layers
from sarathi_jax.step_program import StepProgram
from sarathi_jax.weights.directory import load_model_yaml

NAMES = ("mistral-7b-a100", "yi-34b-2xa100", "llama2-70b-8xa40", "falcon-180b-2x4xa100")


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("name", NAMES)
def test_every_stage_lowers(name: str):
    """All layers; sums as the split says. Inside a mesh of CPUs JAX does not lower Triton: `tests/devices` does."""
    settings = load_deployment(name) | {"hosts": 1}
    model = load_model_yaml(settings.pop("model"))
    engine = EngineConfig(**settings)
    cache = CacheConfig(1024, engine.block_size, engine.max_model_len or model.max_position)
    meshes = make_meshes(model, engine, jax.devices())
    for stage, mesh in zip(split_layers(model, engine), meshes, strict=True):
        traced = StepProgram(model, engine, cache, stage).trace(engine.token_budget, mesh)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.all_reduce") == _sums(model, engine, stage)


def _sums(model, engine, stage) -> int:
    if engine.tp == 1:
        return 0
    return len(stage.layers) * (1 if model.architecture == "falcon" else 2) + stage.is_first
