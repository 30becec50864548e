"""From what a decision came: training images that are like the image, and those that pushed the score.

Letters: m images that are asked about, D width of the pooled features, K classes, k training images listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megavit.evaluate.features import Features
from megavit.evaluate.protocols.knn import highest, nearest
from megavit.evaluate.protocols.rows import Share
from megavit.evaluate.session import Session
from megavit.evaluate.sets.image_set import ImageSet
from megavit.explain.head import HeadInfluence, Measure, Scores, Values, with_one
from megavit.explain.provenance import Readings, TrainingImage, described
from megavit.explain.target import Target
from megavit.parallel.collectives import sum_over_world
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import Loss

HEAD_ONLY = (
    "through the classifier alone, with the features taken as fixed: what an image did to the features while "
    "they were learnt is not in these numbers"
)
_MOST_CLASSES_OF_SET = 256  # rows of W in which the loss of a whole set is followed


@dataclass(frozen=True)
class Pushed:
    """For each of m images the training images that raise the score (`helpful`, the strongest first, values
    positive) and those that lower it (`harmful`, values negative); k each at most. `about` says what such
    numbers can tell, `settings` how they were found."""

    helpful: list[list[TrainingImage]]
    harmful: list[list[TrainingImage]]
    settings: dict[str, Any]
    about: str = HEAD_ONLY


@dataclass(frozen=True)
class LabelErrors:
    """Training images whose labels are likely wrong, the likeliest first.

    `harmful` are those that raise the loss of a validation set most, by the (negative) change of its mean
    loss; `odd` those that the classifier explains least, by their influence on themselves.
    """

    harmful: list[TrainingImage]
    odd: list[TrainingImage]
    settings: dict[str, Any]
    about: str = HEAD_ONLY


def similar(
    session: Session, features: Tensor, k: int, readings: Readings | None = None
) -> list[list[TrainingImage]]:
    """The training images of --data whose features have the highest cosine similarity to each of `features`
    [m, D], the same on every rank. For people: that an image is similar does not say that it mattered.
    Collective."""
    train = _train(session)
    values, rows = nearest(Share(train), features.to(train.mesh.device), min(k, len(train.usable)))
    return _described(train.mesh, train.set, rows, values, readings)


def pushed(
    session: Session,
    features: Tensor,
    target: Target,
    k: int,
    readings: Readings | None = None,
    measure: Measure = "tracin",
    damping: float = 1.0,
) -> Pushed:
    """The training images of --data that pushed the target's score of m images up and down, through the
    classifier alone; see `HeadInfluence.values`.

    The score is the log odds of the class (with sigmoid its logit), or, with `target.against`, the difference
    of two logits. With the measure influence a value is what the score would lose if the classifier were
    fitted without the training image.

    Args:
        features: pooled, [m, D], the same on every rank.
        target: the classes of the m images.

    Collective. ValueError if the training set has other classes than the model.
    """
    train, loss = _train(session), _loss(session)
    features = features.to(train.mesh.device)
    logits = session.model.logits(features)
    head = HeadInfluence(train, session.model.logits, loss)
    found = head.values(
        Scores.of(features, logits, score_gradient(logits, target, loss), loss), measure, damping
    )
    lists = []
    for sign in (1, -1):
        values, rows = highest(train.mesh, sign * found.values, found.rows, min(k, len(train.usable)))
        lists.append(_described(train.mesh, train.set, rows.where(values > 0, -1), sign * values, readings))
    return Pushed(lists[0], lists[1], found.settings)


def score_gradient(logits: Tensor, target: Target, loss: Loss) -> Tensor:
    """The gradient of the target's score with respect to the logits, float64 [m, K]."""
    logits = logits.double()
    gradient = torch.zeros_like(logits)
    mine = target.classes.to(logits.device)[:, None]
    if target.against is not None:
        gradient.scatter_(1, target.against.to(logits.device)[:, None], -1.0)
    elif loss == "softmax":
        # log(p / (1 - p)) is z less the logsumexp of the others.
        gradient = -logits.scatter(1, mine, -torch.inf).softmax(1)
    return gradient.scatter_(1, mine, 1.0)


def label_errors(
    session: Session,
    validation: ImageSet,
    k: int,
    readings: Readings | None = None,
    measure: Measure = "tracin",
    damping: float = 1.0,
) -> LabelErrors:
    """The training images of --data with likely wrong labels, judged by a validation set whose labels are
    trusted, and without one. Costs what `pushed` does for one image, in up to 256 classes. Collective."""
    train, loss = _train(session), _loss(session)
    trusted = session.pooled(validation)
    check_classes(session, validation)
    head = HeadInfluence(train, session.model.logits, loss)
    judged = loss_of_set(HeadInfluence(trusted, session.model.logits, loss))
    found = head.values(judged, measure, damping)
    lowest = Values(-found.values, found.rows, found.settings)
    lists = []
    for sign, some in ((-1, lowest), (1, head.own())):
        values, rows = highest(train.mesh, some.values, some.rows, min(k, len(train.usable)))
        (those,) = _described(train.mesh, train.set, rows.where(values > 0, -1), sign * values, readings)
        lists.append(those)
    return LabelErrors(lists[0], lists[1], found.settings | {"validation": validation.name})


def loss_of_set(head: HeadInfluence) -> Scores:
    """The mean loss of a set with its sign changed, as one score: raising it is good. In the classes that
    contribute most."""
    dim, classes = head.train.dim, len(head.train.set.class_names)
    total = torch.zeros(classes + 1, dim + 1, dtype=torch.float64, device=head.mesh.device)
    for number, (_, values, _, errors) in enumerate(head.predictions()):
        if number % head.mesh.tp_size == head.mesh.tp_rank:
            total[:-1] -= errors.T @ with_one(values)
            total[-1, 0] += len(errors)
    total = sum_over_world(head.mesh, total)
    gradient = total[:-1] / total[-1, 0]
    sizes = gradient.square().sum(1)
    largest = sizes.topk(min(_MOST_CLASSES_OF_SET, len(sizes))).indices.sort().values
    return Scores(largest[None], gradient[largest][None], (sizes[largest].sum() / sizes.sum())[None])


def _train(session: Session) -> Features:
    images = session.open("", "train")
    check_classes(session, images)
    return session.pooled(images)


def check_classes(session: Session, images: ImageSet) -> None:
    """ValueError unless the set has as many classes as the model."""
    count = len(images.class_names)
    if count != session.model.num_classes:
        raise ValueError(
            f"{images.name} has {count} classes, the model {session.model.num_classes}: name the data that "
            f"the model was trained on with --data"
        )


def _loss(session: Session) -> Loss:
    link = session.model.preprocessing.link
    if link == "none":
        raise ValueError(f"{session.model.name} has no classifier, so nothing pushed its score")
    return link


def _described(
    mesh: Mesh, images: ImageSet, rows: Tensor, values: Tensor, readings: Readings | None
) -> list[list[TrainingImage]]:
    """A list for each line of `rows` and `values`, without the rows that are -1; read by the main rank."""
    lines: list[tuple[Sequence[int], Sequence[float]]] = [
        (row[row >= 0].tolist(), value[row >= 0].tolist()) for row, value in zip(rows, values, strict=True)
    ]
    return mesh.on_main(lambda: [described(images, row, value, readings) for row, value in lines])
