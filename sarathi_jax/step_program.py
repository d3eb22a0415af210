"""What one stage of the model computes in a step, as a pure function that is compiled once a token bucket."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from sarathi_jax.batch import BatchLayout, StepBatch
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.kv.cache import KVCache, cache_shapes, row_major
from sarathi_jax.models import Attend, LanguageModel, ModelFunction
from sarathi_jax.parallel import AXIS, Stage, TensorSplit
from sarathi_jax.parallel.logits import gather_logits, sample_split
from sarathi_jax.parallel.tensor import CACHE_SPEC, spec_of
from sarathi_jax.parallel.transfer import join_flat, split_flat
from sarathi_jax.program_store import ProgramStore
from sarathi_jax.sampling import Drawn, SamplingParamsArrays, prompt_logprobs, sampling_shapes

EVERYWHERE = PartitionSpec()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What a step leaves for the host, still on the device.

    Attributes:
      drawn: tokens and their log-probabilities, one row a sequence of the step.
      prompt: log-probabilities of prompt tokens, one row a token: f32[T], i32[T, k], f32[T, k].
      newest: i32[R, 2], of each device row the token that it drew and its position, or a position behind the history;
        for the first stage of a pipeline, None where there is only one stage.
    """

    drawn: Drawn
    prompt: tuple[jax.Array, jax.Array, jax.Array]
    newest: jax.Array | None


