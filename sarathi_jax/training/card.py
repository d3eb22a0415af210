"""The card of a trained checkpoint: what it learned from, how, and how well, all from measured values."""

import dataclasses
import importlib.metadata
from pathlib import Path

from sarathi_jax.training.loop import Run


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured once the steps were done.

    Attributes:
      bits_per_byte: of the model on the held-out text.
      baselines: order -> bits per byte of the modified Kneser-Ney model over the same tokens.
      nats_by_band: mean loss a token over equal bands of positions, from the first to the last of the context.
      samples: drawn texts, prompts included.
    """

    bits_per_byte: float
    baselines: dict[int, float]
    nats_by_band: list[float]
    train_bytes: int
    train_tokens: int
    held_out_bytes: int
    held_out_tokens: int
    samples: list[str]


def write_card(path: Path, run: Run, measured: Measured, curve: str | None) -> None:
    """Writes ``README.md`` beside a checkpoint.

    Args:
      path: of the card.
      run: the finished run.
      measured: its figures.
      curve: file name of the loss curve, if it was drawn.
    """
    config = run.config
    num_params = sum(array.size for array in run.params.values())
    tokens_seen = sum(row["tokens"] for row in run.rows)
    seconds = sum(row["seconds"] for row in run.rows)
    phases = ", ".join(f"{p.steps} steps of {p.batch} x {p.length}" for p in config.phases)
    width = config.max_position // len(measured.nats_by_band)
    bands = "\n".join(
        f"| {i * width}-{(i + 1) * width - 1} | {nats:.3f} |" for i, nats in enumerate(measured.nats_by_band)
    )
    baselines = "\n".join(
        f"| modified Kneser-Ney, interpolated, order {order} | {bits:.4f} | {_below(measured.bits_per_byte, bits)} |"
        for order, bits in measured.baselines.items()
    )
    samples = "\n\n".join(f"{i}. {_quote(text)}" for i, text in enumerate(measured.samples, start=1))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "optax"))
    path.write_text(
        f"""# {path.parent.name}

A LLaMA-type decoder of {num_params / 1e6:.2f} million parameters, trained from nothing by `main.py train`.

## Data and licence
{config.data_note}

{measured.train_bytes:,} bytes ({measured.train_tokens:,} tokens) to learn from, {measured.held_out_bytes:,} bytes
({measured.held_out_tokens:,} tokens) held out: the last chapters of every book, at least
{config.held_out_fraction:.0%} of each. Neither the model nor the tokenizer saw them.

## Recipe
- {config.num_layers} layers, {config.hidden_size} wide, MLP {config.intermediate_size}, {config.num_heads} query heads
  and {config.num_kv_heads} key heads of {config.head_dim}, rotary positions, tied embeddings, float32.
- Own sentencepiece byte-pair tokenizer of {config.vocab_size} pieces with byte fallback
  ({measured.held_out_bytes / measured.held_out_tokens:.2f} bytes a token on the held-out text).
- {phases} tokens: {tokens_seen / 1e6:.2f} million tokens, {tokens_seen / measured.train_tokens:.1f} times the text.
- Muon at {config.learning_rate:g} for the matrices and Adam at {config.embedding_learning_rate:g} for embedding and
  norms, weight decay {config.weight_decay:g}, clipping at 1, {config.warmup_steps} warm-up steps, linear decay to zero
  over the last {config.decay_share:.0%} of the steps, DropConnect {config.drop:g}, seed {config.seed}.
- {seconds / 60:.0f} minutes of steps on a CPU, {tokens_seen / seconds:.0f} tokens a second; {versions}.

## Held-out text
Bits per byte over the same tokens, end tokens included; the model reads windows of {config.max_position} tokens that
overlap by half.

| model | bits per byte | this model is lower by |
|---|---|---|
| **this model** | **{measured.bits_per_byte:.4f}** | |
{baselines}

Mean loss by position in the context, nats a token, over the windows that the text fills:

| positions | loss |
|---|---|
{bands}

{f"![Loss curve]({curve})" if curve else "No loss curve was drawn: matplotlib was not installed."}

## Samples
Unedited, the first draw of each, temperature 0.8, no other restriction; the prompt is set in bold.

{_embolden(samples, config.sample_prompts)}
""",
        encoding="utf-8",
    )


def _below(model: float, baseline: float) -> str:
    return f"{1 - model / baseline:.1%}"


def _quote(text: str) -> str:
    return text.strip().replace("\n", "\n\n   ")


def _embolden(samples: str, prompts: tuple[str, ...]) -> str:
    for i, prompt in enumerate(prompts, start=1):
        samples = samples.replace(f"{i}. {prompt}", f"{i}. **{prompt}**", 1)
    return samples
