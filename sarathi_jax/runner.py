"""The program of a step (`StepProgram`), compiled once a token bucket, and the state it hands on (`Runner`)."""

import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from pallas_kernels.ragged_paged_attention import check_platform, ragged_paged_attention
from sarathi_jax.batch import BatchLayout, StepBatch
from sarathi_jax.compiling import CompileCounter
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.kv.cache import KVCache, allocate_cache, cache_shapes, row_major
from sarathi_jax.models import Attend, ModelFunction
from sarathi_jax.parallel.logits import gather_logits, sample_split
from sarathi_jax.parallel.tensor import AXIS, CACHE_SPEC, TensorSplit, spec_of
from sarathi_jax.sampling import Drawn, SamplingParamsArrays, SamplingTable, prompt_logprobs

_MAX_COMPILE_THREADS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step leaves for the host, still on the device.

    Attributes:
      drawn: tokens and their log-probabilities, one row a sequence of the step.
      prompt: log-probabilities of prompt tokens, one row a token: f32[T], i32[T, k], f32[T, k].
    """

    drawn: Drawn
    prompt: tuple[jax.Array, jax.Array, jax.Array]


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


def scratch_bytes(program: jax.stages.Compiled) -> int:
    """Memory that a program needs while it runs, beside arguments and results; 0 where XLA does not tell."""
    memory = program.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


class StepProgram:
    """What one step computes, as a pure function of parameters, cache, history, batch and sampling parameters.

    Args:
      model: what to compute.
      engine: buckets, rows, dtype, attention backend.
      cache: size of the KV cache.
      device_kind: attention kernels are cut as was measured best on such a device; None: by heuristic.
    """

    def __init__(self, model: ModelConfig, engine: EngineConfig, cache: CacheConfig, device_kind: str | None = None):
        self._model = model
        self._cache = cache
        self._num_rows = engine.max_running
        self._dtype = jnp.dtype(engine.dtype)
        self._split = TensorSplit(model, engine.tp)
        self._axis = AXIS if engine.tp > 1 else None
        self._function = ModelFunction(self._split.local, self._dtype, engine.quantization, self._axis)
        self._shapes = ModelFunction(self._split.widened, self._dtype, engine.quantization).shapes
        self._backend = engine.attention_backend
        self._device_kind = device_kind
        self.layouts = {bucket: BatchLayout(bucket, engine.max_running, cache) for bucket in engine.buckets}
        # Flat leaves: handing a nested state to a compiled program costs more than a small step.
        self.parameter_names = tuple(self._shapes)

    @property
    def history_shape(self) -> tuple[int, int]:
        """[R, L + 1]: every row's tokens, and a place for the one drawn behind the longest sequence."""
        return self._num_rows, self._cache.max_model_len + 1

    def compile(self, bucket: int, mesh: Mesh) -> jax.stages.Compiled:
        """Compiles the step of a bucket from shapes alone."""
        return self.trace(bucket, mesh).lower().compile()

    def trace(self, bucket: int, mesh: Mesh | None = None) -> jax.stages.Traced:
        """Traces the step of a bucket from shapes alone; cache and history are donated, so updated in place.

        Args:
          bucket: one of `layouts`.
          mesh: `tp` devices, which may be there or not; None leaves the place open, and with it how the cache lies in
            memory: for one device.
        """
        layout = self.layouts[bucket]

        def step(params, cache, history, buffer, sampling):
            return self._step(params, cache, history, layout.unpack(buffer), sampling)

        params = tuple(self._shapes[name] for name in self.parameter_names)
        specs = tuple(map(spec_of, self.parameter_names))
        history = jax.ShapeDtypeStruct(self.history_shape, jnp.int32)
        buffer = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        sampling = SamplingTable(self._num_rows, self._model.vocab_size).arrays()
        if mesh is None:
            cache = cache_shapes(self._split.widened, self._cache, self._dtype)
            return jax.jit(step, donate_argnums=(1, 2)).trace(params, cache, history, buffer, sampling)
        everywhere = PartitionSpec()
        if self._axis is not None:
            step = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(specs, CACHE_SPEC, everywhere, everywhere, everywhere),
                out_specs=(CACHE_SPEC, everywhere, everywhere),
                check_vma=False,
            )

        def placed(x, spec=everywhere):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        format = row_major(NamedSharding(mesh, CACHE_SPEC))
        cache = cache_shapes(self._split.widened, self._cache, self._dtype, format)
        program = jax.jit(step, donate_argnums=(1, 2), out_shardings=(format, None, None))
        return program.trace(
            tuple(map(placed, params, specs)), cache, placed(history), placed(buffer), jax.tree.map(placed, sampling)
        )

    def _step(
        self,
        params: tuple[jax.Array, ...],
        cache: KVCache,
        history: jax.Array,
        batch: StepBatch[jax.Array],
        sampling: SamplingParamsArrays,
    ) -> tuple[KVCache, jax.Array, StepOutput]:
        """The program: tokens in, cache and history on, drawn tokens out."""
        model = self._function.bind(dict(zip(self.parameter_names, params, strict=True)))
        # The newest token of a sequence may be known to the device alone: it stands in the sequence's own row.
        tokens = jnp.where(batch.tokens >= 0, batch.tokens, history[batch.token_rows, batch.positions])
        history = history.at[batch.token_rows, batch.positions].set(tokens, mode="drop")
        hidden, cache = model.hidden(tokens, batch.positions, self._attend(batch), cache)
        last = jnp.maximum(batch.chunk_starts[1:] - 1, 0)
        active = batch.samples != 0
        axis, vocab_size = self._axis, self._model.vocab_size
        logits = model.logits(hidden[last])
        drawn = sample_split(logits, axis, vocab_size, batch.rows, batch.kv_lens, history, sampling, active)

        def head(hidden):
            return gather_logits(model.logits(hidden), axis, vocab_size)

        rows = jnp.where(active, batch.rows, history.shape[0])
        history = history.at[rows, batch.kv_lens].set(drawn.tokens, mode="drop")
        wants_prompt = jnp.any(batch.targets >= 0)
        return cache, history, StepOutput(drawn, prompt_logprobs(hidden, head, batch.targets, wants_prompt))

    def _attend(self, batch: StepBatch[jax.Array]) -> Attend:
        def attend(layer, q, k, v, layer_cache):
            return ragged_paged_attention(
                q,
                k,
                v,
                layer_cache,
                batch.write_indices,
                batch.chunk_starts,
                batch.kv_lens,
                batch.block_tables,
                batch.num_decodes[0],
                batch.num_chunks[0],
                scale=1 / math.sqrt(self._model.head_dim),
                window=self._model.windows[layer],
                backend=self._backend,
                device_kind=self._device_kind,
            )

        return attend


