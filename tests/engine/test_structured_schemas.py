"""Structured output on the checkpoint that ships: hundreds of random schemas, and what the masks cost."""

import json
import statistics
import time

import jsonschema
import pytest

from sarathi_jax.llm import LLM
from sarathi_jax.request import SamplingParams
from sarathi_jax.structured import Matcher
from tests.random_schemas import random_schemas

NUM_SCHEMAS = 200
PROMPTS = ("The old house", "She opened the letter and", "It is a truth", "Mr. Darcy")


@pytest.mark.slow
def test_random_schemas(monkeypatch: pytest.MonkeyPatch, record_property):
    """Every answer ends by itself and validates; half are greedy, half drawn."""
    masks_s, advance = [], Matcher.advance

    def timed(matcher: Matcher, token: int) -> bool:
        start_s = time.perf_counter()
        is_complete = advance(matcher, token)
        masks_s.append(time.perf_counter() - start_s)
        return is_complete

    monkeypatch.setattr(Matcher, "advance", timed)
    schemas = random_schemas(seed=5, number=NUM_SCHEMAS, longest=1000)
    params = [
        SamplingParams(max_tokens=None, temperature=i // 2 % 2, seed=i, structured_outputs={"json": schema})
        for i, schema in enumerate(schemas)
    ]
    with LLM(progress=False, max_num_seqs=16, token_buckets=(16, 64)) as llm:
        outputs = llm.generate([PROMPTS[i % 4] for i in range(NUM_SCHEMAS)], params, use_tqdm=False)
        assert llm.num_late_compiles == 0
    for schema, output in zip(schemas, outputs, strict=True):
        sample = output.outputs[0]
        assert sample.finish_reason == "stop", (schema, sample)
        jsonschema.validate(json.loads(sample.text), schema)
    record_property("structured_tokens", len(masks_s))
    record_property("structured_median_us_a_token", 1e6 * statistics.median(masks_s))
    record_property("structured_p99_us_a_token", 1e6 * statistics.quantiles(masks_s, n=100)[-1])
