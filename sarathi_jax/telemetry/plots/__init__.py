"""Pictures of runs, as SVG or PNG by the file's ending; matplotlib is in the extra ``plots``.

The same numbers give the same SVG, byte by byte, so that pictures under version control change only when they say
something else.
"""

from sarathi_jax.telemetry.plots.comparisons import Choice, bars, pareto
from sarathi_jax.telemetry.plots.curves import latency_curves, quantiles, throughput_latency
from sarathi_jax.telemetry.plots.style import COLOURS, PlotError
from sarathi_jax.telemetry.plots.timelines import batch_composition, generation_stall

__all__ = [
    "COLOURS",
    "Choice",
    "PlotError",
    "bars",
    "batch_composition",
    "generation_stall",
    "latency_curves",
    "pareto",
    "quantiles",
    "throughput_latency",
]
