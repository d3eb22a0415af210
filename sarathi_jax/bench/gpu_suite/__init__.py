"""Measurements on one GPU, in parts that run, resume and merge apart: ``docs/gpu-suite.md``.

  python -m sarathi_jax.bench.gpu_suite --part kernels --out DIR
  python -m sarathi_jax.bench.gpu_suite --part merge --out DIR

Needs what the product needs, a GPU, and no network. `--dry_run` runs everything with tiny shapes on a CPU, kernels
interpreted, and says so wherever its numbers go.
"""
