"""Results of one or several models side by side: Markdown to read, CSV to go on with."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavit.evaluate.groups import (
    best_known,
    grouped,
    measured_as,
    model_names,
    model_of,
    tell_apart,
)
from megavit.evaluate.plots import draw_all
from megavit.evaluate.reference import Mark, Reference, references_for
from megavit.evaluate.results import Failed, Result, Skipped
from megavit.evaluate.results_file import Recorded, read_results

_TRIAL, _OTHER_PROTOCOL = "†", "‡"
_MARKS = {Mark.CONFIRMED: "", Mark.SECOND_HAND: " ~", Mark.UNVERIFIED: " ?"}
_SHARE = re.compile(r"top\d|accuracy|precision_at|miou|mce|fpr|(positive|error)_rate|shape_bias|_share|_drop")
_NO_SHARE = re.compile(r"ratio")


@dataclass(frozen=True)
class Row:
    """A row of a table: what every model, and every published one, has for a task, set, metric and settings.

    Args:
        result: one of the results, which says what the row is about.
        settings: what tells it from other rows, in words.
        cells: by column of `Table.models`; None where a model has no such result.
        references: by heading of `Table.references`.
    """

    result: Result
    settings: str
    cells: tuple[Result | None, ...]
    references: dict[str, Reference]

    def found(self) -> list[Result]:
        return [cell for cell in self.cells if cell is not None]

    def best(self) -> float | None:
        """The best value, if there are several to choose from. Trials do not take part."""
        values = [r.value for r in self.found() if r.limit is None and not math.isnan(r.value)]
        if len(values) < 2:
            return None
        return max(values) if self.result.higher_is_better else min(values)


@dataclass(frozen=True)
class Table:
    """Models side by side; `references` are the headings of published numbers that some row has."""

    models: tuple[str, ...]
    references: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: tuple[Skipped | Failed, ...]

    def markdown(self) -> str:
        """Padded, so that it can be read as it is. Shares of images are in percent. Tasks with published
        numbers have tables of their own, each with the columns that it needs."""
        blocks = grouped(self.rows, lambda row: row.result.task if self._is_known(row.result.task) else "")
        tables = [_aligned(self._lines(rows), text_columns=4) for rows in blocks.values()]
        lists = ["\n".join(f"- {line}" for line in lines) for lines in (self._legend(), self._left_out())]
        return "\n\n".join([*(tables or ["No results."]), *filter(None, lists)]) + "\n"

    def _is_known(self, task: str) -> bool:
        return any(row.references for row in self.rows if row.result.task == task)

    def _lines(self, rows: Sequence[Row]) -> list[list[str]]:
        """Heading and rows."""
        names = [name for name in self.references if any(name in row.references for row in rows)]
        headings = {name: r.heading for row in rows for name, r in row.references.items()}
        head = ["task", "data", "metric", "settings", "n", *self.models, *(f"*{headings[n]}*" for n in names)]
        lines = [head]
        for row in rows:
            share = is_share(row.result.metric)
            cells = [_cell(cell, share, row.best()) for cell in row.cells]
            known = [_reference_cell(row.references.get(name), share) for name in names]
            what = [row.result.task, row.result.data, _metric(row.result, share), row.settings]
            lines.append([*what, _numbers_of_images(row), *cells, *known])
        return lines

    def csv(self) -> str:
        """Values as they are: shares, not in percent."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        kinds = ("", " stderr", " n", " bad", " limit")
        writer.writerow(
            [
                *("task", "data", "metric", "settings", "higher_is_better"),
                *(model + kind for model in self.models for kind in kinds),
                *(name + kind for name in self.references for kind in ("", " mark")),
            ]
        )
        for row in self.rows:
            values: list[object] = [*measured_as(row.result), row.settings, row.result.higher_is_better]
            for cell in row.cells:
                values += (
                    [cell.value, cell.stderr, cell.count.used, cell.count.bad, cell.limit]
                    if cell
                    else [None] * len(kinds)
                )
            for name in self.references:
                known = row.references.get(name)
                values += [known.value, known.mark] if known else [None, None]
            writer.writerow(values)
        return file.getvalue()

    def _legend(self) -> list[str]:
        found = [result for row in self.rows for result in row.found()]
        known = [reference for row in self.rows for reference in row.references.values()]
        limits = sorted({result.limit for result in found if result.limit is not None})
        legend = []
        if any(result.stderr is not None for result in found):
            legend.append("± is one standard error.")
        if any(row.best() is not None for row in self.rows):
            legend.append("Bold: the best of the row.")
        for caveat in dict.fromkeys(str(r.settings["caveat"]) for r in found if "caveat" in r.settings):
            legend.append(" ".join(caveat.split()))
        if limits:
            sizes = " or ".join(map(str, limits))
            legend.append(f"{_TRIAL} a trial, of at most {sizes} images a set (`--limit`): not to be quoted.")
        if any(reference.mark is Mark.SECOND_HAND for reference in known):
            legend.append("~ second-hand: printed by others than the authors.")
        if any(reference.mark is Mark.UNVERIFIED for reference in known):
            legend.append("? unverified: recalled, not seen in print.")
        if any(not reference.same_protocol for reference in known):
            legend.append(f"{_OTHER_PROTOCOL} by another protocol than the row's.")
        if known:
            legend.append("*Italics*: published numbers.")
        for source, alike in grouped(known, lambda reference: reference.source).items():
            models = dict.fromkeys(f"{reference.model} ({reference.protocol})" for reference in alike)
            legend.append(f"From {source}: {', '.join(models)}.")
        return legend

    def _left_out(self) -> list[str]:
        """What has no numbers, and why; the models are named where it is not all of them."""
        everybody = {result.model for row in self.rows for result in row.found()}
        lines = []
        for (kind, task, data, why), entries in grouped(self.left_out, _outcome).items():
            models = dict.fromkeys(entry.model for entry in entries if entry.model)
            of = f" of {', '.join(models)}" if models and not everybody <= set(models) else ""
            on = f" on {data}" if data else ""
            lines.append(f"{kind}: {task}{on}{of}: {' '.join(why.split())}")
        return lines


