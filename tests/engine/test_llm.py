"""The library's face: generate, chat, stream, score, metrics."""

import dataclasses
import itertools

import numpy as np
import pytest

from sarathi_jax.request import RequestOutput, SamplingParams
from tests.engine.serving import MAX_LEN, Parity, Served, drawn, greedy, prompt_of


def test_outputs_in_the_order_of_prompts(decoder: Served):
    llm, bench = decoder.face()
    prompts = [prompt_of(length) for length in (40, 3, 17, 1, 60)]
    params = [greedy(max_tokens=n) for n in (20, 3, 9, 14, 1)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 3, 9, 14, 1]
    assert len({output.request_id for output in outputs}) == 5
    bench.check_idle()


def test_kinds_of_prompts(decoder: Served):
    llm, _ = decoder.face()
    assert decoder.tokenizer is not None
    text, params = "the quick brown", greedy(max_tokens=4)
    ids = decoder.tokenizer.encode(text)
    outputs = [
        *llm.generate(text, params),
        *llm.generate(ids, params),
        *llm.generate([text, ids], params, use_tqdm=False),
        *llm.generate(tuple(ids), [params]),
    ]
    assert [output.prompt for output in outputs] == [text, None, text, None, None]
    assert {output.prompt_token_ids for output in outputs} == {tuple(ids)}
    assert all(output.outputs == outputs[0].outputs for output in outputs)
    assert llm.generate([]) == []
    assert len(llm.generate(text)[0].outputs[0].token_ids) <= SamplingParams().max_tokens


def test_chat(decoder: Served):
    llm, _ = decoder.face(prefix_caching=False)  # so that both are computed in the same steps, equal to the last bit
    assert decoder.tokenizer is not None
    conversations = [[{"role": "user", "content": text}] for text in ("a cat", "the dog")]
    several = llm.chat(conversations, greedy(max_tokens=3), use_tqdm=False)
    (one,) = llm.chat(conversations[0], greedy(max_tokens=3))
    assert one.outputs == several[0].outputs
    written = decoder.tokenizer.encode("<s><user>the dog\n<assistant>", add_special_tokens=False)
    assert list(several[1].prompt_token_ids) == written


def test_max_tokens_none_fills_the_model(decoder: Served):
    llm, bench = decoder.face()
    (output,) = llm.generate(prompt_of(MAX_LEN - 20), greedy(max_tokens=None))
    assert len(output.outputs[0].token_ids) == 20
    assert output.outputs[0].finish_reason == "length"
    bench.check_idle()


def test_longest_prompt(decoder: Served):
    llm, _ = decoder.face()
    (output,) = llm.generate(prompt_of(MAX_LEN - 1), greedy(max_tokens=9))
    assert len(output.outputs[0].token_ids) == 1


def test_min_tokens_bans_every_end_of_text(decoder: Served):
    """Ends of text are what the model wants most; until `min_tokens` it may not have them."""
    llm, _ = decoder.face()
    wanted = {2: 100.0, 3: 99.0, 9: 98.0}
    fields = {"logit_bias": wanted, "stop_token_ids": [9], "max_tokens": 12, "ignore_eos": False}
    for params in (greedy(min_tokens=6, **fields), drawn(min_tokens=6, **fields)):
        (sample,) = llm.generate(prompt_of(7), params)[0].outputs
        assert not wanted.keys() & set(sample.token_ids[:6])
        assert sample.token_ids[6:] == (2,)
        assert (sample.finish_reason, sample.stop_reason) == ("stop", None)


def test_stream_grows_into_what_generate_returns(decoder: Served):
    llm, bench = decoder.face()
    prompt, params = "the lazy dog", drawn(max_tokens=30, n=2, stop=["e", "on"], prompt_logprobs=2)
    outputs = list(llm.stream(prompt, params))
    (whole,) = llm.generate(prompt, params)
    assert outputs[-1].outputs == whole.outputs
    assert outputs[-1].prompt_logprobs == whole.prompt_logprobs
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for earlier, later in itertools.pairwise(outputs):
        for before, after in zip(earlier.outputs, later.outputs, strict=True):
            assert after.text.startswith(before.text)
            assert after.token_ids[: len(before.token_ids)] == before.token_ids
            assert len(after.token_ids) - len(before.token_ids) <= 1
    bench.drain()  # a step was under way when the last token came


def test_leaving_a_stream_aborts(decoder: Served):
    llm, bench = decoder.face()
    for output in llm.stream(prompt_of(30), greedy(max_tokens=50)):
        if len(output.outputs[0].token_ids) == 3:
            break
    bench.drain()
    assert bench.pool.num_free == bench.pool.num_total
    stream = llm.stream(prompt_of(30), greedy(max_tokens=50))
    next(stream)
    stream.close()
    bench.drain()


def test_streams_and_generate_do_not_swallow_each_other(decoder: Served, parity: Parity):
    llm, bench = decoder.face()
    asks = [(prompt_of(9), greedy(max_tokens=12)), (prompt_of(21), drawn(max_tokens=8))]
    third = (prompt_of(5), greedy(max_tokens=4))
    expected = decoder.alone([*asks, third])
    streams = [llm.stream(*ask) for ask in asks]
    seen: list[list[RequestOutput]] = [[], []]
    for round_ in itertools.count():
        for stream, outputs in zip(streams, seen, strict=True):
            outputs += itertools.islice(stream, 1)
        if round_ == 2:
            parity.check(llm.generate(*third), expected[2:])
        if all(outputs[-1].finished for outputs in seen):
            break
    for outputs, reference in zip(seen, expected, strict=False):
        parity.check(outputs[-1:], [reference])
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == list(range(1, len(lengths) + 1))
    bench.check_idle()


