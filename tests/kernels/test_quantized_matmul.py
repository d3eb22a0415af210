"""Products with 8-bit weights against numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_matmul import quantize_weight, quantized_matmul, reference

DTYPES = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}


def draw(rows: int, width: int, out: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, width), np.float32), rng.standard_normal((out, width), np.float32)


# 2816: the lanes of the one-row form divide; 1000: they do not; 96: too short for it.
@pytest.mark.parametrize("width", [2816, 1000, 96])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("mode", "stored"), [("w8", "int8"), ("w8", "fp8"), ("w8a8", "int8")])
def test_matches_reference(mode, stored, rows, width):
    x, weight = draw(rows, width)
    values, scale = quantize_weight(weight, DTYPES[stored])
    expected = reference.quantized_matmul(x, values, scale, mode=mode)
    out = jax.jit(functools.partial(quantized_matmul, mode=mode))(x, values, scale)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    exact = x.astype(np.float64) @ weight.T
    # A normal channel's rounding errors are 0.8 % of it for int8 (weights and activations each), 2.5 % for fp8.
    assert np.sqrt(np.mean((out - exact) ** 2)) < (0.04 if stored == "fp8" else 0.02) * np.sqrt(np.mean(exact**2))


def test_extremes_do_not_overflow():
    """All of the largest value: the sums are the largest there are."""
    for rows in (1, 3):
        x, values = np.full((rows, 4096), -5.0, np.float32), np.full((8, 4096), 127, np.int8)
        out = quantized_matmul(jnp.asarray(x), jnp.asarray(values), jnp.ones(8), mode="w8a8")
        np.testing.assert_allclose(out, np.full((rows, 8), -5.0 * 127 * 4096), rtol=1e-6)


def test_rows_of_zeros_stay_zero():
    values, scale = quantize_weight(np.zeros((3, 64), np.float32), np.dtype(np.int8))
    assert np.isfinite(scale).all()
    for mode in ("w8", "w8a8"):
        assert not quantized_matmul(jnp.zeros((2, 64)), jnp.asarray(values), jnp.asarray(scale), mode=mode).any()


@pytest.mark.parametrize("stored", DTYPES)
def test_weights_come_back(stored):
    _, weight = draw(1, 256)
    weight[3] *= 1e-20
    values, scale = quantize_weight(weight.reshape(2, 12, 256), DTYPES[stored])
    assert (values.shape, scale.shape) == ((2, 12, 256), (2, 12))
    weight, scale = weight.reshape(2, 12, 256), scale[..., None]
    error = np.abs(values.astype(np.float64) * scale - weight)
    # Half a step: of the channel's largest value for int8, of the value itself (3 bits and the hidden one) for fp8.
    allowed = scale * 0.51 if stored == "int8" else np.abs(weight) / 15 + scale
    assert (error <= allowed).all()


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantize_weight(np.array([[1.0, np.nan]]), np.dtype(np.int8))
    with pytest.raises(ValueError, match="cannot be quantised to int16"):
        quantize_weight(np.ones((1, 2)), np.dtype(np.int16))
    x, values, scale = jnp.ones((1, 8)), jnp.ones((4, 8), jnp.int8), jnp.ones(4)
    with pytest.raises(ValueError, match="'w4' is not one of w8, w8a8"):
        quantized_matmul(x, values, scale, mode="w4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="do not fit"):
        quantized_matmul(x, values, scale[:3], mode="w8")
    with pytest.raises(ValueError, match="'w8a8' takes weights of int8, not float8_e4m3fn"):
        quantized_matmul(x, values.astype(jnp.float8_e4m3fn), scale, mode="w8a8")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("mode", ["w8", "w8a8"])
def test_lowers_for_accelerators_without_the_form_for_cpus(mode, platform):
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((1, 1024), "float32"), ((64, 1024), "int8"), ((64,), "float32"))]
    traced = jax.jit(functools.partial(quantized_matmul, mode=mode)).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == 1
    assert "optimization_barrier" not in text
