"""config.json -> ModelConfig: what is honoured, what is refused, and the way back."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarathi_jax.config import ConfigError, ModelConfig, RopeConfig
from sarathi_jax.weights.hf_config import model_config_from_hf, model_config_to_hf

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
LLAMA = {"architectures": ["LlamaForCausalLM"], **SMALL}
MISTRAL = {"architectures": ["MistralForCausalLM"], **SMALL}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], **SMALL}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], **SMALL, "head_dim": 16}
FALCON = {
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def read(base, **changes):
    return model_config_from_hf({**base, **changes})


def without(base, *keys):
    return {key: value for key, value in base.items() if key not in keys}


def test_llama_defaults():
    config = model_config_from_hf(without(LLAMA, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"))
    assert (config.num_kv_heads, config.head_dim, config.max_position, config.norm_eps) == (4, 8, 2048, 1e-6)
    assert (config.rope, config.windows, config.tie_embeddings) == (RopeConfig(), (None,) * 4, False)
    assert read(LLAMA, head_dim=16).head_dim == 16
    assert read(LLAMA, num_key_value_heads=None).num_kv_heads == 4


def test_biases_and_norms_of_each_family():
    flags = {
        name: (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm)
        for name, config in {
            "llama": read(LLAMA),
            "llama-biased": read(LLAMA, attention_bias=True, mlp_bias=True),
            "mistral": read(MISTRAL),
            "qwen2": read(QWEN2),
            "qwen3": read(QWEN3),
            "qwen3-biased": read(QWEN3, attention_bias=True),
        }.items()
    }
    assert flags == {
        "llama": (False, False, False, False),
        "llama-biased": (True, True, True, False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (False, False, False, True),
        "qwen3-biased": (True, True, False, True),
    }


def test_model_type_stands_in_for_architectures():
    assert model_config_from_hf({**without(QWEN2, "architectures"), "model_type": "qwen2"}).qkv_bias


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (MISTRAL, (4096,) * 4),
        ({**MISTRAL, "sliding_window": 16}, (16,) * 4),
        ({**MISTRAL, "sliding_window": None}, (None,) * 4),
        ({**QWEN2, "sliding_window": 16}, (None,) * 4),
        ({**QWEN2, "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 16)),
        ({**QWEN2, "sliding_window": 16, "use_sliding_window": True}, (None,) * 4),
        (
            {
                **QWEN3,
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows(fields, windows):
    assert model_config_from_hf(fields).windows == windows


LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("scaling", "rope"),
    [
        (None, RopeConfig(theta=5e5)),
        ({"rope_type": "default"}, RopeConfig(theta=5e5)),
        ({"type": "linear", "factor": 2.0}, RopeConfig(theta=5e5, scaling="linear", factor=2.0)),
        (
            {"rope_type": "llama3", **LLAMA3_ROPE},
            RopeConfig(5e5, "llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
        ({"type": "yarn", "factor": 4.0}, RopeConfig(5e5, "yarn", 4.0, 64)),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False, "beta_fast": 16},
            RopeConfig(5e5, "yarn", 4.0, 32, beta_fast=16.0, truncate=False),
        ),
        (
            {"type": "yarn", "factor": 4.0, "attention_factor": 1.5},
            RopeConfig(5e5, "yarn", 4.0, 64, attention_factor=1.5),
        ),
        (
            {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            RopeConfig(5e5, "yarn", 4.0, 64, attention_factor=1.0),
        ),
    ],
)
def test_both_spellings_of_rope(scaling, rope):
    assert read(LLAMA, rope_theta=5e5, rope_scaling=scaling).rope == rope
    assert (
        read(
            LLAMA,
            rope_parameters={"rope_theta": 5e5, "rope_type": "default", **(scaling or {})}
            if not (scaling and "type" in scaling)
            else {"rope_theta": 5e5, "rope_type": scaling["type"], **scaling},
        ).rope
        == rope
    )


def test_yarn_stretches_the_context():
    assert read(LLAMA, rope_scaling={"type": "yarn", "factor": 4.0}).max_position == 256
    extended = read(LLAMA, rope_scaling={"type": "yarn", "original_max_position_embeddings": 16})
    assert (extended.rope.factor, extended.max_position) == (4.0, 64)


def test_eos_of_both_files():
    assert read(LLAMA).eos_token_ids == ()
    assert read(LLAMA, eos_token_id=2, bos_token_id=1).eos_token_ids == (2,)
    assert model_config_from_hf({**LLAMA, "eos_token_id": [5, 2]}, {"eos_token_id": [2, 7]}).eos_token_ids == (5, 2, 7)


def test_falcon_layouts():
    old = read(FALCON, multi_query=True, num_kv_heads=4)
    assert (old.num_kv_heads, old.num_parallel_norms, old.tie_embeddings, old.intermediate_size) == (1, 1, True, 128)
    heads = read(FALCON, multi_query=False, bias=True)
    assert (heads.num_kv_heads, heads.qkv_bias, heads.out_bias, heads.mlp_bias) == (4, True, True, True)
    new = read(FALCON, new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=96)
    assert (new.num_kv_heads, new.num_parallel_norms, new.intermediate_size) == (2, 2, 96)
    assert (
        read(FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1).num_parallel_norms == 1
    )


def test_falcon_first_releases():
    names = {"hidden_size": 32, "vocab_size": 96, "n_layer": 2, "n_head": 4}
    small = model_config_from_hf({"model_type": "RefinedWebModel", "multi_query": True, **names})
    assert (small.num_layers, small.num_kv_heads, small.num_parallel_norms) == (2, 1, 1)
    large = model_config_from_hf(
        {"architectures": ["RWForCausalLM"], "model_type": "RefinedWeb", "n_head_kv": 2, **names}
    )
    assert (large.num_kv_heads, large.num_parallel_norms) == (2, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**LLAMA, "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        (without(LLAMA, "architectures"), "names no architecture"),
        (without(LLAMA, "hidden_size"), "lacks the field 'hidden_size'"),
        ({**LLAMA, "hidden_size": "32"}, "hidden_size='32' must be a positive integer"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers=True"),
        ({**LLAMA, "hidden_size": 34, "num_attention_heads": 4}, "not a multiple"),
        ({**LLAMA, "num_key_value_heads": 3}, "not a multiple of num_kv_heads"),
        ({**LLAMA, "head_dim": 7}, "must be even"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({**LLAMA, "sliding_window": 16}, "sliding_window"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**LLAMA, "attention_bias": "yes"}, "attention_bias='yes'"),
        ({**LLAMA, "eos_token_id": "</s>"}, "eos_token_id"),
        ({**LLAMA, "bos_token_id": -1}, "bos_token_id"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({**LLAMA, "rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_embeddings"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": -1}}, "factor=-1"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0, "magic": 1}}, "magic"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set for all layers"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias=True"),
        ({**QWEN2, "mlp_bias": True}, "mlp_bias=True"),
        ({**QWEN2, "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        ({**FALCON, "parallel_attn": False}, "parallel_attn=false"),
        ({**FALCON, "alibi": True}, "alibi=true"),
        ({**FALCON, "activation": "relu"}, "activation='relu'"),
        ({**FALCON, "num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ({**FALCON, "multi_query": False, "num_kv_heads": 2}, "needs new_decoder_architecture"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        model_config_from_hf(fields)


def test_unknown_fields_are_named_in_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        read(LLAMA, use_cache=True, transformers_version="5.0", dtype="bfloat16")
        assert not caplog.records
        read(LLAMA, logit_softcap=30.0)
    assert "logit_softcap=30.0" in caplog.text


@pytest.mark.parametrize("fields", [LLAMA, MISTRAL, QWEN2, QWEN3, FALCON, {**LLAMA, "attention_bias": True}])
def test_round_trip_of_each_family(fields):
    config = read(fields, bos_token_id=1, eos_token_id=[2, 3])
    assert model_config_from_hf(model_config_to_hf(config)) == config


rope_scalings = st.sampled_from(
    [
        None,
        {"type": "linear", "factor": 2.0},
        {"rope_type": "llama3", **LLAMA3_ROPE},
        {"type": "yarn", "factor": 4.0},
        {"type": "yarn", "factor": 4.0, "attention_factor": 1.5, "truncate": False},
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    base=st.sampled_from([LLAMA, MISTRAL, QWEN2, QWEN3]),
    rope_scaling=rope_scalings,
    tied=st.booleans(),
    window=st.sampled_from([None, 16]),
    first=st.integers(0, 4),
    eos=st.lists(st.integers(0, 95), max_size=3, unique=True),
)
def test_round_trip(base, rope_scaling, tied, window, first, eos):
    fields = {**base, "rope_scaling": rope_scaling, "tie_word_embeddings": tied, "eos_token_id": eos}
    if base is not LLAMA:
        fields |= {"sliding_window": window, "use_sliding_window": window is not None, "max_window_layers": first}
    config = model_config_from_hf(fields)
    assert model_config_from_hf(model_config_to_hf(config)) == config


def test_a_combination_nobody_published_cannot_be_written():
    config = read(LLAMA)
    odd = ModelConfig(**{**vars(config), "qk_norm": True, "mlp_bias": True})
    with pytest.raises(ConfigError, match="no published architecture"):
        model_config_to_hf(odd)
