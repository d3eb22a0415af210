"""Texts kept to a grammar through the whole engine: what comes out, beside whom, and what is refused."""

import dataclasses
import itertools
import json
import re

import jsonschema
import numpy as np
import pytest

from sarathi_jax.executor import from_message, to_message
from sarathi_jax.parallel.wire import decode, encode
from sarathi_jax.request import MAX_GRAMMAR_LENGTH, RequestError, SamplingParams, StructuredOutputsParams
from sarathi_jax.runner import MicroBatch, Wanted
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.sequence import Status
from tests.engine.serving import MAX_LEN, Ask, Parity, Served, at_most, drawn, greedy, prompt_of
from tests.random_schemas import random_schemas

PERSON = {
    "type": "object",
    "properties": {"n": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["n", "age"],
    "additionalProperties": False,
}
WORDS = ("yes", "no", "no way", 'a "b"\n')


def shaped(**fields) -> SamplingParams:
    """Draws under a grammar, or greedy with temperature=0."""
    return SamplingParams(**{"max_tokens": MAX_LEN - 30, "seed": 5, "logprobs": 20} | fields)


ORDINARY: list[Ask] = [
    (prompt_of(12), greedy(max_tokens=30)),
    (prompt_of(30), drawn(max_tokens=25, repetition_penalty=1.2, n=2)),
]
STRUCTURED: list[Ask] = [
    (prompt_of(7), shaped(structured_outputs={"json": PERSON}, n=2)),
    (prompt_of(20), shaped(structured_outputs={"json": PERSON}, temperature=0, logit_bias={9: 20.0})),
    (prompt_of(9), shaped(structured_outputs={"choice": WORDS}, top_p=0.9)),
]


def test_every_answer_validates(windowed: Served):
    schemas = random_schemas(seed=3, number=24, longest=120)
    asks = [
        (prompt_of(6, i), shaped(structured_outputs={"json": schema}, temperature=i % 2, n=1 + i % 2))
        for i, schema in enumerate(schemas)
    ]
    for schema, output in zip(schemas, windowed.bench(chooser=at_most(20)).run(asks), strict=True):
        for sample in output.outputs:
            assert sample.finish_reason == "stop", (schema, sample.text)
            jsonschema.validate(json.loads(sample.text), schema)
            assert sample.text == json.dumps(json.loads(sample.text), ensure_ascii=False, separators=(",", ":"))
    assert windowed.llm.num_late_compiles == 0


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"choice": WORDS}, "|".join(map(re.escape, WORDS))),
        ({"regex": "[a-c]{2,5}/[0-9]"}, "[a-c]{2,5}/[0-9]"),
        ({"grammar": 'start: "(" inner? ")"\ninner: /[xy]{1,3}/'}, r"\([xy]{0,3}\)"),
        ({"json": '{"enum": ["a", 5]}'}, '"a"|5'),
    ],
)
def test_other_forms(windowed: Served, asked: dict, form: str):
    asks = [(prompt_of(5, i), shaped(structured_outputs=asked, seed=i)) for i in range(6)]
    for output in windowed.bench().run(asks):
        assert output.outputs[0].finish_reason == "stop"
        assert output.outputs[0].stop_reason is None
        assert re.fullmatch(form, output.outputs[0].text)


def test_any_json_object(windowed: Served):
    """Which may grow for ever: the limit of tokens ends it like any text."""
    outputs = windowed.bench().run(
        [(prompt_of(5, i), shaped(structured_outputs={"json_object": True}, seed=i)) for i in range(4)]
    )
    for output in outputs:
        sample = output.outputs[0]
        assert sample.text.startswith("{")
        if sample.finish_reason == "stop":
            assert isinstance(json.loads(sample.text), dict)
        else:
            assert len(sample.token_ids) == MAX_LEN - 30


@pytest.mark.parametrize("policy", ["sarathi", "vllm"])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_blocks", [11, 4096])
def test_same_tokens_whatever_runs_beside(
    windowed: Served, parity: Parity, overlap: bool, num_blocks: int, policy: str
):
    """Overlap, preemption, chunks, samples, other requests: nothing changes a token, of the others neither."""
    asks = [*STRUCTURED, *ORDINARY]
    bench = windowed.bench(
        overlap=overlap, num_blocks=num_blocks, policy=policy, chooser=at_most(9) if policy == "sarathi" else None
    )
    outputs = bench.run(asks)
    parity.check(outputs, windowed.alone(asks))
    assert (sum(output.metrics.num_preemptions for output in outputs) > 0) == (num_blocks == 11)
    assert [output.outputs[0].finish_reason for output in outputs[:3]] == ["stop"] * 3


