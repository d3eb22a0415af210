"""Parameters in an Orbax checkpoint: ``params/`` inside a model directory, one flat dict keyed by dotted path."""

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sarathi_jax.config import ModelConfig
from sarathi_jax.weights.mapping import parameter_shapes
from sarathi_jax.weights.progress import bytes_bar
from sarathi_jax.weights.quantized import Put, place, put_on_default_device
from sarathi_jax.weights.safetensors import WeightsError

ARRAYS_DIRECTORY = "params"
_READ_BYTES = 256 * 10**6
"""Restored at a time: a restore costs some 20 ms whatever it reads."""


def is_orbax(directory: Path) -> bool:
    """Whether there are Orbax weights."""
    return (directory / ARRAYS_DIRECTORY).is_dir()


def stored_dtype(directory: Path) -> np.dtype:
    """Dtype of the first parameter of a checkpoint."""
    with ocp.Checkpointer(_handler(0)) as checkpointer:
        return np.dtype(next(iter(_metadata(checkpointer, directory).values())).dtype)


def load(
    directory: Path,
    config: ModelConfig,
    dtype: np.dtype,
    paths: Collection[str],
    quantized: Mapping[str, np.dtype],
    put: Put,
    progress: bool,
) -> dict[str, jax.Array]:
    """Loads the parameters of these paths, some hundred megabytes at a time: see `load_parameters` in `checkpoint`."""
    shapes = parameter_shapes(config)
    largest_bytes = max(math.prod(shape) for shape in shapes.values()) * 4
    with ocp.Checkpointer(_handler(largest_bytes)) as checkpointer:
        stored = _metadata(checkpointer, directory)
        missing, unused = sorted(shapes.keys() - stored.keys()), sorted(stored.keys() - shapes.keys())
        if missing or unused:
            raise WeightsError(
                f"{directory}: the weights do not fit config.json: missing parameters: {missing[:5]}, "
                f"unused parameters: {unused[:5]}; check that both are of the same model"
            )
        for path, shape in shapes.items():
            if tuple(stored[path].shape) != shape:
                raise WeightsError(
                    f"{directory}: parameter {path!r} has shape {tuple(stored[path].shape)}, but config.json implies "
                    f"{shape}; check that both are of the same model"
                )
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for path, shape in shapes.items()
            if path in paths
        }
        parameters = {}
        with bytes_bar("loading weights", sum(map(_num_bytes, wanted.values())), progress) as bar:
            for group in _groups(wanted):
                try:
                    restored = checkpointer.restore(
                        directory.absolute() / ARRAYS_DIRECTORY,
                        args=ocp.args.PyTreeRestore(
                            item=group,
                            restore_args={path: ocp.ArrayRestoreArgs(dtype=dtype, sharding=sharding) for path in group},
                            partial_restore=True,
                        ),
                    )
                except Exception as error:  # of many libraries: whatever it is, the files cannot be read
                    raise WeightsError(
                        f"{directory / ARRAYS_DIRECTORY} cannot be read ({error}); copy it again"
                    ) from error
                for path, array in restored.items():
                    stays = path not in quantized and put is put_on_default_device
                    parameters |= {path: array} if stays else place(path, np.asarray(array), quantized, put)
                bar.update(sum(map(_num_bytes, group.values())))
        return parameters


def write(directory: Path, parameters: Mapping[str, jax.Array]) -> None:
    """Writes the parameters under ``directory/params``, compressed, in a handful of files."""
    largest_bytes = max(array.nbytes for array in parameters.values())
    with ocp.Checkpointer(_handler(largest_bytes)) as checkpointer:
        checkpointer.save(directory.absolute() / ARRAYS_DIRECTORY, args=ocp.args.PyTreeSave(dict(parameters)))
    # Orbax writes down where it saved, which is nobody's business once the checkpoint is passed on.
    (directory / ARRAYS_DIRECTORY / "commit_success.txt").write_text("Committed.\n")


def _groups(wanted: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Cuts the parameters, in order, into groups of about `_READ_BYTES`."""
    group: dict[str, jax.ShapeDtypeStruct] = {}
    for path, struct in wanted.items():
        group[path] = struct
        if sum(map(_num_bytes, group.values())) >= _READ_BYTES:
            yield group
            group = {}
    if group:
        yield group


def _num_bytes(struct: jax.ShapeDtypeStruct) -> int:
    return math.prod(struct.shape) * struct.dtype.itemsize


def _handler(largest_bytes: int) -> Any:
    # Orbax refuses an array that does not fit into the limit of what is in flight.
    limit_gb = 1 + largest_bytes // 10**9
    return ocp.PyTreeCheckpointHandler(save_concurrent_gb=limit_gb, restore_concurrent_gb=limit_gb)


def _metadata(checkpointer: ocp.Checkpointer, directory: Path) -> dict[str, Any]:
    try:
        metadata = checkpointer.metadata(directory.absolute() / ARRAYS_DIRECTORY).item_metadata
    except Exception as error:
        raise WeightsError(f"{directory / ARRAYS_DIRECTORY} is no Orbax checkpoint ({error}); copy it again") from error
    stored = getattr(metadata, "tree", None)
    if not isinstance(stored, dict) or not stored or not all(hasattr(entry, "shape") for entry in stored.values()):
        raise WeightsError(
            f"{directory / ARRAYS_DIRECTORY} is no Orbax checkpoint of a flat dict of arrays; copy it again"
        )
    return stored
