"""The step loop: schedule, launch, collect, commit. One thread; one step ahead of the device by default."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from sarathi_jax.clock import Clock, WallClock
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.executor import Executor
from sarathi_jax.output import RequestRecord
from sarathi_jax.request import MAX_SEED, Request, RequestError, RequestOutput, SamplingParams
from sarathi_jax.sampling import check_vocabulary
from sarathi_jax.scheduling.base import Scheduler
from sarathi_jax.scheduling.plan import StepPlan, StepResult
from sarathi_jax.sequence import Sequence, Status
from sarathi_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class _Step:
    """A launched step; an empty one where there was nothing to do."""

    plan: StepPlan | None
    handle: Any


class Engine:
    """Serves requests step by step.

    Args:
      model: vocabulary, length and end-of-text tokens.
      config: overlap, seed, and the promised time between tokens.
      cache: the longest sequence.
      scheduler: decides what each step computes.
      executor: runs it.
      sequences: live sequences by id, shared with the executor, which reads them.
      tokenizer: None: token ids in, token ids out.
      clock: stamps the metrics.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        cache: CacheConfig,
        scheduler: Scheduler,
        executor: Executor,
        sequences: dict[int, Sequence],
        tokenizer: Tokenizer | None = None,
        clock: Clock | None = None,
    ):
        self._model = model
        self._config = config
        # Steps under way before one is waited for: one in each stage, and with overlap one more.
        self._depth = config.pp + config.overlap
        self._cache = cache
        self._scheduler = scheduler
        self._executor = executor
        self._sequences = sequences
        self._tokenizer = tokenizer
        self._clock = clock or WallClock()
        self._seeds = np.random.default_rng(config.seed)
        self._records: dict[str, RequestRecord] = {}
        self._in_flight: collections.deque[_Step] = collections.deque()
        self._num_sequences = 0

    def __repr__(self) -> str:
        return f"Engine({len(self._records)} requests, {self._scheduler})"

    @property
    def num_requests(self) -> int:
        """Requests that have not finished."""
        return len(self._records)

    @property
    def has_work(self) -> bool:
        return bool(self._records) or any(step.plan is not None for step in self._in_flight)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        streams: bool = False,
        priority: int = 0,
        slo_ms: float | None = None,
    ) -> None:
        """Accepts a request; `step` will report it.

        Args:
          request_id: unique among live requests.
          prompt_token_ids: at least one token of the vocabulary.
          params: how to draw.
          prompt: the text, to be given back.
          streams: report every token, not only the end.
          priority: less goes first.
          slo_ms: longest time between two of its tokens, in milliseconds; None: the engine's.

        Raises:
          RequestError: it can never be served; the message names what to change.
        """
        if request_id in self._records:
            raise RequestError(f"request_id={request_id!r} is in use: choose another")
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling parameters of type {type(params).__name__}: give SamplingParams, which "
                "SamplingParams.from_dict makes from a mapping"
            )
        if not isinstance(prompt_token_ids, Iterable) or isinstance(prompt_token_ids, str | bytes | Mapping):
            raise RequestError(f"a prompt of type {type(prompt_token_ids).__name__}: give a list of token ids")
        token_ids = tuple(prompt_token_ids)
        self._check(token_ids, params)
        request = self._resolve(request_id, token_ids, params, prompt, streams, priority, slo_ms)
        sequences = [Sequence(self._num_sequences + i, request, i) for i in range(params.n)]
        self._num_sequences += params.n
        self._records[request_id] = RequestRecord(request, self._tokenizer)
        for seq in sequences:
            self._sequences[seq.seq_id] = seq
            self._scheduler.add(seq)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once and frees its blocks; None if there is no such request."""
        record = self._records.get(request_id)
        if record is None:
            return None
        for seq in [seq for seq in self._sequences.values() if seq.request is record.request]:
            self._end(seq, record.samples[seq.index].end("abort"))
        return self._report(record)

    def step(self) -> list[RequestOutput]:
        """Starts one step, if there is anything to do, and reports an earlier one: with overlap the one before it, in
        a pipeline the one that has come through.

        Returns:
          The requests that finished, and those that stream and got a token.
        """
        self._in_flight.append(self._launch(self._scheduler.schedule()))
        due = self._in_flight.popleft() if len(self._in_flight) == self._depth else None
        return [] if due is None or due.plan is None else self._commit(due.plan, self._executor.collect(due.handle))

    def _launch(self, plan: StepPlan | None) -> _Step:
        if plan is not None:
            now_s = self._clock.now_s()
            for chunk in plan.chunks:
                record = self._record_of(self._sequences[chunk.seq_id])
                if record.first_scheduled_s is None:
                    record.first_scheduled_s = now_s
            for seq_id in plan.preempted:
                self._record_of(self._sequences[seq_id]).num_preemptions += 1
        return _Step(plan, self._executor.launch(plan))

    def _commit(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Hands a step's tokens to their sequences; those that ended meanwhile are passed over."""
        now_s, touched, first = self._clock.now_s(), {}, 0
        drawn = result.tokens.tolist()
        for row, chunk in enumerate(plan.chunks):
            seq = self._sequences.get(chunk.seq_id)
            if seq is not None:
                record = self._record_of(seq)
                record.add_prompt_logprobs(chunk.start, chunk.length, result, first)
                if chunk.samples:
                    touched[seq.request.request_id] = record
                    seq.commit(drawn[row])
                    record.add_logprobs(seq.index, drawn[row], result, row)
                    reason = record.samples[seq.index].add(drawn[row], now_s)
                    if reason is not None:
                        self._end(seq, reason)
            first += chunk.length
        return [self._report(record) for record in touched.values() if record.finished or record.request.streams]

    def _end(self, seq: Sequence, reason: Any) -> None:
        self._scheduler.remove(seq)
        seq.finish(reason)
        del self._sequences[seq.seq_id]

    def _report(self, record: RequestRecord) -> RequestOutput:
        if record.finished:
            record.finished_s = self._clock.now_s()
            del self._records[record.request.request_id]
        return record.output()

    def _record_of(self, seq: Sequence) -> RequestRecord:
        assert seq.status is not Status.FINISHED
        return self._records[seq.request.request_id]

    def _check(self, token_ids: tuple[int, ...], params: SamplingParams) -> None:
        """Refuses a request that can never be served."""
        if not token_ids:
            raise RequestError("the prompt is empty: give at least one token")
        for token in token_ids:
            is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not is_integer or not 0 <= token < self._model.vocab_size:
                raise RequestError(
                    f"token id {token!r} is not an integer in [0, {self._model.vocab_size}), the model's vocabulary"
                )
        check_vocabulary(params, self._model.vocab_size)
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer, which this model has not got: use stop_token_ids")
        longest = self._scheduler.longest_sequence
        if len(token_ids) >= longest:
            limit = "max_model_len" if longest == self._cache.max_model_len else "the KV cache"
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; {limit} leaves room for {longest - 1} and one of output: "
                "shorten the prompt, or raise max_model_len or num_blocks"
            )
        if len(token_ids) > self._scheduler.longest_prompt:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens, and a scheduling policy that never cuts prompts can serve "
                f"{self._scheduler.longest_prompt}, its largest step: raise token_budget, or use the policy sarathi"
            )
        room = longest - len(token_ids)
        if params.min_tokens > room:
            raise RequestError(f"min_tokens={params.min_tokens}, but only {room} tokens fit behind this prompt")

    def _resolve(
        self,
        request_id: str,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        prompt: str | None,
        streams: bool,
        priority: int,
        slo_ms: float | None,
    ) -> Request:
        """Decides everything that a request leaves open."""
        room = self._scheduler.longest_sequence - len(token_ids)
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(map(int, token_ids)),
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=int(self._seeds.integers(MAX_SEED + 1)) if params.seed is None else params.seed,
            stop_token_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else frozenset(self._model.eos_token_ids)),
            arrival_s=self._clock.now_s(),
            prompt=prompt,
            streams=streams,
            priority=priority,
            pace_s=self._pace_s(params, slo_ms),
        )

    def _pace_s(self, params: SamplingParams, slo_ms: float | None) -> float | None:
        """The longest that pp steps in a row may take so that two tokens of the request come in the promised time.

        Raises:
          RequestError: a promise that cannot be kept.
        """
        promised_ms = self._config.tbt_slo_ms if slo_ms is None else slo_ms
        if slo_ms is not None:
            if isinstance(slo_ms, bool) or not isinstance(slo_ms, int | float) or not 0 < slo_ms < math.inf:
                raise RequestError(f"slo_ms={slo_ms!r} must be a positive number of milliseconds")
            if not self._scheduler.keeps_pace:
                raise RequestError("slo_ms: no time between tokens can be promised by this server; leave it out")
        if promised_ms is None:
            return None
        # Under a grammar a token must be known here before the next is drawn: a step later than else, with overlap.
        num_stages = self._config.pp
        num_steps = self._depth if params.structured_outputs is not None else num_stages
        return promised_ms / 1000 * num_stages / num_steps
