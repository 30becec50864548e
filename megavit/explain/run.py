"""Explaining all that a command is asked for, batch by batch, on any number of ranks."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from megavit.explain.config import ExplainConfig, InfluenceConfig
from megavit.explain.explainer import Explainer, Settings, Subject
from megavit.explain.explanation import Explanation
from megavit.explain.inputs import Inputs, images_of
from megavit.explain.page import suspects
from megavit.explain.report import PAGE, Report
from megavit.explain.training import Training
from megavit.predictor import Predictor


def explain_all(
    name: str, photos: Sequence[Path], config: ExplainConfig, predictor: Predictor, settings: Settings
) -> int:
    """Explain the photos and the images of --data, and write the report. `name` is the model's folder.

    A data-parallel rank (a TP group) takes a batch of each round; the main rank alone reads the images and
    writes. Collective over the world. The exit status: 1 if some images could not be read. ValueError or
    OSError, on every rank, if there is nothing to explain, or no place for the report.
    """
    mesh = predictor.model.mesh
    out = Path(config.out or Path(name) / "explanation")
    files = _Files()
    total, digest = mesh.on_main(
        lambda: files.open(Inputs(predictor, photos, config.data, config.num, _miss))
    )
    shows_bars = mesh.is_main and not config.quiet and sys.stderr.isatty()
    explainer = Explainer(predictor, settings, facts={"data_digest": digest}, progress=shows_bars)
    training = None
    if config.train:
        say = _tell if mesh.is_main else _ignore
        training = Training(predictor, config.train, name, config.batch_size, quiet=config.quiet, say=say)
    with ExitStack() as closing, tqdm(total=total, unit=" images", disable=not shows_bars) as bar:
        mesh.on_main(lambda: files.begin(Report(out, f"Why {name} decides so", settings.methods), closing))
        size = config.batch_size
        for start in range(0, total, size * mesh.dp_size):
            round_of = range(start, min(total, start + size * mesh.dp_size))
            subjects = mesh.on_main(lambda numbers=round_of: files.read(numbers))  # type: ignore[misc]
            mine = subjects[mesh.dp_rank * size :][:size]
            found = explainer.explain(mine) if mine else []
            found = training.beside(found) if training else found
            gathered = mesh.gather_for_io(found if mesh.tp_rank == 0 else [])
            mesh.on_main(lambda found=gathered: files.write(found, config.quiet))  # type: ignore[misc]
            bar.update(len(round_of))
    if mesh.is_main:
        _print(f"{out / PAGE} shows all")
    return mesh.on_main(lambda: int(files.inputs.num_missed > 0))


def list_label_errors(name: str, config: InfluenceConfig, predictor: Predictor) -> int:
    """Write the training images whose labels are likely wrong, as a page and a record. Collective."""
    mesh = predictor.model.mesh
    out = Path(config.out or Path(name) / "influence")
    validation = mesh.on_main(lambda: images_of(config.data, predictor.names) if config.data else None)
    say = _tell if mesh.is_main else _ignore
    training = Training(predictor, config.train, name, config.batch_size, quiet=config.quiet, say=say)
    found = training.errors(validation, config.num)
    named = {"harmful": found.harmful, "odd": found.odd}
    lists = mesh.on_main(lambda: {kind: training.shown(images) for kind, images in named.items()})
    shown = {one.image.row: torch.from_numpy(one.picture) for some in lists.values() for one in some}
    top = predictor.predict(torch.stack(list(shown.values()))).top(1) if shown else []
    says = {row: f"{best[0][0]} ({best[0][1]:.0%})" for row, best in zip(shown, top, strict=True)}

    def write() -> None:
        out.mkdir(parents=True, exist_ok=True)
        title = f"Training images of {name} whose labels are likely wrong"
        (out / PAGE).write_text(suspects(title, lists, says), encoding="utf-8", errors="backslashreplace")
        rows = {
            kind: [asdict(one.image) | {"model_says": says[one.image.row]} for one in some]
            for kind, some in lists.items()
        }
        record = rows | {"about": found.about, "settings": found.settings}
        (out / "influence.json").write_text(json.dumps(record, indent=1) + "\n")
        for kind, some in lists.items():
            for one in () if config.quiet else some:
                label, value = one.image.label_name, one.image.value
                _print(
                    f"{kind:<8} {value:+.3e}  {one.image.key}: labelled {label}, says {says[one.image.row]}"
                )
        _print(f"{out / PAGE} shows all")

    mesh.on_main(write)
    return 0


class _Files:
    """What the main rank reads and writes."""

    inputs: Inputs
    report: Report

    def open(self, inputs: Inputs) -> tuple[int, str | None]:
        """The number of images, and the digest of the data set."""
        self.inputs = inputs
        return len(inputs), inputs.data_digest

    def begin(self, report: Report, closing: ExitStack) -> None:
        self.report = closing.enter_context(report)

    def read(self, numbers: range) -> list[Subject]:
        return self.inputs.read(numbers)

    def write(self, of_ranks: Sequence[Sequence[Explanation]], quiet: bool) -> None:
        for found in itertools.chain(*of_ranks):
            self.report.add(found)
            if not quiet:
                for line in lines(found):
                    _print(line)


def lines(found: Explanation) -> list[str]:
    """What the command prints of an image."""
    best = found.top(1)[0]
    says = f"says {best.name} ({best.probability:.3f})" + (f", it is {found.label}" if found.label else "")
    shown = [f"{found.name}: {says}; {found.question} ({found.target.probability:.3f})"]
    for name, judged in found.faithfulness.items():
        numbers = f"insertion {judged.insertion:.3f}  deletion {judged.deletion:.3f}  saco {judged.saco:+.3f}"
        shown.append(f"  {name:<24} {numbers}  {found.verdict(name)}".rstrip())
    for name, sums in found.sums.items():
        rest = f"{sums.residual:.3f} is left over"
        shown.append(f"  {name:<24} sums to {sums.total:.3f} of {sums.difference:.3f}, {rest}")
    return shown + [f"  {warning}" for warning in found.warnings]


def _miss(text: str) -> None:
    _print(" ".join(text.split()), sys.stderr)


def _tell(text: str) -> None:
    _print(text, sys.stderr)


def _ignore(text: str) -> None:
    pass


def _print(line: str, stream: TextIO | None = None) -> None:
    """Beside a progress bar. Names of files and classes may hold bytes that are no text here."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    stream.flush()
