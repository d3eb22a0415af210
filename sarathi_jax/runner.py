"""`Runner`: the compiled programs of every stage, the state that they hand on, and the steps that are under way."""

import dataclasses
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from pallas_kernels.ragged_paged_attention import check_platform
from sarathi_jax.compiling import CompileCounter
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.kv.cache import allocate_cache, row_major
from sarathi_jax.parallel import AXIS, split_layers
from sarathi_jax.parallel.pipeline import is_local
from sarathi_jax.parallel.tensor import CACHE_SPEC
from sarathi_jax.parallel.transfer import Transfer, in_turn, put_everywhere
from sarathi_jax.program_store import ProgramStore
from sarathi_jax.sampling import SamplingMirror
from sarathi_jax.step_program import EVERYWHERE, StepOutput, StepProgram, deliver, recall, scratch_bytes

_MAX_COMPILE_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What of a step's output anybody wants.

    Attributes:
      num_chunks: rows of what is drawn.
      logprobs: log-probabilities of the drawn tokens too.
      num_tokens: rows of the log-probabilities of prompt tokens; 0: none.
    """

    num_chunks: int
    logprobs: bool = False
    num_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """A step on its way through the stages, as the host has it.

    Attributes:
      bucket: which of the compiled sizes.
      buffer: i32[size] from that layout's `pack`.
      sampling: of the sampling parameters what changed since the micro-batch before (`SamplingTable.changes`).
      wanted: which parts of its output will be read.
      recalled: rows of the last stage's history that are filled before it: of `step_program.recall`.
    """

    bucket: int
    buffer: np.ndarray
    sampling: Mapping[str, np.ndarray]
    wanted: Wanted
    recalled: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class StartUp:
    """What compiling cost.

    Attributes:
      num_programs: compiled or taken from the compile cache.
      compile_s: wall time of all of it.
      temp_bytes: scratch memory of the largest program.
    """

    num_programs: int
    compile_s: float
    temp_bytes: int


class StageRunner:
    """One stage on its devices: parameters, cache, history and programs.

    Args:
      program: what it computes.
      params: dotted path -> array, as `ModelFunction.shapes`.
      programs: compiled, by bucket.
      recall: compiled, of the last stage; None: nothing is ever recalled.
      mesh: its devices.
      engine, cache: as of the program.
    """

    def __init__(
        self,
        program: StepProgram,
        params: Mapping[str, jax.Array],
        programs: dict[int, jax.stages.Compiled],
        recall: jax.stages.Compiled | None,
        mesh: Mesh,
        engine: EngineConfig,
        cache: CacheConfig,
    ):
        self.parameter_names = program.parameter_names
        self.params = tuple(params[name] for name in program.parameter_names)
        self.programs = programs
        self._recall = recall
        self.everywhere = NamedSharding(mesh, EVERYWHERE)
        cache_format = row_major(NamedSharding(mesh, CACHE_SPEC))
        self.cache = allocate_cache(program.cached_model, cache, jnp.dtype(engine.dtype), cache_format)
        shape = program.history_shape
        self.history = None if shape is None else put_everywhere(np.zeros(shape, np.int32), self.everywhere)
        self._sampling = SamplingMirror(self._put) if program.stage.is_last else None

    def run(self, batch: MicroBatch, hidden: jax.Array | None) -> Any:
        """Starts a step and returns at once: with hidden rows for the next stage, or a `StepOutput`.

        Args:
          batch: the step.
          hidden: rows of the stage before.
        """
        sampling = None if self._sampling is None else self._sampling.update(batch.sampling)
        if self._recall is not None:
            for entry in batch.recalled:
                self.history = in_turn(self._recall(self.history, self._put(entry)))
        self.cache, self.history, output = self.programs[batch.bucket](
            self.params, self.cache, self.history, hidden, self._put(batch.buffer), sampling
        )
        return output

    def _put(self, values: np.ndarray) -> jax.Array:
        return put_everywhere(values, self.everywhere)


class Runner:
    """Runs steps on the devices of one replica. Every program is compiled when the runner is built, none later.

    The stages form a pipeline that moves in ticks: in a tick every stage starts the micro-batch that stands before it,
    then every result is sent on. Whatever runs on a device was enqueued in the order in which it will run, on all
    devices and in all processes alike, so that no two of them ever wait for each other.

    Args:
      model: what to compute.
      params: of each stage that has devices in this process, by its index: dotted path -> array.
      engine: buckets, rows, dtype, attention backend, tp and pp.
      cache: size of the KV cache.
      meshes: devices of each stage.
      progress: shows a bar while compiling.
      store: where programs may be found, and are kept; None: nowhere.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Mapping[int, Mapping[str, jax.Array]],
        engine: EngineConfig,
        cache: CacheConfig,
        meshes: Sequence[Mesh],
        progress: bool = True,
        store: ProgramStore | None = None,
    ):
        check_platform(engine.attention_backend, jax.default_backend())
        logging.info("attention backend: %s", engine.attention_backend)
        device_kind = meshes[0].devices.flat[0].device_kind
        programs = [StepProgram(model, engine, cache, stage, device_kind) for stage in split_layers(model, engine)]
        self.layouts = programs[0].layouts
        self._entry_shape = programs[0].entry_shape
        self._compiles = CompileCounter()
        self.num_late_compiles = 0
        start_s = time.perf_counter()
        compiled = _compile_all(_jobs(programs, engine, meshes, store), progress)
        compile_s = time.perf_counter() - start_s
        self.stages = {}
        for i, mesh in enumerate(meshes):
            if is_local(mesh):
                steps = {bucket: compiled["step", i, bucket] for bucket in engine.buckets}
                recalls = compiled.get(("recall",)) if i == len(meshes) - 1 else None
                self.stages[i] = StageRunner(programs[i], params[i], steps, recalls, mesh, engine, cache)
        self._transfers = {key[1:]: value for key, value in compiled.items() if key[0] == "transfer"}
        self._return = compiled.get(("return",))
        self._deliver = compiled.get(("deliver",))
        steps = [program for key, program in compiled.items() if key[0] == "step"]
        self.start_up = StartUp(len(compiled), compile_s, max(map(scratch_bytes, steps)))
        self._last_process = meshes[-1].devices.flat[0].process_index
        # Before each stage the micro-batch that it runs in the next tick, with the rows of the stage before.
        self._standing: list[tuple[MicroBatch, jax.Array | None] | None] = [None] * len(meshes)

    @property
    def answers(self) -> bool:
        """Whether this process tells the others what was drawn: the first that has devices of the last stage."""
        return self._last_process == jax.process_index()

    def history_entry(self, row: int, tokens: Sequence[int]) -> np.ndarray:
        """For `MicroBatch.recalled`: the known tokens of the sequence that runs in a device row."""
        entry = np.zeros(self._entry_shape, np.int32)
        entry[0], entry[1 : len(tokens) + 1] = row, tokens
        return entry

    def tick(self, batch: MicroBatch | None) -> tuple[MicroBatch, StepOutput | None] | None:
        """Lets a micro-batch in, moves all on by one stage, and returns at once.

        A compilation here is a bug: it is logged as an error and counted.

        Args:
          batch: what enters; None: nothing does.

        Returns:
          The micro-batch that came through the last stage, hence that of pp - 1 ticks ago, and its output, None in a
          process that has none of that stage's devices; None if there was no micro-batch.
        """
        before = self._compiles.count
        self._standing[0] = None if batch is None else (batch, None)
        buckets = sorted({entry[0].bucket for entry in self._standing if entry is not None})
        outputs = [None if entry is None else self._run(i, *entry) for i, entry in enumerate(self._standing)]
        leaving = self._standing[-1]
        for i in reversed(range(1, len(self._standing))):
            self._standing[i] = self._move(i, self._standing[i - 1], outputs[i - 1])
        if leaving is not None and self._return is not None:
            newest = self._return.run(None if outputs[-1] is None else outputs[-1].newest)
            if self._deliver is not None:
                self.stages[0].history = in_turn(self._deliver(self.stages[0].history, newest))
        if self._compiles.count != before:
            self.num_late_compiles += self._compiles.count - before
            names = ", ".join(map(str, buckets))
            logging.error("a step of bucket %s compiled a program after warm-up; please report this", names)
        return None if leaving is None else (leaving[0], outputs[-1])

    def _run(self, stage: int, batch: MicroBatch, hidden: jax.Array | None) -> Any:
        return in_turn(self.stages[stage].run(batch, hidden)) if stage in self.stages else None

    def _move(
        self, stage: int, entry: tuple[MicroBatch, Any] | None, hidden: jax.Array | None
    ) -> tuple[MicroBatch, jax.Array | None] | None:
        """Sends the rows of the stage before on to `stage`."""
        if entry is None:
            return None
        batch = entry[0]
        transfer = self._transfers.get((stage, batch.bucket))
        return batch, None if transfer is None else transfer.run(hidden)


