"""Memory of a deployment: against what was compiled (docs/deployments.md), the models' own shapes, and misfits."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import pytest

from sarathi_jax.config import ConfigError, EngineConfig, ModelConfig
from sarathi_jax.deployment import load_deployment
from sarathi_jax.latency import DEVICES
from sarathi_jax.models import ModelFunction
from sarathi_jax.partition import TensorSplit, split_layers
from sarathi_jax.resources import config_path
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.memory import cache_of, num_blocks, splits_that_fit, stage_memories, weights_bytes
from sarathi_jax.weights.directory import load_model_yaml

GIB = 2**30
# docs/deployments.md: weights GiB, tokens in the cache.
COMPILED = {
    "mistral-7b-a100": (13.49, 483_776),
    "yi-34b-2xa100": (32.03, 370_080),
    "llama2-70b-8xa40": (16.06, 661_088),
    "falcon-180b-2x4xa100": (41.80, 1_759_584),
}


def model_of(name: str) -> ModelConfig:
    return load_model_yaml(config_path("models", name))


def deployment_of(name: str, **changes: Any) -> Deployment:
    settings = load_deployment(name)
    model = load_model_yaml(settings.pop("model"))
    device = DEVICES["a40" if "a40" in name else "a100-80gb"]
    return Deployment(model, device, EngineConfig(**{**settings, "hosts": 1, **changes}))


@pytest.mark.parametrize("name", COMPILED)
def test_what_the_compiler_said(name):
    weights_gib, tokens = COMPILED[name]
    # Enough sequences that memory is the limit, not what they can use.
    deployment = deployment_of(name, max_num_seqs=2048)
    engine = deployment.engine
    memories = stage_memories(deployment.model, engine)
    assert max(one.weights for one in memories) / GIB == pytest.approx(weights_gib, abs=0.006)
    assert all(0.05 < one.scratch / GIB < 0.6 for one in stage_memories(deployment.model, engine))
    assert num_blocks(deployment) * engine.block_size == pytest.approx(tokens, rel=0.03)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("qwen2.5-0.5b", EngineConfig(pp=2)),  # a tied head: the embedding is in both stages
        ("qwen3-0.6b", EngineConfig(tp=2, quantization="w8")),
        ("falcon-7b", EngineConfig(quantization="w8_fp8", pp=3, pp_layers=(1, 1, 2))),
        ("llama3.1-8b", EngineConfig(tp=16, pp=2, dtype="float32")),
    ],
)
def test_weights_are_those_of_the_model_function(name, engine):
    model = model_of(name).with_layers(range(4))
    local = TensorSplit(model, engine.tp).local
    held = []
    for stage in split_layers(model, engine):
        function = ModelFunction(local, jnp.dtype(engine.dtype), engine.quantization, layers=stage.layers)
        held.append(sum(leaf.size * leaf.dtype.itemsize for leaf in function.shapes.values()))
    assert weights_bytes(model, engine) == tuple(held)


def test_the_cache_is_at_most_what_sequences_can_use():
    deployment = deployment_of("yi-34b-2xa100", max_num_seqs=4)
    assert num_blocks(deployment) == 4 * 4096 // 32
    assert cache_of(deployment).max_model_len == 4096
    assert num_blocks(deployment_of("yi-34b-2xa100", num_blocks=77)) == 77


def test_a_model_that_does_not_fit_says_what_does():
    deployment = deployment_of("falcon-180b-2x4xa100", tp=1, pp=1)
    with pytest.raises(ConfigError, match=r"332\.59 GiB for weights.*a100-80gb has 79\.26 GiB.*too little") as error:
        num_blocks(deployment)
    hints = re.findall(r"tp=(\d+) pp=(\d+)( quantization=w8)?", str(error.value).partition("what fits")[2])
    assert len(hints) == 2
    for tp, pp, quantized in hints:
        engine = dataclasses.replace(
            deployment.engine, tp=int(tp), pp=int(pp), quantization="w8" if quantized else None
        )
        assert num_blocks(dataclasses.replace(deployment, engine=engine)) > 0
        assert int(tp) * int(pp) < 8


def test_a_device_that_no_split_saves():
    small = dataclasses.replace(DEVICES["a40"], memory_bytes=3 * 10**8)
    deployment = Deployment(model_of("llama2-70b"), small, EngineConfig())
    with pytest.raises(ConfigError, match="no tp and pp fit on this device: take a larger one"):
        num_blocks(deployment)


def test_too_many_blocks_are_refused():
    with pytest.raises(ConfigError, match=r"num_blocks=1000000 does not fit .* at most \d+ do"):
        num_blocks(deployment_of("mistral-7b-a100", num_blocks=1_000_000))


@pytest.mark.parametrize(("changes", "match"), [({"tp": 3}, "tp may be"), ({"pp": 61}, "60 layers make at most 60")])
def test_splits_that_cannot_be(changes, match):
    with pytest.raises(ConfigError, match=match):
        num_blocks(deployment_of("yi-34b-2xa100", **changes))


def test_splits_that_fit_begin_with_the_fewest_devices():
    deployment = deployment_of("yi-34b-2xa100")
    splits = list(splits_that_fit(deployment.model, deployment.engine, DEVICES["a40"], max_stages=4))
    assert splits[0] == (2, 1)
    assert (1, 1) not in splits
    assert (4, 2) in splits
    assert [tp * pp for tp, pp in splits] == sorted(tp * pp for tp, pp in splits)
