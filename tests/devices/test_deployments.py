"""The paper's deployments, compiled for GPUs that are not there: what each device holds and exchanges."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from sarathi_jax.bench.mesh_report import StageReport, collectives_table, memory_table, report_stages
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.deployment import load_deployment
from sarathi_jax.parallel import make_meshes, split_layers
from sarathi_jax.parallel.transfer import join_meshes, lower_transfer
from sarathi_jax.step_program import StepProgram
from sarathi_jax.weights.directory import load_model_yaml
from tests.devices.compiling import device_of, mesh_of

REPORT = Path(__file__).resolve().parents[2] / "docs" / "deployments.md"
INTRODUCTION = """# What the paper's deployments hold and exchange

Written by `make test-devices` from programs that were compiled for H200 (XLA's GPU compiler, attention in Triton);
nothing here was run on one. Weights and cache are exact; counts of collectives and scratch memory are those of programs
with 2 and 4 layers a stage, extended to all of them, since layers are alike. Bytes are those of one device, in a step
of the deployment's token budget. *Room for the cache* is 90 % of the memory of the device that the paper used, less
weights and scratch.
"""
# Deployment -> memory of the device that the paper used.
GB = 10**9
MEMORY = {
    "mistral-7b-a100": ("A100-80GB", 80 * GB),
    "yi-34b-2xa100": ("A100-80GB", 80 * GB),
    "llama2-70b-8xa40": ("A40-48GB", 48 * GB),
    "falcon-180b-2x4xa100": ("A100-80GB", 80 * GB),
}


@pytest.fixture(scope="module")
def sections():
    """Of the report, by deployment; a run of some tests replaces their sections alone."""
    text = REPORT.read_text() if REPORT.exists() else ""
    kept = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    yield kept
    REPORT.write_text(
        INTRODUCTION + "".join(f"\n## {name}\n{kept[name].rstrip()}\n" for name in MEMORY if name in kept)
    )


@pytest.mark.parametrize("name", MEMORY)
def test_deployment(sections, name: str):
    settings = load_deployment(name) | {"hosts": 1, "attention_backend": "triton"}
    model = load_model_yaml(settings.pop("model"))
    engine = EngineConfig(**settings)
    cache = CacheConfig(1024, engine.block_size, engine.max_model_len or model.max_position)
    meshes = make_meshes(model, engine, mesh_of("8 x H200").devices.flat[: engine.tp * engine.pp].tolist())
    with device_of("triton"):
        reports = report_stages(model, engine, cache, meshes, engine.token_budget, short=True)
    for report in reports:
        check_collectives(report, model, engine)
    for source, target in itertools.pairwise(meshes):
        shape = StepProgram(model, engine, cache).hidden_part(engine.token_budget)
        text = lower_transfer(join_meshes(source, target), shape, np.dtype(np.float32)).compile().as_text()
        assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 1

    device, memory = MEMORY[name]
    room = [0.9 * memory - report.weight_bytes - report.scratch_bytes for report in reports]
    tokens = int(min(left // report.token_bytes for left, report in zip(room, reports, strict=True)))
    longest = engine.max_model_len or model.max_position
    assert tokens >= 4 * longest, "the model fits, with room for a few of its longest sequences"
    weights = sum(report.weight_bytes for report in reports) * engine.tp
    assert weights / 1e9 == pytest.approx(2 * _num_weights(model, engine) / 1e9, rel=0.02)
    total = f"{tokens:,} tokens, {tokens / longest:.0f} sequences of {longest:,}"
    sections[name] = (
        f"\ntp={engine.tp}, pp={engine.pp}, {engine.token_budget} tokens a step. Room for the cache on {device}: "
        f"{min(room) / 2**30:.1f} GiB, {total}.\n\n"
        f"{memory_table(reports)}\n\n{collectives_table(reports)}\n"
    )


def check_collectives(report: StageReport, model: ModelConfig, engine: EngineConfig) -> None:
    """Two sums a layer (one in Falcon's), one for the embedding; gathered are arriving rows and what sampling needs."""
    sums = sum(one.count for one in report.collectives if one.kind == "all-reduce")
    each = 0 if engine.tp == 1 else 1 if model.architecture == "falcon" else 2
    assert sums == each * len(report.stage.layers) + (engine.tp > 1 and report.stage.is_first)
    assert {one.kind for one in report.collectives} <= {"all-reduce", "all-gather"}
    gathered = {one.purpose for one in report.collectives if one.kind == "all-gather"}
    allowed = set() if report.stage.is_first else {"hidden rows"}
    allowed |= {"logits", "greedy candidates"} if report.stage.is_last else set()
    assert gathered <= allowed


def _num_weights(model: ModelConfig, engine: EngineConfig) -> int:
    """Of the whole model, KV heads and a tied embedding counted as often as they stand somewhere."""
    copies = max(1, engine.tp // model.num_kv_heads)
    heads = 2 * model.num_heads + 2 * copies * model.num_kv_heads
    layer = model.hidden_size * (
        model.head_dim * heads + model.intermediate_size * (2 if model.architecture == "falcon" else 3)
    )
    ends = 1 if model.tie_embeddings and len(split_layers(model, engine)) == 1 else 2
    return model.num_layers * layer + ends * model.vocab_size * model.hidden_size
