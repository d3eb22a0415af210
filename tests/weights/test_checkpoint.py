"""Loading and saving: right numbers from every format, and a clear error for everything that can be wrong."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from sarathi_jax.config import ConfigError
from sarathi_jax.weights import orbax, safetensors
from sarathi_jax.weights.checkpoint import load_parameters, random_parameters, save_hf, save_orbax, stored_dtype
from sarathi_jax.weights.directory import load_model_config
from sarathi_jax.weights.mapping import parameter_shapes
from sarathi_jax.weights.safetensors import WeightsError, pieces
from tests.weights.conftest import BFLOAT16, FAMILIES


def load(directory, dtype="float32"):
    return load_parameters(directory, load_model_config(directory), dtype, progress=False)


def equal(left, right):
    return left.keys() == right.keys() and all(
        left[path].dtype == right[path].dtype and np.array_equal(left[path], right[path]) for path in left
    )


def test_decoder_layout_by_hand(make_checkpoint):
    """4 heads of 8 in 2 groups: which row of which published matrix lies where."""
    checkpoint = make_checkpoint("qwen2")
    params, files = load(checkpoint.directory), checkpoint.tensors
    qkv, bias = np.asarray(params["layers.1.attn.qkv.weight"]), np.asarray(params["layers.1.attn.qkv.bias"])
    assert qkv.shape == (2, 4, 8, 32)
    prefix = "model.layers.1.self_attn"
    for head in range(4):
        group, within = divmod(head, 2)
        rows = slice(8 * head, 8 * head + 8)
        np.testing.assert_array_equal(qkv[group, within], files[f"{prefix}.q_proj.weight"][rows])
        np.testing.assert_array_equal(bias[group, within], files[f"{prefix}.q_proj.bias"][rows])
    for group in range(2):
        rows = slice(8 * group, 8 * group + 8)
        np.testing.assert_array_equal(qkv[group, 2], files[f"{prefix}.k_proj.weight"][rows])
        np.testing.assert_array_equal(qkv[group, 3], files[f"{prefix}.v_proj.weight"][rows])
        np.testing.assert_array_equal(bias[group, 3], files[f"{prefix}.v_proj.bias"][rows])
    np.testing.assert_array_equal(
        params["layers.0.mlp.gate_up.weight"][0], files["model.layers.0.mlp.gate_proj.weight"]
    )
    np.testing.assert_array_equal(params["layers.0.mlp.gate_up.weight"][1], files["model.layers.0.mlp.up_proj.weight"])
    assert "head.weight" not in params


def test_falcon_layouts_by_hand(make_checkpoint):
    """Multi-query: all query heads, then the one key and value head; grouped: so for each group."""
    for family, groups in (("falcon-mqa", 1), ("falcon-gqa", 2), ("falcon-mha", 4)):
        checkpoint = make_checkpoint(family)
        fused = checkpoint.tensors["transformer.h.0.self_attention.query_key_value.weight"]
        qkv = load(checkpoint.directory)["layers.0.attn.qkv.weight"]
        assert qkv.shape == (groups, 4 // groups + 2, 8, 32)
        np.testing.assert_array_equal(qkv.reshape(-1, 32), fused)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips(make_checkpoint, family, tmp_path):
    checkpoint = make_checkpoint(family)
    params = load(checkpoint.directory)
    assert {path: array.shape for path, array in params.items()} == parameter_shapes(checkpoint.config)
    save_hf(tmp_path / "hf", checkpoint.config, params, progress=False)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert equal(written, checkpoint.tensors)
    assert load_model_config(tmp_path / "hf") == checkpoint.config
    save_orbax(tmp_path / "orbax", checkpoint.config, params)
    assert load_model_config(tmp_path / "orbax") == checkpoint.config
    assert equal(load(tmp_path / "orbax"), params)


@pytest.mark.parametrize("source", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_casts(make_checkpoint, source, dtype, tmp_path):
    checkpoint = make_checkpoint(dtype=source)
    params = load(checkpoint.directory, dtype)
    expected = checkpoint.tensors["model.norm.weight"].astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(params["norm.weight"], expected)
    assert {array.dtype for array in params.values()} == {jnp.dtype(dtype)}
    assert stored_dtype(checkpoint.directory, checkpoint.config) == ("bfloat16" if source is BFLOAT16 else "float32")
    save_orbax(tmp_path / "orbax", checkpoint.config, params)
    assert stored_dtype(tmp_path / "orbax", checkpoint.config) == dtype
    assert load(tmp_path / "orbax", "float32")["norm.weight"].dtype == jnp.float32


def test_shards(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    params = load(checkpoint.directory)
    checkpoint.write_sharded()
    assert equal(load(checkpoint.directory), params)
    save_hf(tmp_path / "many", checkpoint.config, params, shard_bytes=20_000, progress=False)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == checkpoint.tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert all(os.path.getsize(tmp_path / "many" / file) < 25_000 for file in files)
    assert equal(load(tmp_path / "many"), params)


def test_values_survive_their_buffers(make_checkpoint):
    """On CPU an array adopts the buffer it was read into, which therefore must be frozen and stay alive."""
    checkpoint = make_checkpoint()
    params = load(checkpoint.directory)
    churn = [np.full(array.size, 7.0, np.float32) for array in params.values()]
    assert len(churn) == len(params)
    np.testing.assert_array_equal(params["embed.weight"], checkpoint.tensors["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(params["embed.weight"])[0, 0] = 1.0


def test_pieces_of_a_large_tensor(make_checkpoint, monkeypatch):
    checkpoint = make_checkpoint("falcon-gqa", BFLOAT16)
    params = load(checkpoint.directory)
    monkeypatch.setattr(safetensors.pieces, "__defaults__", (100,))
    assert equal(load(checkpoint.directory), params)


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(0, 6), min_size=1, max_size=4), piece_bytes=st.integers(1, 200), part=st.booleans())
def test_pieces_cover_in_order(shape, piece_bytes, part):
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    region = array[..., : shape[-1] // 2] if part else array
    found = [piece.reshape(-1) for piece in pieces(region, piece_bytes)]
    np.testing.assert_array_equal(np.concatenate([*found, np.empty(0, np.int16)]), region.reshape(-1))
    assert all(piece.nbytes <= max(piece_bytes, 2 * shape[-1]) for piece in found)


def test_tolerated_extras(make_checkpoint):
    checkpoint = make_checkpoint("qwen2")
    params = load(checkpoint.directory)
    checkpoint.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"]
    checkpoint.write()
    assert equal(load(checkpoint.directory), params)
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["lm_head.weight"] + 1
    checkpoint.write()
    with pytest.raises(WeightsError, match=r"'lm_head.weight' differs.*tie_word_embeddings to false"):
        load(checkpoint.directory)


def test_missing_unused_and_misshapen_tensors(make_checkpoint):
    checkpoint = make_checkpoint()
    norm = checkpoint.tensors.pop("model.norm.weight")
    checkpoint.tensors["model.layers.0.surprise"] = norm
    checkpoint.write()
    with pytest.raises(
        WeightsError, match=r"missing: model\.norm\.weight; .*nothing in the model: model\.layers\.0\.sur"
    ):
        load(checkpoint.directory)
    del checkpoint.tensors["model.layers.0.surprise"]
    checkpoint.tensors["model.norm.weight"] = norm[:5]
    checkpoint.write()
    with pytest.raises(WeightsError, match=r"model\.safetensors.*'model\.norm\.weight' has shape \(5,\).*\(32,\)"):
        load(checkpoint.directory)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float64])
def test_dtypes_that_are_no_weights(make_checkpoint, dtype):
    checkpoint = make_checkpoint()
    checkpoint.tensors["model.norm.weight"] = checkpoint.tensors["model.norm.weight"].astype(dtype)
    checkpoint.write()
    with pytest.raises(WeightsError, match=r"'model\.norm\.weight' has dtype"):
        load(checkpoint.directory)


def rewrite(path, change):
    data = bytearray(path.read_bytes())
    path.write_bytes(bytes(change(data)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-7], "truncated"),
        (lambda data: data + b"\0" * 8, "corrupt"),
        (lambda data: data[:5], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: b"\xff" * 8 + data[8:], "truncated or no safetensors"),
        (lambda data: data[:8] + b"#" + data[9:], "corrupt header"),
        (lambda data: data[:8] + b"\xff" + data[9:], "corrupt header"),
        (lambda data: data.replace(b'"shape":[', b'"shape":"', 1), "corrupt header"),
        (lambda data: data.replace(b'"F32"', b'"F16"', 1), "corrupt header"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    ],
)
def test_corrupt_files(make_checkpoint, change, message):
    checkpoint = make_checkpoint()
    rewrite(checkpoint.directory / "model.safetensors", change)
    with pytest.raises(WeightsError, match=rf"model\.safetensors.*{message}"):
        load(checkpoint.directory)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_damage_to_a_header_escapes_as_another_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    path = folder / "model.safetensors"
    save_file({"a": np.ones((3, 2), np.float32), "b": np.ones(4, np.float16)}, path)
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 33))
    damaged = bytearray(whole)
    damaged[position] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(damaged))
    try:
        header = safetensors.read_header(path)
    except WeightsError:
        return
    assert max(tensor.end for tensor in header.values()) == len(whole)


def test_broken_indices(make_checkpoint):
    checkpoint = make_checkpoint()
    weight_map = checkpoint.write_sharded()
    index = checkpoint.directory / "model.safetensors.index.json"
    first = weight_map["model.norm.weight"]
    other = next(file for file in weight_map.values() if file != first)
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": other}}))
    with pytest.raises(WeightsError, match=rf"index.json says that 'model.norm.weight' is in {other}"):
        load(checkpoint.directory)
    for bad in ({}, {"weight_map": 3}, {"weight_map": {"a": "../elsewhere.safetensors"}}):
        index.write_text(json.dumps(bad))
        with pytest.raises(WeightsError, match="no 'weight_map'"):
            load(checkpoint.directory)
    index.write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        load(checkpoint.directory)
    index.write_text(json.dumps({"weight_map": weight_map}))
    rewrite(checkpoint.directory / other, lambda data: data[:-10])
    with pytest.raises(WeightsError, match=f"{other} is truncated"):
        load(checkpoint.directory)
    (checkpoint.directory / other).unlink()
    with pytest.raises(WeightsError, match=rf"cannot read .*{other}.*download the missing file"):
        load(checkpoint.directory)


def test_directories_without_weights(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    config, directory = checkpoint.config, checkpoint.directory
    with pytest.raises(WeightsError, match="is not a directory"):
        load_parameters(tmp_path / "nowhere", config, "float32")
    with pytest.raises(ConfigError, match="is not a directory"):
        load_model_config(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no weights: expected model\.safetensors"):
        load(directory)
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin, which is not loaded"):
        load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model_config(directory)


def test_wrong_dtype_argument(make_checkpoint):
    with pytest.raises(ConfigError, match="'int4' is not one of float32, bfloat16"):
        load(make_checkpoint().directory, "int4")


def test_orbax_directory_is_self_contained_and_small(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    (checkpoint.directory / "tokenizer.model").write_bytes(b"pieces")
    (checkpoint.directory / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    save_orbax(tmp_path / "out", checkpoint.config, load(checkpoint.directory), companions_from=checkpoint.directory)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    assert load_model_config(tmp_path / "out").eos_token_ids == (2, 9)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) < 25
    weights_bytes = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert sum(path.stat().st_size for path in files) < 1.2 * weights_bytes + 100_000
    assert not list(tmp_path.glob(".*"))
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in files)


def test_orbax_is_read_in_groups(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = make_checkpoint()
    params = load(checkpoint.directory)
    save_orbax(tmp_path / "out", checkpoint.config, params)
    monkeypatch.setattr(orbax, "_READ_BYTES", 10_000)
    assert equal(load(tmp_path / "out"), params)


def test_orbax_of_another_model_and_damaged(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    params = load(checkpoint.directory)
    save_orbax(tmp_path / "out", checkpoint.config, params)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    for change, message in (
        ({"vocab_size": 97}, r"'embed\.weight' has shape \(96, 32\).*\(97, 32\)"),
        ({"tie_word_embeddings": True}, r"unused parameters: \['head\.weight'\]"),
        ({"num_hidden_layers": 3}, r"missing parameters: \['layers\.2"),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(WeightsError, match=message):
            load(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(fields))
    largest = max((tmp_path / "out" / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    rewrite(largest, lambda data: data[: len(data) // 2])
    with pytest.raises(WeightsError, match="cannot be read"):
        load(tmp_path / "out")
    (tmp_path / "out" / "params" / "_METADATA").write_text("{")
    with pytest.raises(WeightsError, match="no Orbax checkpoint"):
        load(tmp_path / "out")


def test_saving_refuses(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    params = load(checkpoint.directory)
    with pytest.raises(WeightsError, match="not an empty directory"):
        save_hf(checkpoint.directory, checkpoint.config, params)
    for bad, message in (
        ({path: array for path, array in params.items() if path != "norm.weight"}, r"norm\.weight"),
        (params | {"norm.weight": jnp.ones(3)}, r"'norm\.weight' has shape \(3,\)"),
        (params | {"norm.weight": params["norm.weight"].astype(jnp.float16)}, "one dtype"),
    ):
        for save in (save_hf, save_orbax):
            with pytest.raises(WeightsError, match=message):
                save(tmp_path / "out", checkpoint.config, bad)
    assert not list(tmp_path.glob("*out*"))


def test_random_parameters():
    from sarathi_jax.weights.hf_config import model_config_from_hf

    config = model_config_from_hf(FAMILIES["llama-biased"])
    params = random_parameters(config, "bfloat16", seed=3)
    assert {path: array.shape for path, array in params.items()} == parameter_shapes(config)
    assert {str(array.dtype) for array in params.values()} == {"bfloat16"}
    assert 0.015 < float(jnp.std(params["embed.weight"].astype(jnp.float32))) < 0.025
    assert jnp.all(params["layers.0.mlp_norm.weight"] == 1)
    assert jnp.all(params["layers.0.attn.qkv.bias"] == 0)
    again, other = random_parameters(config, "bfloat16", seed=3), random_parameters(config, "bfloat16", seed=4)
    assert equal(params, again)
    assert not np.array_equal(params["head.weight"], other["head.weight"])
    assert not np.array_equal(params["layers.0.mlp.down.weight"], params["layers.1.mlp.down.weight"])


_MEASURE = """
import re, sys
from pathlib import Path
import jax
from sarathi_jax.weights.checkpoint import load_parameters
from sarathi_jax.weights.directory import load_model_config

