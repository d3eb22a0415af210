import json

import pytest

from sarathi_jax.jobs.rows import RowError, dump, output_fields, parse_row, read_id
from sarathi_jax.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput


def row(**fields):
    return json.dumps(fields).encode()


def test_defaults_of_the_job_and_parameters_of_the_row():
    parsed = parse_row(row(prompt="hi", id="a", sampling_params={"max_tokens": 3}), 7, {"max_tokens": 9, "seed": 1})
    assert (parsed.line, parsed.row_id, parsed.prompt) == (7, "a", "hi")
    assert (parsed.params.max_tokens, parsed.params.seed) == (3, 1)
    assert parsed.messages is None


def test_prompts_of_three_kinds_and_an_id_by_default():
    assert parse_row(row(prompt_token_ids=[1, 2]), 3, {}).prompt == (1, 2)
    chat = parse_row(row(messages=[{"role": "user", "content": "hi"}]), 4, {})
    assert (chat.prompt, chat.messages, chat.row_id) == (None, ({"role": "user", "content": "hi"},), 4)


def test_json_keys_of_logit_bias_become_token_ids():
    params = parse_row(row(prompt="a", sampling_params={"logit_bias": {"5": -1}}), 1, {}).params
    assert params.logit_bias == {5: -1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "a row is a JSON object, not list"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "exactly one of prompt"),
        (row(prompt="a", prompt_token_ids=[1]), "exactly one of prompt"),
        (row(prompt=5), "prompt must be a text"),
        (row(prompt_token_ids=[]), "non-empty list of integers"),
        (row(prompt_token_ids=[True]), "non-empty list of integers"),
        (row(prompt_token_ids=[1.5]), "non-empty list of integers"),
        (row(messages=["hi"]), "objects with role and content"),
        (row(prompt="a", max_tokens=5), "unknown key 'max_tokens'"),
        (row(prompt="a", sampling_params=[1]), "sampling_params must be an object"),
        (row(prompt="a", sampling_params={"max_token": 5}), "did you mean 'max_tokens'"),
        (row(prompt="a", sampling_params={"temperature": -1}), "temperature=-1"),
        (b'{"prompt": "a", "sampling_params": {"temperature": NaN}}', "temperature=nan"),
        (row(prompt="a", sampling_params={"stop": 5}), "sampling_params"),
        (row(prompt="a", sampling_params={"logit_bias": {"x": 1}}), "sampling_params"),
    ],
)
def test_a_bad_row_says_what_is_wrong(text, message):
    with pytest.raises(RowError, match=message):
        parse_row(text, 1, {})


def test_the_id_of_a_bad_row_is_kept_where_it_can_be_read():
    assert read_id(row(id="a", nonsense=1), 4) == "a"
    assert read_id(b"{", 4) == 4
    assert read_id(row(id=True), 4) == 4
    assert read_id(row(id=[1]), 4) == 4


def test_half_a_surrogate_pair_is_written_as_valid_utf_8():
    line = dump({"id": "\ud800", "text": "é"})
    assert json.loads(line.encode()) == {"id": "\ud800", "text": "é"}


def test_output_is_one_line_of_strict_json():
    sample = CompletionOutput(0, "a\nb", (5,), ({5: Logprob(-1.0, "a"), 6: Logprob(float("-inf"))},), "stop", "\n")
    metrics = RequestMetrics(arrival_s=1.0, first_token_s=1.5, finished_s=3.0)
    output = RequestOutput("r", "é", (1,), (sample,), True, metrics, prompt_logprobs=(None, {1: Logprob(-2.0)}))
    line = dump(output_fields(output))
    assert "\n" not in line
    fields = json.loads(line, parse_constant=pytest.fail)
    assert fields["prompt"] == "é"
    assert fields["outputs"][0]["logprobs"][0][1] == {"token_id": 6, "token": None, "logprob": None}
    assert fields["prompt_logprobs"][0] is None
    assert fields["metrics"]["ttft_s"] == 0.5
    assert fields["metrics"]["latency_s"] == 2.0
