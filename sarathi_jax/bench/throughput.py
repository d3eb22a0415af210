"""Offline throughput: serves cases of random prompts and prints one JSON line a case.

  python -m sarathi_jax.bench.throughput --model DIR --cases cases.json --repeats 3

`cases.json` is a list of {"requests": 8, "prompt_tokens": 128, "output_tokens": 64}. Decoding is greedy, prompts are
random token ids drawn anew for each repeat, and nothing is shared between them. The last line tells the memory.
"""

import json
import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
from absl import app, flags

from sarathi_jax import LLM, SamplingParams
from sarathi_jax.config import QUANTIZATIONS
from sarathi_jax.kv.sizes import block_bytes
from sarathi_jax.models.model import ModelFunction

_MODEL = flags.DEFINE_string("model", None, "model folder or YAML; without it the model that ships")
_CASES = flags.DEFINE_string("cases", None, "JSON file of cases", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 3, "runs of each case; the median counts", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ("float32", "bfloat16", "auto"), "of weights and cache")
_QUANTIZATION = flags.DEFINE_enum("quantization", None, QUANTIZATIONS, "8-bit weights; without it none")
_MAX_MODEL_LEN = flags.DEFINE_integer("max_model_len", 2048, "longest prompt + output")
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 32, "sequences at once")
_TOKEN_BUDGET = flags.DEFINE_integer("token_budget", 512, "tokens of the largest step")


def run_case(llm: LLM, case: dict[str, int], repeats: int) -> dict[str, Any]:
    """Serves a case `repeats` times.

    Returns:
      The case with the seconds of each run and output and total tokens a second of the median run.
    """
    requests, prompt_tokens, output_tokens = (case[k] for k in ("requests", "prompt_tokens", "output_tokens"))
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0, detokenize=False)
    generator, seconds = random.Random(0), []
    limit = llm.model_config.vocab_size - 1
    for _ in range(repeats):
        prompts = [[generator.randint(min(10, limit), limit) for _ in range(prompt_tokens)] for _ in range(requests)]
        start_s = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        seconds.append(round(time.perf_counter() - start_s, 4))
    median = sorted(seconds)[len(seconds) // 2]
    return {
        **case,
        "engine": "sarathi_jax",
        "seconds": seconds,
        "output_tok_s": requests * output_tokens / median,
        "total_tok_s": requests * (prompt_tokens + output_tokens) / median,
    }


def memory(llm: LLM) -> dict[str, int]:
    """Bytes: peak of the process, weights, KV cache, and what is left for everything else."""
    engine = llm.engine_config
    shapes = ModelFunction(llm.model_config, jnp.dtype(engine.dtype), engine.quantization).shapes.values()
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)
    cache = llm.cache_config.num_blocks * block_bytes(llm.model_config, llm.cache_config.block_size, engine.dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": peak, "weight_bytes": weights, "cache_bytes": cache, "rest_bytes": peak - weights - cache}


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    cases = json.loads(Path(_CASES.value).read_text())
    start_s = time.perf_counter()
    with LLM(
        _MODEL.value,
        dtype=cast(Any, _DTYPE.value),
        quantization=_QUANTIZATION.value,
        max_model_len=_MAX_MODEL_LEN.value,
        max_num_seqs=_MAX_NUM_SEQS.value,
        token_budget=_TOKEN_BUDGET.value,
    ) as llm:
        print(f"{llm}, ready after {time.perf_counter() - start_s:.1f} s", file=sys.stderr)
        for case in cases:
            print(json.dumps(run_case(llm, case, _REPEATS.value)), flush=True)
        print(json.dumps({"memory": memory(llm)}), flush=True)


if __name__ == "__main__":
    app.run(main)