def kib(field):  # of this process alone; ru_maxrss begins with that of the parent
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

jax.devices()
before = kib("VmRSS")
directory, dtype = sys.argv[1:]
params = load_parameters(directory, load_model_config(directory), dtype, progress=False)
print(kib("VmHWM") - before, sum(a.nbytes for a in params.values()) // 1024)
"""


@pytest.mark.slow
def test_peak_memory_of_loading(tmp_path, repo):
    """600 MB of bfloat16: the peak of host memory is the weights, and little beside."""
    from sarathi_jax.weights.hf_config import model_config_from_hf

    fields = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    }
    config = model_config_from_hf(fields)
    params = {path: jnp.full(shape, 0.5, jnp.bfloat16) for path, shape in parameter_shapes(config).items()}
    save_hf(tmp_path / "hf", config, params, shard_bytes=200 * 10**6, progress=False)
    save_orbax(tmp_path / "orbax", config, params)
    del params
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for directory, dtype, allowed_kib in (
        ("hf", "bfloat16", 150 * 1024),
        ("hf", "float32", 250 * 1024),
        ("orbax", "bfloat16", 1200 * 1024),
    ):
        printed = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(tmp_path / directory), dtype],
            cwd=repo,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        grown_kib, weights_kib = map(int, printed.split())
        print(f"{directory} {dtype}: weights {weights_kib} KiB, peak grew by {grown_kib} KiB")
        assert weights_kib < grown_kib < weights_kib + allowed_kib
