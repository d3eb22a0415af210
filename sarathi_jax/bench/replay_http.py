"""Serves a workload with any OpenAI-compatible server, over HTTP."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from sarathi_jax.bench.http_client import Answer, stream
from sarathi_jax.telemetry.definitions import SampleTimes
from sarathi_jax.telemetry.run import Run
from sarathi_jax.workloads import TimedRequest

_LOG = logging.getLogger(__name__)
_ANSWERS_WITHIN_S = 20.0


class ServerError(RuntimeError):
    """A server that cannot be measured; the message says what it answered."""


@dataclasses.dataclass(frozen=True)
class ServerModel:
    """What a server says of the model that it serves.

    Attributes:
      name: to ask for.
      context: most tokens of a request; None: it does not say.
    """

    name: str
    context: int | None


def served_model(url: str, api_key: str | None = None, name: str | None = None) -> ServerModel:
    """Asks a server for its models.

    Args:
      url: of the server, with or without ``/v1``.
      api_key: None: it wants none.
      name: of the model; None: the first that it lists.

    Raises:
      ServerError: nobody answers, or not with a list that has this model.
    """
    return asyncio.run(_served_model(_base(url), api_key, name))


def replay_url(
    url: str,
    requests: Sequence[TimedRequest],
    prompts: Sequence[str | Sequence[int] | np.ndarray],
    *,
    model: str,
    api_key: str | None = None,
    limit_s: float | None = None,
    progress: bool = True,
) -> Run:
    """Sends requests at their times and notes when each token comes back.

    Every request asks for exactly as many tokens as its output says, with fields that this server and vLLM know
    (``ignore_eos``, ``min_tokens``, ``return_token_ids``). Where a server does not return token ids, a piece of text
    counts as one token.

    Args:
      url: of the server, with or without ``/v1``.
      requests: in the order of their arrival.
      prompts: text or token ids of each.
      model: name to ask for.
      api_key: None: the server wants none.
      limit_s: the run is cut off after so many seconds; None: it ends when all answers have.
      progress: shows a bar.

    Returns:
      The run, without steps and scheduling delays, which only the server knows. An answer that failed was given up
      when it did.

    Raises:
      ServerError: no request was answered.
    """
    bodies = [
        {
            "model": model,
            "prompt": prompt if isinstance(prompt, str) else list(map(int, prompt)),
            "max_tokens": request.output,
            "min_tokens": request.output,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        for request, prompt in zip(requests, prompts, strict=True)
    ]
    return asyncio.run(_replay(_base(url), requests, bodies, api_key, limit_s, progress))


async def _replay(
    url: str,
    requests: Sequence[TimedRequest],
    bodies: Sequence[dict[str, Any]],
    api_key: str | None,
    limit_s: float | None,
    progress: bool,
) -> Run:
    answers = [Answer() for _ in requests]
    ends_s: list[float | None] = [None] * len(requests)
    begin_s = time.monotonic()
    with tqdm(total=len(requests), desc="bench", unit="request", disable=not progress) as bar:

        async def ask(session: aiohttp.ClientSession, i: int) -> None:
            await asyncio.sleep(begin_s + requests[i].arrival_s - time.monotonic())
            await stream(session, url, bodies[i], answer=answers[i])
            ends_s[i] = time.monotonic() - begin_s
            bar.update()

        async with _session(api_key) as session:
            tasks = [asyncio.create_task(ask(session, i)) for i in range(len(requests))]
            _, late = await asyncio.wait(tasks, timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
    for task in tasks:
        if not task.cancelled():
            task.result()
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        if not any(answer.token_s for answer in answers):
            raise ServerError(f"{url}: no request was answered: {errors[0]}")
        _LOG.warning("%d of %d requests failed; the first: %s", len(errors), len(requests), errors[0])
    end_s = limit_s if late and limit_s is not None else max(end for end in ends_s if end is not None)
    samples = [
        SampleTimes(
            request_id=str(i),
            arrival_s=request.arrival_s,
            token_s=tuple(at_s - begin_s for at_s in answer.token_s),
            finished_s=answer.token_s[-1] - begin_s if answer.finish_reason and answer.token_s else None,
            given_up_s=ends_s[i] if answer.error else None,
            num_prompt_tokens=request.prompt,
        )
        for i, (request, answer) in enumerate(zip(requests, answers, strict=True))
        if request.arrival_s <= end_s
    ]
    return Run(tuple(samples), end_s)


async def _served_model(url: str, api_key: str | None, name: str | None) -> ServerModel:
    try:
        async with asyncio.timeout(_ANSWERS_WITHIN_S), _session(api_key) as session:
            async with session.get(f"{url}/v1/models") as response:
                if response.status != 200:
                    text = (await response.text())[:300]
                    raise ServerError(f"{url}: asked for its models, the server answers {response.status}: {text}")
                listed = (await response.json(content_type=None))["data"]
        models = {row["id"]: row for row in listed}
    except (TimeoutError, aiohttp.ClientError, aiohttp.InvalidURL, OSError) as error:
        raise ServerError(
            f"{url}: nobody answers there ({error or type(error).__name__}): is it the right url?"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{url}: its answer about its models is not that of an OpenAI-compatible server") from error
    if not models or (name is not None and name not in models):
        raise ServerError(f"{url}: serves {', '.join(models) or 'no model'}" + (f", not {name!r}" if name else ""))
    chosen = next(iter(models)) if name is None else name
    return ServerModel(chosen, models[chosen].get("max_model_len"))


def _session(api_key: str | None) -> aiohttp.ClientSession:
    """As many connections at once as are asked for, without a limit of time."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)


def _base(url: str) -> str:
    """Without a path; "localhost:8000" is meant as http."""
    url = url if "://" in url else f"http://{url}"
    return url.rstrip("/").removesuffix("/v1")
