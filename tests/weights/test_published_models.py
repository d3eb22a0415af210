"""Every published size in configs/models: its real tensor names and shapes map completely, without any memory.

The expected lists are written here from the published naming conventions, one generator a family, and share nothing
with `sarathi_jax.weights.mapping`.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from sarathi_jax.config import ConfigError
from sarathi_jax.weights.directory import load_model_yaml
from sarathi_jax.weights.mapping import hf_tensors, is_tolerated, num_parameters, parameter_sources

MODELS = Path(__file__).parents[2] / "configs" / "models"

# name: parameters, counted once where head and embedding are tied; Falcon's published figures count the head too.
PUBLISHED_COUNTS = {
    "mistral-7b": 7_241_732_096,
    "yi-34b": 34_388_917_248,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "falcon-7b": 7_217_189_760,
    "falcon-40b": 41_835_970_560,
    "falcon-180b": 179_522_565_120,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 751_632_384,
    "qwen3-1.7b": 2_031_739_904,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}
# Tied models whose published files hold a copy of the embedding as lm_head.weight.
STORES_TIED_HEAD = {"falcon-7b", "falcon-40b", "falcon-180b", "qwen3-0.6b", "qwen3-1.7b"}


def llama_like(hf, *, qkv_bias=False, head_norms=False):
    hidden, inner, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim", hidden // heads)
    queries, keys = heads * head_dim, hf["num_key_value_heads"] * head_dim
    tensors = {"model.embed_tokens.weight": (hf["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for n in range(hf["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if qkv_bias:
            layer |= {f"self_attn.{p}_proj.bias": (size,) for p, size in (("q", queries), ("k", keys), ("v", keys))}
        if head_norms:
            layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        tensors |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return tensors


def falcon(hf):
    hidden = hf["hidden_size"]
    head_dim = hidden // hf["num_attention_heads"]
    kv_heads = hf["num_kv_heads"] if hf["new_decoder_architecture"] else 1
    norms = ["ln_attn", "ln_mlp"] if hf["new_decoder_architecture"] else ["input_layernorm"]
    tensors = {"transformer.word_embeddings.weight": (hf["vocab_size"], hidden)}
    tensors |= {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}
    for n in range(hf["num_hidden_layers"]):
        layer = {
            "self_attention.query_key_value.weight": (hidden + 2 * kv_heads * head_dim, hidden),
            "self_attention.dense.weight": (hidden, hidden),
            "mlp.dense_h_to_4h.weight": (4 * hidden, hidden),
            "mlp.dense_4h_to_h.weight": (hidden, 4 * hidden),
        }
        layer |= {f"{norm}.{leaf}": (hidden,) for norm in norms for leaf in ("weight", "bias")}
        tensors |= {f"transformer.h.{n}.{name}": shape for name, shape in layer.items()}
    return tensors


OF_NOBODY = {"llama-200m"}  # random weights of this shape are measured


def published_tensors(name):
    hf = yaml.safe_load((MODELS / f"{name}.yaml").read_text())["config"]
    family = hf["architectures"][0]
    if family == "FalconForCausalLM":
        tensors = falcon(hf)
    else:
        tensors = llama_like(hf, qkv_bias=family == "Qwen2ForCausalLM", head_norms=family == "Qwen3ForCausalLM")
    if not hf.get("tie_word_embeddings", family == "FalconForCausalLM") or name in STORES_TIED_HEAD:
        tensors["lm_head.weight"] = (hf["vocab_size"], hf["hidden_size"])
    return tensors


def test_every_yaml_is_listed():
    assert {path.stem for path in MODELS.glob("*.yaml")} == PUBLISHED_COUNTS.keys() | OF_NOBODY


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_published_tensors_map_completely(name):
    config = load_model_yaml(MODELS / f"{name}.yaml")
    published, needed = published_tensors(name), hf_tensors(config)
    assert not needed.keys() - published.keys(), "missing"
    unused = {tensor for tensor in published if tensor not in needed and not is_tolerated(tensor, config)}
    assert not unused
    assert needed == {tensor: published[tensor] for tensor in needed}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_parameter_counts(name):
    assert sum(map(math.prod, published_tensors(name).values())) == PUBLISHED_COUNTS[name]
    config = load_model_yaml(MODELS / f"{name}.yaml")
    stored_twice = config.vocab_size * config.hidden_size if name in STORES_TIED_HEAD else 0
    assert num_parameters(config) + stored_twice == PUBLISHED_COUNTS[name]


@pytest.mark.parametrize("name", ["mistral-7b", "falcon-7b", "falcon-40b", "qwen2.5-7b", "qwen3-8b"])
def test_parts_tile_each_parameter(name):
    """Shapes only: a zero-strided array has the real shape and no memory."""
    for source in parameter_sources(load_model_yaml(MODELS / f"{name}.yaml")):
        whole = np.broadcast_to(np.int8(0), source.shape)
        regions = [part.region(whole) for part in source.parts]
        assert [region.size for region in regions] == [math.prod(part.tensor_shape) for part in source.parts]
        assert sum(region.size for region in regions) == source.size


def test_every_shape_is_positive_and_paths_are_unique():
    for path in MODELS.glob("*.yaml"):
        sources = parameter_sources(load_model_yaml(path))
        assert len({source.path for source in sources}) == len(sources)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: a\nconfig: {}\nextra: 1\n", "exactly the keys source and config.*extra"),
        ("source: a\n", "exactly the keys"),
        ("[1, 2", "not valid YAML"),
        ("source: a\nconfig: 3\n", "config must hold"),
        ("source: a\nconfig: {architectures: [Gpt]}\n", "'Gpt' is not supported"),
    ],
)
def test_malformed_yaml(tmp_path, text, message):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_model_yaml(path)


def test_tolerated_tensors_are_few():
    config = load_model_yaml(MODELS / "llama2-7b.yaml")
    assert is_tolerated("model.layers.3.self_attn.rotary_emb.inv_freq", config)
    assert not is_tolerated("model.layers.3.self_attn.rotary_emb.inv_freq.extra", config)
    assert not is_tolerated("model.layers.3.self_attn.q_proj.bias", config)
    assert not is_tolerated("lm_head.weight", config)  # not tied: needed, so never tolerated as an extra
