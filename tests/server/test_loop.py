"""The engine's thread: aborts free blocks, a broken or stuck engine is told to everybody, nobody waits for ever."""

import asyncio
import time

import pytest

from tests.server.running import MODEL, with_server

BODY = {"model": MODEL, "prompt": "the cat", "temperature": 0, "max_tokens": 400, "ignore_eos": True}


class Failing:
    """An engine whose steps go wrong after some.

    Args:
      engine: that is driven.
      num_steps: that go well.
      fail: what is done then.
    """

    def __init__(self, engine, num_steps, fail):
        self._engine = engine
        self._num_steps = num_steps
        self._fail = fail

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self):
        self._num_steps -= 1
        if self._num_steps < 0:
            self._fail()
        return self._engine.step()


def raises() -> None:
    raise RuntimeError("the device is gone")


@pytest.mark.parametrize("fail", [raises, lambda: time.sleep(2)], ids=["raises", "hangs"])
def test_a_broken_engine_is_503_for_everybody(tiny, fail):
    async def talk(client, front):
        began_s = time.monotonic()
        answers = await asyncio.gather(
            client.post("/v1/completions", json=BODY),
            client.post("/v1/completions", json=BODY | {"stream": True}),
            client.post("/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "x"}]}),
        )
        late = await client.post("/v1/completions", json=BODY)
        health = await client.get("/health"), await client.get("/ready")
        return [*answers, late], health, time.monotonic() - began_s

    engine = Failing(tiny.bench().engine, 5, fail)
    (whole, stream, chat, late), health, seconds = with_server(tiny, talk, engine=engine, step_timeout_s=0.3)
    assert seconds < 5
    assert [answer.status_code for answer in (whole, chat, late)] == [503, 503, 503]
    assert whole.json()["error"]["code"] == "engine_failed"
    assert stream.status_code == 503 or '"code":"engine_failed"' in stream.text.split("\n\n")[-2]
    assert [page.status_code for page in health] == [503, 503]


def test_who_leaves_frees_blocks(tiny):
    """Requests in every state: waiting, in their prompt, generating; streaming and not."""
    bench = tiny.bench(max_num_seqs=2)

    async def talk(client, front):
        calls = [
            asyncio.ensure_future(client.post("/v1/completions", json=BODY | {"n": 1 + i % 2, "stream": i % 3 == 0}))
            for i in range(6)
        ]
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
            await asyncio.sleep(0.02)
        await asyncio.gather(*calls, return_exceptions=True)
        return (await client.post("/v1/completions", json=BODY | {"max_tokens": 5})).json()

    # `running` waits until nothing is left, and checks that every block is free.
    assert with_server(tiny, talk, bench=bench)["usage"]["completion_tokens"] == 5


def test_a_stop_string_ends_its_sample_alone(tiny):
    async def talk(client, front):
        body = BODY | {"n": 4, "temperature": 1.5, "seed": 3, "stop": ["e", " "], "max_tokens": 60}
        return (await client.post("/v1/completions", json=body)).json()

    answer = with_server(tiny, talk)
    assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
    assert "stop" in {choice["finish_reason"] for choice in answer["choices"]}
    assert not any(stop in choice["text"] for choice in answer["choices"] for stop in ("e", " "))
