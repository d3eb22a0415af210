"""Files that ship with the package: the default checkpoint and the YAML under ``configs/``.

A checkout has them at its top level; an installed wheel carries them in ``sarathi_jax/_data/``.
"""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


class ResourceError(FileNotFoundError):
    """A file that should have come with the package is not there; the message says what is."""


def data_path(kind: str) -> Path:
    """Folder of shipped files: ``configs`` or ``checkpoints``.

    Raises:
      ResourceError: neither the checkout nor the installed package has it.
    """
    for root in (_PACKAGE / "_data", _PACKAGE.parent):
        if (root / kind).is_dir():
            return root / kind
    raise ResourceError(f"the folder {kind}/ did not come with this installation of sarathi_jax: install it again")


def checkpoint_path(name: str | None = None) -> Path:
    """Folder of a shipped checkpoint.

    Args:
      name: which one; None: the default, the only one that ships.

    Raises:
      ResourceError: there is none of that name, or none at all.
    """
    shipped = {path.name: path for path in sorted(data_path("checkpoints").iterdir()) if path.is_dir()}
    if name is None and len(shipped) == 1:
        return next(iter(shipped.values()))
    if name in shipped:
        return shipped[name]
    if not shipped:
        raise ResourceError(f"no checkpoint in {data_path('checkpoints')}: name a model folder, or train one")
    raise ResourceError(f"which checkpoint? {name!r} is none of {', '.join(shipped)}")


def config_names(kind: str) -> tuple[str, ...]:
    """Names of the shipped YAML files of a kind (``models``, ``deployments``, ``experiments``), sorted."""
    return tuple(sorted(path.stem for path in (data_path("configs") / kind).glob("*.yaml")))


def config_path(kind: str, name: str) -> Path:
    """Path of a shipped YAML file, such as ``config_path("models", "mistral-7b")``.

    Raises:
      ResourceError: there is no such file; names the nearest ones.
    """
    path = data_path("configs") / kind / f"{name}.yaml"
    if not path.is_file():
        known = config_names(kind)
        near = difflib.get_close_matches(name, known, n=3) or known
        raise ResourceError(f"no {kind} configuration {name!r}; there are {', '.join(near) or 'none'}")
    return path
