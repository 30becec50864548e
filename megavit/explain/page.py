"""Explanations as one HTML page, which needs no other file and no network: for reading and for printing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from megavit.explain.charts import path_plot
from megavit.explain.explanation import Explanation, Judged, Shown
from megavit.explain.methods import METHODS
from megavit.explain.pictures import overlay, picture, png
from megavit.explain.tokens import HIGH

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; color: #222; max-width: 1100px }
body { margin: 1.5em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; margin: 0 0 .2em } h3 { font-size: 1em; margin: 1em 0 .3em }
section { border-top: 2px solid #222; padding: 1em 0 }
.row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start }
figure { margin: 0; width: 200px } figure img { width: 100%; display: block }
figcaption { font-size: .85em; color: #444; overflow-wrap: anywhere }
figure.small { width: 116px } figure.small figcaption { font-size: .72em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: 2px 10px 2px 0; text-align: right; font-weight: normal; border-bottom: 1px solid #ddd }
th { color: #666 } td:first-child, th:first-child, td:last-child, th:last-child { text-align: left }
tr.control td { color: #777 }
.bar { display: inline-block; height: .7em; background: #2b7bba; vertical-align: baseline }
.warning { background: #fff1d6; border-left: 4px solid #e08214; padding: .3em .7em; margin: .4em 0 }
.note { color: #555; margin: .3em 0 }
svg.path { width: 520px; max-width: 100% } svg text { font: 10px system-ui, sans-serif }
pre { font-size: .75em; white-space: pre-wrap; overflow-wrap: anywhere }
@media print {
  @page { margin: 12mm }
  body { margin: 0; max-width: none; font-size: 11px }
  body { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  section + section { break-before: page } figure, table, svg, .warning { break-inside: avoid }
  figure { width: 125px } figure.small { width: 84px } details { display: none }
}
"""
# The browser itself is told to load nothing from anywhere.
_HEAD = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'\">\n"
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    "<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
)
_THUMBNAIL = 128  # pixels of a side of a training image, at least
FOOT = "</body>\n</html>\n"
_LEGEND = (
    "A patch of a map has one colour: red speaks for the class, blue against it. Insertion is the mean "
    "probability of the class while the patches join a black image, the map's highest first (high is good); "
    "deletion, while they leave the image (low is good); SaCo, from -1 to 1, is whether what ranks higher "
    "also matters more. Random maps and a blob in the middle of the image have not seen the model."
)
_KINDS = {
    "similar": "Similar training images: nearest by the feature that the classifier reads. For people; they "
    "need not have had any influence.",
    "helpful": "Training images that pushed the score up, by the influence of the classifier alone.",
    "harmful": "Training images that pushed the score down, by the influence of the classifier alone.",
}
_SUSPECTS = {
    "harmful": "They raise the loss of the validation images most, by the influence of the classifier alone.",
    "odd": "The classifier explains them least: they would lose most if it were fitted without them.",
}


def head(title: str, methods: Sequence[str]) -> str:
    """The beginning of a page, with what is to be known about all images."""
    listed = "".join(f"<li><b>{escape(name)}</b>: {escape(METHODS[name].about)}</li>" for name in methods)
    return (
        _HEAD.format(title=escape(title), style=_STYLE)
        + f"<ul>{listed}</ul>"
        + f'<p class="note">{_LEGEND}</p>\n'
    )


def section(number: int, found: Explanation) -> str:
    """One image of the page."""
    parts = [
        f"<section>\n<h2>{number}. {escape(found.name)}: {escape(found.question)}</h2>",
        _says(found),
        *(f'<p class="warning">{escape(warning)}</p>' for warning in found.warnings),
        '<div class="row">',
        _figure(png(picture(found.pixels)), "the image as the model sees it"),
        *(
            _figure(
                png(overlay(found.pixels, values.numpy(), signed=METHODS[name].signed)),
                f"<b>{escape(name)}</b>",
            )
            for name, values in found.maps.items()
        ),
        "</div>",
        _faithfulness(found),
        _sums(found),
        '<h3>Block by block</h3><div class="row">',
        path_plot(found.path),
        _likeliest(found),
        "</div>",
        _high_norms(found),
        *(_training(kind, shown) for kind, shown in found.training.items()),
        "<details><summary>Record</summary><pre>",
        escape(json.dumps(dict(found.provenance), indent=1, ensure_ascii=False)),
        "</pre></details>\n</section>\n",
    ]
    return "\n".join(part for part in parts if part)


