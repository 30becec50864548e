"""Training images beside a decision: those that are like the image, and those that pushed its score."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavit.evaluate.config import EvaluateConfig
from megavit.evaluate.model import ExportedModel
from megavit.evaluate.session import Session
from megavit.evaluate.sets.image_set import ImageSet
from megavit.explain.explanation import Explanation, Shown
from megavit.explain.influence import LabelErrors, check_classes, label_errors, pushed, similar
from megavit.explain.provenance import Readings, TrainingImage
from megavit.explain.target import Target
from megavit.predictor import Predictor

LISTED = 5  # training images of each kind


class Training:
    """Finds the training images of a model, in the data set `data` (see `evaluate.sets.own_data`).

    `run_dir`, if it is a run folder, tells which steps read an image; if it does not, `say` is told why.
    All of it is collective over the world. ValueError if the data are not there, or have other classes than
    the model.
    """

    def __init__(
        self,
        predictor: Predictor,
        data: str,
        run_dir: str | Path,
        batch_size: int,
        *,
        quiet: bool = True,
        say: Callable[[str], None] = lambda text: None,
    ):
        config = EvaluateConfig(tasks="explain", data=data, batch_size=batch_size, quiet=quiet)
        assert predictor.folder is not None
        # As evaluations have it: their feature cache serves both.
        model = ExportedModel(predictor.folder, predictor.model, predictor.preprocessing, predictor.names)
        self._predictor, self._session = predictor, Session(model, config, say)
        self._set = self._session.open("", "train")
        check_classes(self._session, self._set)

        def readings() -> Readings | None:
            try:
                return Readings.of_run(run_dir)
            except (ValueError, OSError) as error:
                say(f"note: the steps that read a training image are not known: {error}")
                return None

        self._readings = self._session.mesh.on_main(readings)

    def beside(self, found: Sequence[Explanation]) -> list[Explanation]:
        """This rank's explanations, perhaps none, with training images. The ranks of a TP group have the
        same."""
        mesh = self._session.mesh
        mine = [(one.features, one.target.number, one.against and one.against.number) for one in found]
        groups = mesh.gather(mine)[:: mesh.tp_size]
        if not any(groups):
            return []
        first = sum(map(len, groups[: mesh.dp_rank]))
        features, classes, others = zip(*itertools.chain(*groups), strict=True)
        target = Target(torch.tensor(classes), None if others[0] is None else torch.tensor(others))
        stacked = torch.stack(features)
        like = similar(self._session, stacked, LISTED, self._readings)
        push = pushed(self._session, stacked, target, LISTED, self._readings)
        lists = {"similar": like, "helpful": push.helpful, "harmful": push.harmful}
        facts = {"training": {"digest": self._set.digest, "about": push.about} | push.settings}
        return [
            dataclasses.replace(
                one,
                training={kind: self.shown(of_all[first + i]) for kind, of_all in lists.items()},
                provenance=dict(one.provenance) | facts,
            )
            for i, one in enumerate(found)
        ]

    def errors(self, validation: ImageSet | None, k: int) -> LabelErrors:
        """The k likeliest label errors by each of two measures, judged by the `validation` images or the test
        images of the data set. Collective."""
        return label_errors(self._session, validation or self._session.open("", "test"), k, self._readings)

    def shown(self, images: Sequence[TrainingImage]) -> list[Shown]:
        """With their pictures; those that cannot be read any more are left out."""
        shown = []
        for image in images:
            with contextlib.suppress(ValueError, OSError):
                (row,) = self._predictor.prepare([self._set.images.read(image.row)])
                if isinstance(row, Tensor):
                    shown.append(Shown(image, row.numpy()))
        return shown
