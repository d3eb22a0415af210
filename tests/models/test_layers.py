"""The forms of a product agree, whatever the width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax.models.layers import product


# 1024 and 2816: lanes that divide; 32 * 31: no useful divisor; 1000: no whole lanes; 96: too short.
@pytest.mark.parametrize("width", [1024, 2816, 32 * 31, 1000, 96])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_in_bfloat16(width, rows):
    rng = np.random.default_rng(width)
    x = jnp.asarray(rng.standard_normal((rows, width)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((2, 20, width)), jnp.bfloat16)
    expected = np.einsum("ti,goi->tgo", np.asarray(x, np.float64), np.asarray(weight, np.float64))
    out = jax.jit(product)(x.astype(jnp.float32), weight)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
