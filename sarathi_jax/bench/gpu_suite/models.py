"""Models of true shapes with random weights, end to end: start-up, programs against their roofline, tokens a second."""

import dataclasses
import functools
import gc
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from sarathi_jax.bench import host
from sarathi_jax.bench.gpu_suite.kernels import current_roofs
from sarathi_jax.bench.gpu_suite.peers import case_name
from sarathi_jax.bench.gpu_suite.results import MAX_ATTEMPTS, Results
from sarathi_jax.bench.gpu_suite.steps import Chunks, draw_parameters, fill_buffer, step_work
from sarathi_jax.bench.gpu_suite.timing import Roofs, time_calls
from sarathi_jax.compiling import use_compile_cache
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig, Quantization
from sarathi_jax.engine import Engine
from sarathi_jax.parallel import make_meshes
from sarathi_jax.replica import build_engine
from sarathi_jax.request import SamplingParams
from sarathi_jax.resources import config_path
from sarathi_jax.runner import MicroBatch, Runner, Wanted
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.sizing import plan_cache
from sarathi_jax.weights.directory import load_model_yaml

Case = dict[str, int]


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
        meshes = make_meshes(self.model, self.engine_config, jax.devices())
        self._cache = plan_cache(self.model, self.engine_config, meshes)
        times.append(time.perf_counter())
        params = {0: self.params}
        self._runner = Runner(self.model, params, self.engine_config, self._cache, meshes, progress=False)
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
        buffer = fill_buffer(runner.layouts[bucket], cache, num_rows, chunks, self.model.vocab_size)
        first = MicroBatch(
            bucket, buffer, SamplingTable(num_rows, self.model.vocab_size).changes(), Wanted(len(chunks))
        )
        runner.tick(first)
        again = dataclasses.replace(first, sampling={})
        timing = time_calls(lambda: jax.tree.leaves(runner.tick(again))[0], dry_run=dry_run)
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


def host_time(num_seqs: int, num_steps: int) -> dict[str, Any]:
    """What the host adds to a decode step, with a device that takes no time."""
    seconds = host.step_seconds(num_seqs, num_steps)
    return {"time_us": statistics.median(seconds) * 1e6, "p90_us": sorted(seconds)[len(seconds) * 9 // 10] * 1e6}


def _shrink(model: ModelConfig) -> ModelConfig:
    """The same kind of model in a size that a test can afford."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return dataclasses.replace(model, vocab_size=64, num_layers=1, max_position=128, windows=model.windows[:1], **sizes)
