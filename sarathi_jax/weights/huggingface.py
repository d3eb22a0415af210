"""Parameters in a Hugging Face directory: one safetensors file, or shards with an index."""

from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import numpy as np

from sarathi_jax.config import ConfigError, ModelConfig
from sarathi_jax.weights import safetensors
from sarathi_jax.weights.buffers import aligned_empty
from sarathi_jax.weights.directory import read_json, write_json
from sarathi_jax.weights.mapping import HEAD_TENSOR, ParameterSource, hf_tensors, is_tolerated, parameter_sources
from sarathi_jax.weights.progress import bytes_bar
from sarathi_jax.weights.quantized import Put, place
from sarathi_jax.weights.safetensors import StoredTensor, WeightsError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_NAMED = 5  # tensors listed in an error message


def is_huggingface(directory: Path) -> bool:
    """Whether there are safetensors weights in the layout of Hugging Face."""
    return (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists()


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the headers alone.

    Raises:
      WeightsError: a file is missing or corrupt, or the index does not fit the files.
    """
    if (directory / SINGLE_FILE).exists():
        return safetensors.read_header(directory / SINGLE_FILE)
    index = directory / INDEX_FILE
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError as error:
        raise WeightsError(f"{error}; download the index again") from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise WeightsError(f"{index} has no 'weight_map' from tensor names to files beside it; download it again")
    files = {file: safetensors.read_header(directory / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise WeightsError(f"{index} says that {name!r} is in {file}, but it is not; download both again")
    unlisted = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    return unlisted | {name: files[file][name] for name, file in weight_map.items()}


def check_tensors(stored: Mapping[str, StoredTensor], config: ModelConfig, directory: Path) -> None:
    """Refuses a checkpoint that does not fit the model: missing or unused tensors, wrong shapes, wrong dtypes.

    Raises:
      WeightsError: the message names the tensors, what was expected and what was found.
    """
    expected = hf_tensors(config)
    missing = [name for name in expected if name not in stored]
    unused = [name for name in stored if name not in expected and not is_tolerated(name, config)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unused:
        problems.append(f"{len(unused)} tensors belong to nothing in the model: {_some(unused)}")
    if problems:
        raise WeightsError(
            f"{directory}: the weights do not fit config.json: {'; '.join(problems)}. Check that both are of the same "
            "model and that every file is there"
        )
    for name, shape in expected.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise WeightsError(
                f"{tensor.path}: tensor {name!r} has shape {tensor.shape}, but config.json implies {shape}; check that "
                "both are of the same model"
            )
        _ = tensor.numpy_dtype  # raises for a dtype that cannot be loaded


def load(
    directory: Path,
    config: ModelConfig,
    dtype: np.dtype,
    paths: Collection[str],
    quantized: Mapping[str, np.dtype],
    put: Put,
    progress: bool,
) -> dict[str, jax.Array]:
    """Loads the parameters of these paths, one at a time: see `sarathi_jax.weights.checkpoint.load_parameters`."""
    stored = stored_tensors(directory)
    check_tensors(stored, config, directory)
    parameters = {}
    sources = [source for source in parameter_sources(config) if source.path in paths]
    tensors = [stored[part.tensor_name] for source in sources for part in source.parts]
    num_bytes = sum(tensor.end - tensor.begin for tensor in tensors)
    with bytes_bar("loading weights", num_bytes, progress) as bar:
        for source in sources:
            buffer = aligned_empty(source.shape, dtype)
            for part in source.parts:
                for read_bytes in safetensors.read_into(stored[part.tensor_name], part.region(buffer)):
                    bar.update(read_bytes)
            if source.path == "embed.weight" and config.tie_embeddings and HEAD_TENSOR in stored:
                _check_tied_head(stored[HEAD_TENSOR], buffer)
            parameters |= place(source.path, buffer, quantized, put)
    return parameters


def write(
    directory: Path, config: ModelConfig, parameters: Mapping[str, jax.Array], shard_bytes: int, progress: bool
) -> None:
    """Writes the weights in as few files of at most `shard_bytes` as a greedy filling gives, with an index if many.

    The tensors of one parameter stay in one file; a parameter larger than `shard_bytes` has a file to itself.
    """
    dtype = np.dtype(parameters["embed.weight"].dtype)
    shards: list[list[ParameterSource]] = [[]]
    filled_bytes = 0
    for source in parameter_sources(config):
        num_bytes = source.size * dtype.itemsize
        if shards[-1] and filled_bytes + num_bytes > shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(source)
        filled_bytes += num_bytes
    total_bytes = sum(source.size for shard in shards for source in shard) * dtype.itemsize
    weight_map: dict[str, str] = {}
    with bytes_bar("writing weights", total_bytes, progress) as bar:
        for number, shard in enumerate(shards, 1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            shapes = {part.tensor_name: part.tensor_shape for source in shard for part in source.parts}
            weight_map |= dict.fromkeys(shapes, file)
            regions = (
                part.region(host)
                for source in shard
                for host in (np.asarray(parameters[source.path]),)
                for part in source.parts
            )
            for written_bytes in safetensors.write_file(directory / file, shapes, dtype, regions):
                bar.update(written_bytes)
    if len(shards) > 1:
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _check_tied_head(head: StoredTensor, embedding: np.ndarray) -> None:
    if head.shape != embedding.shape or not safetensors.equals(head, embedding):
        raise WeightsError(
            f"{head.path}: config.json ties the output head to the embedding, but {HEAD_TENSOR!r} differs from it; "
            "if the model has a head of its own, set tie_word_embeddings to false in config.json"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
