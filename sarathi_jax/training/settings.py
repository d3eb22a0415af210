"""What a training run is: frozen values, so that a run can be told apart from another and resumed only as itself."""

import dataclasses
import os
from pathlib import Path

from sarathi_jax.config import ConfigError, ModelConfig, RopeConfig
from sarathi_jax.training.tokens import BOS_ID, EOS_ID


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps at one shape.

    Attributes:
      steps: optimiser steps.
      length: tokens of a sequence.
      batch: sequences of a step.
    """

    steps: int
    length: int
    batch: int


# Short sequences are several times cheaper a token; the last phase, while the learning rate falls, makes the
# context of 2,048 tokens real.
DEFAULT_PHASES = (Phase(2300, 128, 24), Phase(1000, 256, 12), Phase(350, 512, 6), Phase(220, 2048, 2))


SAMPLE_PROMPTS = (
    "In the beginning",
    "It was a fine morning, and",
    "The old house",
    '"My dear sister," said',
    "Once upon a time",
    "She opened the letter and",
    "There was nothing that he wished for more than",
    "The weather had been",
    "A woman of sense",
    "They walked together to",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run of the trainer; the defaults are the recipe of the shipped checkpoint.

    Attributes:
      corpus: what `corpus.read_books` reads.
      out: folder of the finished checkpoint.
      work_dir: folder of the training state, from which a run resumes; None:
        ``~/.cache/sarathi_jax/training/<name of out>``.
      vocab_size: pieces of the tokenizer.
      max_position: context length that the checkpoint declares.
      phases: shapes of the steps, in order.
      learning_rate: of Muon, which moves the matrices; updates have the size of Adam's (RMS 0.2).
      embedding_learning_rate: of Adam, which moves the embedding and the norms.
      decay_share: share of the steps, at the end, over which the learning rate falls to zero.
      drop: share of the weights that a step leaves out (DropConnect), against overfitting a small corpus.
      held_out_fraction: share of each book that is held out.
      data_note: what the card says about the text and its licence.
      sample_prompts: beginnings of the texts that the card shows.
      sample_tokens: tokens drawn for each.
      eval_every, save_every: steps between looks at the held-out text, and between saved states.
    """

    corpus: Path
    out: Path
    work_dir: Path | None = None
    vocab_size: int = 512
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    max_position: int = 2048
    phases: tuple[Phase, ...] = DEFAULT_PHASES
    learning_rate: float = 4e-3
    embedding_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    decay_share: float = 0.4
    drop: float = 0.0
    held_out_fraction: float = 0.05
    eval_every: int = 200
    save_every: int = 100
    seed: int = 0
    data_note: str = "Not stated. Say here what the text is and under which licence it stands."
    sample_prompts: tuple[str, ...] = SAMPLE_PROMPTS
    sample_tokens: int = 250

    def __post_init__(self):
        if not self.phases or any(min(p.steps, p.length, p.batch) < 1 for p in self.phases):
            raise ConfigError("phases must have at least one step, token and sequence each")
        longest = max(p.length for p in self.phases)
        if longest > self.max_position:
            raise ConfigError(f"a phase trains on {longest} tokens, beyond max_position={self.max_position}")
        if not (0 <= self.drop < 1 and 0 < self.held_out_fraction < 1 and 0 < self.decay_share <= 1):
            raise ConfigError("drop must lie in [0, 1), held_out_fraction in (0, 1), decay_share in (0, 1]")

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def state_dir(self) -> Path:
        if self.work_dir is not None:
            return self.work_dir
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "sarathi_jax" / "training" / self.out.name

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the step's number inside it."""
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError(f"step {step} lies beyond the last phase")

    def model(self) -> ModelConfig:
        return ModelConfig(
            architecture="decoder",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position=self.max_position,
            norm_eps=1e-5,
            rope=RopeConfig(theta=10000.0),
            windows=(None,) * self.num_layers,
            tie_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_ids=(EOS_ID,),
        )
