#!/usr/bin/env bash
# Makes the environment that compiles for GPUs and TPUs on a machine that has neither. Usage: make_devices_venv.sh VENV
# The project's own packages from the lock, beside them the compilers: XLA's CUDA plugin without the CUDA libraries that
# only running needs, ptxas with its headers, and libtpu in the release that this JAX names.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: make_devices_venv.sh VENV}
scripts/make_venv.sh "$venv" requirements.lock
jax=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("jax"))')
libtpu=$("$venv/bin/python" -c '
import importlib.metadata as m
print(next(r.split(";")[0].strip() for r in m.requires("jax") if r.startswith("libtpu") and "\"tpu\"" in r))')
echo "Installing the compilers for CUDA and TPU into $venv (once; about 1 GB)" >&2
scripts/retry.sh "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-deps \
  "jax-cuda13-plugin==$jax" "jax-cuda13-pjrt==$jax" "nvidia-cuda-nvcc==13.*" "nvidia-nvvm==13.*" "$libtpu"
