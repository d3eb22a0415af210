"""Deployments: the files that ship, and what a wrong one is told."""

import pytest

from sarathi_jax.config import ConfigError, EngineConfig
from sarathi_jax.deployment import load_deployment
from sarathi_jax.llm import LLM
from sarathi_jax.parallel import check_split
from sarathi_jax.resources import config_names, config_path
from sarathi_jax.weights.directory import load_model_yaml


@pytest.mark.parametrize("name", config_names("deployments"))
def test_what_ships_can_be_served(name: str):
    arguments = load_deployment(name)
    model = arguments.pop("model", None)
    engine = EngineConfig(**arguments)
    if model is not None:
        check_split(load_model_yaml(model), engine)


def test_meshes_of_the_paper():
    splits = {
        name: (d.get("tp", 1), d.get("pp", 1)) for name in config_names("deployments") if (d := load_deployment(name))
    }
    assert splits["mistral-7b-a100"] == (1, 1)
    assert splits["yi-34b-2xa100"] == (2, 1)
    assert splits["llama2-70b-8xa40"] == splits["falcon-180b-2x4xa100"] == (4, 2)


def test_paths_and_names_of_models(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: weights/mine\npp: 2\npp_layers: [3, 1]\n")
    assert load_deployment(file) == {"model": tmp_path / "weights" / "mine", "pp": 2, "pp_layers": (3, 1)}
    file.write_text("model: yi-34b\n")
    assert load_deployment(str(file)) == {"model": config_path("models", "yi-34b")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpp: 2", r"unknown key 'tpp'; do you mean tp\?"),
        ("host_id: 1", "differs from machine to machine"),
        ("tp: 0", "tp=0 must be a positive integer"),
        ("tp: two", "tp='two' must be a positive integer"),
        ("- 1", "must hold keys and values"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_wrong_files(tmp_path, text: str, message: str):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_deployment(file)


def test_unknown_name():
    with pytest.raises(ConfigError, match="there are llama2-70b-8xa40.*path of a .yaml file"):
        load_deployment("llama2-70b-8xa4")
    with pytest.raises(ConfigError, match="cannot read"):
        load_deployment("nowhere.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hosts": 2, "dp": 2}, "load balancer"),
        ({"host_id": 0}, "for several hosts"),
        ({"coordinator": "localhost:1"}, "for several hosts"),
        ({"hosts": 2, "host_id": 2}, "must be one of 0 to 1"),
        ({"hosts": 0}, "positive integer"),
    ],
)
def test_hosts_that_cannot_be(settings, message: str):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


@pytest.mark.slow
def test_deployed():
    with LLM.deployed("virtual-8", progress=False, tp=1, token_budget=8, max_model_len=64) as llm:
        assert llm.engine_config.pp == 2
        assert llm.generate([5, 6, 7], use_tqdm=False)[0].finished
