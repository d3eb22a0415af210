"""XLA's compilations: kept on disk between runs, and counted."""

import os
import weakref
from pathlib import Path

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""Of JAX, for each program that XLA compiles or that comes from the compile cache."""


class CompileCounter:
    """Counts the programs that this process compiles or takes from the compile cache, for as long as it lives."""

    def __init__(self):
        self.count = 0
        # JAX keeps its listeners for ever: this one must neither keep the counter alive nor outlive it.
        this = weakref.ref(self)

        def on_event(event: str, duration_secs: float, **kwargs: str | int) -> None:
            counter = this()
            if counter is not None and event == COMPILE_EVENT:
                counter.count += 1

        jax.monitoring.register_event_duration_secs_listener(on_event)
        weakref.finalize(self, jax.monitoring.unregister_event_duration_listener, on_event)


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
