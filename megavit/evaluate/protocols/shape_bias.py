"""Does a model go by shape or by texture, and does it err where people err? On cue-conflict images, which
have the shape of one of 16 categories and the texture of another (Geirhos et al., ICLR 2019).

The probability of a category is the **mean** of the softmax probabilities of its ImageNet classes, as
model-vs-human has it; with the sum, dogs would win by their number.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torchmetrics.functional.classification import binary_cohen_kappa

from megavit.evaluate.features import Features
from megavit.evaluate.protocols import standard_error
from megavit.evaluate.protocols.scores import LogitsOf, logits_in_pieces, together
from megavit.evaluate.results import Count, Measurement

# The columns of model-vs-human's csv files that matter here.
_COLUMNS = ("subj", "object_response", "category", "imagename")


def shape_bias(
    features: Features,
    logits_of: LogitsOf,
    categories: Mapping[str, Sequence[int]],
    people: Path | None = None,
) -> Iterator[Measurement]:
    """shape_bias = shape decisions / (shape + texture decisions), over the images whose shape and texture
    differ; shape_accuracy and texture_share, the two parts as shares of these images; error_consistency with
    people, if there is a csv file of their decisions (or a folder of such files).

    Args:
        features: of a set whose labels are the shapes, and whose `groups["texture"]` are the textures, as
            places in its `class_names`.
        logits_of: the classifier of the 1,000 classes.
        categories: the class ids of each category, in the order of `class_names`.
        people: model-vs-human's raw data, with the columns subj, object_response, category, imagename.

    Collective: one all-reduce of n numbers.
    """
    images = features.set
    if tuple(categories) != images.class_names:
        raise ValueError(
            f"categories are {', '.join(categories)}, but {images.name} has {', '.join(images.class_names)}"
        )
    decisions = decide(features, logits_of, list(categories.values()))
    shape, texture = images.labels[:, 0], images.groups["texture"]
    conflict = (decisions >= 0) & (shape != texture)
    by_shape, by_texture = (int((decisions == cue)[conflict].sum()) for cue in (shape, texture))
    count = Count(len(shape), int(conflict.sum()), int(features.bad.sum()))
    decided = by_shape + by_texture
    bias = by_shape / decided if decided else float("nan")
    yield Measurement(
        "shape_bias",
        bias,
        Count(count.given, decided, count.bad),
        standard_error.of_share(bias, decided),
        settings={"by_category": _by_category(decisions, shape, texture, conflict, images.class_names)},
    )
    for metric, hits in (("shape_accuracy", by_shape), ("texture_share", by_texture)):
        value = hits / count.used if count.used else float("nan")
        yield Measurement(
            metric,
            value,
            count,
            standard_error.of_share(value, count.used),
            higher_is_better=metric == "shape_accuracy",
        )
    if people is not None:
        names = [images.images.key(row) for row in range(len(images))]
        yield consistency_with_people(decisions, shape, names, images.class_names, people)


@torch.no_grad()
def decide(features: Features, logits_of: LogitsOf, categories: Sequence[Sequence[int]]) -> np.ndarray:
    """The likeliest category of every image, int64 [n], -1 where it could not be read; the same on every
    rank. Collective."""
    device = features.mesh.device
    outputs = logits_of(torch.zeros(1, features.dim, device=device)).shape[1]
    highest = max(max(ids) for ids in categories)
    if highest >= outputs:
        raise ValueError(
            f"the categories have ImageNet class ids up to {highest}, but the classifier has only {outputs} "
            "outputs; shape bias needs a head of the 1,000 classes"
        )
    mean = torch.zeros(outputs, len(categories), dtype=torch.float64, device=device)
    for place, ids in enumerate(categories):
        mean[list(ids), place] = 1 / len(ids)
    found = torch.zeros(len(features.bad), dtype=torch.float64, device=device)
    for rows, logits in logits_in_pieces(features, logits_of, None, outputs):
        found[torch.from_numpy(rows).to(device)] = (logits.softmax(1) @ mean).argmax(1).double()
    return np.where(features.bad, -1, together(features.mesh, found).astype(np.int64))


def error_consistency(right: np.ndarray, others: np.ndarray) -> float:
    """Cohen's kappa of two observers' bool [n]: 1 if they err on the same images, 0 if no more often than two
    independent ones of their accuracies would, NaN if neither ever errs or both always do."""
    pair = torch.from_numpy(np.stack([right, others]).astype(np.int64))
    return float(binary_cohen_kappa(pair[0], pair[1]))


def consistency_with_people(
    decisions: np.ndarray, shape: np.ndarray, names: Sequence[str], categories: Sequence[str], people: Path
) -> Measurement:
    """error_consistency: the mean over people of the kappa on the images that each of them saw. Right is who
    names the shape. The standard error is that of the mean over people; every kappa is in the settings."""
    row_of = {_picture(name): row for row, name in enumerate(names) if decisions[row] >= 0}
    place = {name: number for number, name in enumerate(categories)}
    seen: dict[str, list[tuple[int, bool]]] = {}
    for person, name, response, category in _read(people):
        if (row := row_of.get(_picture(name))) is None:
            continue
        if place.get(category) != shape[row]:
            raise ValueError(f"{people} calls {name} a {category}, the data set a {categories[shape[row]]}")
        seen.setdefault(person, []).append((row, response == category))
    if not seen:
        raise ValueError(f"no image name of {people} is one of the data set's, such as {_picture(names[0])}")
    kappas = {}
    for person, answers in sorted(seen.items()):
        rows, right = (np.array(column) for column in zip(*answers, strict=True))
        kappas[person] = error_consistency(decisions[rows] == shape[rows], right)
    values = np.array([kappa for kappa in kappas.values() if not np.isnan(kappa)])
    used = len({row for answers in seen.values() for row, _ in answers})
    return Measurement(
        "error_consistency",
        float(values.mean()) if len(values) else float("nan"),
        Count(len(names), used, int((decisions < 0).sum())),
        standard_error.of_mean(values),
        settings={"people": kappas},
    )


def _read(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Person, image, response and category of every line of a csv file, or of all in a folder."""
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        with file.open(newline="") as lines:
            rows = csv.DictReader(lines)
            rows.fieldnames = [name.strip().lower() for name in rows.fieldnames or ()]
            if missing := [name for name in _COLUMNS if name not in rows.fieldnames]:
                raise ValueError(f"{file} lacks the columns {', '.join(missing)} of model-vs-human's files")
            for row in rows:
                yield row["subj"], row["imagename"], row["object_response"], row["category"]


def _picture(name: str) -> str:
    """A picture's name without folder, type and what lists of decisions write before it: airplane1-bicycle2
    of airplane/airplane1-bicycle2.png and of 0001_cc_dnn_0_airplane_00_airplane1-bicycle2.png."""
    return re.split(r"[/\\_]", name)[-1].rsplit(".", 1)[0]


def _by_category(
    decisions: np.ndarray, shape: np.ndarray, texture: np.ndarray, conflict: np.ndarray, names: Sequence[str]
) -> dict[str, float | None]:
    """The shape bias of the images of each shape, None where no decision was for either cue."""
    out: dict[str, float | None] = {}
    for place, name in enumerate(names):
        of = conflict & (shape == place)
        hits, others = ((decisions == cue)[of].sum() for cue in (shape, texture))
        out[name] = float(hits / (hits + others)) if hits + others else None
    return out
