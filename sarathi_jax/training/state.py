"""Training state on disk: parameters, optimiser and step in Orbax, the losses beside them in a line each.

Orbax renames a finished folder into place, so a kill leaves the last whole state; the losses of steps after it are cut
off when the run resumes.
"""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sarathi_jax.config import ConfigError

_LOSSES, _IDENTITY = "losses.jsonl", "run.json"


class StateStore:
    """The folder of one run.

    Args:
      folder: made if it does not exist.
      identity: what must not change between a run and its continuation, as JSON values.

    Raises:
      ConfigError: the folder belongs to another run.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._losses = folder.absolute(), folder / _LOSSES
        mark = folder / _IDENTITY
        if mark.exists():
            found = json.loads(mark.read_text())
            changed = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
            if changed:
                raise ConfigError(
                    f"{folder} holds the state of another run (different: {', '.join(changed)}): "
                    "remove that folder or name another one"
                )
        else:
            mark.write_text(json.dumps(identity, indent=2) + "\n")
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder / "states", options=options)

    def restore(self, fresh: Any) -> tuple[int, Any]:
        """The number of steps done and the newest state; where none was saved, 0 and the fresh one.

        Args:
          fresh: the state before the first step, whose structure the saved one has.
        """
        step = self._manager.latest_step()
        if step is None:
            self._keep_losses_before(0)
            return 0, fresh
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        self._keep_losses_before(step)
        return step, state

    def save(self, step: int, state: Any) -> None:
        """Saves the state after `step` steps; returns when it is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def log(self, row: dict[str, float]) -> None:
        """Appends one line of numbers; `row` names its step."""
        with self._losses.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, float]]:
        """What was logged, in order; a line cut short by a kill is left out."""
        rows = []
        for line in self._losses.read_text().splitlines() if self._losses.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def close(self) -> None:
        self._manager.close()

    def _keep_losses_before(self, step: int) -> None:
        kept = [row for row in self.rows() if row["step"] < step]
        partial = self._losses.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self._losses)
