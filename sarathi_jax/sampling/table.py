"""`SamplingTable`: the sampling parameters of the running sequences, one entry a device row."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sarathi_jax.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from sarathi_jax.sequence import Sequence

MAX_EOS_TOKEN_IDS = 16
MAX_BANNED_IDS = MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS

# Float32 range in which a parameter's products and quotients with ordinary logits stay finite.
_SMALLEST, _LARGEST = 1e-30, 1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParamsArrays:
    """Device copy of the table; R rows, V tokens of the model. Fields mean what those of `SamplingParams` do.

    Attributes:
      temperature: f32[R]; 0 is greedy.
      top_k: i32[R]; 0: all.
      top_p, min_p: f32[R].
      seed: u32[R].
      sample_index: i32[R]; which of the request's `n` samples.
      repetition_penalty, presence_penalty, frequency_penalty: f32[R].
      num_prompt: i32[R]; tokens of the prompt.
      min_tokens: i32[R].
      stop_ids: i32[R, MAX_BANNED_IDS]; never drawn while fewer than `min_tokens` are out; unused entries are -1.
      bias_ids, bias_values: i32, f32[R, MAX_LOGIT_BIAS]; used entries first, unused ids are -1.
      wants_logprobs, wants_prompt_logprobs: i32[R]; -1: none, else the length of the top list.
      is_masked: i32[R]; 1 where only the tokens of `allowed` may be drawn.
      allowed: i32[R, ceil(V / 32)]; a bit for each token, the lowest first.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    seed: jax.Array
    sample_index: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    num_prompt: jax.Array
    min_tokens: jax.Array
    stop_ids: jax.Array
    bias_ids: jax.Array
    bias_values: jax.Array
    wants_logprobs: jax.Array
    wants_prompt_logprobs: jax.Array
    is_masked: jax.Array
    allowed: jax.Array


# What a row holds when nothing runs in it: greedy, and asking for nothing. In `allowed`, one word for as many as the
# vocabulary needs.
_NEUTRAL: dict[str, Any] = {
    "temperature": np.float32(0),
    "top_k": np.int32(0),
    "top_p": np.float32(1),
    "min_p": np.float32(0),
    "seed": np.uint32(0),
    "sample_index": np.int32(0),
    "repetition_penalty": np.float32(1),
    "presence_penalty": np.float32(0),
    "frequency_penalty": np.float32(0),
    "num_prompt": np.int32(0),
    "min_tokens": np.int32(0),
    "stop_ids": np.full(MAX_BANNED_IDS, -1, np.int32),
    "bias_ids": np.full(MAX_LOGIT_BIAS, -1, np.int32),
    "bias_values": np.zeros(MAX_LOGIT_BIAS, np.float32),
    "wants_logprobs": np.int32(-1),
    "wants_prompt_logprobs": np.int32(-1),
    "is_masked": np.int32(0),
    "allowed": np.int32(-1),
}


class SamplingTable:
    """Host side of the sampling parameters: a running sequence owns a row, every other row is neutral.

    Args:
      num_rows: sequences that may run at once.
      vocab_size: tokens of the model.
    """

    def __init__(self, num_rows: int, vocab_size: int):
        self.num_rows = num_rows
        self.vocab_size = vocab_size
        self._neutral = _neutral(vocab_size)
        self._fields = {name: np.repeat(value[None], num_rows, 0) for name, value in self._neutral.items()}
        self._changed = set(self._fields)

    def set_row(self, row: int, sequence: Sequence) -> None:
        """Fills a row with the parameters of the sequence that runs in it.

        Args:
          row: in [0, num_rows).
          sequence: its request, sample index and prompt length are read. Any token may be drawn, until `set_mask`.
        """
        self._write(row, _row_values(sequence, self.vocab_size))

    def set_mask(self, row: int, allowed: np.ndarray) -> None:
        """Lets only some tokens be drawn in a row.

        Args:
          row: in [0, num_rows).
          allowed: i32[ceil(V / 32)], a bit for each token, the lowest first; copied.
        """
        self._write(row, {"is_masked": np.int32(1), "allowed": allowed})

    def clear_row(self, row: int) -> None:
        """Makes a row neutral; a row that no step names as active may also be left as it is."""
        self._write(row, self._neutral)

    def changes(self) -> dict[str, np.ndarray]:
        """The fields of which a row changed since the last call, whole; at first, all. Copies, for a
        `SamplingMirror`.

        Most steps change nothing, and nor does the arrival of a greedy request that wishes for nothing more.
        """
        changes = {name: self._fields[name].copy() for name in sorted(self._changed)}
        self._changed.clear()
        return changes

    def _write(self, row: int, values: dict[str, Any]) -> None:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} is outside the sampling table of {self.num_rows} rows")
        for name, value in values.items():
            if not np.array_equal(self._fields[name][row], value):
                self._fields[name][row] = value
                self._changed.add(name)


