"""The trainer's own sentencepiece tokenizer, and documents as one stream of token ids."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

TOKENIZER_FILE = "tokenizer.model"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
UNK_ID, BOS_ID, EOS_ID = 0, 1, 2

TokenIds = Sequence[int] | np.ndarray
"""A document as token ids."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Trains a byte-pair tokenizer and writes ``tokenizer.model`` and ``tokenizer_config.json``.

    Text goes through unchanged: no case folding, no normalisation, spaces and newlines kept, and what the vocabulary
    lacks falls back to bytes, so decoding gives back every text exactly.

    Args:
      texts: the training documents; never the held-out ones.
      vocab_size: pieces, the 256 bytes and three special tokens included.
      folder: written to; made if it does not exist.
    """
    model = io.BytesIO()
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n") if paragraph]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(paragraphs),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        max_sentence_length=1 << 16,
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_FILE).write_bytes(model.getvalue())
    special = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(special, indent=2) + "\n")
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> sentencepiece.SentencePieceProcessor:
    """Loads ``tokenizer.model`` from a folder."""
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / TOKENIZER_FILE))


def encode_documents(tokenizer: sentencepiece.SentencePieceProcessor, documents: Iterable[str]) -> list[np.ndarray]:
    """Token ids of each document, end token last, no begin token: what both the model and the baseline predict."""
    return [np.array([*tokenizer.encode(document), EOS_ID], np.int32) for document in documents]


def make_stream(documents: Iterable[np.ndarray]) -> np.ndarray:
    """Lays documents end to end, each behind a begin token: i32[N]."""
    return np.concatenate([np.concatenate([[BOS_ID], document]) for document in documents]).astype(np.int32)