def table(files: Sequence[Recorded]) -> Table:
    """All results of several files: a row for each task, set, metric and settings, a column for each model.

    Of a model's results in one place the one of all images is shown before a trial, then the newest.
    """
    results = [result for file in files for result in file.results]
    models = list(grouped(results, model_of))
    rows = []
    for group in grouped(results, measured_as).values():
        numbered = list(zip(tell_apart(group), group, strict=True))
        for settings, pairs in grouped(numbered, lambda pair: pair[0]).items():
            alike = grouped((result for _, result in pairs), model_of)
            cells = tuple(best_known(alike[model]) if model in alike else None for model in models)
            first = pairs[0][1]
            known = {f"{r.model}, {r.protocol}": r for r in references_for(first)}
            rows.append(Row(first, settings, cells, known))
    left_out: list[Skipped | Failed] = []
    for file in files:
        left_out += [*file.skipped, *file.failed]
    return Table(
        tuple(model_names(models)),
        tuple(dict.fromkeys(name for row in rows for name in row.references)),
        tuple(rows),
        tuple(dict.fromkeys(left_out)),
    )


def table_command(paths: Sequence[Path], out: Path | None = None) -> int:
    """Print the table of several results files (or their folders); into `out` also table.md, table.csv and
    the plots. Returns the exit code: 2 with a message if a file is not what it must be."""
    try:
        if not paths:
            raise ValueError("no results files; give those that launch/evaluate.py --out DIR wrote")
        files = [read_results(path) for path in paths]
        if out is not None and out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file; name a folder")
        made = table(files)
        results = [result for file in files for result in file.results]
        written = [] if out is None else write_table(made, results, out)
        print(made.markdown(), end="")
        if written:
            print(f"\nwrote {', '.join(map(str, written))}")
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_table(made: Table, results: Sequence[Result], out: Path) -> list[Path]:
    """table.md, table.csv and the plots that the results have data for. Returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    markdown, comma = out / "table.md", out / "table.csv"
    markdown.write_text(made.markdown(), encoding="utf-8")
    comma.write_text(made.csv(), encoding="utf-8")
    return [markdown, comma, *draw_all(results, out)]


def is_share(metric: str) -> bool:
    """Whether the metric is a share of images (or mCE), which people read in percent."""
    return bool(_SHARE.search(metric)) and not _NO_SHARE.search(metric)


def _outcome(entry: Skipped | Failed) -> tuple[str, str, str, str]:
    if isinstance(entry, Skipped):
        return "skipped", entry.task, entry.data, entry.reason
    return "failed", entry.task, entry.data, entry.error


def _metric(result: Result, share: bool) -> str:
    return f"{result.metric}{', %' if share else ''}{'' if result.higher_is_better else ' ↓'}"


def _numbers_of_images(row: Row) -> str:
    """The images that the numbers rest on, by model where models differ."""
    counts = [(result.count.used, result.count.bad) for result in row.found()]
    texts = [f"{used:,}" + (f" ({bad:,} bad)" if bad else "") for used, bad in dict.fromkeys(counts)]
    return " / ".join(texts)


def _cell(result: Result | None, share: bool, best: float | None) -> str:
    if result is None:
        return ""
    text = _digits(result.value, share)
    if result.stderr is not None:
        text += f" ± {_digits(result.stderr, share)}"
    if result.limit is not None:
        return f"{text} {_TRIAL}"
    return f"**{text}**" if result.value == best else text


def _digits(value: float, share: bool) -> str:
    if share:
        return f"{100 * value:.2f}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


def _reference_cell(known: Reference | None, share: bool) -> str:
    if known is None:
        return ""
    digits = f"{100 * known.value:.4g}" if share else f"{known.value:.4g}"
    if share and "." not in digits:
        digits += ".0"
    return digits + _MARKS[known.mark] + ("" if known.same_protocol else f" {_OTHER_PROTOCOL}")


def _aligned(lines: Sequence[Sequence[str]], text_columns: int) -> str:
    """A Markdown table of a heading and rows; columns of numbers are flush right."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(3, *(len(line[i]) for line in escaped)) for i in range(len(escaped[0]))]
    rule = ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        [
            cell.ljust(w) if i < text_columns else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        for line in escaped
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])
