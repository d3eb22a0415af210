"""Probes on the simulator: giving up runs without hope changes no answer."""

import functools

import pytest

from sarathi_jax.config import EngineConfig
from sarathi_jax.latency import DEVICES
from sarathi_jax.resources import config_path
from sarathi_jax.simulate import Deployment, Snapshot, simulate
from sarathi_jax.simulate.capacity import find_capacity
from sarathi_jax.simulate.probes import Hopeless, simulated
from sarathi_jax.weights.directory import load_model_yaml
from sarathi_jax.workloads import Workload, fixed, poisson

NUMBER = 80
MODEL = load_model_yaml(config_path("models", "mistral-7b"))
DEPLOYMENT = Deployment(MODEL, DEVICES["a100-80gb"], EngineConfig(max_num_seqs=1, max_model_len=512))


def workload(rate: float, seed: int) -> Workload:
    return Workload(functools.partial(fixed, 200, 20), functools.partial(poisson, rate), NUMBER, seed)


def test_a_run_without_hope_is_given_up():
    probe = simulated(DEPLOYMENT, workload)
    assert all(sample.finished_s is not None for sample in probe(1.0, 0).samples)
    cut = probe(50.0, 0)
    ended = [sample for sample in cut.samples if sample.finished_s is not None]
    assert 0 < len(ended) < NUMBER / 2
    assert not cut.keeps_promise(0.1)


@pytest.mark.slow
def test_giving_up_changes_no_capacity():
    def whole(rate, seed):
        return simulate(workload(rate, seed).requests(), DEPLOYMENT, seed=seed, keep_steps=False)

    settings = {"tbt_slo_s": 0.1, "seeds": (0,), "guess": 16.0}
    found, expected = find_capacity(simulated(DEPLOYMENT, workload), **settings), find_capacity(whole, **settings)
    assert (found.rate, found.below, found.bound) == (expected.rate, expected.below, expected.bound)
    assert found.bound == "delay"


def test_hope():
    look = Hopeless(100)
    assert not look(Snapshot(9.0, 60, 9.0))
    assert not look(Snapshot(9.0, 61, 3.9))
    assert look(Snapshot(9.0, 61, 4.1))
