"""`/v1/completions` says what the library says, whole and in pieces, and refuses what it does not honour."""

import asyncio
from typing import Any

import pytest

from sarathi_jax.request import SamplingParams
from sarathi_jax.server.front import Limits
from tests.engine.serving import Served
from tests.server.running import MODEL, events, with_server

PROMPT = "the quick brown fox"
BODY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 12}


def post(served: Served, *bodies: dict[str, Any], path: str = "/v1/completions", **settings: Any) -> list[Any]:
    async def talk(client, front):
        return await asyncio.gather(*[client.post(path, json=body) for body in bodies])

    return with_server(served, talk, **settings)


def library(served: Served, prompts: Any, **params: Any) -> list[Any]:
    llm, _ = served.face(num_blocks=256)
    return llm.generate(prompts, SamplingParams(**params), use_tqdm=False)


def test_says_what_the_library_says(tiny):
    asked = [
        {"temperature": 0, "max_tokens": 12},
        {"temperature": 0.9, "seed": 5, "n": 3, "max_tokens": 9, "top_p": 0.9, "presence_penalty": 0.5},
        {"temperature": 0, "max_tokens": 40, "stop": ["e", "zz"], "min_tokens": 3},
        {"temperature": 0, "max_tokens": 8, "include_stop_str_in_output": True, "stop": "a", "ignore_eos": True},
        {"temperature": 0.7, "seed": 1, "max_tokens": 8, "logit_bias": {"40": 4.5}, "top_k": 5, "min_p": 0.01},
        {"temperature": 0, "max_tokens": 10, "structured_outputs": {"choice": ["fox", "dog"]}},
    ]
    answers = post(tiny, *[BODY | fields for fields in asked])
    streams = post(tiny, *[BODY | fields | {"stream": True} for fields in asked])
    for fields, answer, stream in zip(asked, answers, streams, strict=True):
        assert answer.status_code == 200, answer.text
        params = fields | ({"logit_bias": {40: 4.5}} if "logit_bias" in fields else {})
        expected = library(tiny, PROMPT, **params)[0]
        choices = answer.json()["choices"]
        assert [choice["text"] for choice in choices] == [sample.text for sample in expected.outputs]
        assert [choice["finish_reason"] for choice in choices] == [s.finish_reason for s in expected.outputs]
        assert [choice["stop_reason"] for choice in choices] == [s.stop_reason for s in expected.outputs]
        usage = answer.json()["usage"]
        assert usage["prompt_tokens"] == len(expected.prompt_token_ids)
        assert usage["completion_tokens"] == sum(len(sample.token_ids) for sample in expected.outputs)
        for sample in expected.outputs:
            pieces = [c for e in events(stream) for c in e["choices"] if c["index"] == sample.index]
            assert "".join(piece["text"] for piece in pieces) == sample.text
            assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [sample.finish_reason]


def test_prompts_in_every_form(tiny):
    ids = tiny.tokenizer.encode(PROMPT)
    forms = [PROMPT, [PROMPT, "a cat"], ids, [ids, ids[:3]]]
    answers = post(tiny, *[BODY | {"prompt": form, "n": 2, "return_token_ids": True} for form in forms])
    choices = [answer.json()["choices"] for answer in answers]
    assert [len(each) for each in choices] == [2, 4, 2, 4]
    assert [choice["index"] for choice in choices[1]] == [0, 1, 2, 3]
    assert choices[0][0]["text"] == choices[1][0]["text"] == choices[2][1]["text"] == choices[3][0]["text"]
    assert choices[1][2]["text"] == library(tiny, "a cat", temperature=0, max_tokens=12)[0].outputs[0].text
    assert choices[0][0]["prompt_token_ids"] == ids
    assert len(choices[0][0]["token_ids"]) == 12 or choices[0][0]["finish_reason"] == "stop"


