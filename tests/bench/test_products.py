"""Times of products on this device, in the form that `calibrate` reads."""

import subprocess
import sys

import pytest

from sarathi_jax.latency.fit import read_products


@pytest.mark.slow
def test_measured_products_can_be_read(tmp_path, repo):
    path = tmp_path / "products.csv"
    options = ["--sizes=16x32", "--tokens=1,8", "--dtype=float32", "--repeats=2", f"--out={path}"]
    command = [sys.executable, "-m", "sarathi_jax.bench.products", *options]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    times = read_products(path)
    assert [(gemm.m, gemm.k, gemm.n) for time in times for gemm in time.gemms] == [(1, 16, 32), (8, 16, 32)]
    assert all(seconds > 0 for time in times for seconds in time.gemm_s)
