"""Arithmetic intensity: flops for each byte that a layer moves, against the tokens of a step."""

import dataclasses
import functools

from sarathi_jax.bench.paper.deployments import DeploymentSettings
from sarathi_jax.bench.paper.experiment import Experiment, Options, Section
from sarathi_jax.bench.paper.markdown import Comparison, comparison_table
from sarathi_jax.bench.paper.pictures import Panel, panels
from sarathi_jax.latency import Roofline
from sarathi_jax.latency.roofline import gemm_s, layer_gemms

_VALUE_BYTES = 2
_SATURATED = 0.9  # of the best rate


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is looked at.

    Attributes:
      deployment: whose layers, on one of its devices.
      tokens: of a step.
      context: tokens in the cache of each sequence that decodes.
    """

    deployment: DeploymentSettings
    tokens: tuple[int, ...]
    context: int


@dataclasses.dataclass(frozen=True)
class Paper:
    """The paper's numbers.

    Attributes:
      saturating_tokens: of a prompt that keeps the device's arithmetic busy.
    """

    saturating_tokens: float


def run(experiment: Experiment, options: Options) -> Section:
    settings, paper = experiment.settings_as(Settings), experiment.paper_as(Paper)
    roofline = settings.deployment.build().roofline()
    device = roofline.device
    ridge = device.peak_flops / device.bandwidth
    rows = [
        {
            "tokens": tokens,
            "products_flops_per_byte": products_intensity(roofline, tokens),
            "decode_layer_flops_per_byte": decode_intensity(roofline, tokens, settings.context),
            "products_share_of_peak": share_of_peak(roofline, tokens),
        }
        for tokens in settings.tokens
    ]
    crosses = next(n for n in range(1, 10_000) if products_intensity(roofline, n) >= ridge)
    best = share_of_peak(roofline, 4096)
    saturates = next(n for n in range(128, 4097, 128) if share_of_peak(roofline, n) >= _SATURATED * best)
    decodes = decode_intensity(roofline, 32, settings.context)
    enough = next(n for n in range(1, 10_000) if decode_intensity(roofline, n, settings.context) >= ridge)
    text = "\n\n".join(
        [
            comparison_table(
                [
                    Comparison(
                        f"tokens of a step whose products run at {_SATURATED:.0%} of their best rate",
                        saturates,
                        paper.saturating_tokens,
                        why="ours in steps of a tile of 128 rows; the paper says about 512",
                    ),
                    Comparison("tokens at which the products have as many flops a byte as the device", crosses),
                    Comparison("flops a byte of the device", ridge),
                    Comparison("flops a byte of a layer with 32 decodes", decodes),
                ]
            ),
            f"Below {crosses} tokens the four products of a layer wait for the weights: their intensity grows with "
            "every token, so that more tokens are nearly free. A step of 32 decodes has "
            f"{decodes:.0f} flops for each byte, {ridge / decodes:.0f} times fewer than the device could do; a chunk "
            "of a prompt in the same step uses what is left. Decodes alone would have to be "
            f"{enough}, with {enough * settings.context:,} tokens in the cache, for each reads a cache of its own. Nor "
            "do products reach their best rate where flops and bytes take equally long: there both still wait for "
            "each other.",
        ]
    )
    intensities = Panel(
        f"Intensity of a layer, TP{roofline.tp}",
        {
            "products (prompts)": [(row["tokens"], row["products_flops_per_byte"]) for row in rows],
            f"whole layer, decodes at {settings.context}": [
                (row["tokens"], row["decode_layer_flops_per_byte"]) for row in rows
            ],
        },
        "tokens of a step",
        "flops a byte",
        x_scale="log",
        y_scale="log",
        horizontals={f"{device.name}: {ridge:.0f}": ridge},
    )
    shares = Panel(
        "What the products reach",
        {"products": [(row["tokens"], 100 * row["products_share_of_peak"]) for row in rows]},
        "tokens of a step",
        "% of the device's peak",
        x_scale="log",
        verticals={f"{saturates} tokens": saturates},
    )
    return Section(
        f"A layer's products saturate an A100 at {saturates} tokens (the paper: about {paper.saturating_tokens:.0f}); "
        f"32 decodes use 1/{ridge / decodes:.0f} of the flops that their bytes would allow.",
        text,
        {"intensity": rows},
        {"intensity": functools.partial(panels, [intensities, shares])},
    )


def products_intensity(roofline: Roofline, num_tokens: int) -> float:
    """Flops for each byte of a layer's four products on one device."""
    flops, num_bytes = _products(roofline, num_tokens)
    return flops / num_bytes


def decode_intensity(roofline: Roofline, num_decodes: int, context: int) -> float:
    """Flops for each byte of a layer's products and attention, each decode with so many tokens in the cache."""
    model, tp = roofline.model, roofline.tp
    flops, num_bytes = _products(roofline, num_decodes)
    keys = num_decodes * context
    flops += 4 * keys * model.num_heads // tp * model.head_dim
    num_bytes += 2 * _VALUE_BYTES * keys * max(1, model.num_kv_heads // tp) * model.head_dim
    return flops / num_bytes


def share_of_peak(roofline: Roofline, num_tokens: int) -> float:
    """Flops of a layer's products over what the device could do in their time."""
    gemms = layer_gemms(roofline.model, roofline.tp, num_tokens)
    seconds = sum(float(gemm_s(gemm, roofline.device, roofline.device.kernels)) for gemm in gemms)
    return _products(roofline, num_tokens)[0] / seconds / roofline.device.peak_flops


def _products(roofline: Roofline, num_tokens: int) -> tuple[float, float]:
    gemms = layer_gemms(roofline.model, roofline.tp, num_tokens)
    flops = sum(2 * gemm.m * gemm.k * gemm.n for gemm in gemms)
    values = sum(gemm.m * gemm.k + gemm.k * gemm.n + gemm.m * gemm.n for gemm in gemms)
    return flops, _VALUE_BYTES * values
