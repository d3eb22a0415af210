"""Plans with made-up capacities: what is chosen, what is not even tried, and the reason for each rejected choice."""

import dataclasses
import math
import re

import pytest

from sarathi_jax.config import ConfigError, EngineConfig
from sarathi_jax.latency import DEVICES, DeviceError
from sarathi_jax.resources import config_path
from sarathi_jax.simulate.capacity import Capacity, Level
from sarathi_jax.simulate.choices import Choice, Demand, Options, Plan
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.planner import plan
from sarathi_jax.weights.directory import load_model_yaml
from sarathi_jax.workloads import TimedRequest

YI = load_model_yaml(config_path("models", "yi-34b"))
BASE = Deployment(YI, DEVICES["cpu"], EngineConfig(max_num_seqs=64))
DEMAND = Demand(rate=4.0, tbt_slo_s=0.2, mean_tokens=2000, longest_tokens=4096)
OPTIONS = Options(devices=("a100-80gb", "a40"), tps=(1, 2, 4), pps=(1, 2), budgets=(512, 2048, None))


def found(rate: float, below: float, slo_s: float, p99_tbt_s: float = 0.1) -> Capacity:
    levels = (Level(rate / 4, (), p99_tbt_s / 2, 0.0, ()), Level(rate, (), p99_tbt_s, 0.1, ()))
    return Capacity(rate, below, "tbt", slo_s, levels, (rate, below))


class Searches:
    """Capacities by formula: closely 10 % more than coarsely; budget 2048 never meets the SLO."""

    def __init__(self, scale: float = 1.0):
        self.made, self.scale = [], scale

    def __call__(self, deployment: Deployment, guess: float, closely: bool) -> Capacity:
        engine = deployment.engine
        self.made.append(
            (deployment.device.name, engine.tp, engine.pp, engine.token_budget, engine.tbt_slo_ms, closely)
        )
        if engine.token_budget == 2048 and engine.tbt_slo_ms is None:
            return Capacity(0.0, 0.001, "tbt", 0.2, (Level(0.001, (), 0.5, 0.0, ("tbt",)),), (0.0, 0.001))
        each = {"a100-80gb": 0.5, "a40": 0.1}[deployment.device.name] * self.scale
        rate = each * engine.tp * engine.pp * (1.2 if engine.tbt_slo_ms else 1.0)
        return found(1.1 * rate if closely else rate, 1.15 * rate if closely else 1.25 * rate, 0.2)


def test_the_cheapest_is_chosen_and_every_other_has_a_reason():
    searches, told = Searches(), list[Choice]()
    answer = plan(BASE, DEMAND, OPTIONS, searches, told.append)
    best = answer.best
    assert best is not None
    assert best.is_close
    assert best.budget is None
    assert best.cost == pytest.approx(min(choice.cost for choice in answer.choices))
    # A40: 0.66 x tp x pp requests/s closely at 0.45 $/h; the A100's 0.5 cost 1.80.
    assert best.replicas == math.ceil(4.0 / best.capacity)
    assert len(answer.choices) == 2 * 6 * 3
    assert {choice.name for choice in told} == {choice.name for choice in answer.choices}
    possible = [choice.is_possible for choice in answer.choices]
    assert possible == sorted(possible, reverse=True)
    costs = [choice.cost for choice in answer.choices if choice.is_possible]
    assert costs == sorted(costs)
    assert answer == plan(BASE, DEMAND, OPTIONS, Searches())


def test_reasons():
    answer = plan(BASE, DEMAND, OPTIONS, Searches())
    reasons = {(c.device, c.tp, c.pp, c.budget): c.reason for c in answer.choices}
    assert "the model does not fit" in reasons["a40", 1, 1, 512]
    assert "what fits: tp=2 pp=1" in reasons["a40", 1, 1, 512]
    assert "no rate meets it" in reasons["a40", 4, 1, 2048]
    searched = [made[:4] for made in Searches().made]
    assert ("a40", 1, 1, 512) not in searched


