"""A model directory: its JSON and text files, and how a new one comes to be all at once or not at all."""

import atexit
import contextlib
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sarathi_jax.config import ConfigError, ModelConfig, read_yaml
from sarathi_jax.weights.hf_config import model_config_from_hf
from sarathi_jax.weights.safetensors import WeightsError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
# Travel with the weights from directory to directory.
_COMPANION_FILES = (
    GENERATION_FILE,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConfigError: the file is missing, unreadable or holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return fields


def load_model_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The model of a directory in either format, from its ``config.json`` and ``generation_config.json``.

    Raises:
      ConfigError: no such file, or a model that is not supported; the message names the file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory: give the directory that holds config.json and the weights")
    fields = read_json(directory / CONFIG_FILE)
    generation = directory / GENERATION_FILE
    try:
        return model_config_from_hf(fields, read_json(generation) if generation.exists() else None)
    except ConfigError as error:
        raise ConfigError(f"{directory}: {error}") from error


def load_model_yaml(path: str | os.PathLike[str]) -> ModelConfig:
    """A model of ``configs/models``: ``source`` (the published repository) and ``config`` (its ``config.json``).

    Raises:
      ConfigError: a malformed file, an unknown key or a model that is not supported.
    """
    path = Path(path)
    document = read_yaml(path)
    if set(document) != {"source", "config"}:
        keys = sorted(map(str, document))
        raise ConfigError(f"{path} must have exactly the keys source and config, it has {keys!r}")
    if not isinstance(document["config"], Mapping):
        raise ConfigError(f"{path}: config must hold the fields of a config.json")
    try:
        return model_config_from_hf(document["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer, chat template and generation defaults, as far as there are any."""
    for name in _COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def check_target(target: Path) -> None:
    """Refuses a target that holds something already.

    Raises:
      WeightsError: it does.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise WeightsError(f"{target} exists and is not an empty directory: choose another target or remove it first")


@contextlib.contextmanager
def new_directory(target: str | os.PathLike[str], needed_bytes: int = 0) -> Iterator[Path]:
    """Lends an empty temporary sibling that becomes `target` when the block ends well and vanishes when it does not.

    Args:
      target: where the directory shall appear; it must not exist, or be empty.
      needed_bytes: refuse at once where the disk has less room than this.

    Raises:
      WeightsError: `target` is not empty, or the disk is or becomes full.
    """
    target = Path(target).absolute()
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed_bytes:
        raise WeightsError(
            f"{target.parent} has {free_bytes / 1e9:.2f} GB free, {target.name} needs {needed_bytes / 1e9:.2f} GB: "
            "free some room or choose another disk; nothing was written"
        )
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        partial.replace(target)
    except BaseException as error:
        _remove(partial)
        if _is_disk_full(error):
            raise WeightsError(
                f"the disk of {target.parent} is full: free some room or choose another disk; what was half written "
                "is removed and the source is untouched"
            ) from error
        raise


def _remove(directory: Path) -> None:
    # Threads of a writer that failed may still be adding files, and make the directory anew for them: it is gone when
    # it has stayed away for a second, or when nothing runs any more.
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    away = 0
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        away = 0 if directory.exists() else away + 1
        if away == 10:
            return
        time.sleep(0.1)


def _is_disk_full(error: BaseException) -> bool:
    # Orbax reports it as text from another library, sometimes within a group of errors.
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(seen) for text in ("No space left on device", "ENOSPC", "Disk quota exceeded")):
            return True
        if isinstance(seen, BaseExceptionGroup) and any(map(_is_disk_full, seen.exceptions)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
