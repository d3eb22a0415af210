"""The training run: corpus -> tokenizer -> steps -> checkpoint, resumed from its last saved state after a kill."""

import dataclasses
import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from sarathi_jax.training.batches import batch_at
from sarathi_jax.training.corpus import Split, read_books, split_books
from sarathi_jax.training.evaluate import score
from sarathi_jax.training.objective import Objective, Params, drop_weights
from sarathi_jax.training.settings import TrainConfig
from sarathi_jax.training.state import StateStore
from sarathi_jax.training.tokens import (
    TOKENIZER_CONFIG_FILE,
    encode_documents,
    load_tokenizer,
    make_stream,
    train_tokenizer,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose steps are done."""

    config: TrainConfig
    params: Params
    rows: list[dict[str, float]]
    split: Split
    tokenizer: SentencePieceProcessor
    folder: Path


def run_steps(config: TrainConfig) -> Run:
    """Trains from the last saved state, if there is one, to the last step.

    Args:
      config: the run.

    Raises:
      ConfigError: no text, or the state belongs to another run.
    """
    split = split_books(read_books(config.corpus), config.held_out_fraction)
    store = StateStore(config.state_dir, _identity(config, split))
    tokenizer = _tokenizer(config, split, store.folder)
    stream = make_stream(encode_documents(tokenizer, split.train))
    # A third of the held-out chapters is enough to watch a run by; the card's figure is over all of them.
    watched = encode_documents(tokenizer, split.held_out[::3])
    watched_bytes = sum(len(text.encode()) for text in split.held_out[::3])

    objective = Objective(config.model())
    params = objective.init(config.seed)
    optimizer = make_optimizer(config, params)
    done, state = store.restore({"params": params, "optimizer": optimizer.init(params)})
    update = make_update(objective, optimizer, config)
    token_losses = jax.jit(objective.token_losses)

    with tqdm(total=config.steps, initial=done, desc="training", unit="step") as progress:
        while done < config.steps:
            started = time.perf_counter()
            batch = batch_at(stream, config, done)
            state, loss = update(state, batch, done)
            loss = float(loss)
            row = {"step": done, "loss": loss, "tokens": batch[:, 1:].size, "seconds": time.perf_counter() - started}
            done += 1
            last = done == config.steps
            if last or done % config.eval_every == 0:
                # As long as the phase's sequences: it knows nothing yet of positions beyond them.
                length = config.phase_at(done - 1)[0].length
                bits = score(token_losses, state["params"], watched, length, length).bits
                row["bits_per_byte"] = bits / watched_bytes
                progress.set_postfix(bits_per_byte=f"{row['bits_per_byte']:.3f}", refresh=False)
            store.log(row)
            if last or done % config.save_every == 0:
                store.save(done, state)
            progress.set_description(f"loss {loss:.3f}", refresh=False)
            progress.update()
    store.close()
    return Run(config, state["params"], store.rows(), split, tokenizer, store.folder)


def make_optimizer(config: TrainConfig, params: Params) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the layers, Adam for the embedding and the norms.

    The learning rate warms up, stays, and falls linearly to zero at the end. Reaches a loss in about two thirds of the
    steps of Adam alone, which is what a CPU needs.
    """

    def schedule(peak: float) -> optax.Schedule:
        decay = max(1, round(config.steps * config.decay_share))
        return optax.join_schedules(
            [
                optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps),
                optax.linear_schedule(peak, 0.0, decay),
            ],
            [max(config.warmup_steps, config.steps - decay)],
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(config.learning_rate),
            weight_decay=config.weight_decay,
            adam_learning_rate=schedule(config.embedding_learning_rate),
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrix_axes(params),
        ),
    )


def _matrix_axes(params: Params) -> Any:
    """Which axes of a weight form a matrix; None leaves it to Adam."""

    def axes(name: str, weight: jax.Array) -> MuonDimensionNumbers | None:
        if weight.ndim == 1 or name == "embed.weight":
            return None
        if name.endswith("gate_up.weight"):  # [2, I, E]: two matrices
            return MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        return MuonDimensionNumbers(reduction_axis=weight.ndim - 1, output_axis=tuple(range(weight.ndim - 1)))

    return {name: axes(name, weight) for name, weight in params.items()}


def make_update(objective: Objective, optimizer: optax.GradientTransformation, config: TrainConfig) -> Any:
    """One compiled step: ``(state, batch i32[B, L + 1], step) -> (state, loss)``; the old state is given up."""
    noise = jax.random.key(config.seed, impl="rbg")

    @partial(jax.jit, donate_argnums=0)
    def update(state: dict[str, Any], batch: jax.Array, step: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        def loss_of(params: Params) -> jax.Array:
            noisy = drop_weights(params, config.drop, jax.random.fold_in(noise, step))
            return objective.token_losses(params, batch, noisy).mean()

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        changes, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], changes), "optimizer": optimizer_state}, loss

    return lambda state, batch, step: update(state, jnp.asarray(batch), np.int32(step))


def _tokenizer(config: TrainConfig, split: Split, folder: Path) -> SentencePieceProcessor:
    # The configuration file is written last, so its presence says that both are whole.
    if (folder / TOKENIZER_CONFIG_FILE).exists():
        return load_tokenizer(folder)
    return train_tokenizer(split.train, config.vocab_size, folder)


def _identity(config: TrainConfig, split: Split) -> dict[str, Any]:
    """What a continuation must share with its run: model, seed and text; the schedule may change."""
    text = hashlib.sha256("\0".join((*split.train, "\1", *split.held_out)).encode()).hexdigest()
    return {"model": str(dataclasses.asdict(config.model())), "seed": config.seed, "text_sha256": text}
