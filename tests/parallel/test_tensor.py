"""Tensor parallelism on virtual devices: the tokens of one device, and where the parts of the model are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax.config import QUANTIZATIONS, ConfigError
from sarathi_jax.models import ModelFunction
from sarathi_jax.parallel import TensorSplit
from sarathi_jax.weights.directory import load_model_config
from tests.engine.serving import Parity, build, greedy, prompt_of
from tests.parallel.asks import ASKS, MODELS
from tests.tiny_models import write_tiny_model

NAMES = [name for name in MODELS if name != "qwen2-yarn-mixed"]
QUICK = "falcon-40b"
LONG = pytest.mark.parallel


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("name", [n if n == QUICK else pytest.param(n, marks=LONG) for n in NAMES])
def test_same_tokens(whole, tmp_path, name: str, tp: int):
    """Through the whole engine, chunked, and with too few blocks for all."""
    split, parity = build(name, tmp_path, changes=MODELS[name], tp=tp), Parity()
    outputs = split.bench(num_blocks=12).run(ASKS)
    assert sum(output.metrics.num_preemptions for output in outputs) >= 1
    parity.check(outputs, whole(name, MODELS[name]).alone(ASKS))
    assert parity.num_excused <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon-7b", pytest.param("mistral", marks=LONG)])
def test_devices_hold_their_parts(tmp_path, name: str):
    """Weights of layers and cache: what the split says, KV heads that are repeated counted."""
    served = build(name, tmp_path, changes=MODELS[name], tp=4)
    split, stage = TensorSplit(served.model, 4), served.runner.stages[0]
    local = ModelFunction(split.local, jnp.float32).shapes
    for path, array in zip(stage.parameter_names, stage.params, strict=True):
        assert {shard.data.shape for shard in array.addressable_shards} == {local[path].shape}, path
        assert len(array.addressable_shards) == 4
    for array in jax.tree.leaves(stage.cache):
        kv_heads = split.local.num_kv_heads
        assert {shard.data.shape[1] for shard in array.addressable_shards} == {kv_heads}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sums"), [("falcon-40b", 1), pytest.param("llama-bias", 2, marks=LONG)])
def test_collectives(tmp_path, name: str, sums: int):
    """One sum a pair of products and one for the embedding; gathered are logits and candidates alone."""
    served = build(name, tmp_path, changes=MODELS[name], tp=2)
    for program in served.runner.stages[0].programs.values():
        text = program.as_text()
        num_sums = len(re.findall(r" all-reduce(?:-start)?\(", text))
        assert num_sums == sums * served.model.num_layers + 1
        gathered = [line for line in text.splitlines() if re.search(r" all-gather(?:-start)?\(", line)]
        assert all("gather_logits" in line or "gather_candidates" in line for line in gathered), gathered
        assert not re.search(r" (all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [321, 323])
def test_any_vocabulary(tmp_path, vocab_size: int):
    changes = MODELS["falcon-40b"] | {"vocab_size": vocab_size}
    one, two = (build("falcon-40b", tmp_path / str(tp), changes=changes, tp=tp) for tp in (1, 2))
    parity = Parity()
    parity.check(two.bench().run(ASKS), one.alone(ASKS))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_with_8_bit_weights(tmp_path, quantization: str):
    """Every device rounds its own part of the activations, so log-probabilities agree to that rounding alone."""
    settings = {"changes": MODELS["falcon-7b"], "quantization": quantization}
    one, two = (build("falcon-7b", tmp_path / str(tp), tp=tp, **settings) for tp in (1, 2))
    asks = [(prompt_of(40), greedy(max_tokens=1, prompt_logprobs=0))]
    (ours,), (theirs,) = two.bench().run(asks), one.alone(asks)
    pairs = zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], ours.prompt_token_ids[1:], strict=True)
    differences = [abs(a[token].logprob - b[token].logprob) for a, b, token in pairs]
    assert 0 < max(differences) < 0.1


@pytest.mark.parametrize(
    ("name", "changes", "tp", "message"),
    [
        ("yi", {}, 2, r"tp=2: 7 query heads cannot be split evenly; tp may be 1, 7"),
        ("llama3.1", {"num_attention_heads": 12, "hidden_size": 192, "num_key_value_heads": 6}, 4, "tp may be 1, 2"),
        ("llama3.1", {"intermediate_size": 111}, 2, "111 inner units"),
        ("llama3.1", {}, 0, "tp=0 must be a positive integer"),
        (
            "falcon-40b",
            {"num_attention_heads": 32},
            16,
            r"tp=16 x pp=1 need 16 devices, there are 8 .*this model can have tp=4 pp=2 or tp=8 pp=1; JAX_NUM",
        ),
    ],
)
def test_impossible_split(tmp_path, name, changes, tp, message):
    with pytest.raises(ConfigError, match=message):
        build(name, tmp_path, changes=changes, tp=tp)


def test_widened_weights_compute_the_same(tmp_path):
    """Every group's queries stay with their keys: checked by name of head."""
    write_tiny_model("llama2-gqa", tmp_path)
    model = load_model_config(tmp_path)
    split = TensorSplit(model, 4)
    assert (model.num_heads, model.num_kv_heads, split.kv_copies) == (8, 2, 2)
    names = np.array([[f"q{4 * g + r}" for r in range(4)] + [f"k{g}", f"v{g}"] for g in range(2)])
    widened = split.widen("layers.0.attn.qkv.bias", names[:, :, None])[..., 0]
    assert widened.tolist() == [
        ["q0", "q1", "k0", "v0"],
        ["q2", "q3", "k0", "v0"],
        ["q4", "q5", "k1", "v1"],
        ["q6", "q7", "k1", "v1"],
    ]
