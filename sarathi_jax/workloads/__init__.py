"""Workloads: how long requests are and when they arrive."""

from sarathi_jax.workloads.arrivals import poisson
from sarathi_jax.workloads.lengths import CHAT, Length, LengthQuantiles, TraceError, read_trace, scaled, synthesise

__all__ = ["CHAT", "Length", "LengthQuantiles", "TraceError", "poisson", "read_trace", "scaled", "synthesise"]