class StepProgram:
    """What a stage computes, from parameters, cache, history, hidden rows, batch and sampling parameters.

    Only the first stage and the last one know the tokens: they have a history, the others None. What comes in are
    tokens in the first stage and hidden rows of the stage before in the others; what goes out is a `StepOutput` from
    the last one and hidden rows from the others. Sampling parameters are for the last one, None for the others.

    Args:
      model: what to compute.
      engine: buckets, rows, dtype, attention backend, tp.
      cache: size of the KV cache.
      stage: which part of the model; None: all of it.
      device_kind: attention kernels are cut as was measured best on such a device; None: by heuristic.
    """

    def __init__(
        self,
        model: ModelConfig,
        engine: EngineConfig,
        cache: CacheConfig,
        stage: Stage | None = None,
        device_kind: str | None = None,
    ):
        self.stage = Stage(0, 1, range(model.num_layers)) if stage is None else stage
        self._model = model
        self._cache = cache
        kept = (engine.max_running, engine.dtype, engine.quantization, engine.tp, engine.attention_backend)
        self._about = repr((model, cache, self.stage, device_kind, kept))
        self._num_rows = engine.max_running
        self._dtype = jnp.dtype(engine.dtype)
        self._split = TensorSplit(model, engine.tp)
        self._axis = AXIS if engine.tp > 1 else None
        dtype, quantization, layers = self._dtype, engine.quantization, self.stage.layers
        self._function = ModelFunction(self._split.local, dtype, quantization, self._axis, layers)
        self._shapes = ModelFunction(self._split.widened, dtype, quantization, layers=layers).shapes
        self.cached_model = self._split.widened.with_layers(layers)
        self._backend = engine.attention_backend
        self._device_kind = device_kind
        self.layouts = {bucket: BatchLayout(bucket, engine.max_running, cache) for bucket in engine.buckets}
        # Flat leaves: handing a nested state to a compiled program costs more than a small step.
        self.parameter_names = tuple(self._shapes)

    @property
    def history_shape(self) -> tuple[int, int] | None:
        """[R, L + 1]: every row's tokens, and a place for the one drawn behind the longest sequence."""
        knows_tokens = self.stage.is_first or self.stage.is_last
        return (self._num_rows, self._cache.max_model_len + 1) if knows_tokens else None

    @property
    def newest_shape(self) -> tuple[int, int]:
        """Of `StepOutput.newest`."""
        return self._num_rows, 2

    @property
    def entry_shape(self) -> tuple[int]:
        """Of what `recall` writes."""
        return (self._cache.max_model_len + 2,)

    def hidden_part(self, bucket: int) -> tuple[int]:
        """Shape of one device's part of the hidden rows between stages, float32."""
        return (-(-bucket * self._model.hidden_size // self._split.size),)

    def compile(self, bucket: int, mesh: Mesh, store: ProgramStore | None = None) -> jax.stages.Compiled:
        """Compiles the step of a bucket from shapes alone.

        Args:
          bucket: one of `layouts`.
          mesh: `tp` devices.
          store: where it may be found, and is kept; None: nowhere.
        """
        if store is None:
            return self.trace(bucket, mesh).lower().compile()
        return store.get(f"{self._about}, bucket={bucket}", tuple(mesh.devices.flat), lambda: self.trace(bucket, mesh))

    def trace(self, bucket: int, mesh: Mesh | None = None) -> jax.stages.Traced:
        """Traces the step of a bucket from shapes alone; cache and history are donated, so updated in place.

        Args:
          bucket: one of `layouts`.
          mesh: `tp` devices, which may be there or not; None leaves the place open, and with it how the cache lies in
            memory: for one device.
        """
        layout, stage = self.layouts[bucket], self.stage

        def step(params, cache, history, hidden, buffer, sampling):
            return self._step(params, cache, history, hidden, layout.unpack(buffer), sampling)

        specs = tuple(map(spec_of, self.parameter_names))
        in_specs = (specs, CACHE_SPEC, EVERYWHERE, PartitionSpec(AXIS), EVERYWHERE, EVERYWHERE)
        if self._axis is not None:
            out_specs = (CACHE_SPEC, EVERYWHERE, EVERYWHERE if stage.is_last else PartitionSpec(AXIS))
            step = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        cache_format = None if mesh is None else row_major(NamedSharding(mesh, CACHE_SPEC))
        hidden_size = self._split.size * self.hidden_part(bucket)[0]
        arguments = (
            tuple(self._shapes.values()),
            cache_shapes(self.cached_model, self._cache, self._dtype, cache_format),
            None if self.history_shape is None else jax.ShapeDtypeStruct(self.history_shape, jnp.int32),
            None if stage.is_first else jax.ShapeDtypeStruct((hidden_size,), jnp.float32),
            jax.ShapeDtypeStruct((layout.size,), jnp.int32),
            sampling_shapes(self._num_rows, self._model.vocab_size) if stage.is_last else None,
        )
        if mesh is None:
            return jax.jit(step, donate_argnums=(1, 2)).trace(*arguments)

        def placed(x, spec):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        params, cache, *rest = arguments
        rest = [jax.tree.map(lambda x, s=spec: placed(x, s), x) for x, spec in zip(rest, in_specs[2:], strict=True)]
        program = jax.jit(step, donate_argnums=(1, 2), out_shardings=(cache_format, None, None))
        return program.trace(tuple(map(placed, params, specs)), cache, *rest)

    def _step(
        self,
        params: tuple[jax.Array, ...],
        cache: KVCache,
        history: jax.Array | None,
        hidden: jax.Array | None,
        batch: StepBatch[jax.Array],
        sampling: SamplingParamsArrays | None,
    ) -> tuple[KVCache, jax.Array | None, StepOutput | jax.Array]:
        """The program: tokens or hidden rows in, cache and history on, hidden rows or drawn tokens out."""
        model = self._function.bind(dict(zip(self.parameter_names, params, strict=True)))
        tokens = batch.tokens
        if history is not None:
            # The newest token of a sequence may be known to the device alone: it stands in the sequence's own row.
            tokens = jnp.where(tokens >= 0, tokens, history[batch.token_rows, batch.positions])
            history = history.at[batch.token_rows, batch.positions].set(tokens, mode="drop")
        if hidden is None:
            x = model.embedded(tokens)
        else:
            x = join_flat(hidden, self._axis, (len(tokens), self._model.hidden_size))
        x, cache = model.run_layers(x, batch.positions, self._attend(batch), cache)
        if not self.stage.is_last:
            return cache, history, split_flat(x, self._axis, self._split.size)
        assert history is not None
        assert sampling is not None
        history, output = self._finish(model, model.normed(x), history, batch, sampling)
        return cache, history, output

    def _finish(
        self,
        model: LanguageModel,
        hidden: jax.Array,
        history: jax.Array,
        batch: StepBatch[jax.Array],
        sampling: SamplingParamsArrays,
    ) -> tuple[jax.Array, StepOutput]:
        """Draws the tokens."""
        axis, vocab_size = self._axis, self._model.vocab_size
        active = batch.samples != 0
        logits = model.logits(hidden[jnp.maximum(batch.chunk_starts[1:] - 1, 0)])
        drawn = sample_split(logits, axis, vocab_size, batch.rows, batch.kv_lens, history, sampling, active)
        num_rows, behind = history.shape
        rows = jnp.where(active, batch.rows, num_rows)
        history = history.at[rows, batch.kv_lens].set(drawn.tokens, mode="drop")
        newest = None
        if not self.stage.is_first:
            nothing = jnp.full(self.newest_shape, behind, jnp.int32)
            newest = nothing.at[rows].set(jnp.stack([drawn.tokens, batch.kv_lens], 1), mode="drop")

        def head(hidden):
            return gather_logits(model.logits(hidden), axis, vocab_size)

        prompt = prompt_logprobs(hidden, head, batch.targets, jnp.any(batch.targets >= 0))
        return history, StepOutput(drawn, prompt, newest)

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


def deliver(history: jax.Array, newest: jax.Array) -> jax.Array:
    """Writes tokens that the last stage drew into the first stage's history.

    Args:
      history: i32[R, L + 1].
      newest: of `StepOutput`.
    """
    return history.at[jnp.arange(history.shape[0]), newest[:, 1]].set(newest[:, 0], mode="drop")


def recall(history: jax.Array, entry: jax.Array) -> jax.Array:
    """Fills a row of the last stage's history for a sequence that starts behind tokens that no step computes for it.

    Args:
      history: i32[R, L + 1].
      entry: i32[L + 2], the row and its tokens.
    """
    return history.at[entry[0]].set(entry[1:])


def scratch_bytes(program: jax.stages.Compiled) -> int:
    """Memory that a program needs while it runs, beside arguments and results; 0 where XLA does not tell."""
    memory = program.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes
