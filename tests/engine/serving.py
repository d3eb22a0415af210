"""Engines of any size and schedule around one compiled model, and the comparison of what they draw.

Compiling costs seconds, a step milliseconds. So a model is compiled once (`Served`), with a cache far larger than any
test needs, and every test builds the scheduler that it wants around it: fewer blocks than the cache has (preemption),
some of the compiled buckets, a limit on the tokens of a step (chunking), one sequence at a time (the reference).
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarathi_jax.config import Policy
from sarathi_jax.engine import Engine
from sarathi_jax.executor import DeviceExecutor
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.llm import LLM
from sarathi_jax.request import Logprob, RequestOutput, SamplingParams
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.make import scheduler_of
from sarathi_jax.scheduling.plan import Chooser, Executor, StepPlan, StepResult
from sarathi_jax.sequence import Sequence as Sample
from tests.kv.owners import check_owners
from tests.tiny_models import write_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE, write_tiny_tokenizer

type Ask = tuple[list[int], SamplingParams]

MAX_SEQS = 8
BLOCK_SIZE = 8
MAX_LEN = 160
NUM_BLOCKS = 4096
"""Makes the cache tens of megabytes, so that a copy of it would show in the memory of a step."""

TOP = 20


class Watched:
    """An executor that keeps the plans it was given."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self.plans: list[StepPlan] = []

    def launch(self, plan: StepPlan | None) -> Any:
        if plan is not None:
            self.plans.append(plan)
        return self._executor.launch(plan)

    def collect(self, handle: Any) -> StepResult:
        return self._executor.collect(handle)


class Scripted:
    """An executor that needs no model: every sample says what its script says.

    Args:
      scripts: tokens of sample i of any request.
      sequences: live sequences by id, shared with the engine.
    """

    def __init__(self, scripts: Sequence[Sequence[int]], sequences: Mapping[int, Sample]):
        self._scripts = scripts
        self._sequences = sequences

    def launch(self, plan: StepPlan | None) -> list[int]:
        tokens = []
        for chunk in () if plan is None else plan.chunks:
            seq = self._sequences[chunk.seq_id]
            tokens.append(self._scripts[seq.index][chunk.start + chunk.length - seq.num_prompt] if chunk.samples else 0)
        return tokens

    def collect(self, handle: list[int]) -> StepResult:
        return StepResult(np.array(handle, np.int32))


class Bench:
    """An engine that checks after every step that no block is lost or owned by anyone who does not know.

    Args:
      engine: to drive.
      scheduler: the engine's.
      pool: the scheduler's.
      plans: of the steps so far, filled by the engine's executor.
    """

    def __init__(self, engine: Engine, scheduler: Scheduler, pool: BlockPool, plans: Sequence[StepPlan]):
        self.engine = engine
        self.scheduler = scheduler
        self.pool = pool
        self.plans = plans

    def step(self) -> list[RequestOutput]:
        outputs = self.engine.step()
        self.check_blocks()
        return outputs

    def check_blocks(self) -> None:
        check_owners(self.pool, [self.scheduler.table(seq.seq_id) for seq in self.scheduler.running])

    def check_idle(self) -> None:
        """Nothing runs, nothing waits, every block is free."""
        assert not self.engine.has_work
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.pool.num_free == self.pool.num_total

    def drain(self) -> dict[str, RequestOutput]:
        """Steps until nothing is left; the finished requests by id."""
        finished = {}
        while self.engine.has_work:
            finished |= {output.request_id: output for output in self.step() if output.finished}
            assert len(self.plans) < 5000, "the engine makes no progress"
        self.check_idle()
        return finished

    def run(self, asks: Sequence[Ask]) -> list[RequestOutput]:
        """Serves all requests together; their outputs in order."""
        for i, (prompt, params) in enumerate(asks):
            self.engine.add_request(str(i), prompt, params)
        finished = self.drain()
        return [finished[str(i)] for i in range(len(asks))]


class Served:
    """A compiled model.

    Args:
      llm: whose runner the benches share.
    """

    def __init__(self, llm: LLM):
        self.llm = llm
        self.model = llm.model_config
        self.config = llm.engine_config
        self.runner = llm._loaded.replicas[0].runner
        self.tokenizer = llm.tokenizer
        self._references: dict[str, RequestOutput] = {}

    def bench(
        self,
        *,
        overlap: bool = True,
        buckets: tuple[int, ...] | None = None,
        num_blocks: int = NUM_BLOCKS,
        max_num_seqs: int = MAX_SEQS,
        chooser: Chooser | None = None,
        scripts: Sequence[Sequence[int]] | None = None,
        policy: Policy = "sarathi",
        prefix_caching: bool = True,
    ) -> Bench:
        """An engine of its own around the shared programs. Use one at a time: they share the cache.

        Args:
          overlap: as in `EngineConfig`.
          buckets: some of the compiled ones; None: all.
          num_blocks: at most `NUM_BLOCKS`; few make the scheduler preempt.
          max_num_seqs: at most `MAX_SEQS`; 1 serves one sequence after another.
          chooser: limits the tokens of a step.
          scripts: what the samples of every request say, in place of the model.
          policy: who decides what a step computes; `chooser` is for those that cut prompts.
          prefix_caching: as in `EngineConfig`.
        """
        pool = BlockPool(num_blocks)
        sizes = Sizes(
            block_size=BLOCK_SIZE,
            buckets=buckets or self.config.buckets,
            max_num_seqs=max_num_seqs,
            window=self.model.cache_window,
            max_model_len=self.llm.cache_config.max_model_len,
            num_stages=self.config.pp,
            prefix_caching=prefix_caching,
        )
        scheduler = scheduler_of(policy, pool, sizes, chooser)
        sequences = {}
        table = SamplingTable(self.config.max_running, self.model.vocab_size)
        device = DeviceExecutor(self.runner, table, sequences, scheduler.table)
        executor = Watched(device if scripts is None else Scripted(scripts, sequences))
        config = dataclasses.replace(self.config, overlap=overlap)
        cache = self.llm.cache_config
        engine = Engine(self.model, config, cache, scheduler, executor, sequences, self.tokenizer)
        return Bench(engine, scheduler, pool, executor.plans)

    def face(self, **sizes: Any) -> tuple[LLM, Bench]:
        """An `LLM` of its own around a new bench, which closes without the others.

        Args:
          **sizes: as in `bench`.
        """
        bench, llm = self.bench(**sizes), copy.copy(self.llm)
        llm._engine = bench.engine
        return llm, bench

    def alone(self, asks: Sequence[Ask]) -> list[RequestOutput]:
        """The reference: one sequence at a time, synchronous, each prompt in as few steps as can be, ample blocks, of
        which nobody else has written any."""
        missing = {repr(ask): ask for ask in asks if repr(ask) not in self._references}
        bench = self.bench(overlap=False, buckets=self.config.buckets[-1:], max_num_seqs=1, prefix_caching=False)
        outputs = bench.run(list(missing.values()))
        self._references |= dict(zip(missing, outputs, strict=True))
        assert all(output.metrics.num_preemptions == 0 for output in outputs)
        return [self._references[repr(ask)] for ask in asks]


@dataclasses.dataclass
class Parity:
    """Compares outputs token for token, and counts what it excuses.

    Attributes:
      num_tokens: compared.
      num_excused: sequences whose comparison ended at a near tie.
    """

    num_tokens: int = 0
    num_excused: int = 0

    def check(
        self,
        outputs: Sequence[RequestOutput],
        expected: Sequence[RequestOutput],
        *,
        tie: float | None = 1e-4,
        atol: float = 1e-4,
    ) -> None:
        """Asserts the same tokens, texts, ends and log-probabilities.

        A different token is excused where the reference's best two candidates lie closer than `tie` of the logits'
        scale, for which the distance of the best from the `TOP`-th stands, which is smaller. The sequence is not
        compared any further. Only greedy requests with log-probabilities can be excused.

        Args:
          outputs: of the run under test.
          expected: of the reference.
          tie: share of the scale below which two candidates count as equal; None: any difference is excused.
          atol: of log-probabilities.
        """
        assert len(outputs) == len(expected)
        for output, reference in zip(outputs, expected, strict=True):
            assert output.prompt_token_ids == reference.prompt_token_ids
            _check_tables(output.prompt_logprobs, reference.prompt_logprobs, atol)
            for ours, theirs in zip(output.outputs, reference.outputs, strict=True):
                differ = [a != b for a, b in zip(ours.token_ids, theirs.token_ids, strict=False)]
                length = differ.index(True) if any(differ) else len(theirs.token_ids)
                self.num_tokens += length
                if theirs.logprobs is not None:
                    assert ours.logprobs is not None
                    _check_tables(ours.logprobs[:length], theirs.logprobs[:length], atol)
                if length < len(theirs.token_ids):
                    gap = _relative_gap(theirs.logprobs[length] if theirs.logprobs else None)
                    assert tie is None or gap < tie, (
                        f"token {length} of sample {ours.index} of request {output.request_id} is "
                        f"{ours.token_ids[length]}, not {theirs.token_ids[length]}; gap {gap}"
                    )
                    self.num_excused += 1
                    continue
                # All but the id, which is the bench's own.
                assert dataclasses.replace(ours, logprobs=None) == dataclasses.replace(theirs, logprobs=None)


def build(name: str, directory: Path, *, with_tokenizer: bool = True, changes: dict[str, Any] | None = None, **config):
    """Writes a tiny model and loads it; two layers, so that a program compiles in seconds."""
    changes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2} | (changes or {})
    write_tiny_model(name, directory, changes=changes, dtype=config.get("dtype", "float32"))
    if with_tokenizer:
        write_tiny_tokenizer(directory)
    settings = {
        "max_model_len": MAX_LEN,
        "max_num_seqs": MAX_SEQS,
        "token_buckets": (16, 64),
        "block_size": BLOCK_SIZE,
        "num_blocks": NUM_BLOCKS,
        "seed": 0,
    }
    return Served(LLM(directory, progress=False, **settings | config))


def prompt_of(length: int, key: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    return np.random.default_rng([length, key]).integers(5, VOCAB_SIZE, length).tolist()


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 16, "temperature": 0, "ignore_eos": True, "logprobs": TOP} | fields)


def drawn(**fields: Any) -> SamplingParams:
    """Seeded random draws."""
    return SamplingParams(**{"max_tokens": 16, "seed": 11, "ignore_eos": True, "logprobs": TOP} | fields)


def at_most(num_tokens: int) -> Chooser:
    """Lets a step hold no more than `num_tokens`, as far as its decodes allow."""
    return lambda demand: num_tokens


def random_limit(seed: int) -> Chooser:
    """Another limit each step: chunks of any length, at any boundary."""
    rng = np.random.default_rng(seed)
    return lambda demand: demand.num_decodes + int(rng.integers(0, 24))


def _check_tables(
    ours: Sequence[dict[int, Logprob] | None] | None, theirs: Sequence[dict[int, Logprob] | None] | None, atol: float
) -> None:
    """The same values by rank, and by token wherever both lists have it: near ties may swap or fall off the end."""
    assert (ours is None) == (theirs is None)
    if ours is None or theirs is None:
        return
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is None or other is None:
            continue
        assert len(one) == len(other)
        by_rank = [[entry.logprob for entry in table.values()] for table in (one, other)]
        np.testing.assert_allclose(*by_rank, rtol=0, atol=atol)
        shared = one.keys() & other.keys()
        assert len(shared) >= len(one) - 2
        np.testing.assert_allclose(
            [one[i].logprob for i in shared], [other[i].logprob for i in shared], rtol=0, atol=atol
        )


def _relative_gap(table: dict[int, Logprob] | None) -> float:
    if table is None or len(table) < 2:
        return float("inf")
    values = [entry.logprob for entry in table.values()]
    return (values[0] - values[1]) / (values[0] - values[-1])
