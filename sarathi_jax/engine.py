"""The step loop: schedule, launch, collect, commit. One thread; one step ahead of the device by default."""

import collections
import dataclasses
import math
from collections.abc import Sequence as Seq
from typing import Any

from sarathi_jax.clock import Clock, WallClock
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.intake import Intake
from sarathi_jax.output import RequestRecord, SampleRecord
from sarathi_jax.request import Request, RequestError, RequestOutput, SamplingParams, StructuredOutputsParams
from sarathi_jax.scheduling.base import Scheduler
from sarathi_jax.scheduling.plan import Executor, StepPlan, StepResult
from sarathi_jax.sequence import Sequence
from sarathi_jax.structured import Grammars, Matcher
from sarathi_jax.telemetry.steps import Observer, StepRecord
from sarathi_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class _Step:
    """A launched step; an empty one where there was nothing to do.

    Attributes:
      scheduled_s, launched_s: when its planning began, and when it was on its way.
    """

    plan: StepPlan | None
    handle: Any
    scheduled_s: float
    launched_s: float


@dataclasses.dataclass
class _Came:
    """What came with a step: tokens, and how long those who got them had waited.

    Attributes:
      now_s: when it came.
      request_ids: of the step's chunks, "" for those that had ended meanwhile.
    """

    now_s: float
    request_ids: list[str] = dataclasses.field(default_factory=list)
    num_drawn: int = 0
    ttfts_s: list[float] = dataclasses.field(default_factory=list)
    tbts_s: list[float] = dataclasses.field(default_factory=list)

    def count(self, record: RequestRecord, index: int) -> None:
        """Counts a token of a sample, before the record has it."""
        self.num_drawn += 1
        earlier_s = record.samples[index].token_s
        if earlier_s:
            self.tbts_s.append(self.now_s - earlier_s[-1])
        elif not record.has_begun:
            self.ttfts_s.append(self.now_s - record.request.arrival_s)


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
        # Steps under way before one is waited for: one in each stage, and with overlap one more.
        self._depth = config.pp + config.overlap
        self._scheduler = scheduler
        self._executor = executor
        self._sequences = sequences
        self._tokenizer = tokenizer
        self._clock = clock or WallClock()
        self._intake = Intake(model, config, cache, scheduler, tokenizer is not None, self._clock)
        # Grammars speak of text and of its end.
        self._grammars = None
        if tokenizer is not None and model.eos_token_ids:
            self._grammars = Grammars(tokenizer, model.vocab_size, model.eos_token_ids)
        self._matchers: dict[int, Matcher] = {}
        self._observers: list[Observer] = []
        self._records: dict[str, RequestRecord] = {}
        self._owners: dict[int, RequestRecord] = {}  # of the live sequences, by id
        self._in_flight: collections.deque[_Step] = collections.deque()
        self._num_sequences = 0
        self._ended_s = -math.inf

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
        arrival_s: float | None = None,
    ) -> Request:
        """Accepts a request; `step` will report it.

        Args:
          request_id: unique among live requests.
          prompt_token_ids: at least one token of the vocabulary.
          params: how to draw.
          prompt: the text, to be given back.
          streams: report every token, not only the end.
          priority: less goes first.
          slo_ms: longest time between two of its tokens, in milliseconds; None: the engine's.
          arrival_s: when it really came, on the engine's clock, if it had to wait for a step to end; None: now.

        Returns:
          The request as it is served.

        Raises:
          RequestError: it can never be served; the message names what to change.
        """
        if request_id in self._records:
            raise RequestError(f"request_id={request_id!r} is in use: choose another")
        request = self._intake.accept(
            request_id, prompt_token_ids, params, prompt, streams, priority, slo_ms, arrival_s
        )
        matchers = self._new_matchers(params)
        sequences = [Sequence(self._num_sequences + i, request, i) for i in range(params.n)]
        self._num_sequences += params.n
        self._records[request_id] = record = RequestRecord(request, self._tokenizer)
        for seq, matcher in zip(sequences, matchers, strict=True):
            if matcher is not None:
                self._matchers[seq.seq_id] = matcher
                seq.allowed = matcher.allowed
            self._sequences[seq.seq_id] = seq
            self._owners[seq.seq_id] = record
            self._scheduler.add(seq)
        return request

    def compile_grammar(self, asked: StructuredOutputsParams) -> None:
        """Compiles a grammar ahead, so that `add_request` need not: for callers whose steps shall not wait for it.

        Any thread may call this. The last few grammars are kept.

        Raises:
          RequestError: the grammar cannot be served, with llguidance's reason.
        """
        self._open_grammars().compile(asked)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request at once and frees its blocks; None if there is no such request."""
        record = self._records.get(request_id)
        if record is None:
            return None
        for seq in [seq for seq in self._sequences.values() if seq.request is record.request]:
            self._end(seq, record.samples[seq.index].end("abort"))
        return self._report(record)

    def end_sample(self, request_id: str, index: int, stop: str) -> RequestOutput | None:
        """Ends one sample whose text met a stop string, for callers that make the text themselves.

        Args:
          request_id: what is not live any more is passed over.
          index: of the sample.
          stop: the string.

        Returns:
          The request, if this was its last sample.
        """
        record = self._records.get(request_id)
        if record is None or record.samples[index].finish_reason is not None:
            return None
        seq = next(s for s in self._sequences.values() if s.request is record.request and s.index == index)
        self._end(seq, record.samples[index].end("stop", stop))
        return self._report(record) if record.finished else None

    def observe(self, observer: Observer) -> None:
        """Tells an observer of every step and every request's end from now on."""
        self._observers.append(observer)

    def forget(self, observer: Observer) -> None:
        """Tells an observer nothing any more."""
        self._observers.remove(observer)

    def step(self) -> list[RequestOutput]:
        """Starts one step, if there is anything to do, and reports an earlier one: with overlap the one before it, in
        a pipeline the one that has come through.

        Returns:
          The requests that finished, and those that stream and got a token.
        """
        scheduled_s = self._clock.now_s()
        self._in_flight.append(self._launch(self._scheduler.schedule(), scheduled_s))
        due = self._in_flight.popleft() if len(self._in_flight) == self._depth else None
        return [] if due is None or due.plan is None else self._commit(due, self._executor.collect(due.handle))

    def _launch(self, plan: StepPlan | None, scheduled_s: float) -> _Step:
        if plan is not None:
            for chunk in plan.chunks:
                record = self._owners[chunk.seq_id]
                if record.first_scheduled_s is None:
                    record.first_scheduled_s = scheduled_s
                    record.num_cached_tokens = chunk.start
            for seq_id in plan.preempted:
                self._owners[seq_id].num_preemptions += 1
        handle = self._executor.launch(plan)
        return _Step(plan, handle, scheduled_s, self._clock.now_s())

    def _commit(self, step: _Step, result: StepResult) -> list[RequestOutput]:
        """Hands a step's tokens to their sequences; those that ended meanwhile are passed over."""
        assert step.plan is not None
        if result.prompt_logprobs is not None:
            self._keep_prompt_logprobs(step.plan, result)
        came, told = _Came(self._clock.now_s()), dict[str, RequestRecord]()
        tokens = result.tokens.tolist()
        for row, chunk in enumerate(step.plan.chunks):
            record = self._owners.get(chunk.seq_id)
            came.request_ids.append("" if record is None else record.request.request_id)
            if record is not None and chunk.samples:
                seq = self._sequences[chunk.seq_id]
                if result.logprobs is not None:
                    record.add_logprobs(seq.index, tokens[row], result, row)
                came.count(record, seq.index)
                has_ended = self._take(seq, record.samples[seq.index], tokens[row], came.now_s)
                if has_ended or record.request.streams:
                    told[record.request.request_id] = record
        self._tell(step, came)
        return [self._report(record) for record in told.values() if record.finished or record.request.streams]

    def _keep_prompt_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        first = 0
        for chunk in plan.chunks:
            if chunk.seq_id in self._owners:
                self._owners[chunk.seq_id].add_prompt_logprobs(chunk.start, chunk.length, result, first)
            first += chunk.length

    def _take(self, seq: Sequence, sample: SampleRecord, token: int, now_s: float) -> bool:
        """Adds a token to a sequence; returns whether it ends with it."""
        seq.commit(token)
        matcher = self._matchers.get(seq.seq_id)
        is_complete = matcher is not None and matcher.advance(token)
        reason = sample.add(token, now_s, is_complete)
        if reason is None and matcher is not None and matcher.error is not None:
            reason = sample.end("abort", f"structured_outputs: {matcher.error}")
        if reason is not None:
            self._end(seq, reason)
        return reason is not None

    def _tell(self, step: _Step, came: _Came) -> None:
        """Tells the observers of a step."""
        assert step.plan is not None
        started_s, self._ended_s = max(step.launched_s, self._ended_s), came.now_s
        if self._observers:
            times = (step.scheduled_s, step.launched_s, started_s, came.now_s)
            waits = tuple(came.ttfts_s), tuple(came.tbts_s)
            ids = tuple(came.request_ids)
            told = StepRecord(step.plan, ids, *times, came.num_drawn, *waits, self._scheduler.state)
            for observer in self._observers:
                observer.on_step(told)

    def _end(self, seq: Sequence, reason: Any) -> None:
        self._scheduler.remove(seq)
        seq.finish(reason)
        del self._sequences[seq.seq_id], self._owners[seq.seq_id]
        self._matchers.pop(seq.seq_id, None)

    def _new_matchers(self, params: SamplingParams) -> list[Matcher | None]:
        """One for each sample; None where any text is allowed."""
        asked = params.structured_outputs
        if asked is None:
            return [None] * params.n
        grammars = self._open_grammars()
        return [grammars.matcher(asked) for _ in range(params.n)]

    def _open_grammars(self) -> Grammars:
        if self._grammars is None:
            raise RequestError(
                "structured_outputs need a tokenizer and an end-of-text token, and this model lacks one of them"
            )
        return self._grammars

    def _report(self, record: RequestRecord) -> RequestOutput:
        if record.finished:
            record.finished_s = self._clock.now_s()
            del self._records[record.request.request_id]
        output = record.output()
        if output.finished:
            for observer in self._observers:
                observer.on_end(output)
        return output
