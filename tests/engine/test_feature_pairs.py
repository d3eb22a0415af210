"""Every two features together in one run, against a reference without the machinery and with less asked.

What each feature is measured against, in every pair that holds it:

- overlap, chunking, preemption: one sequence at a time, synchronous, a prompt a step, ample blocks;
- prefix cache: the same requests, served like that, with nothing in the cache; others have left beginnings of prompts;
- SLO budget: the same, without any promise; some are promised a pace, and prompts come while they generate;
- streaming: the same, reported as a whole; what came is put together from what was new in each step;
- tp, pp, of two devices each: one device;
- sliding window, bfloat16: the same model, served like that; in bfloat16 the log-probabilities agree to its precision,
  and a text may go another way where that decides, as long as most tokens agree;
- penalties, seeded sampling: the same draws, served like that (their maths is compared in tests/sampling);
- logprobs, prompt logprobs: of a request that asks for the longest lists, of which shorter ones are the beginning;
- stop strings: the text without them, cut off by this test;
- n: a request with one sample more;
- structured: the same request, served like that, half of them ordinary; the text has its form.

No pair is refused: every one of them works. Requests with prompt logprobs find nothing in the prefix cache, by design;
where both are wanted, only half of the requests ask for them.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable

import pytest

from tests.engine.features import (
    FORM,
    PROMPTS,
    Paced,
    leave_beginnings,
    longest,
    reduced,
    request_of,
    serve,
    stop_string,
)
from tests.engine.serving import Parity, Served, at_most

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
    "prefix cache",
    "SLO budget",
    "streaming",
    "tp",
    "pp",
]
DEVICES = {"tp", "pp"}
CHUNK = 9
PACED_CHUNK = 18
"""More than the promised pace allows, so that either bounds some steps."""


def marked(*features: str):
    """The arguments of a case; meshes take longer."""
    return pytest.param(*features, marks=[pytest.mark.parallel] if DEVICES & set(features) else [])


PAIRS = [marked(*pair) for pair in itertools.combinations(FEATURES, 2)]


def check(features: set[str], one: Served, served: Served, parity: Parity) -> None:
    """Serves requests with these features and compares them.

    Args:
      features: all that is asked.
      one: the model on one device, for the reference.
      served: the model on the devices that the features say.
      parity: counts.
    """
    wanted = [request_of(features, seed) for seed in range(len(PROMPTS))]
    references = one.alone([(prompt, longest(params)) for prompt, params in zip(PROMPTS, wanted, strict=True)])
    if "stop strings" in features:
        texts = [reference.outputs[0].text for reference in references]
        wanted = [
            dataclasses.replace(params, stop=stop_string(text)) for params, text in zip(wanted, texts, strict=True)
        ]

    paced, most = "SLO budget" in features, served.config.buckets[-1]
    if "chunking" in features:
        most = PACED_CHUNK if paced else CHUNK
    chooser = Paced(served, most) if paced else at_most(most) if "chunking" in features else None
    bench = served.bench(
        overlap="overlap" in features,
        num_blocks=12 if "preemption" in features else 500,
        chooser=chooser,
        prefix_caching="prefix cache" in features,
    )
    findable = leave_beginnings(bench) if "prefix cache" in features else [0] * len(PROMPTS)
    outputs = serve(bench, wanted, paced=paced, streams="streaming" in features)

    expected = [reduced(*each, served.tokenizer) for each in zip(references, wanted, strict=True)]
    if "bfloat16" in features:
        parity.check(outputs, expected, tie=None, atol=0.05)
        num_tokens = sum(len(sample.token_ids) for output in expected for sample in output.outputs)
        assert parity.num_tokens >= 0.7 * num_tokens
    else:
        parity.check(outputs, expected)

    if "chunking" in features:
        assert max(plan.num_tokens for plan in bench.plans) <= max(most, served.config.buckets[0])
    if "preemption" in features:
        assert sum(output.metrics.num_preemptions for output in outputs) > 0
    if "stop strings" in features:
        assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    if "structured" in features:
        assert all(re.fullmatch(FORM + "+", sample.text) for output in outputs[::2] for sample in output.outputs)
    if features == {"n", "seeded sampling"}:
        assert all(output.outputs[0].token_ids != output.outputs[1].token_ids for output in outputs)
    cached = [output.metrics.num_cached_tokens for output in outputs]
    if "preemption" in features and "prefix cache" in features:
        assert sum(cached) > 0, "whoever comes first finds something; of the rest some may be evicted before"
    else:
        scored = [params.prompt_logprobs is not None for params in wanted]
        assert cached == [0 if scores else tokens for scores, tokens in zip(scored, findable, strict=True)]
    if isinstance(chooser, Paced):
        assert chooser.num_free > 0
        assert chooser.num_cut > 0
        assert any(plan.num_decodes and not plan.chunks[-1].samples for plan in bench.plans), "prompts are cut"
        starts = [output.metrics.first_scheduled_s or 0 for output in outputs]
        assert starts[3] < starts[2], "less priority goes first"
    assert served.llm.num_late_compiles == 0


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pair(
    first: str, second: str, request: pytest.FixtureRequest, spread: Callable[[str, int, int], Served], parity: Parity
):
    features = {first, second}
    name = "decoder"
    if "sliding window" in features or features == DEVICES:  # which `test_all_together_on_a_mesh` compiles anyway
        name = "windowed"
    if "bfloat16" in features:
        name = "half"
    one: Served = request.getfixturevalue(name)
    tp, pp = 1 + ("tp" in features), 1 + ("pp" in features)
    check(features, one, one if tp == pp == 1 else spread(name, tp, pp), parity)


@pytest.mark.slow
def test_all_together(windowed: Served, parity: Parity):
    check(set(FEATURES) - DEVICES - {"bfloat16"}, windowed, windowed, parity)


@pytest.mark.slow
@pytest.mark.parallel
def test_all_together_on_a_mesh(windowed: Served, spread: Callable[[str, int, int], Served], parity: Parity):
    check(set(FEATURES) - {"bfloat16"}, windowed, spread("windowed", 2, 2), parity)