def test_waits_for_its_own_token_alone(windowed: Served):
    """Under overlap it is in every other step, and the others in all."""
    bench = windowed.bench()
    bench.run([(prompt_of(5), shaped(structured_outputs={"regex": "[a-z]{20}"})), ORDINARY[0]])
    inside = [{chunk.seq_id for chunk in plan.chunks} for plan in bench.plans]
    assert all(1 in ids for ids in inside[:30])
    steps = [i for i, ids in enumerate(inside) if 0 in ids]
    assert {after - before for before, after in itertools.pairwise(steps)} == {2}


def test_nothing_is_left_of_an_aborted_one(windowed: Served, parity: Parity):
    expected = windowed.alone(ORDINARY)
    for moment in (1, 2, 5, 6):
        bench = windowed.bench()
        for i, ask in enumerate([*ORDINARY, STRUCTURED[0]]):
            bench.engine.add_request(str(i), *ask)
        for _ in range(moment):
            bench.step()
        output = bench.engine.abort("2")
        assert output is not None
        assert {sample.finish_reason for sample in output.outputs} == {"abort"}
        finished = bench.drain()
        parity.check([finished["0"], finished["1"]], expected)
        assert not bench.engine._matchers


def test_the_end_of_a_text(windowed: Served):
    """Complete texts end at once; where a text may go on the model decides; a limit or a stop string come first."""
    word = {"structured_outputs": {"choice": ["yes"]}}
    may_go_on = {"structured_outputs": {"regex": "y*"}, "logit_bias": {2: 100.0}}
    exact, limited, stopped, decided, kept = windowed.bench().run(
        [
            (prompt_of(5), shaped(**word)),
            (prompt_of(5), shaped(**word, max_tokens=2)),
            (prompt_of(5), shaped(**word, stop="e")),
            (prompt_of(5), shaped(**may_go_on, temperature=0)),
            (prompt_of(5), shaped(**word, max_tokens=3, detokenize=False)),
        ]
    )
    assert (exact.outputs[0].text, exact.outputs[0].finish_reason) == ("yes", "stop")
    assert 2 not in exact.outputs[0].token_ids
    assert limited.outputs[0].finish_reason == ("length" if limited.outputs[0].text != "yes" else "stop")
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == ("y", "e")
    assert (decided.outputs[0].text, decided.outputs[0].token_ids) == ("", (2,))
    assert kept.outputs[0].finish_reason == "stop"


def test_a_grammar_that_cannot_be_followed(windowed: Served):
    """The sample ends with the reason, and no other: here the tokens come from a script that the grammar forbids."""
    letter = windowed.tokenizer.encode("q", add_special_tokens=False)
    bench = windowed.bench(scripts=[letter * 40])
    bad, good = bench.run(
        [
            (prompt_of(5), shaped(structured_outputs={"regex": "x+"}, logprobs=None)),
            (prompt_of(5), greedy(logprobs=None)),
        ]
    )
    assert bad.outputs[0].finish_reason == "abort"
    assert str(bad.outputs[0].stop_reason).startswith("structured_outputs: ")
    assert len(bad.outputs[0].token_ids) == 1
    assert good.outputs[0].text == "q" * 16
    assert not bench.engine._matchers


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "exactly one of json, json_object, regex, choice, grammar; it has none"),
        ({"regex": "a", "choice": ["b"]}, "it has regex, choice"),
        ({"regexp": "a"}, "did you mean 'regex'"),
        ([], "must be a StructuredOutputsParams, a mapping or None"),
        ({"json_object": 1}, "json_object=1 must be True or False"),
        ({"json": [1]}, "must be a schema that is an object"),
        ({"json": "{"}, "is no JSON"),
        ({"json": {"const": float("nan")}}, "is no JSON"),
        ({"json": {"const": {1}}}, "is no JSON"),
        ({"json": {"x-guidance": {}}}, "x-guidance is not served"),
        ({"regex": ""}, "must be a non-empty string"),
        ({"grammar": 5}, "must be a non-empty string"),
        ({"choice": "ab"}, "must be a list of non-empty strings"),
        ({"choice": ["a", ""]}, "must be a list of non-empty strings"),
        ({"choice": []}, "must be a list of non-empty strings"),
        ({"regex": "a" * (MAX_GRAMMAR_LENGTH + 1)}, "at most 100000 are served"),
    ],
)
def test_bad_parameters(asked: dict, message: str):
    with pytest.raises(RequestError, match=re.escape(message)):
        SamplingParams(structured_outputs=asked)


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 2}])
def test_what_cannot_go_with_a_grammar(fields: dict):
    with pytest.raises(RequestError, match=f"{next(iter(fields))} cannot go with structured_outputs"):
        shaped(structured_outputs={"json_object": True}, **fields)


