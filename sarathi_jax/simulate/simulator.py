"""`simulate`: what a deployment would do with a workload, its prompts and answers together or on devices apart."""

import dataclasses
from collections.abc import Callable, Sequence

from sarathi_jax.config import ConfigError, ModelConfig
from sarathi_jax.latency import Link
from sarathi_jax.simulate.cluster import Cluster, Job, Routing, Snapshot
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.telemetry.run import Run
from sarathi_jax.workloads import TimedRequest

_VALUE_BYTES = 2  # of a key or a value in the cache


def simulate(
    requests: Sequence[TimedRequest],
    deployment: Deployment,
    *,
    routing: Routing = "round_robin",
    seed: int = 0,
    limit_s: float | None = None,
    keep_steps: bool = True,
    stop: Callable[[Snapshot], bool] | None = None,
) -> Run:
    """Serves a workload in simulated time, with the scheduler, block pool and engine of the server.

    The same arguments give the same run.

    Args:
      requests: in the order of their arrival.
      deployment: `engine.dp` replicas of it.
      routing: which replica gets a request: each in turn; the one with the fewest prompt tokens of unfinished requests;
        or the one that had the request's group before, as long as it has not more than twice the mean of them.
      seed: of the engines, and of how their steps scatter.
      limit_s: when the run is cut off; what has not ended by then counts as longer. None: it ends by itself.
      keep_steps: records every step, which takes longer.
      stop: asked about every simulated second; True cuts the run off.

    Raises:
      ConfigError: the model does not fit, or there is no such routing; the message says what to do.
      RequestError: a request can never be served.
    """
    engine = deployment.engine
    if engine.prefix_caching and not any(request.shared for request in requests):
        engine = dataclasses.replace(engine, prefix_caching=False)  # without equal prompts it only costs time
    cluster = Cluster(dataclasses.replace(deployment, engine=engine), routing, seed, keep_steps)
    return cluster.serve(jobs_of(requests, deployment.model.vocab_size), limit_s, stop)


@dataclasses.dataclass(frozen=True)
class Disaggregated:
    """Prompts on some devices, answers on others, and the cache moved between them (SplitWise, DistServe).

    Attributes:
      prefill: computes prompts and draws the first token; its dp says how many replicas.
      decode: draws the others.
      link: from each prefill replica to the decode replicas; a prompt's keys and values follow when all are computed.
    """

    prefill: Deployment
    decode: Deployment
    link: Link


def simulate_disaggregated(
    requests: Sequence[TimedRequest],
    pools: Disaggregated,
    *,
    routing: Routing = "least_work",
    seed: int = 0,
    keep_steps: bool = True,
) -> Run:
    """As `simulate`, with prefill and decode apart.

    What arrives in the decode pool lies in its prefix cache until the request is admitted. If others need the room
    before, the prompt is computed again there; real systems let it wait on the prefill side instead.

    Args:
      requests: in the order of their arrival.
      pools: who does what.
      routing: of both pools, see `simulate`.
      seed: of the engines.
      keep_steps: records every step.

    Returns:
      The run; its steps are those of the prefill replicas, then those of the decode replicas.

    Raises:
      ConfigError: the pools serve different models, one does not fit, or there is no such routing.
      RequestError: a request can never be served.
    """
    if pools.prefill.model != pools.decode.model:
        raise ConfigError("the prefill and the decode pool serve different models: give both the same")
    model = pools.prefill.model
    jobs = jobs_of(requests, model.vocab_size)
    prefill = Cluster(pools.prefill, routing, seed, keep_steps)
    begun = prefill.serve([dataclasses.replace(job, num_output=1) for job in jobs])
    decode_engine = dataclasses.replace(pools.decode.engine, prefix_caching=True)
    decode = Cluster(dataclasses.replace(pools.decode, engine=decode_engine), routing, seed, keep_steps)
    first_s = {sample.request_id: sample.token_s[0] for sample in begun.samples}
    ended = decode.serve(_moved(jobs, first_s, prefill.owners, model, pools.link))
    later = {sample.request_id: sample for sample in ended.samples}
    samples = tuple(
        dataclasses.replace(
            sample,
            token_s=sample.token_s + later[sample.request_id].token_s,
            finished_s=later[sample.request_id].finished_s,
            num_preemptions=sample.num_preemptions + later[sample.request_id].num_preemptions,
            preempted_s=sample.preempted_s + later[sample.request_id].preempted_s,
        )
        if sample.request_id in later
        else sample
        for sample in begun.samples
    )
    return Run(samples, max(begun.end_s, ended.end_s), begun.steps + ended.steps)


def jobs_of(requests: Sequence[TimedRequest], vocab_size: int) -> list[Job]:
    """Requests with made-up prompts, named by their number."""
    return [
        Job(str(number), request.arrival_s, _tokens(number, request, vocab_size), request.output, request.group)
        for number, request in enumerate(requests)
    ]


def _moved(
    jobs: Sequence[Job], first_s: dict[str, float], owners: dict[str, int], model: ModelConfig, link: Link
) -> list[Job]:
    """The jobs that go on in the decode pool, when their keys and values have come there."""
    key_bytes = 2 * _VALUE_BYTES * model.num_layers * model.num_kv_heads * model.head_dim
    free_s, moved = dict[int, float](), list[Job]()
    for job in sorted(jobs, key=lambda job: first_s[job.job_id]):
        if job.num_output == 1:
            continue
        num_keys = min(len(job.tokens), model.cache_window or len(job.tokens))
        owner = owners[job.job_id]
        begin_s = max(first_s[job.job_id], free_s.get(owner, 0.0))
        free_s[owner] = begin_s + link.send_s(num_keys * key_bytes)
        # Its first token is known here and computed there.
        tokens = (*job.tokens, 0)
        moved.append(Job(job.job_id, free_s[owner], tokens, job.num_output - 1, job.group, len(job.tokens)))
    return sorted(moved, key=lambda job: job.arrival_s)


def _tokens(number: int, request: TimedRequest, vocab_size: int) -> tuple[int, ...]:
    """Made-up tokens that begin like those of other requests only as far as the group shares them."""
    shared = 0 if request.group is None else min(request.shared, request.prompt)
    own = (number // vocab_size % vocab_size, number % vocab_size, *(0,) * request.prompt)
    return (*((request.group or 0) % vocab_size,) * shared, *own[: request.prompt - shared])
