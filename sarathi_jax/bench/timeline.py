"""Timelines of pipelines as an SVG picture: a row a stage, a bar a micro-batch, gaps where the stage waits."""

from collections.abc import Sequence

from sarathi_jax.bench.bubbles import Timeline

_WIDTH, _LEFT, _RIGHT = 1000, 90, 20
_ROW, _BAR = 34, 26
_HEAD, _FOOT, _SPACE = 44, 44, 26
_PREFILL, _DECODE, _IDLE, _TEXT = "#4f81bd", "#e39b3d", "#f1b9b4", "#333"


def draw_timelines(timelines: Sequence[Timeline], begin_s: float, length_s: float) -> str:
    """The same stretch of time in several runs, one above the other.

    Args:
      timelines: of equally many stages.
      begin_s, length_s: the stretch, from the first micro-batch on.

    Returns:
      The text of an SVG file.
    """
    num_stages = timelines[0].num_stages
    panel = _HEAD + num_stages * _ROW
    height = len(timelines) * (panel + _SPACE) + _FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="15">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i, timeline in enumerate(timelines):
        parts += _panel(timeline, i * (panel + _SPACE), begin_s, length_s)
    parts += _legend(len(timelines) * (panel + _SPACE), length_s)
    return "\n".join([*parts, "</svg>", ""])


def _panel(timeline: Timeline, top: int, begin_s: float, length_s: float) -> list[str]:
    origin_s = timeline.of_stage(0)[0].begin_s + begin_s
    scale = (_WIDTH - _LEFT - _RIGHT) / length_s
    stages = range(timeline.num_stages)
    idle = sum(map(timeline.bubble_share, stages)) / timeline.num_stages
    words = {
        "sarathi": "every micro-batch filled to the budget with chunks of prompts",
        "vllm": "whole prompts alone, else decodes",
    }
    parts = [
        f'<text x="{_LEFT}" y="{top + 30}" fill="{_TEXT}"><tspan font-weight="bold">{timeline.policy}</tspan>: '
        f"{words[timeline.policy]}</text>",
        f'<text x="{_WIDTH - _RIGHT}" y="{top + 30}" fill="#b0433a" text-anchor="end" font-weight="bold">'
        f"stages wait {idle:.0%} of the time</text>",
    ]
    for stage in stages:
        y = top + _HEAD + stage * _ROW
        parts += [
            f'<text x="{_LEFT - 12}" y="{y + 18}" fill="{_TEXT}" text-anchor="end">stage {stage}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_BAR}" fill="{_IDLE}"/>',
            '<g stroke="#fff" stroke-width="0.8">',
        ]
        for span in timeline.of_stage(stage):
            left = max(0.0, (span.begin_s - origin_s) * scale)
            right = min(float(_WIDTH - _LEFT - _RIGHT), (span.end_s - origin_s) * scale)
            if left >= right:
                continue
            plan = timeline.plans[span.step]
            # The line between neighbours belongs to the bar, so that it does not look like a gap.
            share = plan.num_decodes / plan.num_tokens
            parts.append(
                f'<rect x="{_LEFT + left:.1f}" y="{y}" width="{right - left:.1f}" height="{_BAR}" fill="{_PREFILL}"/>'
                f'<rect x="{_LEFT + left:.1f}" y="{y + _BAR * (1 - share):.1f}" width="{right - left:.1f}" '
                f'height="{_BAR * share:.1f}" fill="{_DECODE}"/>'
            )
        parts.append("</g>")
    return parts


def _legend(top: int, length_s: float) -> list[str]:
    parts, x = [], _LEFT
    for colour, words in ((_PREFILL, "tokens of prompts"), (_DECODE, "decodes"), (_IDLE, "waits")):
        parts += [
            f'<rect x="{x}" y="{top}" width="18" height="18" fill="{colour}"/>',
            f'<text x="{x + 26}" y="{top + 14}" fill="{_TEXT}">{words}</text>',
        ]
        x += 46 + 8 * len(words)
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{top + 14}" fill="{_TEXT}" text-anchor="end">'
        f"{length_s:g} s, a bar a micro-batch</text>"
    )
    return parts