@pytest.mark.parametrize("step", [1, 4, 9])
def test_interrupt_leaves_the_engine_clean(decoder: Served, parity: Parity, monkeypatch: pytest.MonkeyPatch, step: int):
    llm, bench = decoder.face(num_blocks=20)
    asks = [(prompt_of(30, i), drawn(max_tokens=12, seed=i)) for i in range(3)]
    steps, whole = itertools.count(1), bench.engine.step

    def interrupted():
        if next(steps) == step:
            raise KeyboardInterrupt
        return whole()

    with monkeypatch.context() as patch:
        patch.setattr(bench.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([prompt for prompt, _ in asks], [params for _, params in asks], use_tqdm=False)
    bench.check_blocks()
    assert bench.pool.num_free == bench.pool.num_total
    outputs = llm.generate([prompt for prompt, _ in asks], [params for _, params in asks], use_tqdm=False)
    parity.check(outputs, decoder.alone(asks))
    bench.check_idle()


@pytest.mark.parametrize(
    "served",
    ["decoder", pytest.param("windowed", marks=pytest.mark.slow), pytest.param("falcon", marks=pytest.mark.slow)],
)
def test_score_is_what_generation_reports(served: str, request: pytest.FixtureRequest):
    """Scores of a text that the model wrote: the log-probabilities that it reported while writing."""
    model: Served = request.getfixturevalue(served)
    llm, bench = model.face()
    prompt = prompt_of(30)
    (output,) = model.alone([(prompt, drawn(max_tokens=20, prompt_logprobs=0))])
    (sample,) = output.outputs
    assert output.prompt_logprobs is not None
    assert sample.logprobs is not None
    (score,) = llm.score(prompt + list(sample.token_ids))
    reported = [
        *[table[i].logprob for i, table in zip(prompt[1:], output.prompt_logprobs[1:], strict=True) if table],
        *[table[i].logprob for i, table in zip(sample.token_ids, sample.logprobs, strict=True)],
    ]
    np.testing.assert_allclose(score.logprobs, reported, atol=1e-4)
    assert list(score.token_ids) == prompt + list(sample.token_ids)
    assert score.log_likelihood == pytest.approx(sum(reported), abs=1e-3)
    assert all(value < 0 for value in score.logprobs)
    bench.check_idle()


def test_score_of_several_and_of_one_token(decoder: Served):
    llm, _ = decoder.face()
    several = llm.score(["the cat", prompt_of(9), [7]], use_tqdm=False)
    assert several[2].logprobs == ()
    assert several[2].log_likelihood == 0
    assert llm.score(prompt_of(9))[0].logprobs == pytest.approx(several[1].logprobs, abs=1e-4)


def test_logprobs_of_the_drawn_token_and_the_likeliest(decoder: Served):
    llm, _ = decoder.face()
    assert decoder.tokenizer is not None
    (output,) = llm.generate(prompt_of(12), drawn(max_tokens=20, logprobs=3, prompt_logprobs=0, temperature=2.0))
    (sample,) = output.outputs
    assert sample.logprobs is not None
    assert output.prompt_logprobs is not None
    assert {len(table) for table in sample.logprobs} == {3, 4}
    for token, table in zip(sample.token_ids, sample.logprobs, strict=True):
        values = [entry.logprob for entry in table.values()]
        assert values == sorted(values, reverse=True)
        assert table[token].token == decoder.tokenizer.decode([token], skip_special_tokens=False)
    assert output.prompt_logprobs[0] is None
    assert [list(table) for table in output.prompt_logprobs[1:] if table] == [[i] for i in output.prompt_token_ids[1:]]


@pytest.mark.parametrize("overlap", [True, False])
def test_metrics(decoder: Served, overlap: bool):
    llm, _ = decoder.face(overlap=overlap, num_blocks=20)
    params = [drawn(max_tokens=20, n=n) for n in (1, 2, 3, 1)]
    outputs = llm.generate([prompt_of(25, i) for i in range(4)], params, use_tqdm=False)
    for output in outputs:
        metrics = output.metrics
        times = [metrics.arrival_s, metrics.first_scheduled_s, metrics.first_token_s, metrics.finished_s]
        assert None not in times
        assert times == sorted(times)
        assert metrics.ttft_s == metrics.first_token_s - metrics.arrival_s
        for sample, token_s in zip(output.outputs, metrics.token_s, strict=True):
            assert len(token_s) == len(sample.token_ids)
            assert list(token_s) == sorted(token_s)
            assert metrics.first_token_s <= token_s[0]
            assert token_s[-1] <= metrics.finished_s
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def test_same_seed_same_tokens(decoder: Served):
    prompt = prompt_of(10)
    ask = (prompt, SamplingParams(max_tokens=10, n=3, seed=5))
    first, again, other = (
        decoder.bench().run([ask])[0].outputs,
        decoder.bench(overlap=False).run([ask])[0].outputs,
        decoder.bench().run([(prompt, dataclasses.replace(ask[1], seed=6))])[0].outputs,
    )
    assert [sample.token_ids for sample in first] == [sample.token_ids for sample in again]
    assert not {sample.token_ids for sample in first} & {sample.token_ids for sample in other}


def test_repr(decoder: Served):
    text = repr(decoder.llm)
    assert "float32" in text
    assert f"max_model_len={MAX_LEN}" in text
