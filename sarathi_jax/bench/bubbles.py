"""How long the stages of a pipeline wait for each other: engine, scheduler and runner as they are, stages of set times.

The time of a micro-batch in a stage is ``a + b x tokens`` of its bucket, for a compiled program computes its padding.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sarathi_jax.bench.slow_stage import SlowStages, Span
from sarathi_jax.config import CacheConfig, ConfigError, EngineConfig, ModelConfig, Policy, RopeConfig
from sarathi_jax.engine import Engine
from sarathi_jax.executor import DeviceExecutor
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.parallel import TensorSplit, make_meshes, put_parts, split_layers
from sarathi_jax.request import SamplingParams
from sarathi_jax.runner import Runner
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.make import scheduler_of
from sarathi_jax.scheduling.plan import StepPlan, StepResult
from sarathi_jax.weights.checkpoint import random_parameters

LONGEST_PROMPT = 200
LONGEST_OUTPUT = 20
# vllm never cuts a prompt, so that its steps must hold the longest; sarathi has a budget of its own (the paper's tau).
BUCKETS: dict[Policy, tuple[int, ...]] = {"sarathi": (16, 64), "vllm": (16, 64, 128, 256)}
BLOCK_SIZE = 16
SEQS_IN_FLIGHT = 12  # for each stage, so that there are always prompts to fill a step with


@dataclasses.dataclass(frozen=True)
class StageTime:
    """Seconds of a micro-batch in a stage: `base_s` and so much for each token of its bucket."""

    base_s: float = 0.04
    per_token_s: float = 0.0004

    def __call__(self, bucket: int) -> float:
        return self.base_s + self.per_token_s * bucket


@dataclasses.dataclass(frozen=True)
class Load:
    """Requests that are all there from the beginning: prompt and output tokens of each."""

    requests: tuple[tuple[int, int], ...]

    @classmethod
    def draw(cls, num_requests: int, seed: int = 0) -> "Load":
        """Prompts from 16 tokens on by Zipf's law, cut at `LONGEST_PROMPT`; outputs from 4 to `LONGEST_OUTPUT`."""
        generator = np.random.default_rng(seed)
        prompts = np.minimum(16 * generator.zipf(1.5, num_requests), LONGEST_PROMPT).tolist()
        return cls(tuple(zip(prompts, generator.integers(4, LONGEST_OUTPUT + 1, num_requests).tolist(), strict=True)))


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What happened in a run.

    Attributes:
      policy: by which it was scheduled.
      plans: of the micro-batches, in the order in which they entered.
      num_steady: micro-batches that entered while requests were still waiting, hence before the load ran out.
      spans: one a stage and micro-batch.
      time_of: of a stage.
    """

    policy: str
    plans: tuple[StepPlan, ...]
    num_steady: int
    spans: tuple[Span, ...]
    time_of: StageTime

    @property
    def num_stages(self) -> int:
        return 1 + max(span.stage for span in self.spans)

    @property
    def padding(self) -> float:
        """Share of the steady micro-batches' buckets that is padding."""
        steady = self.plans[: self.num_steady]
        return 1 - sum(plan.num_tokens for plan in steady) / sum(plan.bucket for plan in steady)

    def of_stage(self, stage: int) -> list[Span]:
        """In order."""
        return sorted((span for span in self.spans if span.stage == stage), key=lambda span: span.step)

    def ideal_share(self) -> float:
        """Throughput of the steady part over that of a pipeline whose last stage never waits once it is filled."""
        times = [self.time_of(plan.bucket) for plan in self.plans[: self.num_steady]]
        ideal_s = sum(times) + (self.num_stages - 1) * times[0]
        end_s = self.of_stage(self.num_stages - 1)[self.num_steady - 1].end_s
        return ideal_s / (end_s - self.of_stage(0)[0].begin_s)

    def bubble_share(self, stage: int) -> float:
        """Share of the time for which a stage waits between its first micro-batch and its last steady one."""
        spans = self.of_stage(stage)[: self.num_steady]
        busy_s = sum(span.end_s - span.begin_s for span in spans)
        return 1 - busy_s / (spans[-1].end_s - spans[0].begin_s)

    @property
    def tokens_per_s(self) -> float:
        """Prompt and output tokens computed a second in the steady part."""
        last = self.of_stage(self.num_stages - 1)[self.num_steady - 1]
        tokens = sum(plan.num_tokens for plan in self.plans[: self.num_steady])
        return tokens / (last.end_s - self.of_stage(0)[0].begin_s)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return max(span.end_s for span in self.spans) - min(span.begin_s for span in self.spans)

    @property
    def overlap_share(self) -> float:
        """Share of the micro-batches that stage 0 ran while the one before was in stage 1."""
        first, second = self.of_stage(0), self.of_stage(1)
        pairs = list(zip(first[1:], second[:-1], strict=True))
        return sum(max(a.begin_s, b.begin_s) < min(a.end_s, b.end_s) for a, b in pairs) / len(pairs)


