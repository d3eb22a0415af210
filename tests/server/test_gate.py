"""What is refused before the application sees it, and what is told about the server itself."""

import asyncio
import json
import logging
import time

import pytest

from sarathi_jax.server.gate import GateSettings
from tests.server.running import MODEL, with_server

BODY = {"model": MODEL, "prompt": "the cat", "temperature": 0, "max_tokens": 4}


def test_keys(tiny):
    async def talk(client, front):
        wrong = ({}, {"authorization": "Bearer wrong"}, {"authorization": "second"})
        keys = [*wrong, {"authorization": "Bearer second"}]
        statuses = [(await client.post("/v1/completions", json=BODY, headers=each)).status_code for each in keys]
        return [*statuses, *[(await client.get(path)).status_code for path in ("/health", "/ready", "/version")]]

    gate = GateSettings(api_keys=("first", "second"))
    assert with_server(tiny, talk, gate=gate) == [401, 401, 401, 200, 200, 200, 200]


def test_bodies(tiny):
    """None of them is read into memory, and none is an error of the server."""
    headers = {"content-type": "application/json"}
    read = 0

    async def endless():
        nonlocal read
        for _ in range(1000):
            read += 1000
            yield b" " * 1000

    async def slow():
        yield b"{"
        await asyncio.sleep(5)

    async def talk(client, front):
        async def post(content, **more):
            return await client.post("/v1/completions", content=content, headers=headers | more)

        large = await post(b"{" + b" " * 50_000)
        stream = await post(endless())
        late = await post(slow())
        others = [
            await post(content)
            for content in (
                b"",
                b"{",
                b"[]",
                b"null",
                b"\xff\xfe",
                b'{"model": "\xff"}',
                b'"' + b"\\ud800" + b'"',
                b"[" * 9000,
                b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
                b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
                b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
            )
        ]
        plain = await client.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": "text/plain"})
        return large, stream, late, [*others, plain]

    gate = GateSettings(max_body_bytes=10_000, body_timeout_s=0.2)
    large, stream, late, others = with_server(tiny, talk, gate=gate)
    assert (large.status_code, stream.status_code, late.status_code) == (413, 413, 408)
    assert large.headers["connection"] == "close"
    for answer in others:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"]


def test_request_ids_and_logs(tiny, caplog):
    async def talk(client, front):
        given = await client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
        bad = await client.get("/v1/models", headers={"x-request-id": "no spaces please"})
        return given, bad

    with caplog.at_level(logging.INFO, "sarathi_jax.server"):
        given, bad = with_server(tiny, talk)
    assert given.headers["x-request-id"] == "mine-1"
    assert given.json()["id"] == "cmpl-mine-1"
    assert " " not in bad.headers["x-request-id"]
    lines = [record.fields for record in caplog.records if record.message == "request"]
    assert lines[0]["request_id"] == "mine-1"
    assert lines[0]["status"] == 200
    assert lines[0]["output_tokens"] == given.json()["usage"]["completion_tokens"]


def test_refusals_are_told(tiny):
    told = []

    async def talk(client, front):
        await client.post("/v1/completions", json=BODY | {"model": "x"})
        await client.post("/v1/completions", content=b"{")

    with_server(tiny, talk, refused=told.append)
    assert told == [404, 400]


def test_pages(tiny):
    async def talk(client, front):
        front.is_draining = True
        pages = [await client.get(path) for path in ("/ready", "/health", "/metrics", "/docs", "/openapi.json")]
        return pages, await client.post("/v1/completions", json=BODY)

    pages, refused = with_server(tiny, talk, metrics=lambda: b"one 1\n")
    assert [page.status_code for page in pages] == [503, 200, 200, 200, 200]
    assert pages[2].text == "one 1\n"
    assert "http" not in pages[3].text.replace("http-equiv", "")
    assert "/v1/chat/completions" in pages[3].text
    assert "CompletionBody" in pages[4].json()["components"]["schemas"]
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "draining"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny"])
def test_models(tiny, path):
    async def talk(client, front):
        return (await client.get(path)).json(), (await client.get("/v1/models/other")).status_code

    found, status = with_server(tiny, talk)
    model = found["data"][0] if "data" in found else found
    assert (model["id"], model["max_model_len"], status) == (MODEL, 512, 404)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1.5] * 300_000},
        {"prompt": [[1.5]] * 300_000},
        {"prompt": [5] * 300_000},
        {"stop": [1] * 300_000},
        {"logit_bias": {str(i): "x" for i in range(100_000)}},
        {str(i): 1 for i in range(100_000)},
    ],
    ids=["tokens", "lists", "long", "stops", "biases", "names"],
)
def test_many_mistakes_cost_no_more_than_one(tiny, fields):
    async def talk(client, front):
        content = json.dumps(BODY | fields)
        began_s = time.process_time()
        answer = await client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        return answer, time.process_time() - began_s

    answer, seconds = with_server(tiny, talk)
    assert answer.status_code == 400
    assert len(answer.content) < 2000
    assert seconds < 1
