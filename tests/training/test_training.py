"""The trainer end to end on a toy corpus, small enough for seconds."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarathi_jax.config import ConfigError
from sarathi_jax.training import curve
from sarathi_jax.training.batches import batch_at
from sarathi_jax.training.evaluate import score
from sarathi_jax.training.loop import run_steps
from sarathi_jax.training.objective import Objective, causal_attention, drop_weights
from sarathi_jax.training.samples import draw_samples
from sarathi_jax.training.settings import Phase, TrainConfig
from sarathi_jax.training.tokens import BOS_ID, load_tokenizer, train_tokenizer
from sarathi_jax.training.trainer import train
from sarathi_jax.weights.checkpoint import load_parameters
from sarathi_jax.weights.directory import load_model_config
from sarathi_jax.weights.safetensors import WeightsError
from tests.training.texts import write_book

REPO = Path(__file__).resolve().parents[2]


def tiny(folder: Path, **changes) -> TrainConfig:
    fields = {
        "corpus": folder / "texts",
        "out": folder / "tiny",
        "work_dir": folder / "state",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "max_position": 64,
        "phases": (Phase(20, 32, 4), Phase(2, 64, 2)),
        "warmup_steps": 2,
        "held_out_fraction": 0.1,
        "eval_every": 8,
        "save_every": 4,
        "sample_tokens": 8,
    }
    return TrainConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run: its configuration and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    write_book(folder / "texts")
    config = tiny(folder)
    return config, train(config)


def logged(config):
    return [json.loads(line)["loss"] for line in (config.state_dir / "losses.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_short_run_lowers_the_loss(finished):
    config, _ = finished
    found = logged(config)
    assert len(found) == config.steps
    assert np.mean(found[-4:]) < 0.8 * found[0]


@pytest.mark.slow
def test_the_checkpoint_is_whole_and_loads(finished):
    config, out = finished
    assert load_model_config(out) == config.model()
    params = load_parameters(out, config.model(), "float32")
    assert all(np.isfinite(np.asarray(array)).all() for array in params.values())
    text = "Anna walked to the sea,\nand was happy. \u00e9"
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    card = (out / "README.md").read_text()
    assert "order 3" in card
    assert card.count("**Once upon a time**") == 1


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused(finished):
    with pytest.raises(WeightsError, match="not an empty directory"):
        train(finished[0])


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_losses_of_an_undisturbed_one(finished, tmp_path):
    whole, _ = finished
    config = dataclasses.replace(whole, out=tmp_path / "tiny", work_dir=tmp_path / "state")
    program = (
        "from pathlib import Path, PosixPath\n"
        "from sarathi_jax.training.settings import Phase, TrainConfig\n"
        "from sarathi_jax.training.loop import run_steps\n"
        f"run_steps({config!r})"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    try:
        while not (config.state_dir / "losses.jsonl").exists() or len(logged(config)) < 6:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(logged(config)) < config.steps
    run = run_steps(config)
    assert [row["step"] for row in run.rows] == list(range(config.steps))
    assert logged(config) == logged(whole)


@pytest.mark.slow
def test_the_state_of_another_run_is_refused(finished):
    with pytest.raises(ConfigError, match=r"another run \(different: seed\)"):
        run_steps(dataclasses.replace(finished[0], seed=1))


def test_the_loss_curve_is_drawn_or_left_out(tmp_path, monkeypatch):
    rows = [{"step": i, "loss": 5.0 - i / 10, "tokens": 64} for i in range(20)]
    rows[-1]["bits_per_byte"] = 2.0
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not curve.draw_curve(rows, 2.0, 1.5, tmp_path / "none.svg")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert curve.draw_curve(rows, 2.0, 1.5, tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_an_epoch_shows_every_window_once():
    config = tiny(Path("/nowhere"), phases=(Phase(24, 10, 2),))
    tokens = np.arange(10 * 13, dtype=np.int32)
    batches = [batch_at(tokens, config, step) for step in range(6)]
    starts = np.concatenate([batch[:, 0] for batch in batches])
    assert len(np.unique(starts)) == 12
    assert all((np.diff(batch, axis=1) == 1).all() for batch in batches)
    assert not np.array_equal(batch_at(tokens, config, 0), batch_at(tokens, config, 6))


def test_attention_by_blocks_of_rows_is_plain_causal_attention():
    length, heads, groups, size = 600, 4, 2, 8
    key = jax.random.key(0)
    q = jax.random.normal(key, (2 * length, heads, size))
    k, v = jax.random.normal(jax.random.fold_in(key, 1), (2, 2 * length, groups, size))
    out = np.asarray(jax.jit(lambda *qkv: causal_attention(2)(0, *qkv, None)[0])(q, k, v))
    q, k, v = (np.asarray(array) for array in (q, k, v))
    for row in (0, 1, 255, 256, 599, 600, 1199):
        first = row // length * length
        for head in range(heads):
            scores = k[first : row + 1, head // 2] @ q[row, head] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            expected = weights / weights.sum() @ v[first : row + 1, head // 2]
            np.testing.assert_allclose(out[row, head], expected, atol=1e-5)


def test_windows_that_overlap_score_every_token_once():
    objective = Objective(tiny(Path("/nowhere")).model())
    params = objective.init(0)
    document = np.random.default_rng(0).integers(3, 320, 150)
    uniform = score(lambda _, tokens: jnp.full(tokens[:, 1:].shape, math.log(2)), params, [document] * 2, 64, 32)
    assert uniform.bits == pytest.approx(300)
    np.testing.assert_allclose(uniform.nats_by_position, math.log(2), rtol=1e-6)
    losses = jax.jit(objective.token_losses)
    whole = score(losses, params, [document], 150, 150).bits
    tokens = jnp.asarray(np.concatenate([[BOS_ID], document]))[None]
    assert whole == pytest.approx(float(losses(params, tokens).sum()) / math.log(2), rel=1e-5)


def test_dropped_weights_keep_their_mean_and_norms_stay():
    params = {"embed.weight": jnp.ones((1000, 4)), "x.weight": jnp.ones((300, 300)), "norm.weight": jnp.ones(7)}
    noisy = drop_weights(params, 0.25, jax.random.key(0))
    assert float(noisy["x.weight"].mean()) == pytest.approx(1.0, abs=0.02)
    assert (noisy["norm.weight"] == 1).all()
    assert (noisy["embed.weight"].min(axis=1) == noisy["embed.weight"].max(axis=1)).all()
    assert drop_weights(params, 0.0, jax.random.key(0)) is params


def test_samples_go_on_from_their_prompts(tmp_path):
    config = tiny(tmp_path)
    tokenizer = train_tokenizer(["Anna was happy. " * 40 + "Tom wrote to the old captain."], 300, tmp_path)
    model = dataclasses.replace(config.model(), vocab_size=300)
    prompts = [[BOS_ID, *tokenizer.encode("Anna")], [BOS_ID, *tokenizer.encode("Tom wrote")]]
    params = Objective(model).init(0)
    texts = draw_samples(model, params, prompts, 20, 1.0, seed=3)
    assert texts == draw_samples(model, params, prompts, 20, 1.0, seed=3)
    for text, prompt in zip(texts, prompts, strict=True):
        assert text[: len(prompt)] == prompt
        assert len(text) <= 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"phases": ()}, "phases"), ({"phases": (Phase(1, 65, 1),)}, "max_position"), ({"drop": 1.0}, "drop")],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(Path("/nowhere"), **changes)