class _Recorder:
    """An executor that keeps the plans and how many sequences were waiting behind each.

    The host waits for `pause_s` behind each step. It has the time of a whole step to plan and launch the one after the
    next, and would do so at the beginning, just when the stages hand over: real devices need no Python for that, these
    do, and a busy host would slow them.
    """

    def __init__(self, executor: DeviceExecutor, scheduler: Scheduler, pause_s: float):
        self._executor = executor
        self._scheduler = scheduler
        self._pause_s = pause_s
        self.plans: list[StepPlan] = []
        self.num_waiting: list[int] = []

    def launch(self, plan: StepPlan | None) -> Any:
        if plan is not None:
            self.plans.append(plan)
            self.num_waiting.append(self._scheduler.num_waiting)
        return self._executor.launch(plan)

    def collect(self, handle: Any) -> StepResult:
        result = self._executor.collect(handle)
        time.sleep(self._pause_s)
        return result


class SlowPipeline:
    """A tiny random model in a pipeline of virtual devices that take `time_of` a micro-batch.

    Tensor parallelism is left out: in one process, XLA on CPU runs programs over several devices one after another.

    Args:
      num_stages: pp.
      time_of: of a stage.

    Raises:
      ConfigError: fewer than two devices for each stage. XLA has a thread for each device; a sleeping stage keeps one,
        and transfers need others.
    """

    def __init__(self, num_stages: int, time_of: StageTime):
        if len(jax.devices()) < 2 * num_stages:
            raise ConfigError(f"{num_stages} sleeping stages need JAX_NUM_CPU_DEVICES={2 * num_stages} or more")
        max_model_len = LONGEST_PROMPT + LONGEST_OUTPUT
        self._model = ModelConfig(
            "decoder", 64, 32, 64, num_stages, 2, 2, 16, max_model_len, 1e-5, RopeConfig(), (None,) * num_stages
        )
        max_num_seqs = SEQS_IN_FLIGHT * num_stages
        num_blocks = max_num_seqs * (-(-max_model_len // BLOCK_SIZE) + 1)
        self._cache = CacheConfig(num_blocks, BLOCK_SIZE, max_model_len)
        self._engine = EngineConfig(
            dtype="float32",
            max_num_seqs=max_num_seqs,
            token_buckets=tuple(sorted(set().union(*BUCKETS.values()))),
            block_size=BLOCK_SIZE,
            pp=num_stages,
            seed=0,
        )
        meshes = make_meshes(self._model, self._engine, jax.devices())
        params = {}
        for stage, mesh in zip(split_layers(self._model, self._engine), meshes, strict=True):
            put = functools.partial(put_parts, TensorSplit(self._model, 1), mesh)
            params[stage.index] = random_parameters(self._model, "float32", 0, layers=stage.layers, put=put)
        self._runner = Runner(self._model, params, self._engine, self._cache, meshes, progress=False)
        self._time_of = time_of
        self._slow = SlowStages(self._runner, time_of)

    def run(self, policy: Policy, load: Load) -> Timeline:
        """Serves all requests.

        Args:
          policy: a key of `BUCKETS`.
          load: the requests.
        """
        sizes = Sizes(
            block_size=BLOCK_SIZE,
            buckets=BUCKETS[policy],
            max_num_seqs=self._engine.max_num_seqs,
            window=None,
            max_model_len=self._cache.max_model_len,
            num_stages=self._engine.pp,
        )
        scheduler = scheduler_of(policy, BlockPool(self._cache.num_blocks), sizes)
        sequences = {}
        table = SamplingTable(self._engine.max_running, self._model.vocab_size)
        executor = DeviceExecutor(self._runner, table, sequences, scheduler.table)
        executor.warm_up()
        self._slow.take_spans()
        recorder = _Recorder(executor, scheduler, self._time_of(0) / 3)
        engine = Engine(self._model, self._engine, self._cache, scheduler, recorder, sequences)
        for i, (num_prompt, num_output) in enumerate(load.requests):
            params = SamplingParams(max_tokens=num_output, temperature=0, ignore_eos=True, detokenize=False)
            engine.add_request(str(i), [1 + j % 60 for j in range(num_prompt)], params)
        with _attentive():
            while engine.has_work:
                engine.step()
        num_steady = next((i for i, number in enumerate(recorder.num_waiting) if not number), len(recorder.plans))
        return Timeline(
            policy, tuple(recorder.plans), max(1, num_steady), tuple(self._slow.take_spans()), self._time_of
        )


@contextlib.contextmanager
def _attentive() -> Iterator[None]:
    """Lets a stage have Python at once when its sleep is over, where it would wait for up to 5 ms by default."""
    kept = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(kept)


def bubbles_table(timelines: Sequence[Timeline]) -> str:
    """In Markdown, a row a policy; all but the last column of the steady part."""
    rows = [
        "| policy | micro-batches | of the ideal | bubbles of the stages | padding | tokens/s | whole run |",
        "|" + "---|" * 7,
    ]
    for one in timelines:
        bubbles = ", ".join(f"{one.bubble_share(stage):.1%}" for stage in range(one.num_stages))
        rows.append(
            f"| {one.policy} | {one.num_steady} of {len(one.plans)} | {one.ideal_share():.3f} | {bubbles} | "
            f"{one.padding:.1%} | {one.tokens_per_s:.0f} | {one.seconds:.2f} s |"
        )
    return "\n".join(rows)
