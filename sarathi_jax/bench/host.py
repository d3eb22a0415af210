"""What the host adds to a step: schedule + pack + commit, with a device that takes no time.

python -m sarathi_jax.bench.host --num_seqs 32
"""

import statistics
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from sarathi_jax.batch import BatchLayout
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig, RopeConfig
from sarathi_jax.engine import Engine
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.request import SamplingParams
from sarathi_jax.scheduling.plan import StepPlan, StepResult
from sarathi_jax.scheduling.sarathi import SarathiScheduler
from sarathi_jax.sequence import Sequence as TokenSequence

_NUM_SEQS = flags.DEFINE_integer("num_seqs", 32, "running sequences", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 300, "decode steps that are timed", lower_bound=1)


class PackingExecutor:
    """Packs each plan as the device executor does, then answers at once with token 1."""

    def __init__(self, layouts: dict[int, BatchLayout], sequences: dict[int, TokenSequence], scheduler):
        self._layouts = layouts
        self._sequences = sequences
        self._scheduler = scheduler

    def launch(self, plan: StepPlan | None) -> StepPlan | None:
        if plan is not None:
            self._layouts[plan.bucket].pack(plan, self._sequences, self._scheduler.table)
        return plan

    def collect(self, handle: StepPlan) -> StepResult:
        return StepResult(np.ones(len(handle.chunks), np.int32))


def step_seconds(num_seqs: int, num_steps: int) -> list[float]:
    """Host time of each of `num_steps` decode steps of `num_seqs` sequences with 512 tokens of context."""
    context = 512
    config = EngineConfig(max_num_seqs=num_seqs, token_budget=max(512, num_seqs))
    length = context + num_steps + 2
    cache = CacheConfig(num_seqs * (-(-length // config.block_size) + 1), config.block_size, length)
    model = ModelConfig("decoder", 32000, 64, 64, 1, 1, 1, 64, length, 1e-5, RopeConfig(), (None,))
    pool = BlockPool(cache.num_blocks)
    scheduler = SarathiScheduler(
        pool,
        block_size=cache.block_size,
        buckets=config.buckets,
        max_num_seqs=num_seqs,
        window=None,
        max_model_len=cache.max_model_len,
        prefix_caching=config.prefix_caching,
    )
    sequences: dict[int, TokenSequence] = {}
    layouts = {bucket: BatchLayout(bucket, num_seqs, cache) for bucket in config.buckets}
    executor = PackingExecutor(layouts, sequences, scheduler)
    engine = Engine(model, config, cache, scheduler, executor, sequences)
    params = SamplingParams(max_tokens=num_steps + 1, temperature=0, detokenize=False)
    for i in range(num_seqs):
        engine.add_request(str(i), [1] * context, params)
    while any(seq.num_output == 0 for seq in sequences.values()):
        engine.step()
    seconds = []
    while engine.has_work:
        start_s = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start_s)
    return seconds


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    seconds = step_seconds(_NUM_SEQS.value, _STEPS.value)
    print(
        f"{_NUM_SEQS.value} decodes a step: median {statistics.median(seconds) * 1e3:.3f} ms, "
        f"90th percentile {sorted(seconds)[len(seconds) * 9 // 10] * 1e3:.3f} ms of host time"
    )


if __name__ == "__main__":
    app.run(main)
