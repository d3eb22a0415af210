"""XLA's compilations: kept on disk between runs, and counted."""

import os
from pathlib import Path

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts the programs that this process compiles or takes from the compile cache, from now on."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == _COMPILE_EVENT


def use_compile_cache(directory: Path | None = None) -> Path:
    """Keeps compiled programs on disk, so that the next start is quick; a directory that JAX already has is kept.

    Args:
      directory: None: ``$XDG_CACHE_HOME/sarathi_jax/xla``, by default below ``~/.cache``.

    Returns:
      The directory in use.
    """
    current = jax.config.jax_compilation_cache_dir
    if current:
        return Path(current)
    if directory is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sarathi_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # Small programs are worth keeping too: a model has a dozen of them and a start compiles them all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return directory
