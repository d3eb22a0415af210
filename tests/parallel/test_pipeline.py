"""Pipelines on virtual devices: the tokens of one device, what is in flight, and where the parts of the model are."""

import itertools
import re

import jax
import pytest

import sarathi_jax.runner as runner_module
from sarathi_jax.config import ConfigError, EngineConfig
from sarathi_jax.parallel import split_layers
from sarathi_jax.parallel.transfer import put_everywhere
from sarathi_jax.resources import config_path
from sarathi_jax.weights.directory import load_model_yaml
from tests.engine.serving import Parity, Watched, build, greedy, prompt_of
from tests.parallel.asks import ASKS, MODELS

NAMES = ("mistral", "llama3.1", "qwen2-yarn-mixed", "falcon-7b", "falcon-40b")
SPLITS = ((1, 2), (1, 4), (2, 2), (4, 2), (2, 4))
CASES = [(name, tp, pp) for name in NAMES for tp, pp in SPLITS]
QUICK = [("falcon-40b", 1, 4)]
LONG = pytest.mark.parallel

UNEVEN = {"num_hidden_layers": 5}
EVEN = {"num_hidden_layers": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "pp"), [c if c in QUICK else pytest.param(*c, marks=LONG) for c in CASES])
def test_same_tokens(whole, tmp_path, name: str, tp: int, pp: int):
    """Through the whole engine, chunked, with too few blocks for all, overlapped and not; five layers."""
    piped = build(name, tmp_path, changes=MODELS[name] | UNEVEN, tp=tp, pp=pp)
    expected, parity = whole(name, MODELS[name] | UNEVEN).alone(ASKS), Parity()
    for overlap in (True, False):
        outputs = piped.bench(num_blocks=12, overlap=overlap).run(ASKS)
        assert sum(output.metrics.num_preemptions for output in outputs) >= 1
        parity.check(outputs, expected)
    assert parity.num_excused <= 2
    assert piped.llm.num_late_compiles == 0


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=LONG)])
def test_as_many_micro_batches_in_flight_as_stages(tmp_path, overlap: bool):
    """All of them of one bucket while the load is steady, none with a sequence whose token is still on its way."""
    piped = build("falcon-40b", tmp_path, changes=EVEN, pp=4)
    bench = piped.bench(overlap=overlap)
    in_flight, seen = [], []
    watched: Watched = bench.engine._executor

    def launch(plan, inner=watched.launch):
        drew = {chunk.seq_id for other, _ in in_flight[-3:] if other for chunk in other.chunks if chunk.samples}
        assert plan is None or drew.isdisjoint(chunk.seq_id for chunk in plan.chunks)
        handle = inner(plan)
        in_flight.append((plan, handle))
        return handle

    def collect(handle, inner=watched.collect):
        while in_flight[0][1] is not handle:
            in_flight.pop(0)
        seen.append([plan.bucket for plan, _ in in_flight[:4] if plan is not None])
        in_flight.pop(0)
        return inner(handle)

    watched.launch, watched.collect = launch, collect
    bench.run([(prompt_of(4, i), greedy(max_tokens=30, logprobs=None)) for i in range(8)])
    full = [buckets for buckets in seen if len(buckets) == 4]
    assert len(full) > len(seen) / 2
    assert sum(len(set(buckets)) == 1 for buckets in full) > 0.9 * len(full)


@pytest.mark.slow
@pytest.mark.parallel
def test_nothing_passes_through_the_host(tmp_path, monkeypatch):
    """Between stages: what the host sends are packed plans and sampling parameters, each to the stages that read it."""
    piped = build("falcon-40b", tmp_path, changes=EVEN, tp=2, pp=2)
    sent = []

    def recording(values, sharding):
        sent.append(values)
        return put_everywhere(values, sharding)

    monkeypatch.setattr(runner_module, "put_everywhere", recording)
    with jax.transfer_guard_device_to_device("disallow_explicit"), jax.transfer_guard_host_to_device("disallow"):
        piped.bench().run(ASKS)
    sizes = {layout.size for layout in piped.runner.layouts.values()}
    assert len(sent) > 40
    for values in sent:
        is_plan = values.dtype == "int32" and values.ndim == 1 and values.size in sizes
        assert is_plan or values.shape[0] == piped.config.max_running, values.shape


