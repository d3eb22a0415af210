"""The public call: two ways to multiply by 8-bit weights."""

from typing import Literal, get_args

from jax import Array

from pallas_kernels.quantized_matmul import xla

Mode = Literal["w8", "w8a8"]
MODES: tuple[Mode, ...] = get_args(Mode)


def quantized_matmul(x: Array, weight: Array, scale: Array, *, mode: Mode) -> Array:
    """``x @ (weight * scale).T`` with 8-bit weights.

    `w8`: activations are rounded to bfloat16, products are summed in float32: half the bytes of bfloat16 weights, hence
    twice the pace where memory is the limit (GPU, TPU). `w8a8`: each row of activations is quantised to int8 on the fly
    (its largest value becomes 127) and the products are summed exactly in int32: the fast form on CPU. It follows the
    per-token and per-channel scheme of LLM.int8() (arXiv 2208.07339) without its outlier columns.

    Args:
      x: f32[T, in].
      weight: int8 or float8_e4m3fn [out, in]; `w8a8` takes int8 only.
      scale: f32[out], what a unit of the stored weight is worth in each channel.
      mode: one of `MODES`.

    Returns:
      f32[T, out].

    Raises:
      ValueError: shapes, dtypes or a mode that do not fit; named.
    """
    if mode not in MODES:
        raise ValueError(f"quantisation mode {mode!r} is not one of {', '.join(MODES)}")
    if x.ndim != 2 or weight.ndim != 2 or scale.shape != weight.shape[:1] or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x {x.shape}, weight {weight.shape} and scale {scale.shape} do not fit: expected [T, in], [out, in], [out]"
        )
    allowed = ("int8",) if mode == "w8a8" else ("int8", "float8_e4m3fn")
    if weight.dtype.name not in allowed:
        raise ValueError(f"mode {mode!r} takes weights of {' or '.join(allowed)}, not {weight.dtype}")
    run = xla.matmul_w8 if mode == "w8" else xla.matmul_w8a8
    return run(x, weight, scale)
