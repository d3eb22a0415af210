"""Every program is compiled before the first request, and updates the cache in place."""

import gc
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax.compiling import CompileCounter
from sarathi_jax.kv.sizes import block_bytes
from sarathi_jax.request import SamplingParams
from tests.engine.serving import NUM_BLOCKS, VOCAB_SIZE, Served, greedy, prompt_of


class CompileEvents:
    """What JAX itself reports while the block runs: traces, lowerings, compilations, reads of the compile cache."""

    def __enter__(self) -> "CompileEvents":
        self.seen: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)

    def _on_duration(self, event: str, duration_s: float, **_: object) -> None:
        if event.startswith("/jax/core/compile"):
            self.seen.append(event)


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Every field set to something, or not, at random."""

    def maybe(value):
        return value if rng.random() < 0.3 else None

    fields = {
        "n": maybe(int(rng.integers(2, 4))),
        "temperature": maybe(0.0) if rng.random() < 0.5 else float(rng.uniform(0.1, 2)),
        "top_k": maybe(int(rng.integers(1, VOCAB_SIZE))),
        "top_p": maybe(float(rng.uniform(0.1, 1))),
        "min_p": maybe(float(rng.uniform(0, 0.3))),
        "seed": maybe(int(rng.integers(2**32))),
        "repetition_penalty": maybe(float(rng.uniform(0.5, 2))),
        "presence_penalty": maybe(float(rng.uniform(-1, 1))),
        "frequency_penalty": maybe(float(rng.uniform(-1, 1))),
        "logit_bias": maybe({int(i): 2.0 for i in rng.integers(0, VOCAB_SIZE, 4)}),
        "min_tokens": maybe(int(rng.integers(1, 5))),
        "stop_token_ids": maybe([int(i) for i in rng.integers(0, VOCAB_SIZE, 3)]),
        "stop": maybe(["e", "th"]),
        "logprobs": maybe(int(rng.integers(0, 21))),
        "prompt_logprobs": maybe(int(rng.integers(0, 21))),
        "ignore_eos": maybe(True),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return SamplingParams(**{"max_tokens": int(rng.integers(5, 20))} | given)


@pytest.mark.parametrize("overlap", [True, False])
def test_random_mix_compiles_nothing(decoder: Served, overlap: bool):
    rng = np.random.default_rng(17)
    asks = [(prompt_of(int(rng.integers(1, 100)), i), random_params(rng)) for i in range(30)]
    bench = decoder.bench(overlap=overlap, num_blocks=40)
    with CompileEvents() as events:
        for i, (prompt, params) in enumerate(asks):
            bench.engine.add_request(str(i), prompt, params)
            bench.step()
            if i % 7 == 3:
                bench.engine.abort(str(i))
        bench.drain()
    assert events.seen == []
    assert decoder.llm.num_late_compiles == 0
    assert {plan.bucket for plan in bench.plans} == set(decoder.config.buckets)


@pytest.mark.slow
def test_first_request_of_a_fresh_model_compiles_nothing(falcon: Served):
    """Nothing else may warm anything up first, such as a conversion on the host."""
    llm, _ = falcon.face()
    with CompileEvents() as events:
        llm.generate(prompt_of(70), SamplingParams(logprobs=2, prompt_logprobs=1, seed=3), use_tqdm=False)
    assert events.seen == []


def test_late_compile_is_noticed(decoder: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    program = decoder.runner.stages[0].programs[4]

    def compiling(*args):
        jax.jit(lambda x: x * 3 + 1)(jnp.zeros(3))
        return program(*args)

    monkeypatch.setattr(decoder.runner, "num_late_compiles", 0)
    monkeypatch.setitem(decoder.runner.stages[0].programs, 4, compiling)
    with CompileEvents() as events, caplog.at_level(logging.ERROR):
        decoder.bench(overlap=False).run([(prompt_of(3), greedy(max_tokens=1))])
    assert events.seen
    assert decoder.llm.num_late_compiles >= 1
    assert "bucket 4 compiled a program after warm-up" in caplog.text


def test_start_up_is_told(decoder: Served):
    start_up = decoder.llm.start_up
    assert start_up.num_programs == len(decoder.config.buckets) + 1  # one recalls history for cached prefixes
    assert start_up.compile_s > 0
    assert f"{start_up.num_programs} programs" in repr(decoder.llm)


@pytest.mark.parametrize(
    "served",
    ["decoder", pytest.param("windowed", marks=pytest.mark.slow), pytest.param("falcon", marks=pytest.mark.slow)],
)
def test_step_updates_the_cache_in_place(served: str, request: pytest.FixtureRequest):
    """The compiler promises to alias cache and history, and keeps no second cache among its temporaries."""
    model: Served = request.getfixturevalue(served)
    cache_bytes = NUM_BLOCKS * block_bytes(model.model, model.config.block_size, model.config.dtype)
    for bucket in model.config.buckets:
        memory = model.runner.stages[0].programs[bucket].memory_analysis()
        assert memory.alias_size_in_bytes >= cache_bytes + model.runner.stages[0].history.nbytes
        assert memory.temp_size_in_bytes < cache_bytes / 4, bucket


def test_cache_stays_where_it_is(decoder: Served):
    """The buffers themselves: the same memory before and after many steps."""

    def addresses():
        stage = decoder.runner.stages[0]
        arrays = [*jax.tree.leaves(stage.cache), stage.history]
        return [array.unsafe_buffer_pointer() for array in arrays]

    before = addresses()
    decoder.bench().run([(prompt_of(40), greedy(max_tokens=5))])
    assert addresses() == before


def test_a_counter_leaves_nothing_behind():
    counter = CompileCounter()
    jax.jit(lambda x: x * 5 - 2)(jnp.zeros(4))
    assert counter.count >= 1
    watched = weakref.ref(counter)
    del counter
    gc.collect()
    assert watched() is None
