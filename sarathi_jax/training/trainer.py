"""`main.py train`: the run, then its checkpoint with tokenizer, loss curve and card."""

import logging
from pathlib import Path

import jax
import numpy as np

from sarathi_jax.training.card import Measured, write_card
from sarathi_jax.training.curve import draw_curve
from sarathi_jax.training.evaluate import score
from sarathi_jax.training.loop import Run, run_steps
from sarathi_jax.training.ngram import KneserNey
from sarathi_jax.training.objective import Objective
from sarathi_jax.training.samples import draw_samples
from sarathi_jax.training.settings import TrainConfig
from sarathi_jax.training.tokens import BOS_ID, encode_documents
from sarathi_jax.weights.checkpoint import save_orbax
from sarathi_jax.weights.directory import check_target

CURVE_FILE = "loss.svg"
SAMPLE_TEMPERATURE = 0.8
_LOG = logging.getLogger(__name__)
_BASELINE_ORDERS = (3, 5)
_POSITION_BANDS = 8


def train(config: TrainConfig) -> Path:
    """Trains a model, or finishes a run that was interrupted, and saves its checkpoint.

    Args:
      config: the run.

    Returns:
      The folder `config.out`: ``config.json``, tokenizer, ``params/`` in Orbax, ``README.md`` and the loss curve.

    Raises:
      ConfigError: no text, or the training state belongs to another run.
      WeightsError: `config.out` is not empty, or the disk is full.
    """
    check_target(config.out)
    run = run_steps(config)
    measured = measure(run)
    save_orbax(config.out, config.model(), run.params, companions_from=run.folder)
    drawn = draw_curve(
        run.rows, measured.train_bytes / measured.train_tokens, measured.baselines[3], config.out / CURVE_FILE
    )
    if not drawn:
        _LOG.warning("no loss curve: matplotlib is not installed (pip install 'sarathi_jax[plots]')")
    write_card(config.out / "README.md", run, measured, CURVE_FILE if drawn else None)
    return config.out


def measure(run: Run) -> Measured:
    """Held-out bits per byte of the model and of its baselines over the same tokens, loss by position, samples."""
    config, split = run.config, run.split
    documents, held_out = (encode_documents(run.tokenizer, side) for side in (split.train, split.held_out))
    held_out_bytes = sum(len(text.encode()) for text in split.held_out)
    objective = Objective(config.model())
    token_losses = jax.jit(objective.token_losses)
    context = config.max_position
    scored = score(token_losses, run.params, held_out, context, context // 2)
    baselines = {
        order: KneserNey.fit(documents, config.vocab_size, order, BOS_ID).bits(held_out) / held_out_bytes
        for order in _BASELINE_ORDERS
    }
    bands = [float(band.mean()) for band in np.array_split(scored.nats_by_position, _POSITION_BANDS)]
    prompts = [[BOS_ID, *run.tokenizer.encode(prompt)] for prompt in config.sample_prompts]
    length = min(context, config.sample_tokens + max(map(len, prompts)))
    texts = draw_samples(config.model(), run.params, prompts, length, SAMPLE_TEMPERATURE, config.seed)
    return Measured(
        bits_per_byte=scored.bits / held_out_bytes,
        baselines=baselines,
        nats_by_band=bands,
        train_bytes=sum(len(text.encode()) for text in split.train),
        train_tokens=sum(map(len, documents)),
        held_out_bytes=held_out_bytes,
        held_out_tokens=sum(map(len, held_out)),
        samples=[run.tokenizer.decode(text) for text in texts],
    )
