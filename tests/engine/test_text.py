"""Text as it grows: stop strings, stop tokens, lengths, characters of several bytes. A script stands for the model."""

import itertools
from typing import Any

import pytest

from sarathi_jax.request import RequestOutput, SamplingParams
from sarathi_jax.tokenizer import Tokenizer
from tests.engine.serving import Served

EOS = 2
STORY = "the quick brown fox, then the lazy dog; the end"


@pytest.fixture
def tokenizer(decoder: Served) -> Tokenizer:
    assert decoder.tokenizer is not None
    return decoder.tokenizer


def tell(served: Served, *texts: str | list[int], **fields: Any) -> list[RequestOutput]:
    """All outputs of a request whose samples say the texts; the last one is finished."""
    assert served.tokenizer is not None
    encode = served.tokenizer.encode
    scripts = [encode(text, add_special_tokens=False) if isinstance(text, str) else text for text in texts]
    params = {"n": len(texts), "max_tokens": min(map(len, scripts))} | fields
    bench = served.bench(scripts=scripts)
    bench.engine.add_request("story", [5, 6], SamplingParams(**params), streams=True)
    outputs = []
    while bench.engine.has_work:
        outputs += bench.step()
    bench.check_idle()
    assert outputs[-1].finished
    assert not any(output.finished for output in outputs[:-1])
    for earlier, later in itertools.pairwise(outputs):
        for before, after in zip(earlier.outputs, later.outputs, strict=True):
            assert after.text.startswith(before.text), "text that was shown has changed"
            assert after.token_ids[: len(before.token_ids)] == before.token_ids
    return outputs


def test_all_of_it(decoder: Served, tokenizer: Tokenizer):
    outputs = tell(decoder, STORY)
    (sample,) = outputs[-1].outputs
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (STORY, "length", None)
    assert [output.outputs[0].text for output in outputs] == [
        tokenizer.decode(sample.token_ids[: i + 1]) for i in range(len(outputs))
    ]


