"""What 8-bit weights cost in accuracy: teacher-forced on a text, beside the same model as it is stored.

  python -m sarathi_jax.bench.quantization --model DIR --text book.txt

Without `--text` the model first writes what it is then asked about. Prints one JSON line a quantisation: the share of
positions with the same likeliest token, and by how much perplexity rises.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from absl import app, flags

from sarathi_jax import LLM, SamplingParams
from sarathi_jax.config import QUANTIZATIONS, Quantization

_MODEL = flags.DEFINE_string("model", None, "model folder; without it the model that ships")
_TEXT = flags.DEFINE_string("text", None, "text file to be read; without it what the model writes itself")
_MODES = flags.DEFINE_multi_enum("quantization", list(QUANTIZATIONS), list(QUANTIZATIONS), "what to compare")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 20_000, "of the text", lower_bound=2)


def windows(llm: LLM, text: str | None, max_tokens: int) -> list[list[int]]:
    """Token ids to be scored: the text cut to the model's length, or four draws of the model's own."""
    length = llm.cache_config.max_model_len - 1
    if text is None:
        length = min(length // 2, max_tokens // 4)
        params = SamplingParams(n=4, temperature=1, seed=0, max_tokens=length, ignore_eos=True)
        (output,) = llm.generate("The", params, use_tqdm=False)
        return [[*output.prompt_token_ids, *sample.token_ids] for sample in output.outputs]
    if llm.tokenizer is None:
        raise ValueError("the model has no tokenizer to read a text with")
    ids = llm.tokenizer.encode(text)[:max_tokens]
    return [ids[start : start + length] for start in range(0, len(ids) - 1, length)]


def read(llm: LLM, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Teacher-forced: the likeliest token i32[n] at each position but the first of each prompt, and f64[n] the
    log-probability of the token that stands there."""
    best, logprobs = [], []
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    for output in llm.generate(prompts, params, use_tqdm=False):
        for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True):
            if entry is not None:
                best.append(max(entry.items(), key=lambda item: item[1].logprob)[0])
                logprobs.append(entry[token].logprob)
    return np.asarray(best), np.asarray(logprobs)


def compare(
    model: str | None,
    quantizations: Sequence[Quantization],
    text: str | None = None,
    max_tokens: int = 20_000,
    **engine: Any,
) -> list[dict[str, Any]]:
    """Reads the text with each quantisation and without.

    Returns:
      For each: tokens, same_top (share of positions), perplexity, perplexity_ratio (to that of the stored weights).
    """
    with LLM(model, **engine) as llm:
        prompts = windows(llm, text, max_tokens)
        best, logprobs = read(llm, prompts)
    rows = []
    for quantization in quantizations:
        with LLM(model, quantization=quantization, **engine) as llm:
            ours, ours_logprobs = read(llm, prompts)
        rows.append(
            {
                "quantization": quantization,
                "tokens": len(best),
                "same_top": float(np.mean(ours == best)),
                "perplexity": float(np.exp(-ours_logprobs.mean())),
                "perplexity_ratio": float(np.exp(logprobs.mean() - ours_logprobs.mean())),
            }
        )
    return rows


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    text = None if _TEXT.value is None else Path(_TEXT.value).expanduser().read_text()
    for row in compare(_MODEL.value, cast(Any, _MODES.value), text, _MAX_TOKENS.value, progress=sys.stderr.isatty()):
        print(json.dumps(row))


if __name__ == "__main__":
    app.run(main)
