"""A model over two machines: as a pipeline or as one tensor-parallel group, and how long stages wait for each other."""

import dataclasses
import functools
import math
import statistics

from sarathi_jax.bench.paper.batch_throughput import decode_s
from sarathi_jax.bench.paper.deployments import DeploymentSettings, Trace, requests
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Comparison, comparison_table, number, table
from sarathi_jax.bench.paper.parallel import in_parallel
from sarathi_jax.bench.paper.pictures import grouped_bars
from sarathi_jax.config import Policy
from sarathi_jax.latency.devices import ETHERNET_100G, Link
from sarathi_jax.simulate import Deployment, Snapshot, simulate
from sarathi_jax.simulate.capacity import find_capacity
from sarathi_jax.simulate.replica import SimulatedReplica
from sarathi_jax.telemetry.run import Run

_HOPELESS_S = 30.0  # of a wait, where half of all may wait 2 s


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to serve the model.

    Attributes:
      name: in tables.
      policy, tp, pp, max_num_seqs: as of `EngineConfig`.
      token_budget: of a step; None: the longest request, for policies that never cut a prompt.
      over_ethernet: sums over all devices go round through the Ethernet between the machines, as in the paper; False:
        as `DEVICES` has it, measured on machines that InfiniBand joins.
    """

    name: str
    policy: Policy
    tp: int
    pp: int
    max_num_seqs: int
    token_budget: int | None = None
    over_ethernet: bool = False


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      deployment: with the engine of each variant.
      variants: by the order of the table.
      trace: of the requests.
      rate: requests a second at which latencies are compared.
      num_requests, quick_requests: of a run.
      capacity_requests: of a run of the search for a capacity, which must last for waits to show.
      seeds: of the workload.
      decodes, context: of steps without a prompt, and tokens in the cache of each.
      tbt_slo_s: P99 at the capacity.
      tolerance: of the capacity.
    """

    deployment: DeploymentSettings
    variants: tuple[Variant, ...]
    trace: Trace
    rate: float
    num_requests: int
    quick_requests: int
    capacity_requests: int
    seeds: int
    decodes: tuple[int, ...]
    context: int
    tbt_slo_s: float
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A number of the paper: one variant's over another's.

    Attributes:
      what: is compared.
      over, under: names of variants.
      value: in the paper.
      why: ours differs, or how the paper puts it.
    """

    what: str
    over: str
    under: str
    value: float
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's numbers: of median times between tokens, and of capacities."""

    median_tbt: tuple[Ratio, ...]
    capacity: tuple[Ratio, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process does: a variant at the rate, with every request there from the beginning, at its capacity."""

    settings: Settings
    variant: Variant
    num_requests: int
    with_capacity: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one variant.

    Attributes:
      p50_tbt_s, p99_tbt_s, p50_ttft_s: at the rate, medians over the seeds.
      bubbles: of each stage, share of the time in which it waits, with all requests there from the beginning.
      tokens_per_s: prompt and output, likewise.
      capacity: requests a second; None: not searched.
    """

    p50_tbt_s: float
    p99_tbt_s: float
    p50_ttft_s: float
    bubbles: tuple[float, ...]
    tokens_per_s: float
    capacity: float | None


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    num_requests = settings.quick_requests if options.quick else settings.num_requests
    searched = {name for ratio in paper.capacity if not options.quick for name in (ratio.over, ratio.under)}
    jobs = [Job(settings, variant, num_requests, variant.name in searched) for variant in settings.variants]
    answers = in_parallel(outcome_of, jobs, options, experiment.name)
    outcomes = {variant.name: answer for variant, answer in zip(settings.variants, answers, strict=True)}
    comparisons = [
        _compare(ratio, {name: one.p50_tbt_s for name, one in outcomes.items()}) for ratio in paper.median_tbt
    ]
    if not options.quick:
        capacities = {name: one.capacity or math.nan for name, one in outcomes.items()}
        comparisons += [_compare(ratio, capacities) for ratio in paper.capacity]
    rows = [
        {
            "variant": name,
            "p50_tbt_s": one.p50_tbt_s,
            "p99_tbt_s": one.p99_tbt_s,
            "p50_ttft_s": one.p50_ttft_s,
            "bubbles": max(one.bubbles),
            "tokens_per_s": one.tokens_per_s,
            "capacity": "" if one.capacity is None else one.capacity,
        }
        for name, one in outcomes.items()
    ]
    text = "\n\n".join(
        [
            comparison_table(comparisons),
            f"Latencies at {settings.rate:g} requests/s ({settings.trace}, {num_requests} requests, {settings.seeds} "
            "seeds); bubbles and throughput with all requests there from the beginning; capacity at a P99 TBT of "
            f"{settings.tbt_slo_s:g} s, searched to {settings.tolerance:.0%} with one seed of "
            f"{settings.capacity_requests} requests.",
            table(
                ["", "P50 TBT", "P99 TBT", "P50 TTFT", "bubbles of the stages", "tokens/s", "capacity"],
                [
                    [
                        name,
                        f"{number(one.p50_tbt_s)} s",
                        f"{number(one.p99_tbt_s)} s",
                        f"{number(one.p50_ttft_s)} s",
                        ", ".join(f"{share:.1%}" for share in one.bubbles),
                        f"{one.tokens_per_s:.0f}",
                        "-" if one.capacity is None else f"{number(one.capacity)}/s",
                    ]
                    for name, one in outcomes.items()
                ],
            ),
        ]
    )
    text += f"\n\nTime between tokens without any prompt, {settings.context} tokens in the cache of each request:\n\n"
    text += _decode_table(settings)
    groups = {
        what: {name: value(one) for name, one in outcomes.items()}
        for what, value in (
            ("P50 TBT", lambda one: one.p50_tbt_s),
            ("P99 TBT", lambda one: one.p99_tbt_s),
        )
    }
    bubbles = {
        "largest of the stages": {
            name: 100 * max(one.bubbles) for name, one in outcomes.items() if len(one.bubbles) > 1
        }
    }
    least = min((one for one in outcomes.items() if len(one[1].bubbles) > 1), key=lambda pair: max(pair[1].bubbles))
    most = max((one for one in outcomes.items() if len(one[1].bubbles) > 1), key=lambda pair: max(pair[1].bubbles))
    words = ", ".join(f"{one.what} {one.ours:.2f} (paper {number(one.paper or math.nan)})" for one in comparisons[:2])
    return Section(
        f"{words}; bubbles {max(least[1].bubbles):.0%} ({least[0]}) to {max(most[1].bubbles):.0%} ({most[0]}).",
        text,
        {"variants": rows},
        {
            "latency": functools.partial(
                grouped_bars, groups, title=f"Falcon-180B at {settings.rate:g} requests/s", y="seconds", marks={}
            ),
            "bubbles": functools.partial(grouped_bars, bubbles, title="How long a stage waits", y="%", marks={}),
        },
    )


def outcome_of(job: Job) -> Outcome:
    """Serves a variant at the rate, with all requests at once, and at its capacity."""
    settings, deployment = job.settings, _deployment(job)
    seeds = range(settings.seeds if job.num_requests == settings.num_requests else 1)
    runs = [_simulate(job, deployment, settings.rate, job.num_requests, seed) for seed in seeds]
    bubbles, tokens_per_s = _saturated(job, deployment)
    capacity = None
    if job.with_capacity:

        def probe(rate: float, seed: int) -> Run:
            return _simulate(job, deployment, rate, settings.capacity_requests, seed)

        found = find_capacity(
            probe, tbt_slo_s=settings.tbt_slo_s, guess=settings.rate, tolerance=settings.tolerance, seeds=(0,)
        )
        capacity = found.rate
    return Outcome(
        statistics.median(run.tbts.quantile(0.5) for run in runs),
        statistics.median(run.tbts.quantile(0.99) for run in runs),
        statistics.median(run.ttfts.quantile(0.5) for run in runs),
        bubbles,
        tokens_per_s,
        capacity,
    )


def decode_tbt_s(deployment: Deployment, decodes: int, context: int) -> float:
    """Time between tokens of so many requests that only generate, shared out over the stages."""
    pp = deployment.engine.pp
    return pp * decode_s(deployment.roofline(), math.ceil(decodes / pp), context)


def _decode_table(settings: Settings) -> str:
    rows = []
    for variant in {(v.tp, v.pp, v.over_ethernet): v for v in settings.variants}.values():
        deployment = _deployment(Job(settings, variant, settings.num_requests, False))
        link = deployment.tp_link or deployment.device.link(variant.tp)
        message = 2 * settings.decodes[-1] * deployment.model.hidden_size
        rows.append(
            [
                variant.name.partition(", ")[2],
                *(f"{1e3 * decode_tbt_s(deployment, n, settings.context):.0f} ms" for n in settings.decodes),
                f"{1e3 * link.all_reduce_s(message, variant.tp):.2f} ms",
            ]
        )
    decodes = [f"{n} requests" for n in settings.decodes]
    return table(["", *decodes, f"a layer's sum of {settings.decodes[-1]} tokens"], rows)


def _simulate(job: Job, deployment: Deployment, rate: float, number: int, seed: int) -> Run:
    served = requests(job.settings.trace, rate, number, seed)

    def is_hopeless(snapshot: Snapshot) -> bool:
        return snapshot.oldest_waiting_s > _HOPELESS_S and 4 * snapshot.num_waiting > number

    return simulate(served, deployment, keep_steps=False, stop=is_hopeless)


def _saturated(job: Job, deployment: Deployment) -> tuple[tuple[float, ...], float]:
    """Bubbles of each stage and tokens a second, with every request there from the beginning."""
    replica = SimulatedReplica(deployment, keep_steps=False)
    served = requests(job.settings.trace, 1.0, job.num_requests, 0)
    for index, request in enumerate(served):
        replica.add(str(index), (0,) * request.prompt, request.output, 0.0)
    replica.run_until(math.inf)
    end_s = max(output.metrics.finished_s or 0.0 for output in replica.outputs)
    bubbles = tuple(1 - busy_s / end_s for busy_s in replica.executor.busy_s)
    return bubbles, sum(request.prompt + request.output for request in served) / end_s


def _deployment(job: Job) -> Deployment:
    variant = job.variant
    deployment = job.settings.deployment.build(
        policy=variant.policy,
        tp=variant.tp,
        pp=variant.pp,
        max_num_seqs=variant.max_num_seqs,
        token_budget=variant.token_budget or job.settings.deployment.context,
    )
    if not variant.over_ethernet:
        return deployment
    return dataclasses.replace(deployment, tp_link=ring(ETHERNET_100G, variant.tp))


def ring(slowest: Link, num_devices: int) -> Link:
    """An all-reduce around devices: 2 (n - 1) messages one after the other, as fast as the slowest link."""
    return Link(2 * (num_devices - 1) * slowest.latency_s, slowest.bandwidth)


def _compare(ratio: Ratio, values: dict[str, float]) -> Comparison:
    return Comparison(ratio.what, values[ratio.over] / values[ratio.under], ratio.value, why=ratio.why)