class SamplingMirror:
    """Device side of the sampling parameters.

    Args:
      put: brings an array to the devices, all of it to each; the array is not changed any more.
    """

    def __init__(self, put: Callable[[np.ndarray], jax.Array]):
        self._put = put
        self._fields: dict[str, jax.Array] = {}
        self._arrays: SamplingParamsArrays | None = None

    def update(self, changes: Mapping[str, np.ndarray]) -> SamplingParamsArrays:
        """Follows the table; the same object as before where nothing changed.

        Args:
          changes: what `SamplingTable.changes` returned, each time once.
        """
        if changes or self._arrays is None:
            self._fields |= {name: self._put(values) for name, values in changes.items()}
            self._arrays = SamplingParamsArrays(**self._fields)
        return self._arrays


def sampling_shapes(num_rows: int, vocab_size: int) -> SamplingParamsArrays:
    """The arrays of so many rows as shapes, for tracing."""
    fields = _neutral(vocab_size)
    return jax.eval_shape(
        lambda: SamplingParamsArrays(
            **{name: jnp.zeros((num_rows, *value.shape), value.dtype) for name, value in fields.items()}
        )
    )


def _neutral(vocab_size: int) -> dict[str, np.ndarray]:
    """The values of a row in which nothing runs."""
    values = {name: np.asarray(value) for name, value in _NEUTRAL.items()}
    return values | {"allowed": np.full(-(-vocab_size // 32), _NEUTRAL["allowed"])}


def _row_values(sequence: Sequence, vocab_size: int) -> dict[str, Any]:
    request, params = sequence.request, sequence.request.params
    values = {name: value for name, value in _NEUTRAL.items() if name != "allowed"}  # which no flag refers to now
    values["wants_logprobs"] = -1 if params.logprobs is None else params.logprobs
    values["wants_prompt_logprobs"] = -1 if params.prompt_logprobs is None else params.prompt_logprobs
    if not params.is_greedy:
        values["temperature"] = np.clip(params.temperature, _SMALLEST, _LARGEST)
        values["top_k"] = min(params.top_k, vocab_size)
        values["top_p"] = max(params.top_p, _SMALLEST)
        values["min_p"] = params.min_p
        values["seed"] = request.seed
        values["sample_index"] = sequence.index
    if params.is_penalised:
        values["repetition_penalty"] = np.clip(params.repetition_penalty, _SMALLEST, _LARGEST)
        values["presence_penalty"] = params.presence_penalty
        values["frequency_penalty"] = params.frequency_penalty
    if params.is_penalised or params.min_tokens:
        values["num_prompt"] = sequence.num_prompt
    if params.min_tokens:
        # No output is longer than the model's context, so a larger number means the same.
        values["min_tokens"] = min(params.min_tokens, np.iinfo(np.int32).max)
        values["stop_ids"] = _padded(sorted(request.stop_token_ids), "stop_ids", "stop token ids")
    if params.logit_bias:
        values["bias_ids"] = _padded(list(params.logit_bias), "bias_ids", "entries of logit_bias")
        values["bias_values"] = _padded(list(params.logit_bias.values()), "bias_values", "entries of logit_bias")
    return {name: np.asarray(value, _NEUTRAL[name].dtype) for name, value in values.items()}


def _padded(values: list, field: str, what: str) -> np.ndarray:
    padded = _NEUTRAL[field].copy()
    if len(values) > len(padded):
        raise ValueError(f"{len(values)} {what}; a row of the sampling table holds {len(padded)}")
    padded[: len(values)] = values
    return padded
