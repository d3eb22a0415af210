"""The paper's deployments, compiled for the GPUs that the paper used: collectives, transfers, and whether they fit."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from sarathi_jax.bench.mesh_report import StageReport, collectives_table, memory_table, report_stages
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.parallel import AXIS, split_layers
from sarathi_jax.parallel.transfer import join_meshes, lower_transfer
from sarathi_jax.step_program import StepProgram
from tests.devices.compiling import mesh_of
from tests.kernels.abstract import on_gpu
from tests.parallel.test_deployments import NAMES, load

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "deployments.md"
INTRODUCTION = """# The paper's deployments, without their devices

Written by `make test-devices`. Each stage's program is compiled for the GPUs of Sarathi-Serve's Table 1 (A100 of 80 GB,
A40 of 48 GB), none of which is there, with the Triton attention kernel; nothing here was run. bfloat16 weights, the
token budget of the strict SLO, settings of `configs/deployments`.

Weights and cache follow from the shapes of all layers. Collectives and scratch memory are read from programs with 2 and
with 4 layers a stage: layers are alike, so every further layer adds what the third and fourth did. Of the two ways to
sample (greedy candidates, or the whole logits) a step takes one; logits of prompts are gathered only where a request
asks for their log-probabilities. Memory and bytes are those of one device. The cache gets 0.9 of what weights and
scratch leave, as the engine does it; the paper's SLOs are defined with 32 sequences of 4,096 tokens.
"""
HEAD = (
    "deployment | GPU | GiB | weights GiB | scratch GiB | cache GiB | tokens in the cache | sequences of 4,096 tokens"
)
GPUS = {name: "A40" if "a40" in name else "A100" for name in NAMES}
MEMORY = {"A40": 47_600_000_000, "A100": 85_100_068_864}
SLO_SEQUENCES, SLO_LENGTH = 32, 4096


@pytest.fixture(scope="module")
def sections() -> Iterator[dict[str, tuple[str, str]]]:
    """Of each deployment its row and its tables; the document is written anew when all of them are there."""
    found: dict[str, tuple[str, str]] = {}
    yield found
    if len(found) == len(NAMES):
        rows = [f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1), *(found[name][0] for name in NAMES)]
        DOCUMENT.write_text("\n".join([INTRODUCTION, *rows, *(found[name][1] for name in NAMES), ""]), encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_deployment(sections, name: str):
    model, engine = load(name)
    devices = mesh_of(f"8 x {GPUS[name]}").devices.flat[: engine.tp * engine.pp]
    meshes = [jax.sharding.Mesh(row, (AXIS,)) for row in devices.reshape(engine.pp, engine.tp)]
    cache = CacheConfig(1024, engine.block_size, engine.max_model_len or model.max_position)
    with on_gpu("NVIDIA A100", 108):
        reports = report_stages(model, engine, cache, meshes, engine.token_budget, short=True)
    for report in reports:
        if engine.tp == 1:
            assert not report.collectives
        else:
            check_collectives(report, model, engine)
    if engine.pp > 1:
        check_transfers(model, engine, cache, meshes)
    row, tokens = fit(name, reports, engine)
    assert tokens >= SLO_SEQUENCES * SLO_LENGTH
    title = f"\n## {name}\n\ntp={engine.tp}, pp={engine.pp}, a step of {engine.token_budget} tokens.\n"
    tables = [memory_table(reports), *([collectives_table(reports)] if engine.tp > 1 else ["No collectives."])]
    sections[name] = row, "\n".join([title, "\n\n".join(tables)])


def check_collectives(report: StageReport, model: ModelConfig, engine: EngineConfig) -> None:
    """Sums of products and of the embedding; gathered are hidden rows, logits and candidates alone."""
    stage, rows = report.stage, engine.token_budget
    sums = [one for one in report.collectives if one.kind == "all-reduce"]
    assert sum(one.count for one in sums) == (
        len(stage.layers) * (1 if model.architecture == "falcon" else 2) + stage.is_first
    )
    assert {one.size for one in sums} == {4 * rows * model.hidden_size}
    gathers = [one for one in report.collectives if one.kind != "all-reduce"]
    assert all(one.kind == "all-gather" and one.purpose for one in gathers)
    expected = {"greedy candidates", "logits"} if stage.is_last else set()
    assert {one.purpose for one in gathers} == expected | (set() if stage.is_first else {"hidden rows"})
    hidden = [one for one in gathers if one.purpose == "hidden rows"]
    assert all(one.count == 1 and one.size == 4 * rows * model.hidden_size for one in hidden)


def check_transfers(model: ModelConfig, engine: EngineConfig, cache: CacheConfig, meshes: list) -> None:
    """One permutation of each device's own part of the hidden rows, and one of the tokens back to the first stage."""
    programs = [StepProgram(model, engine, cache, stage) for stage in split_layers(model, engine)]
    ends = [
        (meshes[i], meshes[i + 1], programs[0].hidden_part(engine.token_budget), "f32") for i in range(len(meshes) - 1)
    ]
    ends.append((meshes[-1], meshes[0], programs[-1].newest_shape, "s32"))
    for source, target, shape, dtype in ends:
        numpy_dtype = np.dtype({"f32": np.float32, "s32": np.int32}[dtype])
        text = lower_transfer(join_meshes(source, target), shape, numpy_dtype).compile().as_text()
        assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 1
        assert f"{dtype}[{','.join(map(str, shape))}]" in text
        assert not re.search(r" (all-reduce|all-gather|all-to-all|reduce-scatter)", text)


def fit(name: str, reports: list[StageReport], engine: EngineConfig) -> tuple[str, int]:
    """A row of the document, and how many tokens the cache holds: what the fullest stage has room for."""
    memory = MEMORY[GPUS[name]]
    left = [
        int((memory - one.weight_bytes - one.scratch_bytes) * engine.memory_fraction) // one.token_bytes
        for one in reports
    ]
    tightest = int(np.argmin(left))
    one, tokens = reports[tightest], min(left) // engine.block_size * engine.block_size
    sizes = (memory, one.weight_bytes, one.scratch_bytes, tokens * one.token_bytes)
    numbers = " | ".join(f"{size / 2**30:.2f}" for size in sizes)
    return f"| {name} | {GPUS[name]} | {numbers} | {tokens:,} | {math.floor(tokens / SLO_LENGTH)} |", tokens
