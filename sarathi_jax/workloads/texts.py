"""Prompts of real text: pieces of a folder's documents, of a wanted number of tokens."""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from sarathi_jax.workloads.lengths import WorkloadError, check_range

_SUFFIXES = (".txt", ".md")
_TRIES = 8  # of other places in the documents, until the text has as many tokens as are wanted
_CORRECTIONS = 4  # of the cut, in each place


class Encoder(Protocol):
    """What is needed of a tokenizer; `sarathi_jax.tokenizer.Tokenizer` is one."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Iterable[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class TextPrompt:
    """A prompt.

    Attributes:
      text: a piece of the documents, as the tokenizer gives it back.
      num_tokens: that the tokenizer makes of it, with what it adds around a text.
    """

    text: str
    num_tokens: int


def read_documents(folder: Path) -> str:
    """The text of every .txt and .md file in a folder and its folders, in the order of their names.

    Raises:
      WorkloadError: there is no such folder, no text in it, or a file that is not UTF-8.
    """
    if not folder.is_dir():
        raise WorkloadError(f"{folder} is no folder of documents")
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise WorkloadError(f"cannot read {path}: {error}") from error
    text = "\n\n".join(filter(None, texts))
    if not text:
        raise WorkloadError(f"{folder} holds no text in files that end with {' or '.join(_SUFFIXES)}")
    return text


def text_prompts(documents: str, tokenizer: Encoder, lengths: Sequence[int], seed: int) -> list[TextPrompt]:
    """Cuts a prompt from a random place for each length. Documents that end too soon begin again.

    Nearly every prompt has exactly as many tokens as are wanted. Where no piece that was tried does, it has fewer, and
    says so.

    Args:
      documents: see `read_documents`.
      tokenizer: of the model.
      lengths: tokens of each prompt, those included that the tokenizer adds around a text.
      seed: the same one gives the same prompts.

    Raises:
      WorkloadError: no text, or none that the tokenizer knows; a length below 1 or that no text fits into.
    """
    if not documents.strip():
        raise WorkloadError("the documents hold no text")
    generator = random.Random(seed)
    sample = documents[:10_000]
    characters = len(sample) / max(1, len(tokenizer.encode(sample)))  # a token
    if characters > 1000:
        raise WorkloadError("the tokenizer makes hardly a token of the documents; are they of its language?")
    prompts = []
    for length in lengths:
        check_range("prompt", length, length)
        pieces = (_piece(documents, tokenizer, length, characters, generator) for _ in range(_TRIES))
        best = TextPrompt("", 0)
        for piece in pieces:
            best = max(best, piece, key=lambda prompt: prompt.num_tokens)
            if best.num_tokens == length:
                break
        if not best.num_tokens:
            raise WorkloadError(f"no text fits into a prompt of {length} tokens")
        prompts.append(best)
    return prompts


def _piece(documents: str, tokenizer: Encoder, length: int, characters: float, generator: random.Random) -> TextPrompt:
    """From one random place: of that length, or shorter where no cut makes it so (without any text: 0 tokens)."""
    start = _word_start(documents, generator.randrange(len(documents)))
    size = int(1.2 * characters * length) + 16
    while len(token_ids := tokenizer.encode(_around(documents, start, size))) < length:
        size *= 2
    best, kept = TextPrompt("", 0), length
    for _ in range(_CORRECTIONS):
        # A cut within a character decodes to U+FFFD, which is no text of the documents.
        text = tokenizer.decode(token_ids[:kept]).rstrip("\ufffd")
        num_tokens = len(tokenizer.encode(text))
        if text and best.num_tokens < num_tokens <= length:
            best = TextPrompt(text, num_tokens)
        if num_tokens == length or kept + length - num_tokens < 1:
            break
        kept = min(kept + length - num_tokens, len(token_ids))
    return best


def _around(documents: str, start: int, size: int) -> str:
    """That many characters from there on, beginning again at the end."""
    text = documents[start : start + size]
    while len(text) < size:
        text += ("\n\n" + documents)[: size - len(text)]
    return text


def _word_start(documents: str, near: int) -> int:
    """The beginning of the next word; of the first where no other follows."""
    space = documents.find(" ", near)
    return space + 1 if 0 <= space < len(documents) - 1 else 0