def suspects(title: str, lists: Mapping[str, Sequence[Shown]], says: Mapping[int, str]) -> str:
    """A page about training images whose labels are likely wrong. `says` has the model's word by row."""
    parts = [_HEAD.format(title=escape(title), style=_STYLE)]
    for kind, shown in lists.items():
        figures = "".join(_training_figure(one, says.get(one.image.row, "")) for one in shown)
        parts.append(f'<section><h3>{escape(_SUSPECTS[kind])}</h3><div class="row">{figures}</div></section>')
    return "\n".join([*parts, FOOT])


def _says(found: Explanation) -> str:
    best = found.top(1)[0]
    says = f"The model says <b>{escape(best.name)}</b> ({best.probability:.1%})"
    if best.number != found.target.number:
        says += f"; explained is <b>{escape(found.target.name)}</b> ({found.target.probability:.1%})"
    if found.against:
        says += f", held against <b>{escape(found.against.name)}</b> ({found.against.probability:.1%})"
    if found.label:
        says += f". It is {escape(found.label)}"
    return f"<p>{says}.</p>"


def _faithfulness(found: Explanation) -> str:
    if not found.faithfulness:
        return '<p class="note">Whether the maps are right was not measured.</p>'
    rows = [
        _row(name, judged, found.verdict(name), is_control=name not in found.maps)
        for name, judged in found.faithfulness.items()
    ]
    columns = ("map", "insertion", "deletion", "difference", "SaCo", "for this image")
    return (
        "<h3>Are the maps right?</h3><table><tr>"
        + "".join(f"<th>{column}</th>" for column in columns)
        + f"</tr>{''.join(rows)}</table>"
    )


def _row(name: str, judged: Judged, verdict: str, *, is_control: bool) -> str:
    numbers = (judged.insertion, judged.deletion, judged.between, judged.saco)
    cells = [escape(name), *(f"{number:.3f}" for number in numbers), escape(verdict)]
    kind = ' class="control"' if is_control else ""
    return f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _sums(found: Explanation) -> str:
    return "".join(
        f'<p class="note">The values of {escape(name)} sum to {sums.total:.3f}; the score is '
        f"{sums.difference:.3f} above that of a black image; {sums.residual:.3f} is left over.</p>"
        for name, sums in found.sums.items()
    )


def _likeliest(found: Explanation) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.name)}</td><td>{one.probability:.1%}</td>"
        f'<td><span class="bar" style="width:{120 * one.probability:.0f}px"></span></td></tr>'
        for one in found.top()
    )
    return f"<table>{rows}</table>"


def _high_norms(found: Explanation) -> str:
    after = found.high_norms[1:]
    where = f"block {int(after.argmax())}" if after.any() else "any block"
    shares = ", ".join(f"{share:.0%} of {escape(name)}" for name, share in found.on_high_norms.items())
    return (
        f'<p class="note">Patches whose token is more than {HIGH:g} times as long as the median one: '
        f"{float(after.max()):.1%} after {where}. Of the top of the maps there lies on those that are so "
        f"after the last block: {shares}.</p>"
    )


def _training(kind: str, shown: Sequence[Shown]) -> str:
    figures = "".join(_training_figure(one) for one in shown)
    return f'<h3>{escape(_KINDS.get(kind, kind))}</h3><div class="row">{figures}</div>'


def _training_figure(shown: Shown, says: str = "") -> str:
    image = shown.image
    lines = [f"<b>{escape(image.label_name)}</b> {image.value:.3g}", escape(image.key)]
    if says:
        lines.insert(1, f"the model says {escape(says)}")
    if image.steps is not None:
        lines.append(f"read at step {_some(image.steps)}")
    return _figure(png(picture(shown.picture, _THUMBNAIL)), "<br>".join(lines), small=True)


def _some(steps: Iterable[int], most: int = 3) -> str:
    listed = list(steps)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(map(str, listed[:most])) + more


def _figure(data: bytes, caption: str, *, small: bool = False) -> str:
    """`caption` is HTML."""
    encoded = base64.b64encode(data).decode()
    kind = ' class="small"' if small else ""
    return (
        f'<figure{kind}><img alt="" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
