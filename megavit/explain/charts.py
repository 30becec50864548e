"""The path of a decision through the blocks as one plot: an SVG that stands inside a page.

Letters: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from megavit.explain.path import BlockPath

_WIDTH, _LEFT, _RIGHT = 520, 46, 10
_TOP, _CURVE, _GAP, _BARS, _BOTTOM = 16, 90, 34, 110, 30  # heights of what lies below each other
_ATTENTION, _MLP, _LINE = "#2b7bba", "#e08214", "#222"


def path_plot(path: BlockPath) -> str:
    """Above, the target's probability read out after every block; below, what attention and MLP of each
    block contributed to its score. `path` is of one image."""
    depth = len(path.attention)
    step = (_WIDTH - _LEFT - _RIGHT) / (depth + 1)
    centres = [_LEFT + step * (column + 0.5) for column in range(depth + 1)]
    parts = [
        *_curve(centres, path.probabilities.tolist()),
        *_bars(centres[1:], step, path.attention.tolist(), path.mlp.tolist()),
        *_block_numbers(centres),
    ]
    height = _TOP + _CURVE + _GAP + _BARS + _BOTTOM
    return (
        f'<svg class="path" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="path through the blocks">'
        f"{''.join(parts)}</svg>"
    )


def _curve(centres: Sequence[float], probabilities: Sequence[float]) -> list[str]:
    def y(probability: float) -> float:
        return _TOP + _CURVE * (1 - probability)

    points = list(zip(centres, map(y, probabilities), strict=True))
    found = [_text(_LEFT, _TOP - 5, "probability, read out after each block", anchor="start")]
    for tick in (0, 0.5, 1):
        found += [_rule(y(tick)), _text(_LEFT - 5, y(tick) + 3.5, f"{tick:g}", anchor="end")]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    found.append(f'<polyline points="{line}" fill="none" stroke="{_LINE}" stroke-width="1.6"/>')
    found += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{_LINE}"/>' for x, y in points]
    return found


def _bars(
    centres: Sequence[float], step: float, attention: Sequence[float], mlp: Sequence[float]
) -> list[str]:
    top = _TOP + _CURVE + _GAP
    low, high = min(0.0, *attention, *mlp), max(0.0, *attention, *mlp)
    span = (high - low) or 1.0
    zero = top + _BARS * high / span
    found = [
        _text(_LEFT, top - 7, "written by each block to the score:", anchor="start"),
        _text(_LEFT + 205, top - 7, "attention", anchor="start", colour=_ATTENTION),
        _text(_LEFT + 265, top - 7, "MLP", anchor="start", colour=_MLP),
        _rule(zero),
    ]
    ends = [value for value in (high, low) if abs(value) > 0.1 * span]  # others would lie on the 0
    for value in (0.0, *ends):
        found.append(_text(_LEFT - 5, zero - _BARS * value / span + 3.5, f"{value:.2g}", anchor="end"))
    width = 0.36 * step
    for values, colour, side in ((attention, _ATTENTION, -1.0), (mlp, _MLP, 0.0)):
        for centre, value in zip(centres, values, strict=True):
            height = _BARS * abs(value) / span
            y = zero - height if value > 0 else zero
            found.append(
                f'<rect x="{centre + side * width:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{height:.1f}" fill="{colour}"/>'
            )
    return found


def _block_numbers(centres: Sequence[float]) -> list[str]:
    y = _TOP + _CURVE + _GAP + _BARS + 14
    every = -(-len(centres) // 16)
    found = [_text(centres[0], y, "input")]
    found += [_text(x, y, str(number)) for number, x in enumerate(centres[1:]) if number % every == 0]
    return [*found, _text((_LEFT + _WIDTH - _RIGHT) / 2, y + 13, "block")]


def _rule(y: float) -> str:
    return f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = _LINE) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