@pytest.mark.slow
@pytest.mark.parallel
def test_aborts_harm_nobody(whole, tmp_path):
    """At every moment of the run one request is taken back; the others draw what they would alone."""
    changes = MODELS["qwen2-yarn-mixed"] | UNEVEN
    piped, expected = build("qwen2-yarn-mixed", tmp_path, changes=changes, pp=4), whole("qwen2-yarn-mixed", changes)
    reference, parity = expected.alone(ASKS), Parity()
    for moment in range(12):
        bench = piped.bench(num_blocks=24)
        for i, (prompt, params) in enumerate(ASKS):
            bench.engine.add_request(str(i), prompt, params)
        finished = {}
        for _ in range(3 * moment + 1):
            finished |= {output.request_id: output for output in bench.step() if output.finished}
        victim = str(moment % len(ASKS))
        bench.engine.abort(victim)
        finished |= bench.drain()
        others = [i for i in range(len(ASKS)) if str(i) != victim]
        parity.check([finished[str(i)] for i in others], [reference[i] for i in others])
    assert parity.num_excused <= 12


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 4), pytest.param(2, 2, marks=LONG)])
def test_stages_hold_their_parts(tmp_path, tp: int, pp: int):
    """Layer weights and cache of a device: those of all, divided by tp times pp."""
    piped = build("llama3.1", tmp_path, changes=MODELS["llama3.1"] | EVEN, tp=tp, pp=pp)
    one = build("llama3.1", tmp_path / "one", changes=MODELS["llama3.1"] | EVEN)
    names = [set(stage.parameter_names) for stage in piped.runner.stages.values()]
    (every,) = (set(stage.parameter_names) for stage in one.runner.stages.values())
    assert set.union(*names) == every
    assert sum(map(len, names)) == len(every)
    assert "embed.weight" in names[0]
    assert {"norm.weight", "head.weight"} <= names[-1]
    expected = sum(_device_bytes(one.runner.stages[0], "layers.").values()) / (tp * pp)
    for stage in piped.runner.stages.values():
        each = _device_bytes(stage, "layers.")
        assert len(each) == tp
        assert all(abs(held - expected) <= 0.02 * expected for held in each.values())


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize(("name", "sums"), [("falcon-40b", 1), ("llama-bias", 2)])
def test_collectives(tmp_path, name: str, sums: int):
    """A stage gathers the rows that arrive; between stages every number goes once; nothing passes through the host."""
    piped = build(name, tmp_path, changes=MODELS[name] | EVEN, tp=2, pp=2)
    for index, stage in piped.runner.stages.items():
        for program in stage.programs.values():
            text = program.as_text()
            assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == sums * 2 + (index == 0)
            gathered = [line for line in text.splitlines() if re.search(r" all-gather(?:-start)?\(", line)]
            scopes = ("gather_hidden",) if index == 0 else ("gather_hidden", "gather_logits", "gather_candidates")
            assert all(any(scope in line for scope in scopes) for line in gathered), gathered
            assert not re.search(r" (infeed|outfeed|send|recv|all-to-all|collective-permute)(?:-start)?\(", text)
    for (_, bucket), transfer in piped.runner._transfers.items():
        text = transfer.program.as_text()
        assert len(re.findall(r" collective-permute(?:-start)?\(", text)) == 1
        assert re.search(rf"f32\[{bucket * piped.model.hidden_size // 2}\]\S* collective-permute", text)


@pytest.mark.slow
@pytest.mark.parallel
def test_replicas_share_the_requests(whole, tmp_path):
    """dp: two pipelines of two stages, each with weights and blocks of its own."""
    both = build("falcon-40b", tmp_path, changes=UNEVEN, pp=2, dp=2).llm
    prompts, params = [list(prompt) for prompt, _ in ASKS], [params for _, params in ASKS]
    outputs = both.generate(prompts, params, use_tqdm=False)
    Parity().check(outputs, whole("falcon-40b", UNEVEN).alone(ASKS))
    devices = [
        {device for stage in replica.runner.stages.values() for device in stage.everywhere.device_set}
        for replica in both._loaded.replicas
    ]
    assert [len(each) for each in devices] == [2, 2]
    assert devices[0].isdisjoint(devices[1])
    assert all(replica.engine._num_sequences for replica in both._loaded.replicas)


@pytest.mark.parametrize(
    ("name", "pp", "sizes"),
    [
        ("llama2-70b", 2, [40, 40]),
        ("falcon-180b", 4, [20, 20, 20, 20]),
        # A head of 152 k tokens weighs as much as nine of its layers.
        ("qwen2.5-0.5b", 2, [17, 7]),
        ("mistral-7b", 3, [11, 11, 10]),
    ],
)
def test_balanced_by_cost(name: str, pp: int, sizes: list[int]):
    stages = split_layers(load_model_yaml(config_path("models", name)), EngineConfig(pp=pp))
    assert [len(stage.layers) for stage in stages] == sizes
    assert stages[0].layers.start == 0
    assert all(a.layers.stop == b.layers.start for a, b in itertools.pairwise(stages))


def test_stages_by_hand(tmp_path):
    model = load_model_yaml(config_path("models", "mistral-7b"))
    assert [s.layers for s in split_layers(model, EngineConfig(pp=2, pp_layers=(20, 12)))] == [
        range(20),
        range(20, 32),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp": 3}, "pp=3: the model's 2 layers make at most 2 stages"),
        ({"pp": 2, "pp_layers": (2, 1)}, r"pp_layers=2,1 must be 2 numbers \(pp\) that add up to .* 2 layers.*1,1"),
        ({"pp": 2, "pp_layers": (2, 0)}, r"must be positive integers"),
        ({"pp": 0}, "pp=0 must be a positive integer"),
        (
            {"pp": 2, "tp": 8},
            r"tp=8 x pp=2 need 16 .*there are 8 .*tp=4 pp=2 or tp=8 pp=1; JAX_NUM_CPU_DEVICES=16",
        ),
        ({"dp": 9}, "dp=9 replicas need as many devices, there are 8: lower dp"),
        ({"dp": 3, "tp": 4}, "tp=4 x pp=1 need 4 devices for each of dp=3 replicas, there are 2 each"),
    ],
)
def test_impossible_mesh(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        build("falcon-40b", tmp_path, **settings)


def _device_bytes(stage, prefix: str) -> dict:
    """Bytes of the parameters of that name and of the cache, on each device."""
    held: dict = {}
    named = [a for name, a in zip(stage.parameter_names, stage.params, strict=True) if name.startswith(prefix)]
    for array in [*named, *jax.tree.leaves(stage.cache)]:
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held
