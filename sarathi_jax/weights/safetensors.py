"""Reads and writes safetensors files piece by piece.

A file is a little-endian u64 (length of the header in bytes), a JSON header ``{name: {dtype, shape, data_offsets}}``
and the raw little-endian tensors. The files are read with plain reads, not mapped: mapped pages stay resident, so that
loading a model would show twice its weights.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

PIECE_BYTES = 32 * 2**20  # read, cast and written at a time
_MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
_FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_NAMES = {np.dtype(dtype): name for name, dtype in _FLOATS.items()}


class WeightsError(ValueError):
    """Weights that cannot be read or written; the message names the file or tensor and the remedy."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
      path: the file.
      dtype: as the format names it, e.g. ``BF16``.
      begin, end: position in the file, in bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """Its dtype in numpy.

        Raises:
          WeightsError: an integer, quantised or otherwise unsupported dtype.
        """
        if self.dtype not in _FLOATS:
            raise WeightsError(
                f"{self.path}: tensor {self.name!r} has dtype {self.dtype}; only {', '.join(_FLOATS)} can be loaded "
                "(quantised checkpoints are not supported: use the original weights)"
            )
        return np.dtype(_FLOATS[self.dtype])


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name.

    Raises:
      WeightsError: the file is missing, truncated or not in this format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(b"version "):
                raise WeightsError(f"{path} is a Git LFS pointer, not the weights: fetch them with 'git lfs pull'")
            if len(start) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise WeightsError(
                    f"{path} is truncated or no safetensors file: {size} bytes, header of {length}; download it again"
                )
            header = json.loads(file.read(length))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}; download the missing file again") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} has a corrupt header ({error}); download it again") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} has a corrupt header (no JSON object); download it again")
    header.pop("__metadata__", None)
    tensors = {name: _stored_tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((tensor.end for tensor in tensors.values()), default=8 + length)
    if end != size:
        kind = "truncated" if end > size else "corrupt"
        raise WeightsError(f"{path} is {kind}: its header promises {end} bytes, it has {size}; download it again")
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) and begin <= end
        if sound and dtype in _FLOATS:
            sound = end - begin == math.prod(shape) * np.dtype(_FLOATS[dtype]).itemsize
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise WeightsError(f"{path} has a corrupt header: tensor {name!r} is described as {entry!r}; download it again")
    return StoredTensor(path, name, dtype, shape, data_start + begin, data_start + end)


def pieces(region: np.ndarray, piece_bytes: int = PIECE_BYTES) -> Iterator[np.ndarray]:
    """Views that cover an array in row-major order, each of at most `piece_bytes` (or one row of the last axis)."""
    if region.nbytes <= piece_bytes or region.ndim <= 1:
        yield region
        return
    row_bytes = region.nbytes // len(region)
    if row_bytes > piece_bytes:
        for row in region:
            yield from pieces(row, piece_bytes)
        return
    step = piece_bytes // row_bytes
    for first in range(0, len(region), step):
        yield region[first : first + step]


def read_into(tensor: StoredTensor, region: np.ndarray) -> Iterator[int]:
    """Fills `region`, of as many elements, with a tensor cast to the region's dtype; yields the bytes of each piece.

    Raises:
      WeightsError: the dtype is not supported or the file cannot be read.
    """
    dtype = tensor.numpy_dtype
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.begin)
            for piece in pieces(region):
                direct = piece.dtype == dtype and piece.flags.c_contiguous
                buffer = piece if direct else np.empty(piece.shape, dtype)
                if not _read_exactly(file, buffer):
                    raise WeightsError(f"{tensor.path} ended inside tensor {tensor.name!r}; download it again")
                if not direct:
                    piece[...] = buffer
                yield buffer.nbytes
    except OSError as error:
        raise WeightsError(f"cannot read {tensor.path}: {error.strerror}") from error


def equals(tensor: StoredTensor, array: np.ndarray) -> bool:
    """Whether a tensor, cast to the array's dtype, holds the array's values; read piece by piece.

    Raises:
      WeightsError: the dtype is not supported or the file cannot be read.
    """
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.begin)
        for piece in pieces(array):
            buffer = np.empty(piece.shape, tensor.numpy_dtype)
            if not _read_exactly(file, buffer):
                raise WeightsError(f"{tensor.path} ended inside tensor {tensor.name!r}; download it again")
            if not np.array_equal(buffer.astype(piece.dtype), piece):
                return False
    return True


def _read_exactly(file: BinaryIO, buffer: np.ndarray) -> bool:
    left = memoryview(buffer.reshape(-1).view(np.uint8))
    while left:
        got = file.readinto(left)  # pyright: ignore[reportAttributeAccessIssue] (unbuffered files have it)
        if not got:
            return False
        left = left[got:]
    return True


def write_file(
    path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: np.dtype, arrays: Iterable[np.ndarray]
) -> Iterator[int]:
    """Writes a file; yields the bytes of each piece written.

    Args:
      path: the file.
      tensors: name and shape of every tensor, in the order of `arrays`.
      dtype: of all of them.
      arrays: their values, in views of any shape with as many elements; taken one at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # readers written for torch insist on this entry
    begin = 0
    for name, shape in tensors.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for array in arrays:
            for piece in pieces(array):
                file.write(np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data)
                yield piece.nbytes
