"""Runs `hf_reference.py` over tiny models, in the environment that has torch."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.tiny_models import NUM_DECODES, tiny_prompts, write_tiny_model

SCRIPT = Path(__file__).with_name("hf_reference.py")
VARIABLE = "SARATHI_ORACLE_PYTHON"


def oracle_python() -> str | None:
    """The Python with torch and transformers, named by the environment, or None."""
    return os.environ.get(VARIABLE)


def run_reference(names: Sequence[str], root: Path) -> None:
    """Writes ``root/published/NAME``, ``root/resaved/NAME`` and ``root/NAME.npz`` for every tiny model named.

    Args:
      names: keys of `tests.tiny_models.TINY`.
      root: a directory to fill.

    Raises:
      RuntimeError: no Python is named, or the script failed; with the end of what it said.
    """
    python = oracle_python()
    if python is None:
        raise RuntimeError(f"set {VARIABLE} to a Python that has torch and transformers (make test-oracle does)")
    models = [
        {
            "directory": str(write_tiny_model(name, root / "published" / name)),
            "resave": str(root / "resaved" / name),
            "output": str(root / f"{name}.npz"),
        }
        for name in names
    ]
    job = root / "job.json"
    job.write_text(json.dumps({"prompts": tiny_prompts(), "num_decodes": NUM_DECODES, "models": models}))
    # Nothing of our environment may leak into that one, and nothing may be downloaded.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run([python, str(SCRIPT), str(job)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{SCRIPT.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
