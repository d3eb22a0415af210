"""Prompts cut from documents."""

import pytest

from sarathi_jax.tokenizer import load_tokenizer
from sarathi_jax.workloads import WorkloadError, read_documents, text_prompts
from tests.tiny_tokenizers import write_tiny_tokenizer

TEXT = (
    "the quick brown fox jumps over the dog, a cat sat on the mat \u2014 \u00e9t\u00e9 and rain fell on the roof.\n"
    * 20
)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_prompts_have_the_wanted_number_of_tokens(tmp_path, kind):
    tokenizer = load_tokenizer(write_tiny_tokenizer(tmp_path, kind))
    assert tokenizer is not None
    lengths = [2, 3, 10, 64, 100, 500, 4000]
    prompts = text_prompts(TEXT, tokenizer, lengths, seed=1)
    assert [len(tokenizer.encode(prompt.text)) for prompt in prompts] == [prompt.num_tokens for prompt in prompts]
    assert [prompt.num_tokens for prompt in prompts] == lengths
    assert prompts == text_prompts(TEXT, tokenizer, lengths, seed=1) != text_prompts(TEXT, tokenizer, lengths, seed=2)
    # A tokenizer may have its own mind about white space.
    around = " ".join((TEXT * 30).split())
    assert all(" ".join(prompt.text.split()) in around for prompt in prompts)
    with pytest.raises(WorkloadError, match="no text fits into a prompt of 1 token"):
        text_prompts(TEXT, tokenizer, [1], seed=0)  # the begin token alone
    with pytest.raises(WorkloadError, match="at least 1 token"):
        text_prompts(TEXT, tokenizer, [0], seed=0)
    with pytest.raises(WorkloadError, match="no text"):
        text_prompts(" ", tokenizer, [1], seed=0)


def test_documents_are_read(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("Two.\n")
    (tmp_path / "a.txt").write_text("One.\n")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert read_documents(tmp_path) == "One.\n\nTwo."
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(WorkloadError, match="cannot read .*c.txt"):
        read_documents(tmp_path)
    with pytest.raises(WorkloadError, match="is no folder"):
        read_documents(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkloadError, match="holds no text in files that end with .txt or .md"):
        read_documents(tmp_path / "empty")
