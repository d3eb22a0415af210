"""Times the compiled programs at several fills of the cache, once for each device, model and version."""

import collections
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from sarathi_jax.clock import Clock, WallClock
from sarathi_jax.compiling import use_compile_cache
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.executor import DeviceExecutor
from sarathi_jax.kv.blocks import BlockPool, BlockTable
from sarathi_jax.latency import LatencyTable, TableError, Timing, chunk_keys
from sarathi_jax.parallel.hosts import Hosts
from sarathi_jax.request import Request, SamplingParams
from sarathi_jax.runner import Runner
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.scheduling.plan import Chunk, StepPlan
from sarathi_jax.sequence import Sequence as Sample

FILLS = (0.0, 1 / 3, 2 / 3, 1.0)
# How often a program is repeated: at least, and until so many seconds are over, since what disturbs a measurement is
# short; a slow one less often.
_NUM_REPEATS = 5
_LEAST_S, _ENOUGH_S = 0.05, 1.0
# Of the engine's settings those that a step's time depends on.
_SETTINGS = ("dtype", "quantization", "attention_backend", "tp", "pp", "pp_layers", "block_size", "max_num_seqs")


def latency_table(
    model: ModelConfig,
    engine: EngineConfig,
    cache: CacheConfig,
    runner: Runner,
    hosts: Hosts | None = None,
    progress: bool = True,
) -> LatencyTable:
    """The table of a runner: as stored beside the compile cache, or else measured and stored there.

    Args:
      model, engine, cache: as of the runner; together with the device and the versions they are the table's key.
      runner: whose programs; nothing else may use it meanwhile.
      hosts: the other processes of the replica, which this one leads.
      progress: shows a bar while measuring.
    """
    about = about_table(model, engine, cache)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = use_compile_cache().parent / "latency" / f"{digest}.json"
    try:
        return LatencyTable.load(path)
    except FileNotFoundError:
        pass
    except (OSError, TableError) as error:
        logging.warning("%s; measuring anew", error)
    table = measure(engine, cache, runner, model.vocab_size, hosts, about=about, progress=progress)
    try:
        table.save(path)
    except OSError as error:
        logging.warning("cannot keep the measured step times (%s): the next start measures again", error)
    return table


def measure(
    engine: EngineConfig,
    cache: CacheConfig,
    runner: Runner,
    vocab_size: int,
    hosts: Hosts | None = None,
    *,
    about: dict[str, Any] | None = None,
    progress: bool = True,
    clock: Clock | None = None,
) -> LatencyTable:
    """Runs every program on made-up sequences, at four fills of the cache: one decode, as many as fit, a full prompt.

    Args:
      engine, cache, runner, hosts: as of `latency_table`.
      vocab_size: of the model.
      about: kept in the table.
      progress: shows a bar.
      clock: None: the wall clock.
    """
    clock = clock or WallClock()
    timings: dict[tuple[int, int, int, int], float] = {}
    cases = [
        (bucket, num_decodes, fill)
        for bucket in engine.buckets
        for num_decodes in (1, min(bucket, engine.max_running, cache.num_blocks), 0)
        for fill in FILLS
    ]
    # The first one runs twice, since what runs first takes longer.
    for bucket, num_decodes, fill in tqdm(
        (cases[0], *cases), "time", unit="program", disable=not progress, leave=False
    ):
        sample = _decodes(bucket, num_decodes, fill, cache) if num_decodes else _prompt(bucket, fill, cache)
        num_keys = sum(chunk_keys(chunk.start, chunk.length) for chunk in sample.plan.chunks)
        work = (bucket, num_decodes, num_keys, 0) if num_decodes else (bucket, 0, 0, num_keys)
        if work in timings and len(timings) > 1:
            continue  # one decode fills the smallest bucket, and a prompt that is as long as the context begins at 0
        table = SamplingTable(engine.max_running, vocab_size)
        executor = DeviceExecutor(runner, table, sample.sequences, sample.tables.__getitem__, hosts)
        timings[work] = _time_step(executor, sample.plan, engine.pp + engine.overlap, clock)
    return LatencyTable((Timing(*work, seconds) for work, seconds in timings.items()), about)


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A plan, the sequences that it names and their blocks."""

    plan: StepPlan
    sequences: dict[int, Sample]
    tables: dict[int, BlockTable]


def _decodes(bucket: int, num: int, fill: float, cache: CacheConfig) -> _Sample:
    """So many decodes, each as long as `fill` of what fits."""
    longest = min(cache.max_model_len - 1, cache.num_blocks // num * cache.block_size)
    start = max(1, round(fill * (longest - 1))) if longest > 1 else 0
    chunks = tuple(Chunk(i, start, 1, True) for i in range(num))
    return _sample(StepPlan(chunks, bucket, num), cache)


def _prompt(bucket: int, fill: float, cache: CacheConfig) -> _Sample:
    """A chunk of one prompt that fills the bucket, behind `fill` of the longest sequence."""
    longest = min(cache.max_model_len - 1, cache.num_blocks * cache.block_size)
    length = min(bucket, longest)
    start = round(fill * (longest - length))
    return _sample(StepPlan((Chunk(0, start, length, True),), bucket, 1 if length == 1 else 0), cache)


def _sample(plan: StepPlan, cache: CacheConfig) -> _Sample:
    pool, sequences, tables = BlockPool(cache.num_blocks), {}, {}
    for row, chunk in enumerate(plan.chunks):
        end = chunk.start + chunk.length
        params = SamplingParams(temperature=0, max_tokens=1)
        request = Request(str(row), (0,) * end, params, 1, 0, frozenset(), 0.0)
        sequences[row] = seq = Sample(row, request)
        seq.row = row
        tables[row] = BlockTable(pool, cache.block_size)
        has_grown = tables[row].ensure(end)
        assert has_grown
    return _Sample(plan, sequences, tables)


def _time_step(executor: DeviceExecutor, plan: StepPlan, depth: int, clock: Clock) -> float:
    """Median seconds from one step's tokens to the next one's, with as many steps in flight as the engine keeps."""
    ends = list(_ends(executor, _repeated(plan, depth, clock), depth, clock))
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends))


def _repeated(plan: StepPlan, depth: int, clock: Clock) -> Iterator[StepPlan]:
    begin_s = clock.now_s()
    for i in itertools.count():
        elapsed_s = clock.now_s() - begin_s
        if elapsed_s > (_LEAST_S if i >= depth + _NUM_REPEATS else _ENOUGH_S) and i > depth:
            return
        yield plan


def _ends(executor: DeviceExecutor, plans: Iterable[StepPlan], depth: int, clock: Clock) -> Iterator[float]:
    handles = collections.deque()
    for plan in plans:
        handles.append(executor.launch(plan))
        if len(handles) == depth:
            executor.collect(handles.popleft())
            yield clock.now_s()
    while handles:  # what is left passes the stages by itself
        executor.launch(None)
        executor.collect(handles.popleft())


def about_table(model: ModelConfig, engine: EngineConfig, cache: CacheConfig) -> dict[str, Any]:
    """What a table is of: kept in it, and its key where tables are stored."""
    return {
        "device": f"{len(jax.devices())} x {device_name()}",
        "jax": jax.__version__,
        "sarathi_jax": importlib.metadata.version("sarathi-jax"),
        "model": dataclasses.asdict(model),
        "cache": dataclasses.asdict(cache),
        "buckets": list(engine.buckets),
        **{name: getattr(engine, name) for name in _SETTINGS},
    }


def device_name() -> str:
    """What JAX calls the device; for a CPU, which it does not tell apart, what the system calls it."""
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or 'cpu'}"