def places(served: Served, text: str, stop: str) -> tuple[int, int]:
    """Tokens of the text that end before the stop string begins, and tokens until it is complete."""
    assert served.tokenizer is not None
    ids = served.tokenizer.encode(text, add_special_tokens=False)
    lengths = [len(served.tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
    at = text.index(stop)
    return max(i for i, n in enumerate(lengths) if n <= at), min(
        i for i, n in enumerate(lengths) if n >= at + len(stop)
    )


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("stop", ["x", "ick br", "fox, then the lazy dog", " ", "the end", STORY])
def test_stop_string(decoder: Served, stop: str, included: bool):
    outputs = tell(decoder, STORY, stop=stop, include_stop_str_in_output=included)
    (sample,) = outputs[-1].outputs
    at = STORY.index(stop)
    assert sample.text == STORY[: at + len(stop) if included else at]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert len(sample.token_ids) == places(decoder, STORY, stop)[1]
    for output in outputs[:-1]:
        assert STORY[:at].startswith(output.outputs[0].text), "part of the stop string was shown"


def test_stop_strings_here_span_tokens(decoder: Served):
    for stop in ("ick br", "fox, then the lazy dog"):
        first, last = places(decoder, STORY, stop)
        assert last - first >= 2


def test_earliest_of_several_stop_strings(decoder: Served):
    (sample,) = tell(decoder, STORY, stop=["dog", "brown", "fox"])[-1].outputs
    assert (sample.text, sample.stop_reason) == ("the quick ", "brown")


def test_what_only_began_like_a_stop_string_is_shown(decoder: Served):
    outputs = tell(decoder, STORY, stop=["the quality", "dog; the ending", "end."])
    assert outputs[-1].outputs[0].text == STORY
    assert outputs[-1].outputs[0].finish_reason == "length"
    shown = [output.outputs[0].text for output in outputs]
    assert "" in shown, "'the qu' must be held back until it is clear"
    assert "the quick" in shown


def test_each_sample_stops_on_its_own(decoder: Served):
    texts = ["a cat sat on the mat", "the rain fell on the", "no end to this story"]
    first, second, third = tell(decoder, *texts, stop=["sat", "roof"], max_tokens=5)[-1].outputs
    assert (first.text, first.finish_reason, first.stop_reason) == ("a cat ", "stop", "sat")
    assert second.finish_reason == third.finish_reason == "length"
    assert texts[1].startswith(second.text)
    assert len(second.token_ids) == len(third.token_ids) == 5


def test_min_tokens_postpones_stop_strings(decoder: Served):
    second = STORY.index("the", 5)
    (sample,) = tell(decoder, STORY, stop="the", min_tokens=6)[-1].outputs
    assert sample.text == STORY[:second]
    assert len(sample.token_ids) > 6


@pytest.mark.parametrize("included", [False, True])
def test_stop_token(decoder: Served, tokenizer: Tokenizer, included: bool):
    ids = tokenizer.encode(STORY, add_special_tokens=False)
    number = next(i for i in range(4, len(ids)) if ids[i] not in ids[:i])
    fields = {"stop_token_ids": [ids[number]], "include_stop_str_in_output": included}
    (sample,) = tell(decoder, STORY, **fields)[-1].outputs
    assert list(sample.token_ids) == ids[: number + 1]
    assert sample.text == tokenizer.decode(ids[: number + included])
    assert (sample.finish_reason, sample.stop_reason) == ("stop", ids[number])


@pytest.mark.parametrize("eos", [2, 3, 4])
def test_end_of_text(decoder: Served, tokenizer: Tokenizer, eos: int):
    ids = tokenizer.encode(STORY, add_special_tokens=False)
    assert decoder.model.eos_token_ids == (2, 3, 4)
    (sample,) = tell(decoder, [*ids, eos, *ids], max_tokens=None)[-1].outputs
    assert list(sample.token_ids) == [*ids, eos]
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (STORY, "stop", None)


def test_ignore_eos(decoder: Served, tokenizer: Tokenizer):
    ids = tokenizer.encode(STORY, add_special_tokens=False)
    script = [*ids, EOS, *ids]
    (sample,) = tell(decoder, script, ignore_eos=True)[-1].outputs
    assert (list(sample.token_ids), sample.text, sample.finish_reason) == (script, STORY + STORY, "length")
    (sample,) = tell(decoder, script, ignore_eos=True, stop_token_ids=[EOS])[-1].outputs
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (STORY, "stop", EOS)


def test_special_tokens_in_the_text(decoder: Served, tokenizer: Tokenizer):
    ids = tokenizer.encode("cat", add_special_tokens=False)
    (sample,) = tell(decoder, [*ids, 1, *ids], skip_special_tokens=False)[-1].outputs
    assert sample.text == "cat<s>cat"
    (sample,) = tell(decoder, [*ids, 1, *ids])[-1].outputs
    assert sample.text == "catcat"


@pytest.mark.parametrize("text", ["naïve café — “so”", "日本語のテキスト", "🎉👩‍👩‍👧🏳️‍🌈", "a\u0301e\u0308 עברית"])
def test_no_half_character_is_shown(decoder: Served, tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text), "characters of several tokens are the point"
    outputs = tell(decoder, text)
    assert outputs[-1].outputs[0].text == text
    for output in outputs[:-1]:
        assert text.startswith(output.outputs[0].text)
        assert "\ufffd" not in output.outputs[0].text


def test_half_a_character_at_the_end(decoder: Served, tokenizer: Tokenizer):
    ids = tokenizer.encode("ab🎉", add_special_tokens=False)[:-1]
    outputs = tell(decoder, ids)
    assert [output.outputs[0].text for output in outputs[1:-1]] == ["ab"] * (len(outputs) - 2)
    assert outputs[-1].outputs[0].text == "ab\ufffd"


def test_stop_string_of_several_bytes(decoder: Served):
    outputs = tell(decoder, "so 🎉🎊 on", stop="🎊")
    assert outputs[-1].outputs[0].text == "so 🎉"
    assert outputs[-1].outputs[0].stop_reason == "🎊"


def test_without_text(decoder: Served, tokenizer: Tokenizer):
    (sample,) = tell(decoder, STORY, detokenize=False)[-1].outputs
    assert sample.text == ""
    assert list(sample.token_ids) == tokenizer.encode(STORY, add_special_tokens=False)


def test_stop_string_in_what_the_decoder_held_back(decoder: Served, tokenizer: Tokenizer):
    """Half a character is held back until the end, where it becomes the replacement character: here, a stop string."""
    half = tokenizer.encode("🦊", add_special_tokens=False)[:-1]
    script = [*tokenizer.encode("a cat", add_special_tokens=False), *half]
    (sample,) = tell(decoder, script, stop=["\ufffd"])[-1].outputs
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("a cat", "stop", "\ufffd")
