"""Runs of the engine itself, on this machine and in real time: the model that ships, lengths scaled to its context."""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Iterator
from typing import Any

from sarathi_jax.bench.paper.deployments import TRACES, Trace
from sarathi_jax.bench.paper.experiment import Options
from sarathi_jax.bench.paper.served import workload
from sarathi_jax.bench.replay import replay
from sarathi_jax.config import EngineConfig
from sarathi_jax.llm import LLM
from sarathi_jax.telemetry.run import Run
from sarathi_jax.timing import device_name
from sarathi_jax.workloads import Workload, fixed, static

# Of the requests that a new engine serves before it is measured.
_WARM_UP = (64, 8)


@dataclasses.dataclass(frozen=True)
class Engines:
    """What is compared, as the file of an experiment has it.

    Attributes:
      lines: fields of `EngineConfig`, by the name of the line in tables and pictures.
      common: further fields, of all lines.
      quick: fields in place of either, in quick versions: a short context and few programs.
    """

    lines: dict[str, dict[str, Any]]
    common: dict[str, Any]
    quick: dict[str, Any]

    def __post_init__(self) -> None:
        for name, fields in self.lines.items():
            for all_fields in (self.fields(name), self.common | fields | self.quick):
                try:
                    EngineConfig(**all_fields)
                except TypeError as error:
                    raise ValueError(f"{name}: {error}") from None

    def of(self, options: Options) -> "Engines":
        """These, or in a quick version small ones."""
        if not options.quick:
            return self
        return dataclasses.replace(self, lines={name: fields | self.quick for name, fields in self.lines.items()})

    def fields(self, line: str) -> dict[str, Any]:
        """All fields of a line; nothing of a prompt is ever found in the cache, as in the paper."""
        fields = {"prefix_caching": False} | self.common | self.lines[line]
        return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}

    @contextlib.contextmanager
    def open(self, line: str) -> Iterator[LLM]:
        """The engine of a line, which has already served a few requests: whatever comes first is slow."""
        with LLM(progress=False, **self.fields(line)) as llm:
            lengths = functools.partial(fixed, *_WARM_UP)
            replay(llm, Workload(lengths, static, llm.engine_config.max_running).requests(), progress=False)
            yield llm


def serve(llm: LLM, trace: Trace, rate: float, number: int, seed: int, limit_s: float | None = None) -> Run:
    """Serves requests with a trace's lengths, drawn from its published quantiles and scaled to the model's context.

    Args:
      llm: idle.
      trace: whose lengths.
      rate: requests a second, at Poisson arrivals.
      number: of requests.
      seed: the same one gives the same requests, at another rate closer together.
      limit_s: see `replay`.
    """
    load = dataclasses.replace(
        workload(trace, number, rate, seed), context=llm.cache_config.max_model_len, longest=TRACES[trace].longest
    )
    return replay(llm, load.requests(), seed=seed, limit_s=limit_s, progress=False)


def decode_step_s(llm: LLM, decodes: int, context: int, number: int = 64) -> float:
    """Median seconds of a step of so many decodes and nothing else: what the paper's SLOs are multiples of.

    Args:
      llm: idle.
      decodes: of each step.
      context: tokens of each sequence at the end.
      number: of tokens that each generates; enough for all prompts to be computed meanwhile.

    Raises:
      ValueError: it was not enough, or so many never run at once.
    """
    lengths = functools.partial(fixed, context - number, number)
    run = replay(llm, Workload(lengths, static, decodes).requests(), progress=False)
    plans = ((step.plan, step.duration_s) for steps in run.steps for step in steps)
    times_s = [seconds for plan, seconds in plans if plan.num_decodes == plan.num_tokens == decodes]
    if not times_s:
        raise ValueError(
            f"no step had {decodes} decodes: let that many run at once, or prompts be shorter than {context - number}"
        )
    return statistics.median(times_s)


def measured_on(trace: Trace) -> str:
    """What was run where, in a sentence for the page."""
    return (
        f"Measured in real time: the engine itself serves the small model that ships, on {device_name()}. Requests "
        f"have the lengths of the {trace} trace (drawn from its quantiles), scaled to the model's context. Made anew, "
        "the figures are a little different."
    )
