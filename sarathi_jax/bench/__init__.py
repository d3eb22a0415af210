"""Measurements, each a command: ``python -m sarathi_jax.bench.NAME --help``.

`throughput`: total tokens a second of offline cases. `compare`: any commands of that form in turn, and their ratios.
`steps`: time of each compiled program. `host`: what the host adds to a step.
"""
