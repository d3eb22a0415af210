"""A server in this process: a tiny model's engine behind the application, and a client that needs no sockets."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from sarathi_jax.server.app import create_app
from sarathi_jax.server.chat import PLAIN_TEMPLATE
from sarathi_jax.server.front import Front, Limits
from sarathi_jax.server.front import Served as ServedNames
from sarathi_jax.server.gate import GateSettings
from sarathi_jax.server.loop import EngineLoop
from tests.engine.serving import Bench, Served

MODEL = "tiny"


@contextlib.asynccontextmanager
async def running(
    served: Served,
    *,
    bench: Bench | None = None,
    limits: Limits | None = None,
    gate: GateSettings | None = None,
    step_timeout_s: float = 60.0,
    engine: Any = None,
    **app: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, Front]]:
    """Serves a model while it lasts; afterwards every block is free again.

    Args:
      served: the model.
      bench: whose engine; None: a new one.
      limits: as of `Front`.
      gate: as of `create_app`.
      step_timeout_s: as of `EngineLoop`.
      engine: to drive in place of the bench's.
      app: as of `create_app`.
    """
    bench = bench or served.bench()
    loop = EngineLoop(engine or bench.engine, step_timeout_s=step_timeout_s)
    loop.start()
    tokenizer = served.tokenizer
    if tokenizer is not None and not tokenizer.has_chat_template:
        tokenizer = tokenizer.with_chat_template(PLAIN_TEMPLATE)
    max_model_len = served.llm.cache_config.max_model_len
    front = Front(loop, ServedNames((MODEL,), served.model, max_model_len, tokenizer), limits)
    transport = httpx.ASGITransport(create_app(front, gate, **app))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client, front
    if engine is None:
        while loop.num_samples or bench.engine.has_work:
            await asyncio.sleep(0.01)
        bench.check_idle()
    await loop.stop()


def with_server(served: Served, talk: Callable[[httpx.AsyncClient, Front], Awaitable[Any]], **settings: Any) -> Any:
    """Runs a conversation with a server; settings as of `running`."""

    async def run() -> Any:
        async with asyncio.timeout(120), running(served, **settings) as (client, front):
            return await talk(client, front)

    return asyncio.run(run())


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a stream, which must end as streams do."""
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
