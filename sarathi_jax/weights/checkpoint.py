"""Parameters as a flat dict keyed by dotted path: loaded, saved, or drawn at random."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sarathi_jax.config import DTYPES, ConfigError, Dtype, ModelConfig, Quantization
from sarathi_jax.models.model import ModelFunction
from sarathi_jax.weights import huggingface, orbax
from sarathi_jax.weights.buffers import aligned_empty
from sarathi_jax.weights.directory import CONFIG_FILE, copy_companions, load_model_config, new_directory, write_json
from sarathi_jax.weights.hf_config import model_config_to_hf
from sarathi_jax.weights.mapping import num_parameters, parameter_shapes, parameter_sources
from sarathi_jax.weights.quantized import Put, place, put_on_default_device
from sarathi_jax.weights.safetensors import WeightsError, pieces

__all__ = ["load_model_config", "load_parameters", "random_parameters", "save_hf", "save_orbax", "stored_dtype"]

DEFAULT_SHARD_BYTES = 5 * 10**9
_INITIAL_STD = 0.02  # of random weights; the initializer_range that the published models share


def load_parameters(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    dtype: Dtype,
    *,
    quantization: Quantization | None = None,
    put: Put = put_on_default_device,
    layers: range | None = None,
    progress: bool = True,
) -> dict[str, jax.Array]:
    """Loads the weights of a Hugging Face or Orbax directory.

    Tensors are streamed one at a time, cast on the way and, on CPU, read straight into the memory they stay in: the
    peak of host memory is the weights plus far less than 2 GB.

    Args:
      directory: holds ``config.json`` and the weights.
      config: the model, usually `load_model_config(directory)`.
      dtype: of the result; float16, bfloat16 and float32 files are cast.
      quantization: makes the weights of products 8 bits wide on the way (`EngineConfig.quantization`).
      put: brings the values of a path to where they are served.
      layers: those of one stage of a pipeline, whose parameters alone are read; None: all.
      progress: show a progress bar.

    Returns:
      Arrays by dotted path, shapes as in `parameter_shapes`; each quantised weight with its scales beside it.

    Raises:
      WeightsError: files missing, truncated or corrupt; tensors missing, unused, of a wrong shape or dtype.
    """
    directory = Path(directory)
    wanted = ModelFunction(config, _numpy_dtype(dtype), quantization, layers=layers)
    load = orbax.load if _is_orbax(directory) else huggingface.load
    return load(directory, config, _numpy_dtype(dtype), wanted.shapes.keys(), wanted.quantized, put, progress)


def stored_dtype(directory: str | os.PathLike[str], config: ModelConfig) -> Dtype:
    """The dtype that holds every stored value exactly: bfloat16 if all tensors are, else float32.

    Raises:
      WeightsError: as `load_parameters`.
    """
    directory = Path(directory)
    if _is_orbax(directory):
        stored = {orbax.stored_dtype(directory)}
    else:
        tensors = huggingface.stored_tensors(directory)
        huggingface.check_tensors(tensors, config, directory)
        stored = {tensor.numpy_dtype for tensor in tensors.values()}
    return "bfloat16" if stored == {np.dtype(jnp.bfloat16)} else "float32"


def save_orbax(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    parameters: Mapping[str, jax.Array],
    *,
    companions_from: str | os.PathLike[str] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Saves a self-contained Orbax directory: ``config.json``, the tokenizer files and ``params/``; all or nothing.

    Args:
      directory: to be made; must not exist or be empty.
      config: the model.
      parameters: arrays by dotted path, of one dtype.
      companions_from: a directory whose tokenizer, chat template and generation defaults are copied.
      fields: of ``config.json``, if it shall be another than `model_config_to_hf(config)`.

    Raises:
      WeightsError: the directory is not empty, the disk is full, or the parameters do not fit the model.
    """
    with new_directory(directory) as partial:
        _write_beside(partial, config, parameters, companions_from, fields)
        orbax.write(partial, parameters)