def _jobs(
    programs: Sequence[StepProgram], engine: EngineConfig, meshes: Sequence[Mesh], store: ProgramStore | None
) -> dict[tuple, Callable[[], Any]]:
    """What this process compiles. The largest first: with several cores the last to finish should be small."""
    jobs: dict[tuple, Callable[[], Any]] = {}
    for bucket in reversed(engine.buckets):
        for i, (program, mesh) in enumerate(zip(programs, meshes, strict=True)):
            if is_local(mesh):
                jobs["step", i, bucket] = lambda p=program, b=bucket, m=mesh: p.compile(b, m, store)
    for bucket in engine.buckets:
        shape = programs[0].hidden_part(bucket)
        for i in range(1, len(meshes)):
            ends = meshes[i - 1], meshes[i]
            if any(map(is_local, ends)):
                jobs["transfer", i, bucket] = lambda e=ends, s=shape: Transfer(
                    *e, s, np.dtype(np.float32), PartitionSpec(AXIS)
                )
    if len(meshes) > 1:
        ends, shape = (meshes[-1], meshes[0]), programs[0].newest_shape
        if any(map(is_local, ends)):
            jobs["return",] = lambda: Transfer(*ends, shape, np.dtype(np.int32), EVERYWHERE)
        if is_local(meshes[0]):
            jobs["deliver",] = lambda: _compile_update(deliver, programs[0], programs[0].newest_shape, meshes[0], store)
    if engine.prefix_caching and is_local(meshes[-1]):
        jobs["recall",] = lambda: _compile_update(recall, programs[-1], programs[-1].entry_shape, meshes[-1], store)
    return jobs


def _compile_update(
    update: Callable[[jax.Array, jax.Array], jax.Array],
    program: StepProgram,
    shape: tuple[int, ...],
    mesh: Mesh,
    store: ProgramStore | None,
) -> jax.stages.Compiled:
    """Compiles what changes a stage's history in place by an i32 array of that shape."""
    everywhere = NamedSharding(mesh, EVERYWHERE)
    arguments = [jax.ShapeDtypeStruct(s, np.int32, sharding=everywhere) for s in (program.history_shape, shape)]
    traced = functools.partial(jax.jit(update, donate_argnums=0).trace, *arguments)
    if store is None:
        return traced().lower().compile()
    return store.get(f"{update.__name__}, {program.history_shape}, {shape}", tuple(mesh.devices.flat), traced)


def _compile_all(jobs: Mapping[tuple, Callable[[], Any]], progress: bool) -> dict[tuple, Any]:
    with ThreadPoolExecutor(min(_MAX_COMPILE_THREADS, os.cpu_count() or 1)) as threads:
        done = threads.map(lambda job: job(), jobs.values())
        bar = tqdm(done, "compile", total=len(jobs), unit="program", disable=not progress, leave=False)
        return dict(zip(jobs, bar, strict=True))
