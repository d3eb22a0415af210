"""Trace files: read, found by name, and what serves without them."""

import pytest

from sarathi_jax.workloads import CHAT, Length, TraceError, dataset, load_trace, read_trace, synthesise
from sarathi_jax.workloads.traces import DATA_VARIABLE


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


def test_a_trace_is_read(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.3,0,7\n9.1,12,3\n")
    assert read_trace(path) == [Length(374, 44), Length(12, 3)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "num_prefill_tokens"),
        ("num_prefill_tokens,n\n1,2\n", "no column num_decode_tokens"),
        ("num_prefill_tokens,num_decode_tokens\n", "no request"),
        ("num_prefill_tokens,num_decode_tokens\n3,4\n5,x\n", ":3: num_decode_tokens is 'x'"),
        ("num_prefill_tokens,num_decode_tokens\n-3,4\n", ":2: num_prefill_tokens is '-3'"),
        ("num_prefill_tokens,num_decode_tokens\n3\n", ":2: num_decode_tokens is None"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\nsoon,3,1\n", ":2: arrived_at is 'soon', not a time"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\nnan,3,1\n", ":2: arrived_at is 'nan'"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n2,3,1\n1,3,1\n", ":3: arrived_at is 1.0, before"),
    ],
)
def test_what_is_no_trace_says_why(tmp_path, text, words):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=words):
        read_trace(path)
    with pytest.raises(TraceError, match="cannot read"):
        read_trace(tmp_path / "missing.csv")


def test_arrivals_are_counted_from_the_first_request(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n1.0,0,44\n4.5,2,7\n9.0,12,3\n")
    assert load_trace(path).arrivals_s == (0.0, 4.5)
    path.write_text("num_prefill_tokens,num_decode_tokens\n1,2\n")
    assert load_trace(path).arrivals_s is None


def test_a_dataset_is_found_by_path_or_name(tmp_path, monkeypatch):
    path = tmp_path / "openchat_sharegpt4.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n3,4\n5,6\n")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    for found in (dataset(str(path)), dataset("chat"), dataset("openchat_sharegpt4", tmp_path), dataset(path.name)):
        assert (found.source, found.longest) == (str(path), 11)
        assert sorted(found.draw(2, 0), key=str) == [Length(3, 4), Length(5, 6)]
        assert found.trace == load_trace(path)


def test_without_a_file_published_quantiles_serve_and_that_is_said(tmp_path):
    found = dataset("chat")
    assert "openchat_sharegpt4.csv was not found" in found.source
    assert "Table 2" in found.source
    assert (found.trace, found.longest) == (None, 8192)
    assert found.draw(10, 3) == synthesise(CHAT, 10, 3)
    for name, longest in (("arxiv", 16384), ("arxiv_summarization_4k", 4096), ("splitwise_conv", 14089)):
        found = dataset(name, tmp_path)
        assert found.longest == longest
        assert max(length.prompt + length.output for length in found.draw(1000, 0)) <= longest


def test_what_is_not_found_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(
        TraceError, match="no file 'chats', nor chats.csv in a folder .SARATHI_DATA is not set.*chat, arxiv"
    ):
        dataset("chats")
    with pytest.raises(TraceError, match=f"chats.csv in {tmp_path}"):
        dataset("chats", tmp_path)
    with pytest.raises(TraceError, match="is no folder of traces"):
        dataset("chat", tmp_path / "gone")


def test_published_files(shared):
    folder = shared / "data/traces"
    assert len(load_trace(folder / "splitwise_conv.csv").arrivals_s or ()) == 19_366
    assert dataset("chat", folder).longest == 8149
    assert len(dataset("arxiv_summarization_4k", folder).draw(30_000, 0)) == 30_000
