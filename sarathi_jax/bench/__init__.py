"""Measurements, each a command: ``python -m sarathi_jax.bench.NAME --help``.

`throughput`: total tokens a second of offline cases. `compare`: any commands of that form in turn, and their ratios.
`host`: what the host adds to a step. `quantization`: what 8-bit weights cost in accuracy. `gpu_suite`: all that a GPU
is to be asked, in parts. `products`: times of single products, for ``main.py calibrate``. `replay` and `replay_http`
serve a workload for ``main.py bench``.
"""
