"""The compiled programs, one a token bucket, and the state that they hand on: KV cache and token history."""

import dataclasses
import math
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from sarathi_jax.batch import BatchLayout, StepBatch
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.kv.cache import KVCache, allocate_cache, cache_shapes
from sarathi_jax.models import Attend, ModelFunction
from sarathi_jax.sampling import Drawn, SamplingParamsArrays, SamplingTable, prompt_logprobs, sample


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


class Runner:
    """Runs steps on the device. No step compiles: every bucket's program is compiled when the runner is built.

    Args:
      model: what to compute.
      params: dotted path -> array, as `ModelFunction.shapes`.
      engine: buckets, rows, dtype, attention backend.
      cache: size of the KV cache.
      progress: shows a bar while compiling.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Mapping[str, jax.Array],
        engine: EngineConfig,
        cache: CacheConfig,
        progress: bool = True,
    ):
        self._model = model
        self._dtype = jnp.dtype(engine.dtype)
        self._function = ModelFunction(model, self._dtype)
        self._backend = engine.attention_backend
        self._names = tuple(self._function.shapes)
        # Flat leaves: handing a nested state to a compiled program costs more than a small step.
        self._params = tuple(params[name] for name in self._names)
        self._cache = allocate_cache(model, cache, self._dtype)
        self._history = jnp.zeros((engine.max_running, cache.max_model_len + 1), jnp.int32)
        self.layouts = {bucket: BatchLayout(bucket, engine.max_running, cache) for bucket in engine.buckets}
        sampling = SamplingTable(engine.max_running, model.vocab_size).arrays()
        self._programs: dict[int, jax.stages.Compiled] = {}
        start_s = time.perf_counter()
        shapes = cache_shapes(model, cache, self._dtype)
        bar = tqdm(self.layouts.items(), "compile", unit="program", disable=not progress, leave=False)
        for bucket, layout in bar:
            bar.set_postfix(bucket=bucket)
            self._programs[bucket] = self._compile(layout, shapes, sampling)
        compile_s = time.perf_counter() - start_s
        temp_bytes = max(program.memory_analysis().temp_size_in_bytes for program in self._programs.values())
        self.start_up = StartUp(len(self._programs), compile_s, temp_bytes)

    def run(self, bucket: int, buffer: np.ndarray, sampling: SamplingParamsArrays) -> StepOutput:
        """Starts a step and returns at once.

        Args:
          bucket: one of `layouts`.
          buffer: i32[size] from that layout's `pack`.
          sampling: parameters of every row.
        """
        self._cache, self._history, output = self._programs[bucket](
            self._params, self._cache, self._history, jax.device_put(buffer), sampling
        )
        return output

    def memory(self, bucket: int) -> jax.stages.Compiled:
        """The compiled program of a bucket, for its `memory_analysis` and text."""
        return self._programs[bucket]

    def _compile(self, layout: BatchLayout, cache: list, sampling: SamplingParamsArrays) -> jax.stages.Compiled:
        def step(params, cache, history, buffer, sampling):
            return self._step(params, cache, history, layout.unpack(buffer), sampling)

        buffer = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        lowered = jax.jit(step, donate_argnums=(1, 2)).lower(self._params, cache, self._history, buffer, sampling)
        return lowered.compile()

    def _step(
        self,
        params: tuple[jax.Array, ...],
        cache: KVCache,
        history: jax.Array,
        batch: StepBatch,
        sampling: SamplingParamsArrays,
    ) -> tuple[KVCache, jax.Array, StepOutput]:
        """The program: tokens in, cache and history on, drawn tokens out."""
        model = self._function.bind(dict(zip(self._names, params, strict=True)))
        # The newest token of a sequence may be known to the device alone: it stands in the sequence's own row.
        tokens = jnp.where(batch.tokens >= 0, batch.tokens, history[batch.token_rows, batch.positions])
        history = history.at[batch.token_rows, batch.positions].set(tokens, mode="drop")
        hidden, cache = model.hidden(tokens, batch.positions, self._attend(batch), cache)
        last = jnp.maximum(batch.chunk_starts[1:] - 1, 0)
        active = batch.samples != 0
        drawn = sample(model.logits(hidden[last]), batch.rows, batch.kv_lens, history, sampling, active)
        rows = jnp.where(active, batch.rows, history.shape[0])
        history = history.at[rows, batch.kv_lens].set(drawn.tokens, mode="drop")
        wants_prompt = jnp.any(batch.targets >= 0)
        return cache, history, StepOutput(drawn, prompt_logprobs(hidden, model.logits, batch.targets, wants_prompt))

    def _attend(self, batch: StepBatch) -> Attend:
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
            )

        return attend
