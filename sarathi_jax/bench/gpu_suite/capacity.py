"""Capacity of the scheduling policies: the paper's chat trace at rising rates, with every metric of its promise."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sarathi_jax.bench.gpu_suite.results import Results
from sarathi_jax.bench.replay import replay
from sarathi_jax.llm import LLM
from sarathi_jax.resources import checkpoint_path, config_path
from sarathi_jax.workloads import CHAT, Workload, poisson, synthesise

POLICIES = ("sarathi", "vllm", "orca")


@dataclasses.dataclass(frozen=True)
class Load:
    """What is served.

    Attributes:
      model: a directory, or a YAML: then weights are random.
      engine: fields of `EngineConfig` of all policies.
      budget: of sarathi, in tokens; the others take whole prompts.
      orca_max_num_seqs: sequences that Orca has room for, since it reserves the longest for each.
      rates: requests a second, ascending; once a policy is far too slow, the higher ones are left out.
      number: requests of a run.
      limit_s: of a run.
      slo_s: P99 of the times between tokens.
    """

    model: Path
    engine: Mapping[str, Any]
    budget: int
    orca_max_num_seqs: int
    rates: tuple[float, ...]
    number: int
    limit_s: float
    slo_s: float

    @property
    def context(self) -> int:
        """Longest prompt and output together."""
        return self.engine["max_model_len"]

    def settings(self, policy: str) -> dict[str, Any]:
        """Fields of `EngineConfig` of a policy."""
        if policy == "sarathi":
            return {**self.engine, "policy": policy, "token_budget": self.budget}
        own = {**self.engine, "policy": policy, "token_budget": self.context}
        return own | {"max_num_seqs": self.orca_max_num_seqs} if policy == "orca" else own


def paper_load() -> Load:
    """Mistral-7B at the paper's strict SLO for an A100."""
    engine = {"max_model_len": 8192, "max_num_seqs": 128, "dtype": "bfloat16"}
    rates = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0)
    return Load(config_path("models", "mistral-7b"), engine, 512, 16, rates, 96, 60, 0.1)


def dry_load() -> Load:
    """The model that ships, in a few seconds."""
    # The same programs for all policies, which are compiled once.
    engine = {"max_model_len": 128, "max_num_seqs": 4, "dtype": "float32", "token_buckets": (8, 128)}
    return Load(checkpoint_path(), engine, 32, 2, (20.0,), 4, 20, 1.0)


def run(results: Results, backends: Sequence[str], dry_run: bool) -> bool:
    """A row a policy and rate, with the first of the backends.

    Returns:
      Whether every row was reached.
    """
    load = dry_load() if dry_run else paper_load()
    backend = "xla" if dry_run else backends[0]
    for policy in POLICIES:
        keys = {rate: f"capacity {policy} at {rate:g}/s" for rate in load.rates}
        if all(map(results.is_done, keys.values())):
            continue
        settings = load.settings(policy) | {"attention_backend": backend, "prefix_caching": False}
        with LLM(load.model, progress=False, **settings) as llm:
            for rate, key in keys.items():
                about = {"kind": "capacity", "policy": policy, "rate": rate, "slo_s": load.slo_s}
                if not results.measure(key, functools.partial(serve, llm, load, rate), **about):
                    return False
                if results.rows[key].get("median_delay_s", 0.0) > load.limit_s / 4:
                    break
    return True


def serve(llm: LLM, load: Load, rate: float) -> dict[str, float]:
    """The metrics of one run."""
    lengths, arrivals = functools.partial(synthesise, CHAT), functools.partial(poisson, rate)
    workload = Workload(lengths, arrivals, load.number, 0, load.context, CHAT.longest)
    came = replay(llm, workload.requests(), limit_s=load.limit_s, progress=False)
    return {
        "p50_ttft_s": came.ttfts.quantile(0.5),
        "p99_tbt_s": came.tbts.quantile(0.99),
        "median_delay_s": came.scheduling_delays.quantile(0.5),
        "output_tok_s": came.throughput.output_tokens_per_s,
        "keeps_promise": came.keeps_promise(load.slo_s),
    }
