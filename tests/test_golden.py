"""Agreement with the committed logits of Hugging Face transformers, without torch. See tests/oracle for the live test.

Max absolute error under 2e-4 of the logits' scale at every kept position, and the same greedy tokens, in float32.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from sarathi_jax.config import ModelConfig, RopeConfig
from sarathi_jax.weights.checkpoint import save_orbax
from sarathi_jax.weights.mapping import hf_tensors, is_tolerated
from tests.agreement import forward_error, longest_first
from tests.forward import PagedModel, load_model
from tests.golden_file import DIRECTORY, TOLERANCE, read_golden
from tests.tiny_models import NUM_DECODES, PROMPT_LENGTHS, TINY, tensor_shapes, write_tiny_model

MAX_LEN = max(PROMPT_LENGTHS) + NUM_DECODES + 1
MAX_GOLDEN_BYTES = 3_000_000
QUICK = ("qwen2-yarn-mixed", "falcon-40b")
"""Between them: windows in some layers, yarn, biases, tied and untied heads, both architectures."""

NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TINY]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory):
    """Writes a tiny model once and returns its directory."""
    root = tmp_path_factory.mktemp("published")
    return functools.cache(lambda name: write_tiny_model(name, root / name))


def through_orbax(published: Path, directory: Path) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """What comes back of a model that was saved as Orbax."""
    config, params = load_model(published)
    save_orbax(directory, config, params)
    return load_model(directory)


def test_every_family_has_golden_values_of_a_modest_size():
    files = sorted(DIRECTORY.glob("*.npz"))
    assert {file.stem for file in files} == set(TINY)
    assert sum(file.stat().st_size for file in DIRECTORY.rglob("*") if file.is_file()) <= MAX_GOLDEN_BYTES


@pytest.mark.parametrize("name", TINY)
def test_published_tensors_are_those_we_map(published, name: str):
    config, _ = load_model(published(name))
    shapes = tensor_shapes(TINY[name])
    needed = hf_tensors(config)
    assert needed == {tensor: shape for tensor, shape in shapes.items() if not is_tolerated(tensor, config)}


@pytest.mark.parametrize("name", NAMES)
def test_logits_in_every_batch_and_chunk_size(published, tmp_path: Path, name: str):
    config, params = load_model(published(name))
    model, expected = PagedModel(config, params, MAX_LEN), longest_first(read_golden(name))
    chunk_sizes = (64, 16, 7, 1)
    for num_texts in range(1, len(expected) + 1):
        chunk_size = chunk_sizes[num_texts % len(chunk_sizes)]
        error = forward_error(model, expected[:num_texts], chunk_size)
        assert error <= TOLERANCE, f"{num_texts} texts in chunks of {chunk_size}"
    orbax_config, orbax_params = through_orbax(published(name), tmp_path / "orbax")
    assert orbax_config == config
    assert forward_error(model.with_params(orbax_params), expected, 16) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "falcon-7b"])
def test_logits_with_the_specified_attention(published, name: str):
    """The reference backend, which runs step by step: two prompts, one longer than the window."""
    config, params = load_model(published(name))
    model, whole = PagedModel(config, params, 32, "reference"), read_golden(name)[:2]
    logits = model.logits([one.prompt for one in whole], [one.prompt_length for one in whole], 16)
    for one, ours in zip(whole, logits, strict=True):
        kept = one.positions < one.prompt_length
        error = np.abs(ours[one.positions[kept]] - one.logits[kept]).max()
        assert error <= TOLERANCE * np.abs(one.logits).max()


def _rope(**changes):
    return lambda config: dataclasses.replace(config, rope=dataclasses.replace(config.rope, **changes))


def _windows(*windows):
    return lambda config: dataclasses.replace(config, windows=windows)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("mistral", _windows(25, 25, 25), id="window-one-wider"),
        pytest.param("mistral", _windows(23, 23, 23), id="window-one-narrower"),
        pytest.param("qwen2-yarn-mixed", _windows(24, 24, 24), id="window-in-every-layer"),
        pytest.param("llama3.1", _rope(scaling=None), id="no-llama3-scaling"),
        pytest.param("llama-linear", _rope(factor=2.0), id="half-the-linear-scaling"),
        pytest.param("llama-yarn", _rope(attention_factor=1.0), id="no-yarn-temperature"),
        pytest.param("falcon-11b", lambda config: dataclasses.replace(config, rope=RopeConfig()), id="falcon-theta"),
    ],
)
def test_golden_values_can_tell_a_wrong_model(published, name: str, change):
    """A small mistake in the maths is far outside the tolerance, so the tests above would see it."""
    config, params = load_model(published(name))
    wrong: ModelConfig = change(config)
    longest = longest_first(read_golden(name))[0]
    (logits,) = PagedModel(wrong, params, MAX_LEN).logits([longest.tokens], [longest.prompt_length], 64)
    assert longest.error_of(logits) > 10 * TOLERANCE
