"""What the lists of training images are worth, measured on digits.

`python -m tests.explain.training_images removal RUN --data DATA` takes away, for each of 24 test images, the
5% of the training images that a list puts first, fits the classifier again, and prints by how much the
predicted class's margin over the others falls. `... labels RUN --data DATA --wrong wrong.npy` counts how many
of the first k images of a list have a wrong label; `... mislabelled FOLDER` writes the digits with 5% wrong
labels, which a model must be trained on.

Letters: n training images, m test images, D width of the features, K classes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from megavit.data import write
from megavit.data.class_names import write_class_names
from megavit.evaluate.config import EvaluateConfig
from megavit.evaluate.features import Features
from megavit.evaluate.model import ExportedModel
from megavit.evaluate.protocols.knn import nearest
from megavit.evaluate.protocols.probe import LinearProbe
from megavit.evaluate.session import Session
from megavit.explain.head import HeadInfluence, Scores
from megavit.explain.influence import loss_of_set, score_gradient
from megavit.explain.target import Target
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import Loss

SHARE = 0.05
DAMPINGS = (0.1, 1.0, 10.0)
Classifier = Callable[[Tensor], Tensor]


def write_mislabelled(folder: Path, seed: int) -> np.ndarray:
    """Digits of which 5% of the training labels are wrong, as shards; returns (and writes) which."""
    train, test = write.digits_arrays()
    rng = np.random.default_rng(seed)
    wrong = np.sort(rng.choice(len(train.labels), round(SHARE * len(train.labels)), replace=False))
    labels = np.array(train.labels)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, len(wrong))) % 10
    folder.mkdir(parents=True, exist_ok=True)
    parts = [write.ArrayImages(train.images, labels).split("train"), test.split("test")]
    write.write_splits(parts, folder, 100, 1)
    write_class_names(folder, [str(digit) for digit in range(10)])
    np.save(folder / "wrong.npy", wrong)
    return wrong


class Case(NamedTuple):
    """Pooled features of a model, and its own classifier."""

    train: Features
    test: Features
    classifier: Classifier
    loss: Loss


def open_case(run: Path, data: Path, cache: Path) -> Case:
    model = ExportedModel.open(run, Mesh.single())
    config = EvaluateConfig(tasks="knn", data=str(data), cache_dir=str(cache), workers=0, quiet=True)
    session = Session(model, config, print)
    train, test = (session.pooled(session.open("", split)) for split in ("train", "test"))
    link = model.preprocessing.link
    assert link != "none"
    return Case(train, test, model.logits, link)


def values_of(features: Features) -> Tensor:
    return torch.cat([piece.values for piece in features.everywhere()])


def fit(x: np.ndarray, y: np.ndarray, loss: Loss, c: float, num_classes: int = 10) -> LinearProbe:
    """A classifier on features: logistic regression, or with sigmoid one for each class."""

    def regression(labels: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=2000, tol=1e-6).fit(x, labels)

    if loss == "softmax":
        found = regression(y)
        weight, bias = found.coef_, found.intercept_
    else:
        each = [regression(y == label) for label in range(num_classes)]
        weight = np.concatenate([one.coef_ for one in each])
        bias = np.concatenate([one.intercept_ for one in each])
    return LinearProbe(torch.from_numpy(weight), torch.from_numpy(bias))


def margins(logits: Tensor, classes: Tensor) -> Tensor:
    mine = logits.gather(1, classes[:, None])
    return mine[:, 0] - logits.scatter(1, classes[:, None], -torch.inf).amax(1)


def orders(
    case: Case, queries: Tensor, classes: Tensor, fitted: Classifier, loss: Loss
) -> dict[str, np.ndarray]:
    """For each test image the training images, those first that a list puts first: int64 [m, n]."""
    rng = np.random.default_rng(0)
    n, labels = len(case.train.usable), case.train.labels[:, 0]
    noise = rng.random((len(queries), n))
    found = {
        "random": noise,
        "random, same class": noise - (labels[None] == classes.numpy()[:, None]),
    }
    result = {name: values.argsort(1) for name, values in found.items()}
    near = result["nearest by feature"] = nearest(case.train, queries, n)[1].numpy()
    others = np.take_along_axis(labels[None].repeat(len(near), 0), near, 1) != classes.numpy()[:, None]
    result["nearest, same class"] = np.take_along_axis(near, others.argsort(1, kind="stable"), 1)
    heads = {"": (fitted, loss), ", the model's own classifier": (case.classifier, case.loss)}
    for where, (classifier, kind) in heads.items():
        head = HeadInfluence(case.train, classifier, kind)
        logits = classifier(queries)
        scores = Scores.of(queries, logits, score_gradient(logits, Target(classes), kind), kind)
        result[f"tracin{where}"] = _falling(head.values(scores, "tracin").values)
        for damping in DAMPINGS:
            values = head.values(scores, "influence", damping)
            result[f"influence, damping {damping}{where}"] = _falling(values.values)
    return result


def _falling(values: Tensor) -> np.ndarray:
    return values.argsort(1, descending=True).numpy()


def removal(
    case: Case, c: float = 1.0, count: int = 24, loss: Loss = "softmax", only: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """The fall of the predicted class's margin when the first 5% of each list, or of those named in `only`,
    are taken away, [m]."""
    x, y = values_of(case.train).double().numpy(), case.train.labels[:, 0]
    tests = values_of(case.test)
    queries = tests[np.linspace(0, len(tests) - 1, count).round().astype(int)]
    fitted = fit(x, y, loss, c)
    classes = fitted(queries).argmax(1)
    before = margins(fitted(queries), classes)
    removed = round(SHARE * len(x))
    result = {}
    for name, order in orders(case, queries, classes, fitted, loss).items():
        if only and name not in only:
            continue
        after = torch.empty(count, dtype=torch.float64)
        for i in range(count):
            kept = np.delete(np.arange(len(x)), order[i, :removed])
            again = fit(x[kept], y[kept], loss, c)
            after[i] = margins(again(queries[i : i + 1]), classes[i : i + 1])[0]
        result[name] = (before - after).numpy()
    return result


def found_labels(case: Case, wrong: np.ndarray, validation: Features | None = None) -> dict[str, float]:
    """The share of wrong labels among as many first images of a list as there are wrong labels."""
    x, y = values_of(case.train), case.train.labels[:, 0]
    head = HeadInfluence(case.train, case.classifier, case.loss)
    judged = loss_of_set(HeadInfluence(validation or case.test, case.classifier, case.loss))
    logits = case.classifier(x)
    p = logits.softmax(1) if case.loss == "softmax" else logits.sigmoid()
    neighbours = y[nearest(case.train, x, 11)[1].numpy()[:, 1:]]
    lists = {
        "random": torch.rand(len(x), generator=torch.Generator().manual_seed(0)),
        "low probability of the label": -p[range(len(x)), y],
        "neighbours of other classes": torch.from_numpy((neighbours != y[:, None]).mean(1)),
        "influence on itself (tracin)": head.own().values[0],
        "tracin over validation": -head.values(judged, "tracin").values[0],
    }
    for damping in DAMPINGS:
        values = head.values(judged, "influence", damping)
        lists[f"influence over validation, damping {damping}"] = -values.values[0]
    first = {name: _falling(some[None])[0, : len(wrong)] for name, some in lists.items()}
    return {name: float(np.isin(rows, wrong).mean()) for name, rows in first.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("removal", "labels", "mislabelled"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--wrong", type=Path)
    parser.add_argument("--loss", choices=("softmax", "sigmoid"), default="softmax")
    parser.add_argument("--c", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "mislabelled":
        print(f"{len(write_mislabelled(given.folder, given.seed))} labels are wrong")
        return
    with tempfile.TemporaryDirectory() as cache:
        case = open_case(given.folder, given.data, Path(cache))
        if given.what == "removal":
            for name, falls in removal(case, given.c, loss=given.loss).items():
                error = falls.std(ddof=1) / len(falls) ** 0.5
                print(f"| {name} | {falls.mean():.2f} ± {error:.2f} |", flush=True)
        else:
            for name, precision in found_labels(case, np.load(given.wrong)).items():
                print(f"| {name} | {precision:.3f} |", flush=True)


if __name__ == "__main__":
    main()
