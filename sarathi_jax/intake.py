"""The door of the engine: a request is refused here, with what to change, or resolved into a `Request`."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sarathi_jax.clock import Clock
from sarathi_jax.config import CacheConfig, EngineConfig, ModelConfig
from sarathi_jax.request import MAX_SEED, Request, RequestError, SamplingParams
from sarathi_jax.scheduling.base import Scheduler


class Intake:
    """Checks requests and decides what they leave open.

    Args:
      model: vocabulary and end-of-text tokens.
      config: seed, stages, overlap, and the promised time between tokens.
      cache: the longest sequence.
      scheduler: what it can serve.
      has_text: there is a tokenizer.
      clock: stamps arrivals.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        cache: CacheConfig,
        scheduler: Scheduler,
        has_text: bool,
        clock: Clock,
    ):
        self._model = model
        self._config = config
        self._cache = cache
        self._scheduler = scheduler
        self._has_text = has_text
        self._clock = clock
        self._seeds = np.random.default_rng(config.seed)

    def accept(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        prompt: str | None,
        streams: bool,
        priority: int,
        slo_ms: float | None,
        arrival_s: float | None = None,
    ) -> Request:
        """Arguments and errors as of `Engine.add_request`."""
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling parameters of type {type(params).__name__}: give SamplingParams, which "
                "SamplingParams.from_dict makes from a mapping"
            )
        if not isinstance(prompt_token_ids, Iterable) or isinstance(prompt_token_ids, str | bytes | Mapping):
            raise RequestError(f"a prompt of type {type(prompt_token_ids).__name__}: give a list of token ids")
        token_ids = tuple(prompt_token_ids)
        self._check(token_ids, params)
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise RequestError(f"priority={priority!r} must be an integer")
        room = self._scheduler.longest_sequence - len(token_ids)
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(map(int, token_ids)),
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=int(self._seeds.integers(MAX_SEED + 1)) if params.seed is None else params.seed,
            stop_token_ids=frozenset(params.stop_token_ids)
            | (frozenset() if params.ignore_eos else frozenset(self._model.eos_token_ids)),
            arrival_s=self._clock.now_s() if arrival_s is None else arrival_s,
            prompt=prompt,
            streams=streams,
            priority=priority,
            pace_s=self._pace_s(params, slo_ms),
        )

    def _check(self, token_ids: tuple[int, ...], params: SamplingParams) -> None:
        """Refuses a request that can never be served."""
        if not token_ids:
            raise RequestError("the prompt is empty: give at least one token")
        # Almost always true, and a hundred times as quick to see as a look at each.
        if set(map(type, token_ids)) != {int} or min(token_ids) < 0 or max(token_ids) >= self._model.vocab_size:
            self._check_each(token_ids)
        check_vocabulary(params, self._model.vocab_size)
        if params.stop and not self._has_text:
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

    def _check_each(self, token_ids: tuple[Any, ...]) -> None:
        for token in token_ids:
            is_integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not is_integer or not 0 <= token < self._model.vocab_size:
                raise RequestError(
                    f"token id {token!r} is not an integer in [0, {self._model.vocab_size}), the model's vocabulary"
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
        num_steps = num_stages + self._config.overlap if params.structured_outputs is not None else num_stages
        return promised_ms / 1000 * num_stages / num_steps


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Refuses token ids that the model does not have, which would be ignored on the device.

    Raises:
      RequestError: naming the parameter and the token id.
    """
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token in ids:
            if token >= vocab_size:
                raise RequestError(f"{name} names token {token}, but the vocabulary has {vocab_size} tokens")
