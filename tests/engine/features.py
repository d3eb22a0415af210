"""How each feature of the pairwise test is asked for and served, and what the reference says should come of it."""

import collections
import dataclasses
from collections.abc import Sequence

from sarathi_jax.latency import LatencyTable, StepTimes, Timing
from sarathi_jax.request import CompletionOutput, Logprob, RequestOutput, SamplingParams, StructuredOutputsParams
from sarathi_jax.scheduling.plan import Demand, KeepPace
from sarathi_jax.tokenizer import Tokenizer
from tests.engine.serving import BLOCK_SIZE, TOP, Bench, Served, greedy, prompt_of

PROMPTS = [prompt_of(length) for length in (6, 14, 20, 30)]
FORM = "[a-z ]"
NUM_BEFORE = 4
"""Steps before the second half of the requests comes, where a pace is promised: somebody must be generating then."""

PRIORITIES = (1, 0, 1, 0)
SLOS_MS = (None, 60, 45, None)
"""Of the requests: less than the largest step takes, and time enough for a step of 16 tokens, also in two stages."""


class Paced(KeepPace):
    """Keeps a promised pace where a token more in a bucket costs a millisecond more.

    Args:
      served: whose buckets.
      most: tokens that a step may hold in any case.
    """

    def __init__(self, served: Served, most: int):
        buckets = served.config.buckets
        timings = [Timing(b, d, d, 1 - d, b / 1000) for b in buckets for d in (0, 1)]
        super().__init__(StepTimes(LatencyTable(timings)), buckets, served.config.pp)
        self._most = min(most, buckets[-1])
        self.num_free = 0
        self.num_cut = 0

    def __call__(self, demand: Demand) -> int:
        """Counts the steps that nobody's promise bounds, and those that hold less than they could without one."""
        limit = super().__call__(demand)
        self.num_free += demand.pace_s is None
        wanted = min(demand.num_decodes + demand.num_prefill_tokens, self._most)
        self.num_cut += demand.pace_s is not None and limit < wanted
        return min(limit, self._most)


def request_of(features: set[str], seed: int) -> SamplingParams:
    """All that the features ask of a request, but stop strings."""
    is_structured = "structured" in features and seed % 2 == 0
    # Who asks for the log-probabilities of a prompt takes nothing of it from the cache: there others must.
    scores_prompt = "prompt logprobs" in features and ("prefix cache" not in features or seed % 3 == 0)
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
        prompt_logprobs=2 if scores_prompt else None,
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


def stop_string(text: str) -> str:
    """Two characters in the middle of the text, which random tokens seldom hold together."""
    pairs = [text[i : i + 2] for i in range(len(text) // 2, len(text) - 1)]
    return next(pair for pair in pairs if pair.isascii() and pair.isprintable())


def leave_beginnings(bench: Bench) -> list[int]:
    """Lets others leave the first block of every prompt in the cache; how many tokens of each can be found there."""
    bench.run([(prompt[: BLOCK_SIZE + 1], greedy(max_tokens=3)) for prompt in PROMPTS])
    return [BLOCK_SIZE * (len(prompt) > BLOCK_SIZE) for prompt in PROMPTS]


def serve(bench: Bench, wanted: Sequence[SamplingParams], *, paced: bool, streams: bool) -> list[RequestOutput]:
    """Serves the prompts; their outputs in order.

    Args:
      bench: to serve them.
      wanted: of each prompt.
      paced: promise a pace, and let the second half of the requests come while the first is generating.
      streams: read every token as it comes, and return what was read.
    """
    outputs: dict[str, list[RequestOutput]] = collections.defaultdict(list)

    def step() -> None:
        for output in bench.step():
            outputs[output.request_id].append(output)

    for i, (prompt, params) in enumerate(zip(PROMPTS, wanted, strict=True)):
        if paced and i == len(PROMPTS) // 2:
            for _ in range(NUM_BEFORE):
                step()
        promise = {"slo_ms": SLOS_MS[i], "priority": PRIORITIES[i]} if paced else {}
        bench.engine.add_request(str(i), prompt, params, streams=streams, **promise)
    while bench.engine.has_work:
        step()
        assert len(bench.plans) < 5000, "the engine makes no progress"
    bench.check_idle()
    if streams:
        return [_joined(outputs[str(i)]) for i in range(len(PROMPTS))]
    assert all(len(several) == 1 for several in outputs.values()), "the end is all that is reported"
    return [outputs[str(i)][0] for i in range(len(PROMPTS))]


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


def _joined(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """The samples put together from what was new in each output of a stream: a token at a time, none taken back."""
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    samples = []
    for i, last in enumerate(outputs[-1].outputs):
        text, ids, tables = "", (), ()
        for output in outputs:
            sample = output.outputs[i]
            assert len(sample.token_ids) - len(ids) in (0, 1)
            text += sample.text[len(text) :]
            ids += sample.token_ids[len(ids) :]
            tables += (sample.logprobs or ())[len(tables) :]
        logprobs = None if last.logprobs is None else tables
        samples.append(dataclasses.replace(last, text=text, token_ids=ids, logprobs=logprobs))
    whole = dataclasses.replace(outputs[-1], outputs=tuple(samples))
    assert whole == outputs[-1]
    return whole


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