def test_what_costs_too_much_even_at_best_is_not_simulated():
    searches = Searches()
    cheap = dataclasses.replace(OPTIONS, prices={"a100-80gb": 1000.0, "a40": 0.1})
    answer = plan(BASE, DEMAND, cheap, searches)
    assert not [made for made in searches.made if made[0] == "a100-80gb"]
    dear = next(c for c in answer.choices if c.device == "a100-80gb" and c.tp == 2)
    assert "costs at least $" in dear.reason
    assert "a replica serves at most" in dear.reason


def test_a_slo_below_a_single_decode_rejects_everything_without_a_search():
    searches = Searches()
    answer = plan(BASE, dataclasses.replace(DEMAND, tbt_slo_s=0.002), OPTIONS, searches)
    assert answer.best is None
    assert answer.front == ()
    assert not searches.made
    assert any("a single request alone has a TBT of" in choice.reason for choice in answer.choices)


@pytest.mark.parametrize(
    ("demand", "options", "match"),
    [
        ({"longest_tokens": 9000}, {}, "a request has up to 9000 tokens, there is room for 4096"),
        ({"rate": 1e6}, {}, "needs .* replicas of at most .* requests/s each, more than the 64"),
        ({}, {"tps": (3,)}, "tp=3: 56 query heads cannot be split evenly"),
        ({}, {"pps": (61,), "tps": (1,), "max_devices": 64}, "60 layers make at most 60 stages"),
    ],
)
def test_more_reasons(demand, options, match):
    answer = plan(BASE, dataclasses.replace(DEMAND, **demand), dataclasses.replace(OPTIONS, **options), Searches())
    assert answer.best is None
    assert [choice for choice in answer.choices if re.search(match, choice.reason)]


def test_devices_that_no_link_joins():
    base = dataclasses.replace(BASE, model=load_model_yaml(config_path("models", "llama2-70b")))
    answer = plan(base, DEMAND, dataclasses.replace(OPTIONS, tps=(16,), pps=(1,)), Searches())
    assert {choice.reason for choice in answer.choices} == {
        "no link joins 16 a100-80gb: at most 8; name the link",
        "no link joins 16 a40: at most 8; name the link",
    }


def test_too_few_replicas_allowed_after_the_search():
    answer = plan(BASE, DEMAND, dataclasses.replace(OPTIONS, max_replicas=2), Searches(scale=0.01))
    assert answer.best is None
    assert any("more than the 2 that may be" in choice.reason for choice in answer.choices)


def test_the_front_has_what_nothing_beats():
    def choice(cost: float, p99_tbt_s: float, reason: str = "") -> Choice:
        return Choice("a40", 1, 1, 512, cost, 9.0, 1.0, 1.1, 1, p99_tbt_s, reason=reason)

    ranked = (
        choice(1, 0.2),
        choice(1, 0.1),
        choice(2, 0.2),
        choice(3, 0.05),
        choice(4, 0.05),
        choice(0, 0.0, "broken"),
    )
    assert Plan(DEMAND, ranked).front == (ranked[1], ranked[3])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"devices": ("a100",)}, "do you mean a100-80gb"),
        ({"devices": ()}, "name at least one"),
        ({"prices": {}}, "what does a100-80gb cost"),
        ({"budgets": (0,)}, "must be positive"),
        ({"tps": (0,)}, "must be positive"),
    ],
)
def test_options_that_cannot_be(changes, match):
    with pytest.raises((ConfigError, DeviceError), match=match):
        dataclasses.replace(OPTIONS, **changes)


def test_demands():
    requests = [TimedRequest(0.0, 100, 50), TimedRequest(1.0, 300, 10, group=1, shared=200)]
    assert Demand.of(requests, 2.0, 0.1) == Demand(2.0, 0.1, (149 + 109) / 2, 310)
    for changes in ({"rate": 0.0}, {"tbt_slo_s": -1.0}, {"rate": math.inf}):
        with pytest.raises(ConfigError, match="must be a number above 0"):
            dataclasses.replace(DEMAND, **changes)
    with pytest.raises(ConfigError):
        Demand.of([], 2.0, 0.1)
    with pytest.raises(ConfigError, match="raise it"):
        plan(BASE, DEMAND, dataclasses.replace(OPTIONS, tps=(4,), max_devices=2), Searches())
