"""What can be measured: protocols, the data that each needs, and how `--tasks` names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megavit.evaluate.protocols.calibration import calibration
from megavit.evaluate.protocols.classify import classify
from megavit.evaluate.protocols.corruption import corruption_error
from megavit.evaluate.protocols.fewshot import fewshot
from megavit.evaluate.protocols.knn import knn
from megavit.evaluate.protocols.linear import LinearProbe, fit
from megavit.evaluate.protocols.multi_label import mean_average_precision
from megavit.evaluate.protocols.ood import ood
from megavit.evaluate.protocols.scores import Scores, score
from megavit.evaluate.protocols.selective import selective
from megavit.evaluate.results import Measurement
from megavit.evaluate.session import Session
from megavit.evaluate.sets.image_set import ImageSet
from megavit.evaluate.spaces import in_classes_of

OWN = "data"  # the data set of --data


class Found(NamedTuple):
    """A measurement, and the images that it is of."""

    measurement: Measurement
    images: ImageSet


@dataclass(frozen=True)
class Protocol:
    """A way to measure.

    Args:
        title: in a few words, for the results.
        run: yields what is found on a data set, by its name.
    """

    title: str
    run: Callable[[Session, str], Iterator[Found]]


@dataclass(frozen=True)
class Task:
    """A protocol on a data set; `name` is how `--tasks` has it."""

    name: str
    protocol: Protocol
    data: str

    def run(self, session: Session) -> Iterator[Found]:
        return self.protocol.run(session, self.data)


def _head(session: Session, data: str) -> Iterator[Found]:
    images, scores = _scored(session, data)
    for measurement in classify(scores):
        yield Found(measurement, images)
    if images.right == "all":
        for measurement in mean_average_precision(session.pooled(images), session.model.logits, scores.link):
            yield Found(measurement, images)


def _calibration(session: Session, data: str) -> Iterator[Found]:
    images, scores = _scored(session, data)
    for measurement in calibration(session.pooled(images), session.model.logits, scores):
        yield Found(measurement, images)


def _selective(session: Session, data: str) -> Iterator[Found]:
    images, scores = _scored(session, data)
    for measurement in selective(scores):
        yield Found(measurement, images)


def _linear(session: Session, data: str) -> Iterator[Found]:
    train = session.open(data, "train")
    tests = _tests(session, data)
    for layer, features in session.probe_features(train).items():
        probe, settings = fit(features, seed=session.config.seed)
        yield from _probed(session, tests, layer, probe, settings)


def _linear_sgd(session: Session, data: str) -> Iterator[Found]:
    train = session.open(data, "train")
    tests = _tests(session, data)
    for layer, (probe, settings) in train_heads(session, train).items():
        yield from _probed(session, tests, layer, probe, settings)


def _probed(
    session: Session,
    tests: list[ImageSet],
    layer: str,
    probe: LinearProbe,
    settings: Mapping[str, Any],
) -> Iterator[Found]:
    """The accuracy of a probe on each of the test sets."""
    for images in tests:
        scores = score(session.probe_features(images)[layer], probe, "softmax")
        for found in classify(scores):
            chosen = {**settings, **found.settings, "layer": layer}
            yield Found(dataclasses.replace(found, settings=chosen), images)


def _knn(session: Session, data: str) -> Iterator[Found]:
    train = session.probe_features(session.open(data, "train"))
    tests = _tests(session, data)
    for layer, features in train.items():
        for images in tests:
            yield from _with_layer(knn(features, session.probe_features(images)[layer]), layer, images)


def _fewshot(session: Session, data: str) -> Iterator[Found]:
    train = session.probe_features(session.open(data, "train"))
    tests = _tests(session, data)
    for layer, features in train.items():
        for images in tests:
            yield from _with_layer(fewshot(features, session.probe_features(images)[layer]), layer, images)


def _with_layer(found: Iterator[Measurement], layer: str, images: ImageSet) -> Iterator[Found]:
    for one in found:
        yield Found(dataclasses.replace(one, settings={**one.settings, "layer": layer}), images)


def _ood(session: Session, data: str) -> Iterator[Found]:
    inside, outside = session.open(data, "test"), session.outside()
    try:
        train = session.pooled(session.open(data, "train"))
    except MissingData as error:  # the distances need it, the scores of the classifier do not
        session.say(f"note: no distances to training images: {error}")
        train = None
    has_classes = bool(session.model.num_classes)
    found = ood(
        session.pooled(inside),
        session.pooled(outside),
        train=train,
        logits_of=session.model.logits if has_classes else None,
    )
    for one in found:
        yield Found(dataclasses.replace(one, data=f"{inside.name} / {outside.name}"), inside)


def _corruption(session: Session, data: str) -> Iterator[Found]:
    """The 15 corruptions made on the fly."""
    clean, scores = _scored(session, data)
    accuracy = {}
    for name in CORRUPTIONS:
        rows = []
        for severity in SEVERITIES:
            images = clean.adjusted(dataclasses.replace(clean.adjust, corruption=name, severity=severity))
            rows.append(score(session.pooled(images), session.model.logits, scores.link))
        accuracy[name] = rows
    for one in corruption_error(scores, accuracy):
        yield Found(one, clean)


def _tests(session: Session, data: str) -> list[ImageSet]:
    """The test images of a set, and of those that share its classes and are there."""
    found = [session.open(data, "test")]
    for name in _RELATIVES.get(data, ()):
        try:
            found.append(session.open(name, "test"))
        except MissingData as error:
            session.tell(f"without {name}: {str(error).splitlines()[0]}")
    return found


def _scored(session: Session, data: str) -> tuple[ImageSet, Scores]:
    """The test images of a set with the model's classes as labels, and what its classifier says of them."""
    images = in_classes_of(session.model, session.open(data, "test"))
    # Softmax also for a model that was trained with sigmoids, as is the custom where models are compared.
    link: Link = "sigmoid" if images.right == "all" else "softmax"
    return images, score(session.pooled(images), session.model.logits, link)


_IMAGENET = ("imagenet-real", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
_RELATIVES = {"imagenet": _IMAGENET}  # on which a probe that learned from the set is tested too

PROTOCOLS = {
    "head": Protocol("the model's own classifier", _head),
    "linear": Protocol("linear probe by LBFGS, L2 chosen on held-out training images", _linear),
    "linear-sgd": Protocol("linear probe by SGD with random crops, rate chosen likewise", _linear_sgd),
    "fewshot": Protocol("ridge regression on a few images a class", _fewshot),
    "knn": Protocol("vote of the k nearest training images", _knn),
    "calibration": Protocol("calibration of the model's own classifier", _calibration),
    "selective": Protocol("risk and coverage of the model's own classifier", _selective),
    "corruption": Protocol("accuracy under 15 corruptions made on the fly", _corruption),
    "ood": Protocol("telling the test images from others (--ood)", _ood),
    "imagenet-c": Protocol("mean corruption error against AlexNet", _imagenet_c),
    "shape-bias": Protocol("shape or texture, on cue-conflict images", _shape_bias),
    "fairness": Protocol("accuracy and positive rate by group", _fairness),
}
# How a set is measured if only its name is given.
_USUAL = {
    "cifar10": "linear",
    "cifar100": "linear",
    "celeba": "fairness",
    "cue-conflict": "shape-bias",
    "imagenet-c": "imagenet-c",
}
