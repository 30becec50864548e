"""Pictures of results, one PNG a question. What a plot needs that is not there is left out of it.

Needs matplotlib, which the extra `plot` brings; without it there is a line, and no pictures.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megavit.evaluate.groups import (
    best_known,
    grouped,
    measured_as,
    model_names,
    model_of,
    short_names,
    tell_apart,
)
from megavit.evaluate.results import Result

_ACCURACY = ("top1", "precision_at_1", "accuracy", "map")
_LEGEND_WIDTH, _LEGEND_LINE = 4.0, 0.16  # inches of a legend of many lines
_Data = TypeVar("_Data")


class Line(NamedTuple):
    """A curve: its name and points, sorted by x, or without any x a level; `error` is the standard error of
    y, 0 if there is none; lines of one colour belong together."""

    name: str
    x: list[float]
    y: list[float]
    error: list[float]
    color: int


def draw_all(results: Sequence[Result], out: Path) -> list[Path]:
    """Draw every plot that some results have the data of. Returns the files, or nothing, with a line on
    stderr, if matplotlib is not installed."""
    drawings = [(out / name, draw) for name, draw in _PLOTS.items()]
    if not importlib.util.find_spec("matplotlib"):
        print("note: no plots without matplotlib: pip install 'megavit[plot]'", file=sys.stderr)
        return []
    named = _named(results)
    return [path for path, draw in drawings if _save(draw(named), path)]


class Named(NamedTuple):
    """A result, with the names of its model and of its settings among the others."""

    result: Result
    model: str
    settings: str


def _named(results: Sequence[Result]) -> list[Named]:
    """One of each kind: no trials or older ones beside others of the same."""
    models = list(grouped(results, model_of))
    names = dict(zip(models, model_names(models), strict=True))
    found = []
    for group in grouped(results, measured_as).values():
        pairs = zip(tell_apart(group), group, strict=True)
        for (settings, model), alike in grouped(pairs, lambda pair: (pair[0], model_of(pair[1]))).items():
            best = best_known([result for _, result in alike])
            name = names[model] + (" (trial)" if best.limit is not None else "")
            found.append(Named(best, name, settings))
    return found


def accuracy_by_layer(named: Sequence[Named]) -> Any:
    """Accuracy of a protocol on the features of each block, or None."""
    lines = _lines_over(named, "layer")
    if not lines:
        return None
    figure, axes = _figure(7, 4.5)
    _draw_lines(axes, lines)
    axes.set(xlabel="block", ylabel="accuracy, %", title="accuracy by depth of the features")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes, lines)
    return figure


def fewshot(named: Sequence[Named]) -> Any:
    """Accuracy against images a class, or None."""
    lines = _lines_over(named, "shots")
    if not lines:
        return None
    figure, axes = _figure(7, 4.5)
    axes.set_xscale("log")
    ticks = sorted({x for line in lines for x in line.x})
    axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)  # before it is drawn: one point has no range of its own
    _draw_lines(axes, lines)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training images a class", ylabel="accuracy, %", title="few-shot accuracy")
    _legend(axes, lines)
    return figure


def reliability(named: Sequence[Named]) -> Any:
    """Accuracy and share of the images against confidence, a panel for each measurement that has bins, or
    None."""
    panels = [(item, bins) for item in named if (bins := _bins(item))]
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    titles = _titles([item for item, _ in panels])
    for (item, bins), title, place in zip(panels, titles, axes, strict=True):
        filled = [row for row in bins if row[0] > 0 and all(map(math.isfinite, row))]
        total = sum(count for count, _, _ in filled)
        width = 0.9 / len(bins)
        confidences = [confidence for _, confidence, _ in filled]
        place.bar(confidences, [c / total for c, _, _ in filled], width, color="0.8", label="share of images")
        place.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="perfect calibration")
        place.plot(confidences, [accuracy for _, _, accuracy in filled], marker="o", label="accuracy")
        place.set(
            xlim=(0, 1),
            ylim=(0, 1.02),
            xlabel="confidence",
            title=f"{title}\n{item.result.metric} {item.result.value:.4f}",
        )
    axes[0].legend(fontsize=8, loc="upper left")
    figure.suptitle("reliability: accuracy of the predictions of each confidence")
    return figure


def corruption(named: Sequence[Named]) -> Any:
    """Accuracy by severity, a line for each corruption and their mean, a panel for each measurement, or
    None."""
    panels = _one_each([(item, table) for item in named if (table := _severities(item))])
    if not panels:
        return None
    figure, axes = _panels(len(panels), width=6.5, height=5)
    titles = _titles([item for item, _ in panels])
    for (_, table), title, place in zip(panels, titles, axes, strict=True):
        for number, (name, values) in enumerate(table.items()):
            style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
            severities = range(1, len(values) + 1)
            place.plot(severities, [100 * v for v in values], style, marker=".", linewidth=1, label=name)
        longest = max(map(len, table.values()))
        columns = [
            [v[i] for v in table.values() if i < len(v) and math.isfinite(v[i])] for i in range(longest)
        ]
        means = [100 * sum(column) / len(column) if column else math.nan for column in columns]
        place.plot(range(1, longest + 1), means, color="black", marker="o", linewidth=3, label="mean")
        place.set(xlabel="severity", ylabel="accuracy, %", title=title)
        place.set_xticks(range(1, longest + 1))
        place.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("accuracy under corruption")
    return figure


def risk_coverage(named: Sequence[Named]) -> Any:
    """Error among the images on which the model is surest, or None."""
    curves = [(item, _table(item, "curve", "coverage", "risk")) for item in named]
    found = _one_each([(item, curve) for item, curve in curves if curve])
    if not found:
        return None
    figure, axes = _figure(7, 4.5)
    names = _titles([item for item, _ in found])
    lines = [
        Line(name, [100 * c for c, _ in curve], [100 * r for _, r in curve], [0.0] * len(curve), number)
        for number, (name, (_, curve)) in enumerate(zip(names, found, strict=True))
    ]
    _draw_lines(axes, lines, marker="o" if max(len(line.x) for line in lines) < 20 else "")
    axes.set(xlabel="coverage: images answered, %", ylabel="risk: errors among them, %", xlim=(0, 101))
    axes.set_ylim(bottom=0)
    axes.set_title("selective prediction: answering only when sure")
    _legend(axes, lines)
    return figure


def ood(named: Sequence[Named]) -> Any:
    """AUROC of every score, grouped by the set out of distribution, or None."""
    found = [item for item in named if item.result.metric.startswith("auroc_")]
    if not found:
        return None
    scores = list(dict.fromkeys(item.result.metric.removeprefix("auroc_") for item in found))
    bars = grouped(found, lambda item: (item.model, item.result.task, item.result.data, item.settings))
    names = short_names(list(bars))
    figure, axes = _figure(max(6.0, 1 + 0.35 * len(scores) * len(bars)), 4.5)
    width = 0.8 / len(bars)
    for number, (name, items) in enumerate(zip(names, bars.values(), strict=True)):
        places = [
            scores.index(item.result.metric.removeprefix("auroc_")) + (number - (len(bars) - 1) / 2) * width
            for item in items
        ]
        errors = [item.result.stderr or 0.0 for item in items]
        drawn = axes.bar(places, [item.result.value for item in items], width, yerr=errors, label=name)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.axhline(0.5, color="0.5", linestyle="--", linewidth=1)
    axes.text(1.0, 0.5, " chance", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_xticks(range(len(scores)), [score.replace("_", "\n") for score in scores])
    axes.set(ylim=(0, 1.08), ylabel="AUROC", title="detection of images from another distribution")
    figure.legend(fontsize=8, loc="outside lower center", ncols=min(3, len(bars)))
    return figure


_PLOTS: dict[str, Callable[[Sequence[Named]], Any]] = {
    "accuracy_by_layer.png": accuracy_by_layer,
    "fewshot.png": fewshot,
    "reliability.png": reliability,
    "corruption.png": corruption,
    "risk_coverage.png": risk_coverage,
    "ood.png": ood,
}


def _lines_over(named: Sequence[Named], setting: str) -> list[Line]:
    """A line of accuracy against a setting for each model, task, set, metric and other choices. A word
    without a number (the layer `pooled`) has no place on the axis: it is a level beside the same model's
    curve."""
    found = [item for item in named if item.result.metric in _ACCURACY and setting in item.result.settings]

    def owner(item: Named) -> tuple[str, ...]:
        others = [part for part in item.settings.split(", ") if part and not part.startswith(f"{setting} ")]
        kind = re.sub(r"[^a-z ]", "", str(item.result.settings[setting]))  # layers of several kinds
        return item.model, item.result.task, item.result.data, item.result.metric, ", ".join(others), kind

    owners = grouped(found, owner)
    placed = [key for key, items in owners.items() if _position(items[0], setting) is not None]
    curves = list(dict.fromkeys(key[:-1] for key in placed))
    shown = [key for key in owners if key[:-1] in curves]
    lines = []
    for name, key in zip(short_names(shown), shown, strict=True):
        results = sorted(owners[key], key=lambda item: _position(item, setting) or 0.0)
        places = [place for item in results if (place := _position(item, setting)) is not None]
        values = [100 * item.result.value for item in results]
        errors = [100 * (item.result.stderr or 0.0) for item in results]
        lines.append(Line(name, places, values, errors, curves.index(key[:-1])))
    return lines


def _position(item: Named, setting: str) -> float | None:
    """A number, or the one in a word like block.7; None for a word without one."""
    value = item.result.settings[setting]
    if isinstance(value, int | float):
        return float(value)
    digits = re.search(r"\d+", str(value))
    return float(digits[0]) if digits else None


def _numbers(values: object) -> list[float] | None:
    """A list of numbers, with nan for words and gaps; None if it is no list."""
    return [_number(value) for value in values] if isinstance(values, list) else None


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _table(item: Named, setting: str, *columns: str) -> list[list[float]]:
    """The whole rows of a setting that is a list of rows, or holds a list of each column by its name; no rows
    if there is no such setting."""
    found = item.result.settings.get(setting)
    if isinstance(found, dict) and all(isinstance(found.get(name), list) for name in columns):
        found = [list(row) for row in zip(*(found[name] for name in columns), strict=False)]
    rows = [_numbers(row) for row in found] if isinstance(found, list) else []
    return [row for row in rows if row is not None and len(row) == len(columns)]


def _bins(item: Named) -> list[list[float]]:
    """Of each bin of confidence: images, mean confidence, accuracy."""
    columns = ("count", "confidence", "accuracy")
    return _table(item, "bins", *columns) or _table(item, "reliability", *columns)


def _severities(item: Named) -> dict[str, list[float]]:
    found = item.result.settings.get("accuracy")
    tables = {name: _numbers(values) for name, values in found.items()} if isinstance(found, dict) else {}
    return {name: values for name, values in tables.items() if values}


def _titles(items: Sequence[Named]) -> list[str]:
    return short_names([(item.model, *_place(item)) for item in items])


def _place(item: Named) -> tuple[str, str, str]:
    return item.result.data, item.result.task, item.settings


def _one_each(found: Sequence[tuple[Named, _Data]]) -> list[tuple[Named, _Data]]:
    """The first of each model, set, task and settings: several metrics may rest on the same data."""
    return [pairs[0] for pairs in grouped(found, lambda pair: (pair[0].model, *_place(pair[0]))).values()]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _panels(count: int, width: float = 4.5, height: float = 4.5) -> tuple[Any, list[Any]]:
    """Up to three panels a row."""
    from matplotlib.figure import Figure

    columns = min(3, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _draw_lines(axes: Any, lines: Iterable[Line], marker: str = "o") -> None:
    for line in lines:
        color = f"C{line.color % 10}"
        if line.x:
            error = line.error if any(line.error) else None
            axes.errorbar(line.x, line.y, error, marker=marker, capsize=2, label=line.name, color=color)
        else:
            axes.axhline(line.y[0], linestyle="--", label=line.name, color=color)
    axes.grid(alpha=0.3)


def _legend(axes: Any, lines: Sequence[Line]) -> None:
    if len(lines) <= 12:
        axes.legend(fontsize=8)
    else:  # beside the axes, which must not shrink for it
        figure = axes.figure
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + _LEGEND_WIDTH, max(height, _LEGEND_LINE * (len(lines) + 2)))
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _save(figure: Any, path: Path) -> bool:
    if figure is None:
        return False
    figure.savefig(path, dpi=110)
    return True
