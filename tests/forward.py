"""Logits at every position of several texts, computed chunk by chunk over a paged cache, without the engine.

The engine returns only the best few log-probabilities; here the same model, attention, block tables and packed batches
run under a schedule that the test chooses, and every logit comes back.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_paged_attention import ragged_paged_attention, reference
from sarathi_jax.batch import BatchLayout
from sarathi_jax.config import CacheConfig, ModelConfig, Quantization
from sarathi_jax.kv.blocks import BlockPool, BlockTable
from sarathi_jax.models import ModelFunction
from sarathi_jax.request import Request, SamplingParams
from sarathi_jax.scheduling.plan import Chunk, StepPlan
from sarathi_jax.sequence import Sequence as Text
from sarathi_jax.weights.checkpoint import load_model_config, load_parameters

MAX_SEQS = 8
BUCKET = 64
"""Tokens of a step: one compiled program a model keeps the tests quick."""

BLOCK_SIZE = 16


class PagedModel:
    """A model with its parameters and a paged cache, in one compiled program.

    Args:
      config: the model.
      params: dotted path -> array.
      max_len: longest text in tokens.
      backend: of attention; ``reference`` is the specification, in numpy: it cannot be compiled.
      quantization: of `params`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Mapping[str, jax.Array],
        max_len: int,
        backend: str = "xla",
        quantization: Quantization | None = None,
    ):
        self._config = config
        self._params = params
        num_blocks = MAX_SEQS * -(-max_len // BLOCK_SIZE)
        self._cache = CacheConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE, max_model_len=max_len)
        self._layout = BatchLayout(BUCKET, MAX_SEQS, self._cache)
        step = functools.partial(_step, ModelFunction(config, jnp.float32, quantization), config, self._layout)
        if backend == "reference":
            self._step = functools.partial(step, reference.ragged_paged_attention)
        else:
            # Ahead of time, as the runner does: parameters from wherever they were loaded meet the same program.
            program = jax.jit(functools.partial(step, functools.partial(ragged_paged_attention, backend=backend)))
            buffer = jax.ShapeDtypeStruct((self._layout.size,), jnp.int32)
            self._step = program.lower(params, self._empty_cache(), buffer).compile()

    def with_params(self, params: Mapping[str, jax.Array]) -> "PagedModel":
        """The same compiled program with other parameters.

        Args:
          params: of the same shapes.
        """
        other = copy.copy(self)
        other._params = params
        return other

    def logits(
        self, texts: Sequence[Sequence[int]], prompt_lengths: Sequence[int], chunk_size: int
    ) -> list[np.ndarray]:
        """Logits f32[len, V] of each text.

        All texts start together; prompts advance by chunks that share the bucket, in turn, and who is through with the
        prompt goes on one token a step: steps mix chunks of any length with decodes.

        Args:
          texts: at most `MAX_SEQS` lists of token ids.
          prompt_lengths: how much of each text is prompt.
          chunk_size: most tokens of one text in a step.
        """
        pool, cache = BlockPool(self._cache.num_blocks), self._empty_cache()
        live = {i: _text(i, tokens) for i, tokens in enumerate(texts)}
        tables = {i: BlockTable(pool, BLOCK_SIZE) for i in live}
        rows: dict[int, list[np.ndarray]] = {i: [] for i in live}
        while live:
            plan = _plan(live.values(), prompt_lengths, chunk_size)
            for chunk in plan.chunks:
                assert tables[chunk.seq_id].ensure(chunk.start + chunk.length)
                live[chunk.seq_id].num_computed += chunk.length
            buffer = self._layout.pack(plan, live, tables.__getitem__)
            logits, cache = self._step(self._params, cache, buffer)
            logits, first = np.asarray(logits), 0
            for chunk in plan.chunks:
                rows[chunk.seq_id].append(logits[first : first + chunk.length])
                first += chunk.length
                if self._config.cache_window is not None:
                    computed = live[chunk.seq_id].num_computed
                    tables[chunk.seq_id].release_before(computed - self._config.cache_window + 1)
                if chunk.samples:
                    tables[chunk.seq_id].release()
                    del live[chunk.seq_id]
        pool.check()
        assert pool.num_free == pool.num_total
        return [np.concatenate(parts) for parts in rows.values()]

    def _empty_cache(self) -> list[tuple[jax.Array, jax.Array]]:
        """Full of NaN: whoever reads what was not written shows it."""
        shape = (self._cache.num_blocks, self._config.num_kv_heads, BLOCK_SIZE, self._config.head_dim)
        return [(jnp.full(shape, jnp.nan), jnp.full(shape, jnp.nan)) for _ in range(self._config.num_layers)]


def load_model(directory: Path, quantization: Quantization | None = None) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """Configuration and float32 parameters of a Hugging Face or Orbax directory.

    Args:
      directory: holds ``config.json`` and the weights.
      quantization: of the weights of products, or None.
    """
    config = load_model_config(directory)
    return config, load_parameters(directory, config, "float32", quantization=quantization, progress=False)


def _text(seq_id: int, tokens: Sequence[int]) -> Text:
    request = Request(str(seq_id), tuple(tokens), SamplingParams(), 1, 0, frozenset(), 0.0)
    text = Text(seq_id, request)
    text.row = seq_id
    return text


def _plan(live: Any, prompt_lengths: Sequence[int], chunk_size: int) -> StepPlan:
    """One token for each text beyond its prompt, then chunks of prompts in order while there is room."""
    chunks, room = [], BUCKET
    for text in sorted(live, key=lambda text: text.num_computed < prompt_lengths[text.seq_id]):
        left = prompt_lengths[text.seq_id] - text.num_computed
        length = min(chunk_size, left, room) if left > 0 else min(1, room)
        if length:
            chunks.append(Chunk(text.seq_id, text.num_computed, length, length == text.num_uncomputed))
            room -= length
    chunks.sort(key=lambda chunk: chunk.length != 1)
    return StepPlan(tuple(chunks), BUCKET, num_decodes=sum(chunk.length == 1 for chunk in chunks))


def _step(
    model: ModelFunction, config: ModelConfig, layout: BatchLayout, attention: Callable[..., Any], params, cache, buffer
):
    batch, scale = layout.unpack(buffer), 1 / math.sqrt(config.head_dim)

    def attend(layer, q, k, v, layer_cache):
        return attention(
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
            scale=scale,
            window=config.windows[layer],
        )

    bound = model.bind(params)
    hidden, cache = bound.hidden(jnp.asarray(batch.tokens), jnp.asarray(batch.positions), attend, cache)
    return bound.logits(hidden), cache
