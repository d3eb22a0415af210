"""Programs that are kept on disk: the same answers from them, and never a wrong or a damaged one."""

import logging
import random
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pytest

from sarathi_jax import SamplingParams, loading, program_store
from sarathi_jax.llm import LLM
from sarathi_jax.program_store import ProgramStore
from sarathi_jax.step_program import StepProgram
from tests.tiny_models import write_tiny_model
from tests.tiny_tokenizers import VOCAB_SIZE

PROMPTS = [list(range(5, 5 + length)) for length in (3, 20, 33)]


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "use_compile_cache", lambda: tmp_path / "xla")
    # Like no model before, or its programs might come out of JAX's cache.
    unique = {"rms_norm_eps": random.uniform(1e-6, 1e-4)}
    write_tiny_model("llama2", tmp_path / "model", changes={"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2} | unique)
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


_THRESHOLD = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def factor() -> Iterator[float]:
    """Makes a program like no other, which JAX's own cache neither has nor takes."""
    before = jax.config.values[_THRESHOLD]
    jax.config.update(_THRESHOLD, 1e9)
    yield random.uniform(2, 3)
    jax.config.update(_THRESHOLD, before)


def tracer(function) -> Callable[[], jax.stages.Traced]:
    return lambda: jax.jit(function).trace(jax.ShapeDtypeStruct((3,), jnp.float32))


def times(factor: float) -> Callable[[], jax.stages.Traced]:
    return tracer(lambda x: factor * x)


def not_again() -> jax.stages.Traced:
    pytest.fail("it is there, and was traced again")


def test_a_damaged_program_is_made_anew(tmp_path, caplog, factor):
    store, devices = ProgramStore(tmp_path), jax.devices()[:1]
    store.get("times", devices, times(factor))
    (path,) = tmp_path.glob("*.program")
    for damage in (b"", b"nothing", path.read_bytes()[:-100]):
        path.write_bytes(damage)
        with caplog.at_level(logging.WARNING):
            program = store.get("times", devices, times(factor))
        assert program(jnp.ones(3))[0] == jnp.float32(factor)
        assert "compiling it anew" in caplog.text
        caplog.clear()
    assert store.get("times", devices, not_again)(jnp.ones(3))[0] == jnp.float32(factor)


def test_a_program_of_other_devices_is_another(tmp_path, factor):
    store = ProgramStore(tmp_path)
    for device in jax.devices()[:2]:
        here = jax.sharding.SingleDeviceSharding(device)
        shape = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=here)
        for trace in (lambda s=shape: jax.jit(lambda x: factor * x).trace(s), not_again):
            program = store.get("times", [device], trace)
            assert program(jax.device_put(jnp.ones(3), here)).devices() == {device}


def test_what_jax_had_in_memory_is_not_stored(tmp_path, factor):
    """It may have come from JAX's own cache, and lack functions when it is written once more."""
    function, shape = jax.jit(lambda x: factor * x), jax.ShapeDtypeStruct((3,), jnp.float32)
    function.trace(shape).lower().compile()
    program = ProgramStore(tmp_path).get("times", jax.devices()[:1], lambda: function.trace(shape))
    assert program(jnp.ones(3))[0] == jnp.float32(factor)
    assert not list(tmp_path.glob("*.program"))


def test_settings_make_another_program(tmp_path, monkeypatch, factor):
    def get(trace):
        ProgramStore(tmp_path).get("times", jax.devices()[:1], trace)

    get(times(factor))
    with jax.default_matmul_precision("highest"):
        get(times(factor))
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", "--other")
        get(times(factor))
    get(not_again)
    assert len(list(tmp_path.glob("*.program"))) == 3


def test_other_code_finds_the_same_program_by_its_text(tmp_path, monkeypatch, factor):
    devices = jax.devices()[:1]
    ProgramStore(tmp_path).get("times", devices, times(factor))
    monkeypatch.setattr(program_store, "_code", lambda: "changed")
    store = ProgramStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled again"))
        store.get("times", devices, times(factor))
    assert store.get("times", devices, not_again)(jnp.ones(3))[0] == jnp.float32(factor)
    other = ProgramStore(tmp_path).get("more", devices, times(factor + 1))
    assert other(jnp.ones(3))[0] == jnp.float32(factor + 1)


def test_what_jax_had_cached_is_not_stored(tmp_path, factor):
    # Written once more such a program would lack functions: it loads, and fails when it runs.
    devices = jax.devices()[:1]
    jax.config.update(_THRESHOLD, 0)
    for name in ("first", "second"):
        program = ProgramStore(tmp_path / name).get("sorted", devices, tracer(lambda x: factor * jnp.sort(x)))
        assert program(jnp.ones(3))[0] == jnp.float32(factor)
    assert not (tmp_path / "second").exists()
    assert ProgramStore(tmp_path / "first").get("sorted", devices, not_again)(jnp.ones(3)).shape == (3,)


def test_what_cannot_be_stored_still_runs(tmp_path, factor):
    def calls_back(x):
        return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct((3,), jnp.float32), factor * x)

    devices = jax.devices()[:1]
    program = ProgramStore(tmp_path).get("callback", devices, tracer(calls_back))
    assert program(jnp.ones(3))[0] == jnp.float32(factor)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    program = ProgramStore(tmp_path / "file").get("times", devices, times(factor))
    assert program(jnp.ones(3))[0] == jnp.float32(factor)
