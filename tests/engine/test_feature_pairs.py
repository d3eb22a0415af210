"""Every two features together in one run, against a reference without the machinery and with less asked.

What each feature is measured against, in every pair that holds it:

- overlap, chunking, preemption: one sequence at a time, synchronous, a prompt a step, ample blocks;
- sliding window, bfloat16: the same model, served like that; in bfloat16 the log-probabilities agree to its precision,
  and a text may go another way where that decides, as long as most tokens agree;
- penalties, seeded sampling: the same draws, served like that (their maths is compared in tests/sampling);
- logprobs, prompt logprobs: of a request that asks for the longest lists, of which shorter ones are the beginning;
- stop strings: the text without them, cut off by this test;
- n: a request with one sample more;
- structured: the same request, served like that, half of them ordinary; the text has its form.

No pair is refused: every one of them works.
"""

import dataclasses
import itertools
import re

import pytest

from sarathi_jax.request import CompletionOutput, Logprob, RequestOutput, SamplingParams, StructuredOutputsParams
from sarathi_jax.tokenizer import Tokenizer
from tests.engine.serving import TOP, Parity, Served, at_most, prompt_of

FEATURES = [
    "overlap",
    "preemption",
    "chunking",
    "penalties",
    "logprobs",
    "prompt logprobs",
    "seeded sampling",
    "stop strings",
    "n",
    "sliding window",
    "bfloat16",
    "structured",
]
PROMPTS = [prompt_of(length) for length in (6, 14, 20, 30)]
CHUNK = 9
FORM = "[a-z ]"


def request_of(features: set[str], seed: int) -> SamplingParams:
    """All that the features ask of a request, but stop strings."""
    is_structured = "structured" in features and seed % 2 == 0
    return SamplingParams(
        max_tokens=36,
        ignore_eos=not is_structured,
        structured_outputs=StructuredOutputsParams(regex=FORM + "{500}") if is_structured else None,
        temperature=0.9 if "seeded sampling" in features else 0,
        seed=seed if "seeded sampling" in features else None,
        repetition_penalty=1.3 if "penalties" in features else 1,
        frequency_penalty=0.3 if "penalties" in features else 0,
        presence_penalty=0.2 if "penalties" in features else 0,
        logprobs=3 if "logprobs" in features else None,
        prompt_logprobs=2 if "prompt logprobs" in features else None,
        n=2 if "n" in features else 1,
    )


def longest(params: SamplingParams) -> SamplingParams:
    """The request of the reference."""
    return dataclasses.replace(
        params,
        logprobs=TOP,
        prompt_logprobs=None if params.prompt_logprobs is None else TOP,
        n=params.n + (params.n > 1),
    )


def reduced(reference: RequestOutput, params: SamplingParams, tokenizer: Tokenizer | None) -> RequestOutput:
    """What a request with these parameters should return, given what the reference returned."""
    outputs = []
    for sample in reference.outputs[: params.n]:
        cut = _cut(sample, params.stop[0], tokenizer) if params.stop and tokenizer else sample
        assert cut.logprobs is not None
        lists = [
            _first(table, token, params.logprobs) for table, token in zip(cut.logprobs, cut.token_ids, strict=True)
        ]
        outputs.append(dataclasses.replace(cut, logprobs=None if params.logprobs is None else tuple(lists)))
    prompt_logprobs = None
    if params.prompt_logprobs is not None:
        assert reference.prompt_logprobs is not None
        pairs = zip(reference.prompt_logprobs, reference.prompt_token_ids, strict=True)
        prompt_logprobs = tuple(table and _first(table, token, params.prompt_logprobs) for table, token in pairs)
    return dataclasses.replace(reference, outputs=tuple(outputs), prompt_logprobs=prompt_logprobs)


def _first(table: dict[int, Logprob], token: int, num_top: int | None) -> dict[int, Logprob]:
    ids = sorted(table, key=lambda i: -table[i].logprob)
    return {i: table[i] for rank, i in enumerate(ids) if i == token or rank < (num_top or 0)}


def _cut(sample: CompletionOutput, stop: str, tokenizer: Tokenizer) -> CompletionOutput:
    at = sample.text.find(stop)
    if at < 0:
        return sample
    length = next(i for i in range(len(sample.token_ids) + 1) if stop in tokenizer.decode(sample.token_ids[:i]))
    assert sample.logprobs is not None
    return dataclasses.replace(
        sample,
        text=sample.text[:at],
        token_ids=sample.token_ids[:length],
        logprobs=sample.logprobs[:length],
        finish_reason="stop",
        stop_reason=stop,
    )


def stop_string(text: str) -> str:
    """Two characters in the middle of the text, which random tokens seldom hold together."""
    pairs = [text[i : i + 2] for i in range(len(text) // 2, len(text) - 1)]
    return next(pair for pair in pairs if pair.isascii() and pair.isprintable())


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(FEATURES, 2)))
def test_pair(first: str, second: str, request: pytest.FixtureRequest, parity: Parity):
    features = {first, second}
    name = "half" if "bfloat16" in features else "windowed" if "sliding window" in features else "decoder"
    served: Served = request.getfixturevalue(name)
    wanted = [request_of(features, seed) for seed in range(len(PROMPTS))]
    references = served.alone([(prompt, longest(params)) for prompt, params in zip(PROMPTS, wanted, strict=True)])
    if "stop strings" in features:
        texts = [reference.outputs[0].text for reference in references]
        wanted = [
            dataclasses.replace(params, stop=stop_string(text)) for params, text in zip(wanted, texts, strict=True)
        ]

    bench = served.bench(
        overlap="overlap" in features,
        num_blocks=12 if "preemption" in features else 500,
        chooser=at_most(CHUNK) if "chunking" in features else None,
    )
    outputs = bench.run(list(zip(PROMPTS, wanted, strict=True)))

    expected = [reduced(*each, served.tokenizer) for each in zip(references, wanted, strict=True)]
    if "bfloat16" in features:
        parity.check(outputs, expected, tie=None, atol=0.05)
        num_tokens = sum(len(sample.token_ids) for output in expected for sample in output.outputs)
        assert parity.num_tokens >= 0.7 * num_tokens
    else:
        parity.check(outputs, expected)
    chunks = [chunk.length for plan in bench.plans for chunk in plan.chunks]
    assert ("chunking" not in features) or max(chunks) <= max(CHUNK, served.config.buckets[0])
    if "preemption" in features:
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
    if "stop strings" in features:
        assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    if "structured" in features:
        assert all(re.fullmatch(FORM + "+", sample.text) for output in outputs[::2] for sample in output.outputs)
    if features == {"n", "seeded sampling"}:
        assert all(output.outputs[0].token_ids != output.outputs[1].token_ids for output in outputs)


@pytest.mark.slow
def test_all_together(windowed: Served, parity: Parity):
    everything = set(FEATURES)
    wanted = [request_of(everything, seed) for seed in range(len(PROMPTS))]
    references = windowed.alone([(prompt, longest(params)) for prompt, params in zip(PROMPTS, wanted, strict=True)])
    bench = windowed.bench(num_blocks=12, chooser=at_most(CHUNK))
    outputs = bench.run(list(zip(PROMPTS, wanted, strict=True)))
    parity.check(outputs, [reduced(*each, windowed.tokenizer) for each in zip(references, wanted, strict=True)])
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
