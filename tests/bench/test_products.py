"""Times of products on this device, in the form that `calibrate` reads."""

import pytest

from sarathi_jax.bench.products import measure
from sarathi_jax.latency.fit import read_products


@pytest.mark.slow
def test_measured_products_can_be_read(tmp_path):
    cases = [(1, 16, 32), (8, 16, 32)]
    measure(cases, "float32", 2, tmp_path / "products.csv")
    times = read_products(tmp_path / "products.csv")
    assert [(gemm.m, gemm.k, gemm.n) for time in times for gemm in time.gemms] == cases
    assert all(seconds > 0 for time in times for seconds in time.gemm_s)