def test_logprobs_and_echo(tiny):
    expected = library(tiny, PROMPT, temperature=0, max_tokens=5, logprobs=3, prompt_logprobs=3)[0]
    fields = BODY | {"max_tokens": 5, "logprobs": 3}
    plain, echoed, scored, stream = post(
        tiny, fields, fields | {"echo": True}, fields | {"echo": True, "max_tokens": 0}, fields | {"stream": True}
    )
    logprobs = plain.json()["choices"][0]["logprobs"]
    sample = expected.outputs[0]
    assert logprobs["token_logprobs"] == pytest.approx(
        [t[i].logprob for i, t in zip(sample.token_ids, sample.logprobs, strict=True)], abs=1e-5
    )
    assert [len(table) >= 1 for table in logprobs["top_logprobs"]] == [True] * 5
    assert logprobs["text_offset"][0] == 0
    pieces = [choice["logprobs"] for event in events(stream) for choice in event["choices"]]
    for name in ("tokens", "text_offset"):
        assert [item for piece in pieces for item in piece[name]] == logprobs[name]
    choice = echoed.json()["choices"][0]
    assert choice["text"] == PROMPT + sample.text
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == len(expected.prompt_token_ids) + 5
    choice = scored.json()["choices"][0]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["token_logprobs"]) == len(expected.prompt_token_ids)
    assert scored.json()["usage"]["completion_tokens"] == 0


def test_usage_comes_last(tiny):
    body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
    whole, stream = post(tiny, BODY, body)
    *pieces, last = events(stream)
    assert last["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][name] == whole.json()["usage"][name]
    assert all(piece["usage"] is None for piece in pieces)
    assert {piece["id"] for piece in pieces} == {last["id"]}


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"best_of": 2}, "best_of", "n"),
        ({"suffix": "x"}, "suffix", "suffix"),
        ({"audio": True}, "audio", "not a field"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 10**40, "min_tokens": 10**39}, None, "min_tokens"),
        ({"temperature": -1}, "temperature", "greater"),
        ({"temperature": float("inf")}, "temperature", "finite"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"logit_bias": {"5": 101}}, None, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"4000": 1}}, None, "vocabulary"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, None, "empty"),
        ({"prompt": [5, 100000]}, None, "vocabulary"),
        ({"prompt": [5] * 512}, "prompt", "512 tokens"),
        ({"prompt": "x " * 50000}, "prompt", "max_model_len"),
        ({"prompt": {"a": 1}}, "prompt", "valid"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"seed": 2**32}, "seed", "4294967295"),
        ({"slo_ms": 50.0}, None, "slo_ms"),
        ({"structured_outputs": {"regex": "("}}, None, "regex"),
        ({"structured_outputs": {"json": {"type": "frog"}}}, None, "json"),
        ({"n": 1000}, None, "at most"),
    ],
)
def test_refuses_by_name(tiny, fields, param, word):
    import json

    async def talk(client, front):
        # Not the client's own JSON, which refuses infinity.
        return await client.post(
            "/v1/completions", content=json.dumps(BODY | fields), headers={"content-type": "application/json"}
        )

    answer = with_server(tiny, talk)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param in (None, error["param"]), error
    assert word in error["message"], error


def test_unknown_model_and_path(tiny):
    answers = [*post(tiny, BODY | {"model": "gpt-9"}), *post(tiny, {}, path="/v1/nothing")]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].json()["error"]["code"] == "model_not_found"


def test_more_than_the_limit_is_429(tiny):
    first, second, third = post(tiny, BODY | {"n": 3}, BODY | {"n": 3}, BODY | {"n": 5}, limits=Limits(max_requests=4))
    assert sorted([first.status_code, second.status_code]) == [200, 429]
    late = first if first.status_code == 429 else second
    assert int(late.headers["retry-after"]) >= 1
    assert late.json()["error"]["type"] == "rate_limit_error"
    assert third.status_code == 400


def test_a_call_that_takes_too_long_is_408(tiny):
    (answer,) = post(tiny, BODY | {"max_tokens": 100, "ignore_eos": True}, limits=Limits(request_timeout_s=0.02))
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "request_timeout"
