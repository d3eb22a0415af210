"""Lists what is supported: architectures, and the published models with a configuration under configs/models.

A model folder of a listed architecture loads whatever its size; the sizes below are checked tensor by tensor.
  PROGRAM models
"""

from collections.abc import Sequence

import yaml
from absl import flags

from sarathi_jax.cli.fields import UsageError
from sarathi_jax.resources import config_names, config_path

SUMMARY = "lists supported architectures and published models with their sizes"

_BYTES = 2  # of a bfloat16 number


def define(values: flags.FlagValues) -> None:
    """No flags of its own."""


def run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    # Here, so that --help is answered without waiting for jax.
    from sarathi_jax.weights.hf_config import SUPPORTED_ARCHITECTURES, model_config_from_hf
    from sarathi_jax.weights.mapping import num_parameters

    if arguments:
        raise UsageError(f"unexpected {arguments[0]!r}; this verb takes no arguments")
    print("Architectures: " + ", ".join(SUPPORTED_ARCHITECTURES))
    print("Formats: Hugging Face folders (config.json, *.safetensors, tokenizer) and Orbax checkpoints")
    rows = [("model", "published as", "parameters", "bf16 weights", "bf16 KV per 1k tokens", "context", "window")]
    for name in config_names("models"):
        document = yaml.safe_load(config_path("models", name).read_text())
        config = model_config_from_hf(document["config"])
        size = num_parameters(config)
        kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * _BYTES
        rows.append(
            (
                name,
                document["source"],
                f"{size / 1e9:.2f} B",
                f"{size * _BYTES / 1e9:.1f} GB",
                f"{1000 * kv_bytes / 1e6:.0f} MB",
                f"{config.max_position:,}",
                f"{config.cache_window:,}" if config.cache_window else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(left + right))
    return 0
