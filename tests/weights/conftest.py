"""Small configurations of every layout, and random checkpoints written by the safetensors library itself."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sarathi_jax.weights.hf_config import model_config_from_hf
from sarathi_jax.weights.mapping import hf_tensors

_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FALCON = {
    "architectures": ["FalconForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"], **_SMALL},
    "llama-biased": {"architectures": ["LlamaForCausalLM"], **_SMALL, "attention_bias": True, "mlp_bias": True},
    "mistral": {"architectures": ["MistralForCausalLM"], **_SMALL, "sliding_window": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], **_SMALL, "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], **_SMALL, "head_dim": 16},
    "falcon-mqa": {**_FALCON, "multi_query": True},
    "falcon-mha": {**_FALCON, "multi_query": False, "bias": True},
    "falcon-gqa": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
}


class Checkpoint:
    """A Hugging Face directory of random numbers, and what lies in it."""

    def __init__(self, directory, fields, dtype=np.float32):
        self.directory = directory
        self.fields = {**fields, "transformers_version": "4.46.0"}
        self.config = model_config_from_hf(fields)
        rng = np.random.default_rng(0)
        self.tensors = {
            name: rng.standard_normal(shape, np.float32).astype(dtype)
            for name, shape in hf_tensors(self.config).items()
        }
        directory.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self):
        (self.directory / "config.json").write_text(json.dumps(self.fields))
        save_file(self.tensors, self.directory / "model.safetensors")

    def write_sharded(self, num_shards=3):
        (self.directory / "model.safetensors").unlink(missing_ok=True)
        weight_map = {}
        for number in range(num_shards):
            file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
            names = list(self.tensors)[number::num_shards]
            save_file({name: self.tensors[name] for name in names}, self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        (self.directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return weight_map


@pytest.fixture
def make_checkpoint(tmp_path):
    def make(family="llama", dtype=np.float32):
        return Checkpoint(tmp_path / family, FAMILIES[family], dtype)

    return make


BFLOAT16 = ml_dtypes.bfloat16
