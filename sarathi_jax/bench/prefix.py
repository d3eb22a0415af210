"""What the prefix cache saves: the time to the first token of a first and of a second question about a document.

  python -m sarathi_jax.bench.prefix --documents 5 --tokens 1500

Every document is asked about twice, over HTTP, by a client that is alone. Prints both medians and their ratio.
"""

import asyncio
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
from absl import app, flags

from sarathi_jax.bench.http_client import ServerProcess, stream
from sarathi_jax.resources import checkpoint_path
from sarathi_jax.telemetry.definitions import quantile
from sarathi_jax.weights.directory import load_model_config

_MODEL = flags.DEFINE_string("model", None, "model folder; without it the model that ships")
_DOCUMENTS = flags.DEFINE_integer("documents", 5, "different ones", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 1500, "of a document", lower_bound=1)
_QUESTION = flags.DEFINE_integer("question", 20, "tokens of a question", lower_bound=1)


async def ask_twice(url: str, vocab_size: int) -> list[list[float]]:
    """Seconds to the first token of the first questions, and of the second ones."""
    generator, ttfts_s = random.Random(0), []
    async with aiohttp.ClientSession() as session:
        for _ in range(_DOCUMENTS.value):
            document = _tokens(generator, _TOKENS.value, vocab_size)
            for _ in range(2):
                body: dict[str, Any] = {
                    "model": "asked",
                    "prompt": document + _tokens(generator, _QUESTION.value, vocab_size),
                    "max_tokens": 4,
                    "ignore_eos": True,
                    "return_token_ids": True,
                }
                answer = await stream(session, url, body)
                assert answer.ttft_s is not None, answer.error
                ttfts_s.append(answer.ttft_s)
    return [ttfts_s[::2], ttfts_s[1::2]]


def _tokens(generator: random.Random, number: int, vocab_size: int) -> list[int]:
    return [generator.randrange(min(10, vocab_size - 1), vocab_size) for _ in range(number)]


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    model = Path(_MODEL.value) if _MODEL.value else checkpoint_path()
    with (
        tempfile.TemporaryDirectory() as folder,
        ServerProcess([f"--model={model}", "--served_model_name=asked"], Path(folder) / "log") as server,
    ):
        first, second = asyncio.run(ask_twice(server.url, load_model_config(model).vocab_size))
    medians = [quantile(values, 0.5) for values in (first, second)]
    figures = {
        "document_tokens": _TOKENS.value,
        "first_ttft_ms": round(1e3 * medians[0], 1),
        "second_ttft_ms": round(1e3 * medians[1], 1),
        "ratio": round(medians[1] / medians[0], 3),
        "worst_ratio": round(max(b / a for a, b in zip(first, second, strict=True)), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    app.run(main)
