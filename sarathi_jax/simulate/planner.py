"""The cheapest deployment that serves a workload at a rate within an SLO, and why every other one was not chosen.

Choices are devices, tp, pp and token budgets; of each, as many replicas as the rate needs. Most are rejected without a
simulation: what does not fit, what is too slow with nobody else there, what costs too much even if every step did
nothing but products. The others are searched for their capacity, cheapest first: coarsely, then closely those that
could be the cheapest.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable

from sarathi_jax.config import ConfigError
from sarathi_jax.latency import Roofline, Work, device_of
from sarathi_jax.simulate.capacity import Capacity
from sarathi_jax.simulate.choices import Choice, Demand, Options, Plan
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.memory import cache_of

Search = Callable[[Deployment, float, bool], Capacity]
"""The capacity of a deployment of one replica, near a rate; coarsely, or (True) closely."""


def plan(
    base: Deployment,
    demand: Demand,
    options: Options,
    search: Search,
    on_choice: Callable[[Choice], None] | None = None,
) -> Plan:
    """Finds the cheapest choice.

    Args:
      base: model, engine and host term that all choices share; its device, tp, pp, dp, budget and promise are not.
      demand: what is asked for.
      options: what may be chosen.
      search: finds capacities.
      on_choice: told of every choice as it is decided, and again if it is searched closely.

    Raises:
      ConfigError: nothing to choose from.
    """
    tell = on_choice or (lambda choice: None)
    open_choices, decided = list[tuple[Choice, Deployment]](), list[Choice]()
    for choice, deployment in _enumerate(base, demand, options):
        if deployment is None:
            decided.append(choice)
            tell(choice)
        else:
            open_choices.append((choice, deployment))
    possible = list[tuple[Choice, Deployment]]()
    cheapest = math.inf
    for choice, deployment in sorted(open_choices, key=lambda pair: _least_cost(pair[0], demand)):
        least = _least_cost(choice, demand)
        if least > options.dearest * cheapest:
            found = dataclasses.replace(choice, reason=_too_dear(choice, demand, least, cheapest))
        else:
            found = _searched(choice, demand, options, search(deployment, choice.at_most / 2, False))
        tell(found)
        if found.is_possible:
            cheapest = min(cheapest, found.cost)
            possible.append((found, deployment))
        else:
            decided.append(found)
    # What a coarse search found may be better, not worse, by what lies between `capacity` and `below`.
    while possible:
        index = min(range(len(possible)), key=lambda i: _order(possible[i][0], demand))
        choice, deployment = possible[index]
        if choice.is_close:
            break
        found = _searched(choice, demand, options, search(deployment, choice.capacity, True))
        found = dataclasses.replace(found, is_close=True)
        tell(found)
        if found.is_possible:
            possible[index] = found, deployment
        else:
            decided.append(found)
            del possible[index]
    ranked = sorted((choice for choice, _ in possible), key=lambda one: (one.cost, not one.is_close, -one.capacity))
    return Plan(demand, (*ranked, *decided))


def _enumerate(base: Deployment, demand: Demand, options: Options) -> Iterable[tuple[Choice, Deployment | None]]:
    """Every choice with what would serve it, or without it and with the reason."""
    splits = sorted(
        (split for split in itertools.product(options.tps, options.pps) if math.prod(split) <= options.max_devices),
        key=lambda split: (math.prod(split), split[1]),
    )
    if not splits:
        raise ConfigError(f"max_devices={options.max_devices} leaves no tp and pp to choose: raise it")
    for device, (tp, pp), budget in itertools.product(options.devices, splits, options.budgets):
        choice = Choice(device, tp, pp, budget, tp * pp * options.prices[device])
        try:
            deployment = _deployment(base, choice, demand, options)
            reason, at_most = _judge(deployment, demand)
        except ValueError as error:  # the engine's ConfigError, or a roofline without a link
            yield dataclasses.replace(choice, reason=str(error)), None
            continue
        choice = dataclasses.replace(choice, at_most=at_most, reason=reason)
        if not reason and math.ceil(demand.rate / at_most) > options.max_replicas:
            choice = dataclasses.replace(choice, reason=_too_many(at_most, "at most ", demand, options))
        yield choice, None if choice.reason else deployment


def _deployment(base: Deployment, choice: Choice, demand: Demand, options: Options) -> Deployment:
    """One replica of a choice."""
    largest = max((budget for budget in options.budgets if budget is not None), default=2048)
    engine = dataclasses.replace(
        base.engine,
        tp=choice.tp,
        pp=choice.pp,
        pp_layers=None,
        dp=1,
        hosts=1,
        num_blocks=None,
        token_buckets=None,
        token_budget=largest if choice.budget is None else choice.budget,
        tbt_slo_ms=1e3 * demand.tbt_slo_s if choice.budget is None else None,
    )
    return dataclasses.replace(base, device=device_of(choice.device), engine=engine, table=None)


def _judge(deployment: Deployment, demand: Demand) -> tuple[str, float]:
    """Why one replica cannot serve, or "", and the rate that none exceeds."""
    cache, roofline = cache_of(deployment), deployment.roofline()
    room = min(cache.num_blocks * cache.block_size, cache.max_model_len)
    if room < demand.longest_tokens:
        return f"a request has up to {demand.longest_tokens} tokens, there is room for {room}", 0.0
    alone_s = _decode_s(roofline, deployment.engine.buckets[0])
    if alone_s > demand.tbt_slo_s:
        return (
            f"a single request alone has a TBT of {alone_s * 1e3:.3g} ms, the SLO is {demand.tbt_slo_s * 1e3:.3g} ms",
            0.0,
        )
    tokens_per_s = max(bucket / roofline.work_s(Work(bucket)) for bucket in deployment.engine.buckets)
    return "", tokens_per_s / demand.mean_tokens


def _decode_s(roofline: Roofline, bucket: int) -> float:
    """The next token of a request that is alone: through all stages, one after the other."""
    work = Work(bucket, 1, 1, 0, 1)
    stages_s = sum(roofline.stage_s(work, stage) for stage in range(roofline.pp))
    return stages_s + (roofline.pp - 1) * roofline.send_s(bucket)


def _searched(choice: Choice, demand: Demand, options: Options, capacity: Capacity) -> Choice:
    """A choice with what a search found."""
    if not capacity.rate:
        return dataclasses.replace(choice, reason=str(capacity))
    # A run that ends hides some of the delay that its last requests would have had.
    rate = min(capacity.rate, choice.at_most)
    replicas = math.ceil(demand.rate / rate)
    level = next(level for level in capacity.levels if level.rate >= min(demand.rate / replicas, capacity.rate))
    reason = _too_many(rate, "", demand, options) if replicas > options.max_replicas else ""
    return dataclasses.replace(
        choice,
        capacity=rate,
        below=capacity.below,
        replicas=replicas,
        p99_tbt_s=level.p99_tbt_s,
        reason=reason,
    )


def _least_cost(choice: Choice, demand: Demand) -> float:
    return math.ceil(demand.rate / choice.at_most) * choice.replica_cost


def _order(choice: Choice, demand: Demand) -> tuple[float, bool, float]:
    """What it costs at best; of equals first what was searched closely, then what has most to spare."""
    rate = choice.capacity if choice.is_close else min(choice.below, choice.at_most)
    return math.ceil(demand.rate / rate) * choice.replica_cost, not choice.is_close, -choice.capacity


def _too_dear(choice: Choice, demand: Demand, least: float, cheapest: float) -> str:
    return (
        f"costs at least ${least:.2f}/h, {least / cheapest:.1f} times the cheapest found: a replica serves at most "
        f"{choice.at_most:.3g} requests/s, so that it takes {math.ceil(demand.rate / choice.at_most)}"
    )


def _too_many(rate: float, words: str, demand: Demand, options: Options) -> str:
    return (
        f"needs {math.ceil(demand.rate / rate)} replicas of {words}{rate:.3g} requests/s each, more than the "
        f"{options.max_replicas} that may be"
    )
