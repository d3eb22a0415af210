"""How fast simulations run, and what `schedule()` costs by the number of running sequences. CPU time of one core.

python -m sarathi_jax.bench.simulation
python -m sarathi_jax.bench.simulation --recorded splitwise_conv.csv   # the hour of that trace over 8 replicas, too
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from sarathi_jax.config import EngineConfig
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.latency import DEVICES
from sarathi_jax.request import Request, SamplingParams
from sarathi_jax.resources import config_path
from sarathi_jax.scheduling.base import Scheduler
from sarathi_jax.scheduling.sarathi import SarathiScheduler
from sarathi_jax.sequence import Sequence as TokenSequence
from sarathi_jax.simulate import Deployment
from sarathi_jax.simulate.cluster import Cluster
from sarathi_jax.simulate.simulator import jobs_of
from sarathi_jax.weights.directory import load_model_yaml
from sarathi_jax.workloads import CHAT, TimedRequest, Workload, load_trace, poisson, synthesise

_RECORDED = flags.DEFINE_string("recorded", None, "CSV file of lengths and arrivals, for eight replicas of Yi-34B")
_REQUESTS = flags.DEFINE_integer("chat_requests", 2048, "of the chat trace, on Mistral-7B", lower_bound=1)
_STEPS = flags.DEFINE_integer("timed_steps", 300, "calls of schedule() that are timed", lower_bound=1)

_BLOCK_SIZE = 16


def simulated_s(requests: Sequence[TimedRequest], deployment: Deployment) -> tuple[float, int]:
    """CPU seconds of a simulation, and its steps."""
    begin_s = time.process_time()
    cluster = Cluster(deployment, "least_work", seed=0, keep_steps=False)
    cluster.serve(jobs_of(requests, deployment.model.vocab_size))
    return time.process_time() - begin_s, sum(replica.executor.num_steps for replica in cluster.replicas)


def deployment(model: str, context: int, **engine: Any) -> Deployment:
    """A model on A100; one that was trained for less takes the longer context all the same."""
    settings = {"max_num_seqs": 128, "block_size": _BLOCK_SIZE, "max_model_len": context, "prefix_caching": False}
    loaded = load_model_yaml(config_path("models", model))
    loaded = dataclasses.replace(loaded, max_position=max(loaded.max_position, context))
    return Deployment(loaded, DEVICES["a100-80gb"], EngineConfig(**settings | engine))


def schedule_seconds(num_sequences: int, num_steps: int) -> list[float]:
    """Host seconds of `schedule()` with so many decodes, a step ahead of their tokens as with overlap."""
    most_tokens = num_steps + 2 * num_sequences + 2  # the first ones generate while the last prompts are computed
    context = 512 + most_tokens
    pool = BlockPool(num_sequences * (-(-context // _BLOCK_SIZE) + 1))
    scheduler: Scheduler = SarathiScheduler(
        pool,
        block_size=_BLOCK_SIZE,
        buckets=(num_sequences, 512 + num_sequences),
        max_num_seqs=num_sequences,
        window=None,
        max_model_len=context,
    )
    params, sequences = SamplingParams(temperature=0, max_tokens=most_tokens), []
    for i in range(num_sequences):
        request = Request(str(i), (1,) * 512, params, most_tokens, 0, frozenset(), 0.0)
        sequences.append(TokenSequence(i, request))
        scheduler.add(sequences[-1])
    seconds = []
    while len(seconds) < num_steps:
        begin_s = time.process_time()
        plan = scheduler.schedule()
        passed_s = time.process_time() - begin_s
        assert plan is not None
        if plan.num_decodes == num_sequences:
            seconds.append(passed_s)
        for chunk in plan.chunks:
            if chunk.samples:
                sequences[chunk.seq_id].commit(1)
    return seconds


def main(arguments: Sequence[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    lengths, arrivals = functools.partial(synthesise, CHAT), functools.partial(poisson, 3.0)
    chat = Workload(lengths, arrivals, _REQUESTS.value, 0).requests()
    seconds, num_steps = simulated_s(chat, deployment("mistral-7b", CHAT.longest))
    print(f"{len(chat)} chat requests, Mistral-7B: {seconds:.1f} s, {num_steps / seconds:,.0f} steps/s")
    if _RECORDED.value is not None:
        trace = load_trace(Path(_RECORDED.value))
        if trace.arrivals_s is None:
            raise app.UsageError(f"{_RECORDED.value} has no column arrived_at")
        hour = [
            TimedRequest(at_s, length.prompt, length.output)
            for at_s, length in zip(trace.arrivals_s, trace.lengths, strict=True)
        ]
        longest = max(length.prompt + length.output for length in trace.lengths)
        seconds, num_steps = simulated_s(hour, deployment("yi-34b", longest, tp=2, dp=8))
        print(
            f"{len(hour)} recorded requests over {hour[-1].arrival_s:.0f} s, 8 replicas of Yi-34B: {seconds:.1f} s, "
            f"{num_steps / seconds:,.0f} steps/s"
        )
    for num_sequences in tqdm((64, 256, 1024), "schedule()", file=sys.stderr, leave=False):
        taken = schedule_seconds(num_sequences, _STEPS.value)
        print(f"schedule() with {num_sequences} decodes: median {1e3 * statistics.median(taken):.2f} ms")


if __name__ == "__main__":
    app.run(main)
