"""What cannot be served is refused with a message that helps, and disturbs nobody."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sarathi_jax.config import ConfigError
from sarathi_jax.llm import LLM
from sarathi_jax.request import RequestError, SamplingParams
from tests.engine.serving import BLOCK_SIZE, MAX_LEN, VOCAB_SIZE, Bench, Parity, Served, drawn, greedy, prompt_of

NAN, INF = float("nan"), float("inf")

BAD_VALUES: dict[str, list[Any]] = {
    "n": [0, -1, 1.5, "2", True, NAN, 1025, None],
    "max_tokens": [0, -3, 2.5, "16", NAN],
    "min_tokens": [-1, 1.5, NAN, 17, None],
    "temperature": [-0.1, NAN, INF, "hot", None, True],
    "top_k": [-2, 1.5, NAN, None],
    "top_p": [0.0, -0.1, 1.1, NAN, None],
    "min_p": [-0.1, 1.1, NAN],
    "seed": [-1, 2**32, 1.5, NAN, "7"],
    "repetition_penalty": [0.0, -1.0, NAN, INF],
    "presence_penalty": [2.1, -2.1, NAN, INF],
    "frequency_penalty": [2.1, -2.1, NAN, -INF],
    "logit_bias": [
        {-1: 1.0},
        {1: NAN},
        {1: 101.0},
        {1: -INF},
        {"1": 1.0},
        {1.5: 1.0},
        dict.fromkeys(range(301), 0.0),
        [1, 2],
        5,
        "a",
    ],
    "stop": ["", ["a", ""], [1], 5, [None]],
    "stop_token_ids": [[-1], [1.5], ["a"], [NAN], list(range(33)), 5, "12"],
    "ignore_eos": ["no", 1, None],
    "include_stop_str_in_output": ["no", 0, None],
    "logprobs": [-1, 21, 1.5, NAN],
    "prompt_logprobs": [-1, 21, 1.5, NAN],
    "detokenize": ["no", 1, None],
    "skip_special_tokens": ["no", 1, None],
    "structured_outputs": [{}, [], "json", 5, True, {"json": 5}, {"regex": None}, {"choice": ["a"], "regex": "a"}],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in BAD_VALUES.items() for value in values],
    ids=lambda value: str(value)[:20],
)
def test_bad_parameter(name: str, value: Any):
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_every_parameter_is_tried():
    assert set(BAD_VALUES) == {field.name for field in dataclasses.fields(SamplingParams)}


def test_unknown_parameter():
    with pytest.raises(RequestError, match="'temprature'; did you mean 'temperature'"):
        SamplingParams.from_dict({"temprature": 1})
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)


def test_stop_strings_need_text():
    with pytest.raises(RequestError, match="detokenize=True or use stop_token_ids"):
        SamplingParams(stop="x", detokenize=False)


BAD_REQUESTS: dict[str, tuple[Any, Any, str]] = {
    "empty text": ("", greedy(), "prompt is empty"),
    "empty ids": ([], greedy(), "prompt is empty"),
    "too long": (prompt_of(MAX_LEN), greedy(), "max_model_len leaves room for 159"),
    "much too long": (prompt_of(5 * MAX_LEN), greedy(), "shorten the prompt"),
    "too large an id": ([5, VOCAB_SIZE], greedy(), rf"{VOCAB_SIZE} is not an integer in \[0, {VOCAB_SIZE}\)"),
    "huge id": ([10**30], greedy(), "vocabulary"),
    "negative id": ([5, -1], greedy(), "-1 is not an integer"),
    "fraction": ([5, 1.5], greedy(), "1.5 is not an integer"),
    "whole float": ([5, np.float32(7)], greedy(), "is not an integer"),
    "NaN": ([5, NAN], greedy(), "nan is not an integer"),
    "text among ids": ([5, "a"], greedy(), "'a' is not an integer"),
    "bool": ([5, True], greedy(), "True is not an integer"),
    "None": ([5, None], greedy(), "None is not an integer"),
    "bytes": (b"abc", greedy(), "bytes"),
    "no prompt": (None, greedy(), "NoneType"),
    "number": (7, greedy(), "int"),
    "mapping": ({"prompt": "x"}, greedy(), "dict"),
    "surrogate": ("ab\ud800", greedy(), "Unicode"),
    "bias beyond the vocabulary": ([5], greedy(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias names token"),
    "stop beyond the vocabulary": ([5], greedy(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids names token"),
    "min_tokens beyond the room": (prompt_of(150), greedy(max_tokens=50, min_tokens=20), "only 10 tokens fit"),
    "a dict of parameters": ([5], {"temperature": 0}, "SamplingParams.from_dict"),
    "a name as parameters": ([5], "greedy", "SamplingParams"),
}


@pytest.fixture
def watched(decoder: Served) -> Iterator[tuple[LLM, Bench]]:
    """A model that must draw the same tokens after the test as before it, with every block free."""
    llm, bench = decoder.face(prefix_caching=False)
    ask = (prompt_of(20), drawn(max_tokens=8))
    before = llm.generate(*ask)[0].outputs
    yield llm, bench
    bench.check_idle()
    assert llm.generate(*ask)[0].outputs == before
    bench.check_idle()


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_request(watched: tuple[LLM, Bench], case: str):
    prompt, params, message = BAD_REQUESTS[case]
    llm, _ = watched
    with pytest.raises(ValueError, match=message):
        llm.submit(prompt, params)
    if not isinstance(prompt, int):  # beside others a number would be a token id
        with pytest.raises(ValueError, match=message):
            llm.generate([[5, 6], prompt], [greedy(), params], use_tqdm=False)
    with pytest.raises(ValueError, match=message):
        next(llm.stream(prompt, params))


@pytest.mark.parametrize("prompts", [None, 7, 1.5, {"prompt": "x"}, b"abc", [[5], None], [[5], 7], [None]])
def test_bad_prompts(watched: tuple[LLM, Bench], prompts: Any):
    llm, _ = watched
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompts, use_tqdm=False)


def test_bad_request_beside_good_ones(decoder: Served, parity: Parity):
    asks = [(prompt_of(30, i), drawn(max_tokens=12, seed=i)) for i in range(3)]
    bench = decoder.bench(num_blocks=16)
    for i, (prompt, params) in enumerate(asks):
        bench.engine.add_request(str(i), prompt, params)
    finished = {}
    bad = [(prompt, params) for prompt, params, _ in BAD_REQUESTS.values() if isinstance(prompt, list)]
    for i, (prompt, params) in enumerate(bad):
        finished |= {output.request_id: output for output in bench.step() if output.finished}
        with pytest.raises(RequestError):
            bench.engine.add_request(f"bad {i}", prompt, params)
    finished |= bench.drain()
    parity.check([finished[str(i)] for i in range(3)], decoder.alone(asks))


def test_number_of_sampling_params(watched: tuple[LLM, Bench]):
    llm, _ = watched
    with pytest.raises(RequestError, match="2 prompts but 3 sampling_params"):
        llm.generate([[5], [6]], [greedy()] * 3)
    with pytest.raises(RequestError, match="1 prompts but 0 sampling_params"):
        llm.generate([5, 6], [])


def test_which_prompt_is_bad(watched: tuple[LLM, Bench]):
    llm, _ = watched
    with pytest.raises(RequestError, match="prompt 1: token id -4"):
        llm.generate([[5], [-4], [6]])


def test_request_id_in_use(watched: tuple[LLM, Bench]):
    llm, bench = watched
    llm.submit([5, 6], greedy(), request_id="mine")
    with pytest.raises(RequestError, match="'mine' is in use"):
        llm.submit([7], greedy(), request_id="mine")
    assert bench.drain().keys() == {"mine"}
    llm.submit([7], greedy(), request_id="mine")
    bench.drain()


def test_prompt_longer_than_the_cache(decoder: Served):
    llm, bench = decoder.face(num_blocks=4)
    with pytest.raises(RequestError, match=r"the KV cache leaves room for 32 .* raise max_model_len or num_blocks"):
        llm.submit(prompt_of(33), greedy())
    (output,) = llm.generate(prompt_of(4 * BLOCK_SIZE), greedy(max_tokens=50), use_tqdm=False)
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 1
    bench.check_idle()


def test_numpy_prompts(decoder: Served):
    llm, _ = decoder.face()
    ids = prompt_of(6)
    one, *several = (
        *llm.generate(np.array(ids), greedy(), use_tqdm=False),
        *llm.generate([np.array(ids), ids], greedy(), use_tqdm=False),
        *llm.generate(np.array([ids, ids]), greedy(), use_tqdm=False),
    )
    assert [output.outputs for output in several] == [one.outputs] * 4
    assert all(type(token) is int for token in one.prompt_token_ids)


@pytest.mark.slow
def test_text_without_a_tokenizer(falcon: Served):
    llm, bench = falcon.face()
    with pytest.raises(RequestError, match="has no tokenizer: give the prompt as token ids"):
        llm.generate("text")
    with pytest.raises(RequestError, match="no chat template"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(RequestError, match=r"stop strings need a tokenizer.*stop_token_ids"):
        llm.generate([5], SamplingParams(stop="x"))
    (output,) = llm.generate([5, 6], greedy(max_tokens=3), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
    assert output.outputs[0].text == ""
    assert output.outputs[0].logprobs is not None
    assert all(entry.token is None for entry in output.outputs[0].logprobs[0].values())
    bench.check_idle()


def test_closed(decoder: Served):
    llm, _ = decoder.face()
    with llm:
        pass
    llm.close()
    assert "closed" in repr(llm)
    for use in (lambda: llm.generate([5]), lambda: next(llm.stream([5])), lambda: llm.score([5]), lambda: llm.engine):
        with pytest.raises(RuntimeError, match="closed: build a new one"):
            use()
    with pytest.raises(RuntimeError, match="closed"):
        _ = llm.num_late_compiles


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dtype": "float16"}, "float16.*float32, bfloat16"),
        ({"dtype": "int4"}, "int4.*float32, bfloat16"),
        ({"max_model_len": 100_000}, "exceeds the 512 positions"),
        ({"max_model_len": 0}, "max_model_len=0"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"token_budget": -1}, "token_budget=-1"),
        ({"token_buckets": (16, 4)}, "ascending"),
        ({"token_buckets": ()}, "ascending"),
        ({"block_size": 1.5}, "block_size=1.5"),
        ({"num_blocks": 0}, "num_blocks=0"),
        ({"memory_fraction": NAN}, "memory_fraction=nan"),
        ({"attention_backend": "magic"}, "magic"),
    ],
    ids=str,
)
def test_bad_configuration(decoder: Served, config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LLM(decoder.llm._path, progress=False, **config)


def test_unknown_configuration(decoder: Served):
    with pytest.raises((TypeError, ConfigError), match="max_num_seq"):
        LLM(decoder.llm._path, progress=False, max_num_seq=3)
