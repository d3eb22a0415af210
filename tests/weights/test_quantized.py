"""Loading with 8-bit weights: which parameters, from every format, and what cannot be."""

import numpy as np
import pytest

from sarathi_jax.config import ConfigError, EngineConfig
from sarathi_jax.weights.checkpoint import load_parameters, random_parameters, save_orbax
from sarathi_jax.weights.safetensors import WeightsError


@pytest.mark.parametrize("family", ["qwen2", "falcon-gqa"])
def test_products_are_quantised_and_nothing_else(make_checkpoint, family, tmp_path):
    checkpoint = make_checkpoint(family)
    plain = load_parameters(checkpoint.directory, checkpoint.config, "float32", progress=False)
    save_orbax(tmp_path / "orbax", checkpoint.config, plain)
    for directory in (checkpoint.directory, tmp_path / "orbax"):
        params = load_parameters(directory, checkpoint.config, "float32", quantization="w8a8", progress=False)
        changed = {path for path, array in params.items() if array.dtype == np.int8}
        names = ("qkv.weight", "out.weight", "up.weight", "down.weight", "head.weight")
        assert changed == {path for path in plain if path.endswith(names)}
        assert params.keys() == plain.keys() | {path.replace(".weight", ".scale") for path in changed}
        for path, array in plain.items():
            if path in changed:
                scale = np.asarray(params[path.replace(".weight", ".scale")])[..., None]
                assert np.abs(np.asarray(params[path]) * scale - array).max() <= scale.max() * 0.51
            else:
                np.testing.assert_array_equal(params[path], array)


def test_random_weights_are_quantised_alike(make_checkpoint):
    config = make_checkpoint("llama").config
    plain, eight = random_parameters(config, "bfloat16", 0), random_parameters(config, "bfloat16", 0, "w8_fp8")
    assert str(eight["head.weight"].dtype) == "float8_e4m3fn"
    back = np.asarray(eight["head.weight"], np.float32) * np.asarray(eight["head.scale"])[:, None]
    np.testing.assert_allclose(back, np.asarray(plain["head.weight"], np.float32), rtol=0.07, atol=1e-4)


def test_weights_that_are_not_finite_are_named(make_checkpoint):
    checkpoint = make_checkpoint("llama")
    checkpoint.tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = np.inf
    checkpoint.write()
    with pytest.raises(WeightsError, match=r"'layers\.1\.mlp\.down\.weight'.*infinite or NaN"):
        load_parameters(checkpoint.directory, checkpoint.config, "float32", quantization="w8", progress=False)


def test_unknown_quantisation_is_refused():
    with pytest.raises(ConfigError, match="'int4' is not one of w8, w8_fp8, w8a8"):
        EngineConfig(quantization="int4")  # pyright: ignore[reportArgumentType]
