"""Tokens to text: assembles a `RequestOutput` as tokens are committed, and finds stop strings."""

from collections.abc import Sequence as Seq

import numpy as np

from sarathi_jax.request import CompletionOutput, FinishReason, Logprob, Request, RequestMetrics, RequestOutput
from sarathi_jax.scheduling.plan import StepResult
from sarathi_jax.tokenizer import IncrementalDecoder, Tokenizer


class SampleText:
    """The text of one sample as it grows.

    Text that may be the beginning of a stop string is held back until it is known not to be one, so a reader never
    sees part of it.

    Args:
      request: whose sample; its stop strings are looked for once `min_tokens` are out.
      decoder: None where no text is wanted.
    """

    def __init__(self, request: Request, decoder: IncrementalDecoder | None):
        self._params = request.params
        self._decoder = decoder
        self._text = ""
        self._searched = 0  # no stop string begins before this index
        self.stopped_by: str | None = None

    def push(self, token: int, num_output: int) -> None:
        """Adds a token; sets `stopped_by` when a stop string is complete."""
        if self._decoder is None:
            return
        self._text += self._decoder.push([token])
        if num_output >= self._params.min_tokens:
            self._find_stop()
        else:
            self._searched = len(self._text)

    def finish(self) -> None:
        """Adds what the decoder held back: bytes that never became a character."""
        if self._decoder is not None and self.stopped_by is None:
            self._text += self._decoder.finish()
            self._find_stop()

    def visible(self, finished: bool) -> str:
        """The text so far, without what may still turn out to be a stop string."""
        if finished or not self._params.stop:
            return self._text
        return self._text[: len(self._text) - max(_overlap(self._text, stop) for stop in self._params.stop)]

    def _find_stop(self) -> None:
        found = [(at, stop) for stop in self._params.stop if (at := self._text.find(stop, self._searched)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            end = at + len(self.stopped_by) if self._params.include_stop_str_in_output else at
            self._text = self._text[:end]
        longest = max(map(len, self._params.stop), default=0)
        self._searched = max(self._searched, len(self._text) - longest + 1)


class SampleRecord:
    """What is known of one sample: tokens, text, log-probabilities, times, and how it ended."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None):
        decoder = None
        if tokenizer is not None and request.params.detokenize:
            # The text goes on from the prompt, so a space before its first word is part of it.
            decoder = IncrementalDecoder(tokenizer, request.params.skip_special_tokens, at_start=False)
        self.index = index
        self.request = request
        self.text = SampleText(request, decoder)
        self.token_ids: list[int] = []
        self.token_s: list[float] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def add(self, token: int, now_s: float, is_complete: bool = False) -> FinishReason | None:
        """Adds a drawn token and decides whether the sample ends with it.

        Args:
          token: drawn.
          now_s: when it became known.
          is_complete: with it the text is all that the request's grammar allows.
        """
        request = self.request
        self.token_ids.append(token)
        self.token_s.append(now_s)
        num_output = len(self.token_ids)
        if token in request.stop_token_ids and num_output > request.params.min_tokens:
            if request.params.include_stop_str_in_output:
                self.text.push(token, num_output)
            return self.end("stop", token if token in request.params.stop_token_ids else None)
        self.text.push(token, num_output)
        if self.text.stopped_by is not None:
            return self.end("stop", self.text.stopped_by)
        if is_complete:
            return self.end("stop", None)
        if num_output >= request.max_tokens:
            return self.end("length", None)
        return None

    def end(self, reason: FinishReason, stop_reason: str | int | None = None) -> FinishReason:
        self.text.finish()
        if reason == "length" and self.text.stopped_by is not None:
            # What the decoder still held back completed a stop string.
            reason, stop_reason = "stop", self.text.stopped_by
        self.finish_reason, self.stop_reason = reason, stop_reason
        return reason

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self.text.visible(self.finish_reason is not None),
            token_ids=tuple(self.token_ids),
            logprobs=None if self.request.params.logprobs is None else tuple(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class RequestRecord:
    """What is known of a request: its samples, its prompt's log-probabilities, its times.

    Args:
      request: as accepted.
      tokenizer: None: token ids only.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self.request = request
        self.samples = [SampleRecord(i, request, tokenizer) for i in range(request.params.n)]
        self.first_scheduled_s: float | None = None
        self.finished_s: float | None = None
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[dict[int, Logprob] | None] = [None]

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def has_begun(self) -> bool:
        """Whether any sample has a token."""
        return any(sample.token_ids for sample in self.samples)

    def add_logprobs(self, index: int, token: int, result: StepResult, row: int) -> None:
        """Records the log-probabilities of a drawn token: row `row` of the step's result."""
        num_top = self.request.params.logprobs
        if num_top is None or result.logprobs is None or result.top_ids is None or result.top_logprobs is None:
            return
        top = zip(result.top_ids[row, :num_top], result.top_logprobs[row, :num_top], strict=True)
        self.samples[index].logprobs.append(self._entry(token, result.logprobs[row], list(top)))

    def add_prompt_logprobs(self, start: int, length: int, result: StepResult, first: int) -> None:
        """Records those of the prompt tokens that follow positions ``start .. start + length - 1``.

        Args:
          start: position of the chunk's first token; what a recomputed chunk repeats is ignored.
          length: tokens of the chunk.
          result: of the step.
          first: row of the chunk's first token in the step.
        """
        num_top, prompt = self.request.params.prompt_logprobs, self.request.prompt_token_ids
        if num_top is None or result.prompt_logprobs is None:
            return
        assert result.prompt_top_ids is not None
        assert result.prompt_top_logprobs is not None
        for position in range(len(self._prompt_logprobs), min(start + length + 1, len(prompt))):
            row = first + position - 1 - start
            top = zip(result.prompt_top_ids[row, :num_top], result.prompt_top_logprobs[row, :num_top], strict=True)
            self._prompt_logprobs.append(self._entry(prompt[position], result.prompt_logprobs[row], list(top)))

    def output(self) -> RequestOutput:
        """Everything so far; cheap enough for every step of a stream."""
        request, first_s = self.request, [sample.token_s[0] for sample in self.samples if sample.token_s]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=tuple(sample.output() for sample in self.samples),
            finished=self.finished,
            metrics=RequestMetrics(
                arrival_s=request.arrival_s,
                first_scheduled_s=self.first_scheduled_s,
                first_token_s=min(first_s, default=None),
                finished_s=self.finished_s,
                token_s=tuple(tuple(sample.token_s) for sample in self.samples),
                num_preemptions=self.num_preemptions,
                num_cached_tokens=self.num_cached_tokens,
            ),
            prompt_logprobs=None if request.params.prompt_logprobs is None else tuple(self._prompt_logprobs),
        )

    def _entry(self, token: int, logprob: np.floating, top: Seq[tuple[int, float]]) -> dict[int, Logprob]:
        values = {int(i): float(value) for i, value in top if i >= 0}
        values.setdefault(token, float(logprob))
        ordered = sorted(values, key=lambda i: -values[i])
        return {i: Logprob(values[i], self._token_text(i)) for i in ordered}

    def _token_text(self, token: int) -> str | None:
        if self._tokenizer is None or not self.request.params.detokenize:
            return None
        return self._tokenizer.decode([token], skip_special_tokens=False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