class Runner:
    """Runs steps on the device. Every bucket's program is compiled when the runner is built, none later.

    Args:
      model: what to compute.
      params: dotted path -> array, as `ModelFunction.shapes`.
      engine: buckets, rows, dtype, attention backend.
      cache: size of the KV cache.
      mesh: the devices, `tp` of them.
      progress: shows a bar while compiling.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Mapping[str, jax.Array],
        engine: EngineConfig,
        cache: CacheConfig,
        mesh: Mesh,
        progress: bool = True,
    ):
        check_platform(engine.attention_backend, jax.default_backend())
        logging.info("attention backend: %s", engine.attention_backend)
        program = StepProgram(model, engine, cache, mesh.devices.flat[0].device_kind)
        self.layouts = program.layouts
        self.parameter_names = program.parameter_names
        self.params = tuple(params[name] for name in program.parameter_names)
        self._compiles = CompileCounter()
        start_s = time.perf_counter()
        # Largest first: with several cores the last one to finish should be a small one.
        order = engine.buckets[::-1]
        with ThreadPoolExecutor(min(_MAX_COMPILE_THREADS, os.cpu_count() or 1)) as threads:
            compiled = threads.map(lambda bucket: program.compile(bucket, mesh), order)
            bar = tqdm(compiled, "compile", total=len(order), unit="program", disable=not progress, leave=False)
            self.programs: dict[int, jax.stages.Compiled] = dict(zip(order, bar, strict=True))
        self.start_up = StartUp(
            num_programs=len(self.programs),
            compile_s=time.perf_counter() - start_s,
            temp_bytes=max(map(scratch_bytes, self.programs.values())),
        )
        format = row_major(NamedSharding(mesh, CACHE_SPEC))
        self.cache = allocate_cache(TensorSplit(model, engine.tp).widened, cache, jnp.dtype(engine.dtype), format)
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self._history = jax.device_put(np.zeros(program.history_shape, np.int32), self.everywhere)
        self.num_late_compiles = 0

    def run(self, bucket: int, buffer: np.ndarray, sampling: SamplingParamsArrays) -> StepOutput:
        """Starts a step and returns at once. A compilation here is a bug: it is logged as an error and counted.

        Args:
          bucket: one of `layouts`.
          buffer: i32[size] from that layout's `pack`.
          sampling: parameters of every row.
        """
        before = self._compiles.count
        self.cache, self._history, output = self.programs[bucket](
            self.params, self.cache, self._history, jax.device_put(buffer, self.everywhere), sampling
        )
        if self._compiles.count != before:
            self.num_late_compiles += self._compiles.count - before
            logging.error("a step of bucket %d compiled a program after warm-up; please report this", bucket)
        return output
