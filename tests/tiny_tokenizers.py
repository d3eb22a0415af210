"""Small tokenizers in the two published formats, for tests that need text; trained in milliseconds on a few lines."""

import io
import json
from pathlib import Path
from typing import Literal

VOCAB_SIZE = 320
"""Fits both; give it to ``write_tiny_model(..., changes={"vocab_size": VOCAB_SIZE})``."""

_TEXT = (
    "the quick brown fox jumps over the lazy dog and the dog sleeps on",
    "a cat sat on the mat while the rain fell on the roof of the house",
    "in the beginning the words were few and then there were many more words",
)
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tiny_tokenizer(directory: Path, kind: Literal["byte_level", "sentencepiece"] = "byte_level") -> Path:
    """Writes a tokenizer with ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2 and a chat template; returns the directory.

    Args:
      directory: made if absent.
      kind: ``byte_level`` writes tokenizer.json (as Llama 3 and Qwen have), ``sentencepiece`` tokenizer.model with byte
        fall-back (as Llama 2 and Mistral have).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "byte_level":
        _write_byte_level(directory / "tokenizer.json")
    else:
        _write_sentencepiece(directory / "tokenizer.model")
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return directory


def _write_byte_level(file: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(file))


def _write_sentencepiece(file: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())
