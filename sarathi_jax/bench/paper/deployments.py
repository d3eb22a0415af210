"""The paper's deployments and traces in simulation."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

from sarathi_jax.config import EngineConfig, ModelConfig
from sarathi_jax.deployment import load_deployment
from sarathi_jax.latency import DEVICES, PUBLISHED_STACK, HostTerm
from sarathi_jax.simulate import Deployment
from sarathi_jax.weights.directory import load_model_yaml
from sarathi_jax.workloads import ARXIV, CHAT, LengthQuantiles, TimedRequest, Workload, poisson, synthesise

Stack = Literal["ours", "published", "published_free_sequences"]
Trace = Literal["chat", "arxiv"]
STACKS: dict[Stack, HostTerm | None] = {
    "ours": None,
    "published": PUBLISHED_STACK,
    "published_free_sequences": dataclasses.replace(PUBLISHED_STACK, sequence_s=0.0),
}
TRACES: dict[str, LengthQuantiles] = {"chat": CHAT, "arxiv": ARXIV}


@dataclasses.dataclass(frozen=True)
class DeploymentSettings:
    """A deployment in the file of an experiment.

    Attributes:
      name: of ``configs/deployments``.
      device: of `DEVICES`.
      context: longest prompt and output together. Above what the model was trained for the model is taken as if it had
        been trained for it, as the paper did with Yi-34B; times know nothing of a model's quality.
      stack: ``published``: with the host term of the stack that the paper measured; ``published_free_sequences``:
        with that term but for what it adds for each sequence of a step; ``ours``: without.
      pads: a step takes the time of its compiled size; False: of its tokens, as the paper's eager stack does.
      engine: fields of `EngineConfig` in place of the deployment's.
    """

    name: str
    device: str = "a100-80gb"
    context: int = 8192
    stack: Stack = "ours"
    pads: bool = False
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device {self.device!r} is none of {', '.join(DEVICES)}")
        self.build()

    def build(self, **engine: Any) -> Deployment:
        """What is simulated.

        Args:
          engine: fields of `EngineConfig` in place of these.

        Raises:
          ValueError: there is no such deployment, or its settings cannot be.
        """
        fields = load_deployment(self.name)
        model = _model(fields.pop("model"), self.context)
        fields |= {"max_model_len": self.context, "block_size": 16, "prefix_caching": False, "hosts": 1}
        try:
            config = EngineConfig(**(fields | self.engine | engine))
        except TypeError as error:
            raise ValueError(f"engine: {error}") from None
        return Deployment(
            model,
            DEVICES[self.device],
            config,
            host=STACKS[self.stack],
            pads=self.pads,
        )


def requests(trace: Trace, rate: float, number: int, seed: int) -> list[TimedRequest]:
    """Requests with the lengths of a trace, drawn from its published quantiles, that arrive as a Poisson process."""
    draw = functools.partial(synthesise, TRACES[trace])
    return Workload(draw, functools.partial(poisson, rate), number, seed).requests()


def _model(path: Path, context: int) -> ModelConfig:
    model = load_model_yaml(path)
    return dataclasses.replace(model, max_position=max(model.max_position, context))
