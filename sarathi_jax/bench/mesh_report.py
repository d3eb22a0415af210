"""What the programs of a mesh exchange and hold: read from compiled programs, for devices that may be there or not."""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.kv.sizes import block_bytes
from sarathi_jax.models import ModelFunction
from sarathi_jax.parallel import Stage, TensorSplit, split_layers
from sarathi_jax.step_program import StepProgram, scratch_bytes

_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
# Of an asynchronous pair the end counts, whose type is that of the result alone.
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(?:-done)?\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
# Scopes of the source -> what is gathered there.
_SCOPES = {"gather_hidden": "hidden rows", "gather_logits": "logits", "gather_candidates": "greedy candidates"}
_SHORT = (2, 4)
"""Layers of a stage that stand for all of them."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Exchanges of one kind in a program.

    Attributes:
      kind: as XLA calls it.
      purpose: what is gathered; empty for sums.
      result: type of the result on one device.
      size: its bytes.
      count: how many the program has; sampling takes one of two branches in a step.
    """

    kind: str
    purpose: str
    result: str
    size: int
    count: int


@dataclasses.dataclass(frozen=True)
class StageReport:
    """A stage's program of one bucket; bytes are those of one device.

    Attributes:
      stage: which.
      collectives: of its program.
      weight_bytes: parameters.
      token_bytes: keys and values of one token in the cache.
      scratch_bytes: what the program needs while it runs.
      sent_bytes: hidden rows to the next stage or, from the last one, drawn tokens back to the first; 0 without
        another stage.
      host_bytes: what the host sends for a step.
    """

    stage: Stage
    collectives: tuple[Collective, ...]
    weight_bytes: int
    token_bytes: int
    scratch_bytes: int
    sent_bytes: int
    host_bytes: int


def read_collectives(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, those of one kind, purpose and type as one.

    Args:
      text: optimised HLO.
    """
    counts: dict[tuple[str, str, str, int], int] = {}
    for line in text.splitlines():
        if (match := _COLLECTIVE.search(line)) is None:
            continue
        arrays = _ARRAY.findall(match[1])
        purpose = next((words for scope, words in _SCOPES.items() if scope in line), "")
        result = ", ".join(f"{dtype}[{shape}]" for dtype, shape in arrays)
        key = match[2], purpose, result, sum(_bytes_of(*array) for array in arrays)
        counts[key] = counts.get(key, 0) + 1
    return tuple(Collective(*key, count) for key, count in sorted(counts.items()))


def _bytes_of(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(map(int, filter(None, shape.split(",")))) * bits // 8


def report_stages(
    model: ModelConfig,
    engine: EngineConfig,
    cache: CacheConfig,
    meshes: Sequence[Mesh],
    bucket: int,
    device_kind: str | None = None,
    *,
    short: bool,
) -> list[StageReport]:
    """Compiles every stage's program of a bucket.

    Args:
      model, engine, cache: as of `StepProgram`.
      meshes: of each stage.
      bucket: one of the engine's.
      device_kind: as of `StepProgram`.
      short: compile few layers, not all, and conclude from programs of two depths what all would have: counts and
        scratch grow by the same with every layer, since layers are alike.
    """
    stages = split_layers(model, engine)
    if not short or min(len(stage.layers) for stage in stages) <= max(_SHORT):
        programs = [StepProgram(model, engine, cache, stage, device_kind) for stage in stages]
        return [_read(model, engine, p, bucket, mesh) for p, mesh in zip(programs, meshes, strict=True)]
    reports = []
    for stage, mesh in zip(stages, meshes, strict=True):
        few, more = (
            _read(*cut, StepProgram(*cut, cache, split_layers(*cut)[stage.index], device_kind), bucket, mesh)
            for cut in (_shortened(model, engine, num_layers) for num_layers in _SHORT)
        )
        reports.append(_extended(few, more, stage, _held(model, engine, stage)))
    return reports


def _shortened(model: ModelConfig, engine: EngineConfig, num_layers: int) -> tuple[ModelConfig, EngineConfig]:
    """So many layers in each stage."""
    sizes = (num_layers,) * engine.pp
    return model.with_layers(range(sum(sizes))), dataclasses.replace(engine, pp_layers=sizes)


def _held(model: ModelConfig, engine: EngineConfig, stage: Stage) -> tuple[int, int]:
    """Bytes of a device's weights, and of a token in its cache."""
    local = TensorSplit(model, engine.tp).local
    shapes = ModelFunction(local, jnp.dtype(engine.dtype), engine.quantization, layers=stage.layers).shapes
    weight_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values())
    return weight_bytes, block_bytes(local.with_layers(stage.layers), 1, engine.dtype)


def _read(model: ModelConfig, engine: EngineConfig, program: StepProgram, bucket: int, mesh: Mesh) -> StageReport:
    compiled = program.compile(bucket, mesh)
    stage, sent_bytes = program.stage, 0
    if stage.num_stages > 1:
        sent_bytes = 4 * math.prod(program.newest_shape if stage.is_last else program.hidden_part(bucket))
    return StageReport(
        stage,
        read_collectives(compiled.as_text() or ""),
        *_held(model, engine, stage),
        scratch_bytes(compiled),
        sent_bytes,
        4 * program.layouts[bucket].size,
    )


def _extended(few: StageReport, more: StageReport, stage: Stage, held: tuple[int, int]) -> StageReport:
    """The report of a stage from those of its first layers."""

    def extend(at_few: int, at_more: int) -> int:
        steps, rest = divmod((at_more - at_few) * (len(stage.layers) - _SHORT[0]), _SHORT[1] - _SHORT[0])
        assert rest == 0, "layers are not alike"
        return at_few + steps

    before = {dataclasses.replace(one, count=0): one.count for one in few.collectives}
    collectives = tuple(
        dataclasses.replace(one, count=extend(before[dataclasses.replace(one, count=0)], one.count))
        for one in more.collectives
    )
    scratch = max(more.scratch_bytes, extend(few.scratch_bytes, more.scratch_bytes))
    return StageReport(stage, collectives, *held, scratch, more.sent_bytes, more.host_bytes)


def collectives_table(reports: Sequence[StageReport]) -> str:
    """In Markdown, a row a kind."""
    rows = ["| stage | collective | of | result on a device | count | bytes each |", "|" + "---|" * 6]
    rows += [
        f"| {report.stage.index} | {one.kind} | {one.purpose or 'shares of products'} | {one.result} | {one.count} | "
        f"{one.size:,} |"
        for report in reports
        for one in report.collectives
    ]
    return "\n".join(rows)


def memory_table(reports: Sequence[StageReport]) -> str:
    """In Markdown, a row a stage."""
    rows = [
        "| stage | layers | weights GiB | cache bytes a token | scratch MiB | sent on, bytes a step | "
        "from the host, bytes a step |",
        "|" + "---|" * 7,
    ]
    rows += [
        f"| {one.stage.index} | {len(one.stage.layers)} | {one.weight_bytes / 2**30:.2f} | {one.token_bytes:,} | "
        f"{one.scratch_bytes / 2**20:.1f} | {one.sent_bytes:,} | {one.host_bytes:,} |"
        for one in reports
    ]
    return "\n".join(rows)
