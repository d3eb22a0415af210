"""Programs that are kept on disk: the same answers from them, and never a wrong or a damaged one."""

import logging
import os

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import SamplingParams, loading
from sarathi_jax.llm import LLM
from sarathi_jax.program_store import ProgramStore
from sarathi_jax.step_program import StepProgram
from tests.tiny_models import write_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE

PROMPTS = [list(range(5, 5 + length)) for length in (3, 20, 33)]


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "use_compile_cache", lambda: tmp_path / "xla")
    write_tiny_model("llama2", tmp_path / "model", changes={"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2})
    return tmp_path / "model"


def answers(model, **config) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True)
    sizes = {"max_model_len": 64, "block_size": 8, "num_blocks": 40, "token_buckets": (16,), "max_num_seqs": 4}
    with LLM(model, dtype="float32", progress=False, **sizes, **config) as llm:
        first = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        # Again: caches and histories were donated, and prefixes are taken from the cache.
        again = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
        assert again == first
        assert llm.num_late_compiles == 0
        return first


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"tp": 2, "dp": 2}, {"pp": 2}])
def test_the_second_start_traces_nothing(model, monkeypatch, config):
    first = answers(model, **config)

    def refuse(*_):
        raise AssertionError("traced again")

    monkeypatch.setattr(StepProgram, "trace", refuse)
    assert answers(model, **config) == first
    with pytest.raises(AssertionError, match="traced again"):
        answers(model, **config, quantization="w8")


def double(x):
    return 2 * x


def traced(function=double) -> jax.stages.Traced:
    return jax.jit(function).trace(jax.ShapeDtypeStruct((3,), jnp.float32))


def test_a_damaged_program_is_made_anew(tmp_path, caplog):
    store, devices = ProgramStore(tmp_path), jax.devices()[:1]
    store.get("double", devices, traced)
    (path,) = tmp_path.glob("*/*")
    for damage in (b"", b"nothing", path.read_bytes()[:-100]):
        path.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            program = store.get("double", devices, traced)
        assert program(jnp.ones(3)).tolist() == [2, 2, 2]
        assert "compiling it anew" in caplog.text
        caplog.clear()
    assert store.get("double", devices, lambda: pytest.fail("it is there"))(jnp.ones(3)).tolist() == [2, 2, 2]


def test_a_program_of_other_devices_is_another(tmp_path):
    store = ProgramStore(tmp_path)
    for device in jax.devices()[:2]:
        here = jax.sharding.SingleDeviceSharding(device)
        shape = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=here)
        for _ in range(2):
            program = store.get("double", [device], lambda s=shape: jax.jit(double).trace(s))
            assert program(jax.device_put(jnp.ones(3), here)).devices() == {device}


def test_settings_make_another_version(tmp_path, monkeypatch):
    ProgramStore(tmp_path).get("x", jax.devices()[:1], traced)
    with jax.default_matmul_precision("highest"):
        ProgramStore(tmp_path).get("x", jax.devices()[:1], traced)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    ProgramStore(tmp_path).get("x", jax.devices()[:1], traced)
    assert len(list(tmp_path.iterdir())) >= 2
    for version in range(5):
        monkeypatch.setenv("LIBTPU_INIT_ARGS", str(version))
        ProgramStore(tmp_path).get("x", jax.devices()[:1], traced)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_cannot_be_stored_still_runs(tmp_path):
    store = ProgramStore(tmp_path)

    def calls_back(x):
        return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((3,), jnp.float32), x)

    program = store.get("callback", jax.devices()[:1], lambda: traced(calls_back))
    assert program(jnp.ones(3)).tolist() == [1, 1, 1]
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    unwritable = ProgramStore(tmp_path / "file")
    assert unwritable.get("double", jax.devices()[:1], traced)(jnp.ones(3)).tolist() == [2, 2, 2]
