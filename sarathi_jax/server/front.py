"""Between HTTP and the engine: text to tokens, and who is let in."""

import asyncio
import dataclasses
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sarathi_jax.config import ModelConfig
from sarathi_jax.request import RequestError, SamplingParams
from sarathi_jax.server.errors import ApiError, unavailable
from sarathi_jax.server.generation import Generation
from sarathi_jax.server.loop import Ask, EngineFailedError, EngineLoop, Inbox
from sarathi_jax.tokenizer import Tokenizer, TokenizerError

Admit = Callable[[Sequence[Ask]], float | None]
"""Says of the prompts of a call in how many seconds to try again; None lets them in."""

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
_NAME = re.compile(r"^(?:prompt \d+: )?(?:a token id of )?(\w+)[=.\[ :]")


@dataclasses.dataclass(frozen=True)
class Served:
    """What a server serves.

    Attributes:
      names: under which the model is known; the first is its own.
      max_model_len: most tokens of prompt and output.
      tokenizer: None: prompts are token ids, and answers have no text.
    """

    names: tuple[str, ...]
    model: ModelConfig
    max_model_len: int
    tokenizer: Tokenizer | None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
      max_requests: samples (prompts times `n`) that may run or wait at once.
      request_timeout_s: longest time from the acceptance of a call to the end of its answer.
    """

    max_requests: int = 256
    request_timeout_s: float = 600.0


class Front:
    """Accepts prompts for the engine.

    Args:
      loop: with the engine.
      served: the model.
      limits: of what may be asked.
      admit: who is let in beyond `limits`; None: everybody.
      pool: threads for tokenising and for compiling grammars.
    """

    def __init__(
        self,
        loop: EngineLoop,
        served: Served,
        limits: Limits | None = None,
        admit: Admit | None = None,
        pool: ThreadPoolExecutor | None = None,
    ):
        self.loop = loop
        self.served = served
        self.is_draining = False
        self._limits = limits or Limits()
        self._admit = admit
        self._pool = pool or ThreadPoolExecutor(2, thread_name_prefix="text")
        self._max_prompt_bytes = 0
        if served.tokenizer is not None:
            longest = max(len(served.tokenizer.token_bytes(i)) for i in range(served.tokenizer.vocab_size))
            self._max_prompt_bytes = longest * served.max_model_len

    @property
    def is_ready(self) -> bool:
        return self.loop.is_healthy and not self.is_draining

    def check_model(self, name: str) -> None:
        """Refuses another model than the one that is served."""
        if name not in self.served.names:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.served.names[0]!r}",
                param="model",
                code="model_not_found",
            )

    def tokenizer(self) -> Tokenizer:
        """The model's, or an error for the client."""
        if self.served.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: give token ids", code="no_tokenizer")
        return self.served.tokenizer

    async def run[T](self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what takes long beside the event loop; what the library refuses becomes a 400."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        except (RequestError, TokenizerError) as error:
            raise refusal(error) from None

    async def encode(self, text: str, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Tokens of a text; one that is far too long is refused unread."""
        tokenizer = self.tokenizer()
        if not text:
            raise ApiError(400, f"{param} is empty: give at least one character", param=param, code="invalid_value")
        if len(text) > self._max_prompt_bytes:
            raise ApiError(
                400,
                f"{param} has {len(text)} characters, which can never fit max_model_len="
                f"{self.served.max_model_len} tokens: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return await self.run(tokenizer.encode, text, add_special_tokens)

    def check_room(self, num_samples: int = 1) -> None:
        """Refuses a call while there is no room for it.

        Raises:
          ApiError: 503 if the server is going down or broken, 429 if too much is asked at once.
        """
        if self.is_draining:
            raise unavailable("the server is going down", "draining")
        if not self.loop.is_healthy:
            raise unavailable("the engine has failed; the server starts anew", "engine_failed")
        most = self._limits.max_requests
        if num_samples > most:
            raise ApiError(400, f"{num_samples} samples in one call; at most {most} are served", code="too_many")
        if self.loop.num_samples + num_samples > most:
            raise ApiError(
                429, f"{most} requests run or wait already: try again later", code="queue_full", retry_after_s=1
            )

    async def open(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streams: bool,
        priority: int = 0,
        slo_ms: float | None = None,
    ) -> Generation:
        """Hands prompts to the engine.

        Args:
          request_id: of the call.
          prompts: token ids.
          params: for each of them.
          streams: deltas are wanted as they come.
          priority: as of `Engine.add_request`.
          slo_ms: as of `Engine.add_request`.

        Raises:
          ApiError: the call cannot be served, or not now.
        """
        _check_stops(params)
        self._check_lengths(prompts)
        if params.structured_outputs is not None:
            await self.run(self.loop.compile_grammar, params.structured_outputs)
        self.check_room(len(prompts) * params.n)
        # The engine makes no text: stop strings are found here.
        bare = dataclasses.replace(params, stop=(), detokenize=False)
        watched = streams or bool(params.stop)
        asks = [Ask(self.loop.new_id(request_id), ids, bare, watched, priority, slo_ms) for ids in prompts]
        wait_s = None if self._admit is None else self._admit(asks)
        if wait_s is not None:
            raise ApiError(
                429,
                f"the promised times cannot be kept now: try again in {wait_s:.0f} s",
                code="overloaded",
                retry_after_s=wait_s,
            )
        inbox = Inbox()
        try:
            requests = await self.loop.submit(asks, inbox)
        except RequestError as error:
            raise refusal(error) from None
        except EngineFailedError as error:
            raise unavailable(str(error), "engine_failed") from None
        requests = [dataclasses.replace(request, params=params) for request in requests]
        return Generation(self.loop, inbox, requests, self.served.tokenizer, self._limits.request_timeout_s)

    def _check_lengths(self, prompts: Sequence[Sequence[int]]) -> None:
        """Refuses a prompt that can never fit before the engine's thread looks at each of its tokens."""
        most, longest = self.served.max_model_len, max(map(len, prompts), default=0)
        if longest >= most:
            raise ApiError(
                400,
                f"the prompt has {longest} tokens; max_model_len={most} leaves room for {most - 1} and one of output: "
                "shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )


def refusal(error: Exception) -> ApiError:
    """What the library refuses, with the name of the field that the message begins with."""
    text = str(error)
    if "the prompt has" in text:
        return ApiError(400, text, param="prompt", code="context_length_exceeded")
    named = _NAME.match(text)
    return ApiError(400, text, param=named[1] if named and "=" in text[: named.end()] else None, code="invalid_value")


def _check_stops(params: SamplingParams) -> None:
    if len(params.stop) > MAX_STOPS or any(len(text) > MAX_STOP_LENGTH for text in params.stop):
        raise ApiError(
            400,
            f"stop: at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters are served",
            param="stop",
            code="invalid_value",
        )