def test_a_schema_is_kept_as_it_was():
    schema = {"enum": [1]}
    params = shaped(structured_outputs={"json": schema})
    schema["enum"].append(2)
    assert params.structured_outputs == StructuredOutputsParams(json='{"enum": [1]}')
    assert dataclasses.replace(params, n=2).structured_outputs == params.structured_outputs


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"json": {"type": "strin"}}, "structured_outputs.json cannot be served: Invalid type: strin"),
        ({"json": {"not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable schema"),
        ({"json": {"$ref": "http://127.0.0.1/"}}, "Default retriever does not fetch resources"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "no token of the model can go on"),
        ({"json": json.loads('{"items":' * 200 + "{}" + "}" * 200)}, "recursion limit exceeded"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": "\ud800"}, "surrogates not allowed"),
        ({"grammar": "start: other"}, 'unknown name: "other"'),
        ({"grammar": "nonsense"}, "cannot be served"),
    ],
)
def test_refused_grammars_harm_nobody(windowed: Served, parity: Parity, asked: dict, message: str):
    bench = windowed.bench()
    bench.engine.add_request("0", *ORDINARY[0])
    bench.step()
    with pytest.raises(RequestError, match=re.escape(message)):
        bench.engine.add_request("1", prompt_of(5), shaped(structured_outputs=asked))
    assert bench.engine.num_requests == 1
    parity.check([bench.drain()["0"]], windowed.alone(ORDINARY[:1]))


def test_a_model_without_text_is_refused(falcon: Served):
    with pytest.raises(RequestError, match="structured_outputs need a tokenizer"):
        falcon.bench().engine.add_request("0", [5, 6], shaped(structured_outputs={"json_object": True}))


@pytest.mark.parametrize("regex", ["a{1000000}", "(a{1000}){1000}", "(a?){5000}a{5000}", "(.*a){20}.{1000}"])
def test_a_hostile_grammar_takes_no_long_step(windowed: Served, regex: str):
    """Counted in lexer states, not in seconds: the engine's own steps go on and the sample ends at its limit."""
    asks = [(prompt_of(5), shaped(structured_outputs={"regex": regex}, max_tokens=12)), ORDINARY[0]]
    hostile, other = windowed.bench().run(asks)
    assert hostile.outputs[0].finish_reason in ("length", "abort")
    assert other.outputs[0].finish_reason == "length"


def test_compiled_ahead(windowed: Served):
    engine = windowed.bench().engine
    asked = StructuredOutputsParams(json=PERSON)
    engine.compile_grammar(asked)
    engine.add_request("0", prompt_of(5), shaped(structured_outputs=asked))
    assert engine._grammars is not None
    assert engine._grammars._compiled.cache_info()[:2] == (1, 1)
    engine.abort("0")


def test_masks_reach_other_processes():
    table = SamplingTable(4, 100)
    table.changes()
    allowed = np.array([1, -1, 2**31 - 1, -(2**31)], np.int32)
    table.set_mask(2, allowed)
    sent = MicroBatch(16, np.zeros(8, np.int32), table.changes(), Wanted(1, False, 0))
    received = from_message(decode(bytearray(encode(to_message(sent)))))
    assert received is not None
    assert received.sampling["is_masked"].tolist() == [0, 0, 1, 0]
    np.testing.assert_array_equal(received.sampling["allowed"][2], allowed)


def test_a_preempted_one_goes_on_where_it_was(windowed: Served):
    """Its matcher keeps its place while the blocks are gone, a token in flight included."""
    bench = windowed.bench(num_blocks=11)
    for i, ask in enumerate([*ORDINARY, STRUCTURED[0]]):
        bench.engine.add_request(str(i), *ask)
    seen = set()
    finished = {}
    while bench.engine.has_work:
        for seq in bench.scheduler.waiting:
            if seq.num_preemptions and seq.allowed is not None and seq.status is Status.WAITING:
                seen.add((seq.num_output > 0, seq.num_in_flight))
        finished |= {output.request_id: output for output in bench.step() if output.finished}
    assert (True, 0) in seen
    for sample in finished["2"].outputs:
        jsonschema.validate(json.loads(sample.text), PERSON)