def save_hf(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    parameters: Mapping[str, jax.Array],
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    companions_from: str | os.PathLike[str] | None = None,
    fields: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> None:
    """Saves a Hugging Face directory (safetensors, sharded with an index beyond `shard_bytes`); all or nothing.

    The other arguments and the errors are those of `save_orbax`.
    """
    itemsize = max((array.dtype.itemsize for array in parameters.values()), default=0)
    with new_directory(directory, num_parameters(config) * itemsize) as partial:
        _write_beside(partial, config, parameters, companions_from, fields)
        huggingface.write(partial, config, parameters, shard_bytes, progress)


def random_parameters(
    config: ModelConfig,
    dtype: Dtype,
    seed: int,
    quantization: Quantization | None = None,
    put: Put = put_on_default_device,
    layers: range | None = None,
) -> dict[str, jax.Array]:
    """Random weights for measurements: matrices of standard deviation 0.02, unit norms, zero biases.

    They are drawn on the host (uniform: far quicker than normal, and nothing is compiled), each parameter from a
    generator of its own, so that a seed gives the same weights on every device and in every stage.
    """
    wanted = ModelFunction(config, _numpy_dtype(dtype), quantization, layers=layers)
    paths, quantized = wanted.shapes.keys(), wanted.quantized
    parameters = {}
    for i, source in enumerate(parameter_sources(config)):
        if source.path not in paths:
            continue
        generator = np.random.default_rng([seed, i])
        buffer = aligned_empty(source.shape, _numpy_dtype(dtype))
        if source.path.endswith("norm.weight"):
            buffer[...] = 1
        elif source.path.endswith(".bias"):
            buffer[...] = 0
        else:
            for piece in pieces(buffer):
                values = generator.random(piece.shape, np.float32)
                values -= 0.5
                values *= _INITIAL_STD * np.sqrt(np.float32(12))  # a uniform variable has variance width^2 / 12
                piece[...] = values
        parameters |= place(source.path, buffer, quantized, put)
    return parameters


def _is_orbax(directory: Path) -> bool:
    """Which format a directory has: True for Orbax, False for Hugging Face."""
    if orbax.is_orbax(directory) and huggingface.is_huggingface(directory):
        raise WeightsError(f"{directory} holds both Orbax and safetensors weights: remove one of them")
    if orbax.is_orbax(directory):
        return True
    if huggingface.is_huggingface(directory):
        return False
    if not directory.is_dir():
        raise WeightsError(f"{directory} is not a directory: give the one that holds config.json and the weights")
    found = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if found:
        raise WeightsError(f"{directory} holds {found[0]}, which is not loaded: save the model as safetensors first")
    raise WeightsError(
        f"{directory} holds no weights: expected {huggingface.SINGLE_FILE}, {huggingface.INDEX_FILE} with its shards, "
        f"or the Orbax directory {orbax.ARRAYS_DIRECTORY}/"
    )


def _write_beside(
    directory: Path,
    config: ModelConfig,
    parameters: Mapping[str, jax.Array],
    companions_from: str | os.PathLike[str] | None,
    fields: Mapping[str, Any] | None,
) -> None:
    """Checks the parameters and writes everything but the arrays."""
    shapes = parameter_shapes(config)
    if parameters.keys() != shapes.keys():
        raise WeightsError(f"parameters do not fit the model: {sorted(parameters.keys() ^ shapes.keys())[:5]}")
    for path, shape in shapes.items():
        if parameters[path].shape != shape:
            raise WeightsError(f"parameter {path!r} has shape {parameters[path].shape}, the model needs {shape}")
    dtypes = {str(array.dtype) for array in parameters.values()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise WeightsError(f"parameters must all be of one dtype, {' or '.join(DTYPES)}; they are {sorted(dtypes)}")
    fields = model_config_to_hf(config) if fields is None else fields
    kept = {key: value for key, value in fields.items() if key not in ("dtype", "torch_dtype")}
    write_json(directory / CONFIG_FILE, kept | {"torch_dtype": dtypes.pop()})
    if companions_from is not None:
        copy_companions(Path(companions_from), directory)


def _numpy_dtype(dtype: Dtype) -> np.dtype:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    return np.dtype(jnp.dtype(dtype))
