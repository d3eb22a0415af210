"""Workloads: how long requests are and when they arrive. Nothing here knows an engine."""

from sarathi_jax.workloads.arrivals import bursts, gamma, poisson, recorded, static
from sarathi_jax.workloads.lengths import Length, WorkloadError, fixed, in_order, scaled, shuffled, uniform, zipf
from sarathi_jax.workloads.quantiles import ARXIV, CHAT, LengthQuantiles, synthesise
from sarathi_jax.workloads.specs import Workloads, WorkloadSpec, arrivals_of, lengths_of
from sarathi_jax.workloads.texts import TextPrompt, read_documents, text_prompts
from sarathi_jax.workloads.traces import Dataset, Trace, TraceError, dataset, load_trace, read_trace
from sarathi_jax.workloads.workload import TimedRequest, Workload

__all__ = [
    "ARXIV",
    "CHAT",
    "Dataset",
    "Length",
    "LengthQuantiles",
    "TextPrompt",
    "TimedRequest",
    "Trace",
    "TraceError",
    "Workload",
    "WorkloadError",
    "WorkloadSpec",
    "Workloads",
    "arrivals_of",
    "bursts",
    "dataset",
    "fixed",
    "gamma",
    "in_order",
    "lengths_of",
    "load_trace",
    "poisson",
    "read_documents",
    "read_trace",
    "recorded",
    "scaled",
    "shuffled",
    "static",
    "synthesise",
    "text_prompts",
    "uniform",
    "zipf",
]
