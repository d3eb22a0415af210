"""Models of true shapes with random weights, end to end: start-up, programs against their roofline, tokens a second."""

import dataclasses
import functools
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sarathi_jax.batch import BatchLayout
from sarathi_jax.bench import host
from sarathi_jax.bench.gpu_suite.attention import visible_pairs
from sarathi_jax.bench.gpu_suite.kernels import current_roofs
from sarathi_jax.bench.gpu_suite.peers import case_name
from sarathi_jax.bench.gpu_suite.results import MAX_ATTEMPTS, Results, Skipped
from sarathi_jax.bench.gpu_suite.timing import Roofs, time_calls
from sarathi_jax.compiling import use_compile_cache
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig, Quantization
from sarathi_jax.engine import Engine
from sarathi_jax.llm import build_engine
from sarathi_jax.models import ModelFunction
from sarathi_jax.request import SamplingParams
from sarathi_jax.resources import config_path
from sarathi_jax.runner import Runner
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.sizing import plan_cache
from sarathi_jax.weights.directory import load_model_yaml

_STD = 0.02  # of random weights, as `random_parameters` draws them

Case = dict[str, int]
Chunks = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model of the suite.

    Attributes:
      name: of its file in ``configs/models``.
      cases: offline throughput.
    """

    name: str
    quantization: Quantization | None
    max_num_seqs: int
    cases: tuple[tuple[int, int, int], ...]
    max_model_len: int = 4096
    buckets: tuple[int, ...] = (1, 8, 32, 64, 128, 512, 2048)

    def throughput_cases(self, dry_run: bool) -> list[Case]:
        cases = ((2, 6, 3),) if dry_run else self.cases
        return [dict(zip(("requests", "prompt_tokens", "output_tokens"), case, strict=True)) for case in cases]


SETTINGS = {
    "mistral-7b": Setting("mistral-7b", None, 128, ((128, 512, 128), (32, 512, 128), (1, 512, 128), (256, 128, 256))),
    "yi-34b": Setting("yi-34b", None, 64, ((64, 512, 64), (1, 512, 64))),
    "llama2-70b-w8": Setting("llama2-70b", "w8", 64, ((64, 512, 64), (1, 512, 64))),
}


def run(results: Results, setting: Setting, backends: Sequence[str], block_size: int, dry_run: bool) -> bool:
    """All rows of a model, one backend after another.

    Returns:
      Whether every row was reached.
    """
    roofs = current_roofs(results, dry_run)
    model = load_model_yaml(config_path("models", setting.name))
    if dry_run:
        model = _shrink(model)
        setting = dataclasses.replace(setting, max_num_seqs=4, max_model_len=64, buckets=(8,))
    for num_seqs in sorted({32, setting.max_num_seqs} if not dry_run else {2}):
        measured = functools.partial(host_time, num_seqs, 10 if dry_run else 300)
        results.measure(f"host time, {num_seqs} decodes", measured, kind="host", num_seqs=num_seqs)
    params: dict[str, Array] = {}
    for backend in ("xla",) if dry_run else backends:
        engine = EngineConfig(
            max_model_len=setting.max_model_len,
            max_num_seqs=setting.max_num_seqs,
            token_budget=setting.buckets[-1],
            token_buckets=setting.buckets,
            quantization=setting.quantization,
            attention_backend=backend,
            block_size=block_size,
            seed=0,
        )
        serving = Serving(model, engine, params)
        done = _rows(results, setting, serving, roofs, dry_run)
        params = serving.params
        serving.close()
        if not done:
            return False
    return True


def _rows(results: Results, setting: Setting, serving: "Serving", roofs: Roofs, dry_run: bool) -> bool:
    backend = serving.engine_config.attention_backend
    steps = step_cases(setting)
    cases = setting.throughput_cases(dry_run)
    keys = [f"step {backend} {kind}, bucket {bucket}, KV {kv_len}" for kind, bucket, kv_len, _ in steps]
    keys += [f"serving {backend} {case_name(case)}" for case in cases]
    if all(map(results.is_done, keys)):
        return True
    # The compile cache may hold programs of an earlier run: every start tells its own number of programs and seconds.
    starts = [row for key, row in results.rows.items() if key.startswith(f"start-up {backend}")]
    if sum(row["status"] != "measured" for row in starts) >= MAX_ATTEMPTS:
        return True
    number = 1 + len(starts)
    if not results.measure(f"start-up {backend}, run {number}", serving.start, kind="start-up", backend=backend):
        return False
    if not serving.has_started:
        return True
    for key, (kind, bucket, kv_len, chunks) in zip(keys, steps, strict=False):
        measured = functools.partial(serving.time_step, bucket, chunks, roofs, dry_run)
        fields = {"backend": backend, "kind": "step", "step": kind, "bucket": bucket, "kv_len": kv_len}
        if not results.measure(key, measured, **fields):
            return False
    for key, case in zip(keys[len(steps) :], cases, strict=True):
        fields = {"backend": backend, "kind": "throughput", **case}
        if not results.measure(key, functools.partial(serving.serve, case), **fields):
            return False
    return True


def step_cases(setting: Setting) -> list[tuple[str, int, int, Chunks]]:
    """``(kind, bucket, KV length, chunks)``: all rows decode, one prompt fills the bucket, or both share it."""
    found, longest = [], setting.max_model_len - 1
    for bucket in setting.buckets:
        if bucket <= setting.max_num_seqs:
            kv_lens = sorted({min(512, longest), min(2048, longest), longest})
            found += [("decode", bucket, kv_len, ((1, kv_len),) * bucket) for kv_len in kv_lens]
        if bucket > 1:
            found.append(("prefill", bucket, bucket, ((bucket, bucket),)))
        decodes = min(setting.max_num_seqs // 2, bucket // 2)
        if decodes > 1:
            kv_len = min(2048, longest)
            chunk = bucket - decodes
            found.append(("mixed", bucket, kv_len, (*((1, kv_len),) * decodes, (chunk, max(chunk, kv_len)))))
    return found


class Serving:
    """The engine of one attention backend.

    Args:
      model, engine_config: what to serve and how.
      params: weights that an earlier one drew, or empty.
    """

    def __init__(self, model: ModelConfig, engine_config: EngineConfig, params: dict[str, Array]):
        self.model = model
        self.engine_config = engine_config
        self.params = params
        self._runner: Runner | None = None
        self._engine: Engine | None = None
        self._cache: CacheConfig | None = None

    def start(self) -> dict[str, Any]:
        """Draws weights where there are none, sizes the cache, compiles everything."""
        cache_directory = use_compile_cache()
        num_cached = sum(1 for _ in cache_directory.glob("*")) if cache_directory.is_dir() else 0
        times = [time.perf_counter()]
        if not self.params:
            self.params = draw_parameters(self.model, self.engine_config)
        times.append(time.perf_counter())
        self._cache = plan_cache(self.model, self.engine_config)
        times.append(time.perf_counter())
        self._runner = Runner(self.model, self.params, self.engine_config, self._cache, progress=False)
        self._engine = build_engine(self.model, self.engine_config, self._cache, self._runner, None)
        times.append(time.perf_counter())
        weights, size, plan = (later - earlier for earlier, later in itertools.pairwise(times))
        stats = jax.devices()[0].memory_stats() or {}
        return {
            "draw_weights_s": weights,
            "plan_cache_s": size,
            "compile_s": plan,
            "start_up_s": times[-1] - times[0],
            "num_programs": self._runner.start_up.num_programs,
            "files_in_compile_cache": num_cached,
            "weight_bytes": sum(array.nbytes for array in self.params.values()),
            "cache_blocks": self._cache.num_blocks,
            "temp_bytes": self._runner.start_up.temp_bytes,
            "peak_bytes": stats.get("peak_bytes_in_use", 0),
        }

    def close(self) -> None:
        """Frees the cache; the weights stay with whoever holds `params`."""
        self._runner = self._engine = None
        gc.collect()

    @property
    def has_started(self) -> bool:
        return self._engine is not None

    def time_step(self, bucket: int, chunks: Chunks, roofs: Roofs, dry_run: bool) -> dict[str, Any]:
        """Time of a program against the fewest bytes and operations of the step."""
        runner, cache = self._runner, self._cache
        assert runner is not None
        assert cache is not None
        num_rows = self.engine_config.max_running
        sampling = SamplingTable(num_rows, self.model.vocab_size).arrays()
        buffer = fill_buffer(runner.layouts[bucket], cache, num_rows, chunks, self.model.vocab_size)
        timing = time_calls(lambda: runner.run(bucket, buffer, sampling).drawn.tokens, dry_run=dry_run)
        num_bytes, flops = step_work(self.model, self.params, runner.layouts[bucket].num_seqs, bucket, chunks)
        row = timing.row() | roofs.percent(timing.seconds, num_bytes, flops)
        row |= {"floor_us": roofs.floor_s(num_bytes, flops) * 1e6, "enqueue_us": timing.enqueue_s * 1e6}
        return row | {
            "tokens_s": sum(length for length, _ in chunks) / timing.seconds,
            "bytes": num_bytes,
            "flops": flops,
        }

    def serve(self, case: Case) -> dict[str, Any]:
        """Greedy generation of random prompts through the engine; the second of two runs."""
        runner, engine, longest = self._runner, self._engine, case["prompt_tokens"] + case["output_tokens"]
        assert runner is not None
        assert engine is not None
        params = SamplingParams(max_tokens=case["output_tokens"], temperature=0, ignore_eos=True, detokenize=False)
        generator, seconds, steps = random.Random(0), 0.0, 0
        for _ in range(2):
            prompts = [
                [generator.randrange(10, self.model.vocab_size) for _ in range(case["prompt_tokens"])]
                for _ in range(case["requests"])
            ]
            steps, start_s = 0, time.perf_counter()
            for i, prompt in enumerate(prompts):
                engine.add_request(str(i), prompt, params)
            while engine.has_work:
                engine.step()
                steps += 1
            seconds = time.perf_counter() - start_s
        return {
            "seconds": seconds,
            "steps": steps,
            "output_tok_s": case["requests"] * case["output_tokens"] / seconds,
            "total_tok_s": case["requests"] * longest / seconds,
            "late_compiles": runner.num_late_compiles,
        }


def draw_parameters(model: ModelConfig, engine: EngineConfig) -> dict[str, Array]:
    """Random weights of the spread of `random_parameters`, drawn on the device: 70 billion take seconds, not minutes.

    8-bit weights are drawn as such, uniform over their range, with the scale that gives them that spread.
    """
    shapes = ModelFunction(model, jnp.dtype(engine.dtype), engine.quantization).shapes

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        if dtype == jnp.int8:
            return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
        width = math.sqrt(12)  # a uniform variable has variance width^2 / 12
        values = jax.random.uniform(key, shape, jnp.bfloat16, -width / 2, width / 2)
        return (values * (1 if dtype == jnp.float8_e4m3fn else _STD)).astype(dtype)

    parameters = {}
    for i, (path, leaf) in enumerate(shapes.items()):
        if path.endswith("norm.weight"):
            parameters[path] = jnp.ones(leaf.shape, leaf.dtype)
        elif path.endswith(".bias"):
            parameters[path] = jnp.zeros(leaf.shape, leaf.dtype)
        elif path.endswith(".scale"):
            unit = _STD if engine.quantization == "w8_fp8" else _STD * math.sqrt(12) / 256
            parameters[path] = jnp.full(leaf.shape, unit, leaf.dtype)
        else:
            parameters[path] = draw(jax.random.key(i, impl="rbg"), leaf.shape, leaf.dtype)
    return jax.block_until_ready(parameters)


def fill_buffer(layout: BatchLayout, cache: CacheConfig, num_rows: int, chunks: Chunks, vocab_size: int) -> np.ndarray:
    """A packed step of these chunks, every sequence in blocks of its own, every chunk drawing a token.

    Args:
      layout: of the bucket, which the chunks fill.
      cache: its blocks.
      num_rows: rows of the device, R.
      chunks: ``(length, KV length)``, decodes first.
      vocab_size: tokens are drawn from it.

    Raises:
      Skipped: the cache has too few blocks.
    """
    used = [-(-kv_len // cache.block_size) for _, kv_len in chunks]
    if sum(used) > cache.num_blocks:
        raise Skipped(f"needs {sum(used)} blocks of the cache, which has {cache.num_blocks}")
    rng = np.random.default_rng(0)
    blocks = rng.permutation(cache.num_blocks).astype(np.int32)
    buffer = np.zeros(layout.size, np.int32)
    batch = layout.unpack(buffer)
    batch.write_indices[:] = cache.num_blocks * cache.block_size
    batch.token_rows[:] = num_rows
    batch.targets[:] = -1
    row = first_block = 0
    for s, (length, kv_len) in enumerate(chunks):
        ids = blocks[first_block : first_block + used[s]]
        first_block += used[s]
        rows, positions = slice(row, row + length), np.arange(kv_len - length, kv_len)
        batch.tokens[rows] = rng.integers(0, vocab_size, length)
        batch.positions[rows] = positions
        batch.token_rows[rows] = s
        batch.write_indices[rows] = ids[positions // cache.block_size] * cache.block_size + positions % cache.block_size
        batch.block_tables[s, : used[s]] = ids
        batch.kv_lens[s], batch.rows[s], batch.samples[s] = kv_len, s, 1
        row += length
        batch.chunk_starts[s + 1 :] = row
    batch.num_decodes[0] = sum(length == 1 for length, _ in chunks)
    batch.num_chunks[0] = len(chunks)
    buffer.setflags(write=False)
    return buffer


def step_work(
    model: ModelConfig, params: dict[str, Array], num_rows: int, bucket: int, chunks: Chunks
) -> tuple[float, float]:
    """Fewest bytes (weights once, K and V of every sequence once, new ones written) and operations of a step.

    Products count every row of the bucket, the head every row of sequences; of the embedding the rows looked up.
    """
    embedding, head, layers, num_bytes = 0, 0, 0, 0.0
    for path, array in params.items():
        if path == "embed.weight":
            embedding = array.shape[1]
            num_bytes += array.nbytes if model.tie_embeddings else bucket * embedding * array.dtype.itemsize
            head += array.size if model.tie_embeddings else 0
            continue
        num_bytes += array.nbytes
        if array.ndim > 1 and not path.endswith(".scale"):
            head, layers = (head + array.size, layers) if path.startswith("head.") else (head, layers + array.size)
    heads, flops = model.num_heads * model.head_dim, 2.0 * (bucket * layers + num_rows * head)
    for window in model.windows:
        for length, kv_len in chunks:
            seen = kv_len if window is None else min(kv_len, window + length - 1)
            num_bytes += 2 * 2 * model.num_kv_heads * model.head_dim * (seen + length)
            pairs = visible_pairs(length, kv_len)
            if window is not None:
                pairs = sum(min(window, position + 1) for position in range(kv_len - length, kv_len))
            flops += 4 * heads * pairs
    return num_bytes, flops


def host_time(num_seqs: int, num_steps: int) -> dict[str, Any]:
    """What the host adds to a decode step, with a device that takes no time."""
    seconds = host.step_seconds(num_seqs, num_steps)
    return {"time_us": statistics.median(seconds) * 1e6, "p90_us": sorted(seconds)[len(seconds) * 9 // 10] * 1e6}


def _shrink(model: ModelConfig) -> ModelConfig:
    """The same kind of model in a size that a test can afford."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return dataclasses.replace(model, vocab_size=64, num_layers=1, max_position=128, windows=model.windows[:1], **sizes)
