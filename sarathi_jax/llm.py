"""The library's face: `LLM` loads a model and generates text, chats, streams and scores."""

import collections
import dataclasses
import itertools
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from sarathi_jax.config import Dtype
from sarathi_jax.deployment import load_deployment
from sarathi_jax.engine import Engine
from sarathi_jax.loading import Loaded, load
from sarathi_jax.replica import Replicas
from sarathi_jax.request import RequestError, RequestOutput, SamplingParams
from sarathi_jax.runner import StartUp
from sarathi_jax.tokenizer import TokenizerError

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-likelihood of a text under the model.

    Attributes:
      token_ids: of the text; the first has nothing before it and no log-probability.
      logprobs: natural logarithms, of ``token_ids[1:]``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def log_likelihood(self) -> float:
        """Sum over all tokens but the first."""
        return sum(self.logprobs)


class LLM:
    """A model ready to generate.

    >>> with LLM() as llm:
    ...     print(llm.generate("It was a", SamplingParams(max_tokens=20))[0].outputs[0].text)

    Args:
      model: directory in Hugging Face or Orbax format, or a YAML of ``configs/models`` (random weights of that shape,
        for measurements); None: the small model that ships.
      dtype: of weights, cache and products; ``auto``: what the checkpoint is stored in.
      progress: shows bars while loading and compiling.
      config: any field of `EngineConfig` (`max_model_len`, `max_num_seqs`, `token_budget`, `block_size`, ...).

    Raises:
      ConfigError: the configuration cannot be served; the message says what to change.
      WeightsError: the checkpoint is incomplete or corrupt; the message names the tensor and the file.
      HostsError: with `hosts`, the processes do not find each other, or one is lost.
      SystemExit: with `hosts`, in all processes but the first, when the first has closed its LLM: until then they
        serve it from here, so that the same script may run in all of them.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: Dtype | Literal["auto"] = "auto",
        progress: bool = True,
        **config: Any,
    ):
        loaded = load(model, dtype, progress, config)
        self._path = loaded.path
        self.model_config = loaded.model_config
        self.engine_config = loaded.engine_config
        self.cache_config = loaded.cache_config
        self.tokenizer = loaded.tokenizer
        self._loaded: Loaded | None = loaded
        self._engine: Engine | Replicas | None = loaded.engine()
        self._ids = itertools.count()
        # Outputs by the request's id, until whoever asked for them takes them: any step may report any request.
        self._inboxes: dict[str, collections.deque[RequestOutput]] = {}

    @classmethod
    def deployed(cls, deployment: str | Path, *, progress: bool = True, **config: Any) -> "LLM":
        """An LLM as a file of ``configs/deployments`` describes it.

        Args:
          deployment: its name, or the path of such a YAML file.
          progress: as of `LLM`.
          config: what shall differ from it.

        Raises:
          ConfigError: no such file, or one that cannot be served; further errors are those of `LLM`.
        """
        arguments = load_deployment(deployment) | config
        return cls(arguments.pop("model", None), progress=progress, **arguments)

    def __repr__(self) -> str:
        state = "closed" if self._engine is None else f"{self.start_up.num_programs} programs"
        return (
            f"LLM({str(self._path)!r}, dtype={self.engine_config.dtype!r}, "
            f"max_model_len={self.cache_config.max_model_len}, blocks={self.cache_config.num_blocks} x "
            f"{self.cache_config.block_size}, {state}, {jax.devices()[0].device_kind})"
        )

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the weights and the cache; safe to call twice."""
        self._engine = None
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()

    @property
    def start_up(self) -> StartUp:
        """What compiling cost, over all replicas."""
        return self._open().start_up

    @property
    def num_late_compiles(self) -> int:
        """Programs compiled after warm-up; anything but 0 is a bug."""
        return self._open().num_late_compiles

    @property
    def engine(self) -> Engine | Replicas:
        """The step loop, for callers that drive it themselves."""
        if self._engine is None:
            raise RuntimeError("this LLM is closed: build a new one")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates for every prompt; all of them share the device.

        Args:
          prompts: a text, a list of token ids, or a list of either.
          sampling_params: for all prompts, or one a prompt; None: the defaults.
          use_tqdm: shows a bar when there are several prompts.

        Returns:
          One output a prompt, in their order.

        Raises:
          RequestError: a prompt or parameter that cannot be served; nothing is generated then.
        """
        batch = _batch(prompts)
        params = SamplingParams() if sampling_params is None else sampling_params
        each: list[Any] = list(params) if isinstance(params, list | tuple) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"{len(batch)} prompts but {len(each)} sampling_params: give one, or one a prompt")
        ids: list[str] = []
        try:
            for prompt, its in zip(batch, each, strict=True):
                ids.append(self.submit(prompt, its))
        except BaseException as error:
            for request_id in ids:
                self.engine.abort(request_id)
            if isinstance(error, RequestError) and len(batch) > 1:
                raise RequestError(f"prompt {len(ids)}: {error}") from None
            raise
        outputs = self._finish(ids, use_tqdm and len(ids) > 1)
        return [outputs[request_id] for request_id in ids]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generates the next message of one conversation or of several, with the model's chat template.

        Args:
          messages: ``[{"role": "user", "content": "..."}, ...]``, or a list of such.
          sampling_params: as in `generate`.
          use_tqdm: as in `generate`.

        Raises:
          RequestError: the model has no tokenizer or no chat template.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [self.chat_tokens(conversation) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yields the output so far after every token. Leaving the loop early aborts the request.

        Several streams may be read in turn, and `generate` may be called between: nobody misses a token.

        Raises:
          RequestError: as `generate`.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        request_id = self.submit(prompt, params, streams=True)
        inbox = self._inboxes[request_id] = collections.deque()
        try:
            while inbox or self.engine.has_work:
                while inbox:
                    output = inbox.popleft()
                    yield output
                    if output.finished:
                        return
                self._step()
        finally:
            self._forget([request_id])

    def score(self, texts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[Score]:
        """Log-likelihood of each text.

        Args:
          texts: as the prompts of `generate`; each needs room for one more token.
          use_tqdm: shows a bar when there are several.
        """
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        scores = []
        for output in self.generate(texts, params, use_tqdm=use_tqdm):
            assert output.prompt_logprobs is not None
            ids, tables = output.prompt_token_ids, output.prompt_logprobs[1:]
            logprobs = tuple(table[i].logprob for i, table in zip(ids[1:], tables, strict=True) if table is not None)
            scores.append(Score(ids, logprobs))
        return scores

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        *,
        request_id: str | None = None,
        streams: bool = False,
    ) -> str:
        """Queues one request without waiting; `engine.step` works on it. Returns its id.

        Args:
          prompt: text or token ids.
          sampling_params: how to draw.
          request_id: unique among live requests; None: made up.
          streams: `engine.step` reports every token, not only the end.

        Raises:
          RequestError: as `generate`.
        """
        request_id = f"request-{next(self._ids)}" if request_id is None else request_id
        if not isinstance(prompt, str):
            self.engine.add_request(request_id, prompt, sampling_params, streams=streams)
            return request_id
        if self.tokenizer is None:
            raise RequestError(f"{self._path} has no tokenizer: give the prompt as token ids")
        if not prompt:
            raise RequestError("the prompt is empty: give at least one character")
        try:
            token_ids = self.tokenizer.encode(prompt)
        except TokenizerError as error:
            raise RequestError(str(error)) from None
        self.engine.add_request(request_id, token_ids, sampling_params, prompt=prompt, streams=streams)
        return request_id

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the prompt of its next message, by the model's chat template.

        Raises:
          RequestError: the model has no tokenizer or no chat template, or the template refuses the messages.
        """
        if self.tokenizer is None:
            raise RequestError(f"{self._path} has no tokenizer, so no chat template: give token ids")
        try:
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
            return self.tokenizer.encode(text, add_special_tokens=False)
        except TokenizerError as error:
            raise RequestError(str(error)) from None

    def _finish(self, ids: Sequence[str], use_tqdm: bool) -> dict[str, RequestOutput]:
        """Steps until the requests have finished; if interrupted, aborts what is left of them."""
        outputs, num_tokens, inbox = {}, 0, collections.deque()
        self._inboxes |= dict.fromkeys(ids, inbox)
        with tqdm(total=len(ids), desc="generate", unit="request", disable=not use_tqdm) as bar:
            try:
                while len(outputs) < len(ids):
                    self._step()
                    while inbox:
                        output = inbox.popleft()
                        if output.finished:
                            outputs[output.request_id] = output
                            num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
                            bar.set_postfix(tokens=num_tokens, refresh=False)
                            bar.update()
            finally:
                self._forget(ids)
        return outputs

    def _step(self) -> None:
        """Runs a step and hands out what it reports."""
        for output in self.engine.step():
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)

    def _forget(self, ids: Sequence[str]) -> None:
        """Aborts what is left of the requests; nobody waits for them any more."""
        for request_id in ids:
            del self._inboxes[request_id]
            if self._engine is not None:
                self._engine.abort(request_id)

    def _open(self) -> Loaded:
        if self._loaded is None:
            raise RuntimeError("this LLM is closed: build a new one")
        return self._loaded


def _batch(prompts: Any) -> list[Any]:
    """The prompts as a list; what is no prompt stays in it for `LLM.submit` to refuse."""
    if not isinstance(prompts, Iterable) or isinstance(prompts, str | bytes | Mapping):
        return [prompts]
    batch = list(prompts)
    return [batch] if batch and isinstance(batch[0], numbers.Number) else batch
