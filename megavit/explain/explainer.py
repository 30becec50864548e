"""Finding out why a model decides so, some images at a time.

Letters: B images, S image side, C channels, K classes, h rows and w columns of patches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megavit.data.photos import Photo
from megavit.data.preprocessing import Preprocessing
from megavit.evaluate.results import now, versions
from megavit.explain import faithfulness as faithful
from megavit.explain.explanation import Explanation, Judged, Sums, class_of
from megavit.explain.gradient import sum_check
from megavit.explain.methods import METHODS, check_methods, compute_maps
from megavit.explain.path import BlockPath, path
from megavit.explain.target import Baseline, Target
from megavit.explain.tokens import high_norms
from megavit.fields import nearest
from megavit.predictor import Predictor, load_classifier
from megavit.tasks.config import Loss
from megavit.train.checkpoint.frozen import export_digest
from megavit.train.logging.environment import device_name

_STEPS = 16  # of insertion and deletion
_DRAWS = 5  # random maps beside every map


class Subject(NamedTuple):
    """An image to be explained: its name, uint8 [S, S, C] as the model sees it, a digest of what was given,
    the name of its true class ("" if nobody says)."""

    name: str
    pixels: Tensor
    sha256: str
    label: str = ""


@dataclass(frozen=True)
class Settings:
    """What is asked. `target` and `against` are class ids; without a target it is the likeliest class, with
    `against` the likeliest other one."""

    methods: tuple[str, ...] = ("located",)
    target: int | None = None
    against: int | None = None
    faithfulness: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_methods(self.methods)
        if self.target is not None and self.target == self.against:
            raise ValueError(
                f"target and against are the same class, number {self.target}; name two, or leave one out"
            )


class Explainer:
    """Explains what a model says of images. On a mesh the ranks of a TP group explain the same images
    together and have the same explanations. Collective over the world to make.

    `facts` are added to the provenance. With `progress`, slow methods show a bar.
    """

    def __init__(
        self,
        predictor: Predictor,
        settings: Settings,
        *,
        facts: Mapping[str, Any] | None = None,
        progress: bool = False,
    ):
        self.predictor, self.settings, self.progress = predictor, settings, progress
        self._loss: Loss = "softmax" if predictor.preprocessing.link == "softmax" else "sigmoid"
        self._baseline = black(predictor.preprocessing)
        self._facts = dict(facts or {}) | self._provenance()

    def explain(self, subjects: Sequence[Subject]) -> list[Explanation]:
        """Of B images, B >= 1, which go through the model together."""
        model, settings = self.predictor.model, self.settings
        pixels = torch.stack([subject.pixels for subject in subjects])
        predictions = self.predictor.predict(pixels)
        images = self.predictor.as_input(pixels)
        with torch.no_grad():
            pooled = model.forward_head(model.forward_features(images), pre_logits=True).float().cpu()
        target = self._target(predictions.logits)
        maps = compute_maps(
            model, images, target, settings.methods, baseline=self._baseline, progress=self.progress
        )
        judged = self._judged(images, target, maps)
        sums = {
            name: sum_check(model, images, target, maps[name], baseline=self._baseline)
            for name in settings.methods
            if METHODS[name].adds_up
        }
        ways = path(model, images, target, loss=self._loss)
        norms = high_norms(model, images)
        tops = {name: norms.share_of_top(values) for name, values in maps.items()}
        maps = {name: values.float().cpu() for name, values in maps.items()}
        names, found = predictions.names, []
        for i, subject in enumerate(subjects):
            logits, probabilities = predictions.logits[i], predictions.probabilities[i]
            classes = [
                None if ids is None else class_of(int(ids[i]), names, logits, probabilities) for ids in target
            ]
            assert classes[0] is not None
            found.append(
                Explanation(
                    name=subject.name,
                    pixels=subject.pixels.numpy(),
                    label=subject.label,
                    features=pooled[i],
                    logits=logits,
                    probabilities=probabilities,
                    names=names,
                    target=classes[0],
                    against=classes[1],
                    maps={name: values[i] for name, values in maps.items()},
                    faithfulness={name: Judged(*_row(columns, i)) for name, columns in judged.items()},
                    sums={name: Sums(*_row(columns, i)) for name, columns in sums.items()},
                    path=BlockPath(*(values[i] for values in ways)),
                    high_norms=norms.by_block[:, i].cpu(),
                    on_high_norms={name: float(shares[i]) for name, shares in tops.items()},
                    training={},
                    provenance={"input_sha256": subject.sha256} | self._facts,
                )
            )
        return found

    def _target(self, logits: Tensor) -> Target:
        settings, device = self.settings, self.predictor.model.embed.weight.device
        rest = logits.clone()
        if settings.against is not None:
            rest[:, settings.against] = -torch.inf
        best = rest.argmax(1).to(device)
        classes = best if settings.target is None else torch.full_like(best, settings.target)
        against = None if settings.against is None else torch.full_like(best, settings.against)
        return Target(classes, against)

    def _judged(
        self, images: Tensor, target: Target, maps: Mapping[str, Tensor]
    ) -> Mapping[str, faithful.Faithfulness]:
        if not self.settings.faithfulness:
            return {}
        return faithful.with_controls(
            self.predictor.model,
            images,
            target,
            maps,
            loss=self._loss,
            baseline=self._baseline,
            steps=_STEPS,
            draws=_DRAWS,
            seed=self.settings.seed,
        )

    def _provenance(self) -> dict[str, Any]:
        predictor, model = self.predictor, self.predictor.model
        folder = predictor.folder
        return {
            "model": None if folder is None else str(folder),
            "checkpoint_digest": None if folder is None else export_digest(folder, model.mesh),
            "transform": asdict(predictor.preprocessing),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device_name(model.mesh.device),
            "tp_size": model.mesh.tp_size,
            "patch_size": model.config.patch_size,
            "methods": {name: METHODS[name].about for name in self.settings.methods},
            "baseline": "black",
            "faithfulness": {"steps": _STEPS, "random_maps": _DRAWS} if self.settings.faithfulness else None,
            "seed": self.settings.seed,
            "versions": versions(),
            "date": now(),
        }


def explain(
    model: Predictor | str | os.PathLike[str],
    image: Photo,
    target: str | int | None = None,
    against: str | int | None = None,
    methods: Sequence[str] = ("located",),
    *,
    faithfulness: bool = True,
    train: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Explanation:
    """Why the model decides so about an image.

    Args:
        model: what `megavit.load` gives, or the folder that it takes.
        image: a photo as the model takes it, see `PhotoReader`.
        target: name or id of the class to explain; the likeliest one if it is left out.
        against: a class to hold it against: why the one rather than the other.
        methods: names of maps, of `megavit.explain.methods.METHODS`.
        faithfulness: measure whether the maps are right for this image, at the price of some 300 forward
            passes.
        train: folder with the training images, as `launch/evaluate.py` takes it, for those that are like the
            image and those that pushed its score. The first time all of them go through the model.
        seed: of the random maps that maps are held against.

    Raises ValueError for an unknown class or method, and for what is no photo.
    """
    check_methods(methods)
    predictor = model if isinstance(model, Predictor) else load_classifier(model)
    mine, other = (
        None if word is None else class_number(predictor.names, word) for word in (target, against)
    )
    settings = Settings(tuple(methods), mine, other, faithfulness, seed)
    found = Explainer(predictor, settings).explain([subject_of(predictor, image)])
    if train is not None:
        from megavit.explain.training import Training

        run_dir = predictor.folder.parent if predictor.folder else Path()
        found = Training(predictor, os.fspath(train), run_dir, predictor.batch_size).beside(found)
    return found[0]


def subject_of(predictor: Predictor, image: Photo, name: str = "image", label: str = "") -> Subject:
    """Reads an image. ValueError for what is no photo, OSError for a file that cannot be read."""
    given = None
    if isinstance(image, str | os.PathLike):
        name, image = os.fspath(image), Path(image).read_bytes()
    if isinstance(image, bytes):
        given = sha256(image).hexdigest()
    (pixels,) = predictor.prepare([image])
    if not isinstance(pixels, Tensor):
        raise pixels if isinstance(pixels, OSError) or name == "image" else ValueError(f"{name}: {pixels}")
    return Subject(name, pixels, given or sha256(pixels.numpy().tobytes()).hexdigest(), label)


def class_number(names: Sequence[str], word: str | int) -> int:
    """The class that a name or an id means; names go first. ValueError naming those that come near."""
    lower = [name.lower() for name in names]
    for known, wanted in ((list(names), word), (lower, str(word).lower())):
        if wanted in known:
            return known.index(str(wanted))
    if str(word).isdecimal() and int(word) < len(names):
        return int(word)
    hint = nearest(str(word), names) or f"; the first ones are {', '.join(names[:5])}"
    raise ValueError(f"no class is called {word!r}, nor has this id: there are {len(names)}{hint}")


def black(preprocessing: Preprocessing) -> Baseline:
    """Black pixels as the model takes them, [C, 1, 1]."""
    used = preprocessing
    return -(torch.tensor(used.mean) / torch.tensor(used.std)).view(-1, 1, 1)


def _row(columns: Sequence[Tensor], i: int) -> list[float]:
    return [float(column[i]) for column in columns]
