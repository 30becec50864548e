"""What can be measured: protocols, the data that each needs, and how `--tasks` names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megavit.evaluate.config import EvaluateConfig
from megavit.evaluate.dense_tasks import measure_depth, measure_segment
from megavit.evaluate.features import Features
from megavit.evaluate.protocols.calibration import calibration
from megavit.evaluate.protocols.classify import classify
from megavit.evaluate.protocols.corruption import corrupted, imagenet_c, outcome
from megavit.evaluate.protocols.fairness import CAVEAT, fairness
from megavit.evaluate.protocols.fewshot import fewshot
from megavit.evaluate.protocols.knn import knn
from megavit.evaluate.protocols.linear import fit
from megavit.evaluate.protocols.multi_label import mean_average_precision
from megavit.evaluate.protocols.ood import ood
from megavit.evaluate.protocols.probe import LinearProbe
from megavit.evaluate.protocols.rows import held_out_tenth
from megavit.evaluate.protocols.scores import Link, Scores, score
from megavit.evaluate.protocols.selective import selective
from megavit.evaluate.protocols.sgd import BATCH, EPOCHS, RATES, choose, epoch_batches, train_heads
from megavit.evaluate.protocols.shape_bias import shape_bias
from megavit.evaluate.results import Measurement
from megavit.evaluate.session import Session
from megavit.evaluate.sets.catalogue import CATALOGUE, DENSE_SETS, describe, find
from megavit.evaluate.sets.checks import check_not_chance
from megavit.evaluate.sets.cue_conflict import CATEGORIES, category_members
from megavit.evaluate.sets.dense import OWN_LAYOUTS, DenseSet
from megavit.evaluate.sets.image_set import ImageSet, MissingData
from megavit.evaluate.sets.imagenet_classes import NUM_CLASSES
from megavit.evaluate.sets.imagenet_variants import CORRUPTIONS, SEVERITIES, imagenet_c_parts
from megavit.evaluate.sets.photo_patches import PHOTO_PATCHES
from megavit.evaluate.spaces import in_classes_of
from megavit.fields import nearest

OWN = ""  # the data set of --data
IMAGENET_C = "imagenet-c"
_MOST_SHOWN = 5


class Found(NamedTuple):
    """A measurement, and the images that it is of."""

    measurement: Measurement
    images: ImageSet | DenseSet


@dataclass(frozen=True)
class Protocol:
    """A way to measure.

    Args:
        title: in a few words, for the results.
        run: yields what is found on a data set, by its name.
        learns: whether it needs training images.
        maps: the task (depth, segment) whose maps it looks at; empty for those that look at features.
    """

    title: str
    run: Callable[[Session, str], Iterator[Found]]
    learns: bool = False
    maps: str = ""


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
    # Images that were chosen because classifiers get them wrong may be at chance.
    found = list(classify(scores, chance_is_error=images.name != "imagenet-a"))
    if images.right != "all":
        check_not_chance(found[0].value, scores.classes, scores.count.used, images.name)
    for measurement in found:
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
    train = session.probe_features(session.open(data, "train"))
    tests = _tests(session, data)
    for layer, features in train.items():
        probe, settings = fit(features, seed=session.config.seed)
        yield from _probed(session, tests, layer, probe, settings)


def _linear_sgd(session: Session, data: str) -> Iterator[Found]:
    images, config = session.open(data, "train"), session.config
    tests = _tests(session, data)
    train = session.probe_features(images)
    first = next(iter(train.values()))
    rows, held = held_out_tenth(first, config.seed)
    batches = [epoch_batches(rows, BATCH, config.seed, epoch) for epoch in range(EPOCHS)]
    steps = sum(map(len, batches))
    heads = train_heads(
        session.augmented(images, batches),
        session.mesh,
        {layer: features.dim for layer, features in train.items()},
        len(images.class_names),
        steps,
        seed=config.seed,
    )
    layer, probe, settings = choose(heads, train, held, RATES)
    more = {
        "epochs": EPOCHS,
        "batch": BATCH,
        "steps": steps,
        "crop_area": config.crop_area,
        "flip": config.flip,
    }
    yield from _probed(session, tests, layer, probe, {**settings, **more})


def _probed(
    session: Session, tests: Sequence[ImageSet], layer: str, probe: LinearProbe, settings: Mapping[str, Any]
) -> Iterator[Found]:
    """The accuracy of a probe on each of the test sets."""
    for images in tests:
        scores = score(session.probe_features(images)[layer], probe, "softmax")
        for found in classify(scores, chance_is_error=False):
            chosen = {**settings, **found.settings, "layer": layer}
            yield Found(dataclasses.replace(found, settings=chosen), images)


def _knn(session: Session, data: str) -> Iterator[Found]:
    yield from _on_layers(session, data, knn)


def _fewshot(session: Session, data: str) -> Iterator[Found]:
    yield from _on_layers(session, data, fewshot)


def _on_layers(
    session: Session, data: str, protocol: Callable[[Features, list[Features]], Iterator[Measurement]]
) -> Iterator[Found]:
    """A protocol that learns from the training images, on each layer and test set."""
    train = session.probe_features(session.open(data, "train"))
    tests = {images.name: images for images in _tests(session, data)}
    for layer, features in train.items():
        asked = [session.probe_features(images)[layer] for images in tests.values()]
        for found in protocol(features, asked):
            settings = {**found.settings, "layer": layer}
            yield Found(dataclasses.replace(found, settings=settings), tests[found.data])


def _ood(session: Session, data: str) -> Iterator[Found]:
    inside, outside = session.open(data, "test"), session.outside()
    train = None
    try:  # the distances need training images, the scores of the classifier do not
        if data in CATALOGUE and "train" not in CATALOGUE[data].splits:
            raise MissingData(f"{data} has none")
        train = session.pooled(session.open(data, "train"))
    except MissingData as error:
        session.say(f"note: no distances to training images: {error}")
    found = ood(
        session.pooled(inside),
        session.pooled(outside),
        train=train,
        logits_of=session.model.logits if session.model.num_classes else None,
    )
    for one in found:
        yield Found(dataclasses.replace(one, data=f"{inside.name} / {outside.name}"), inside)


def _corruption(session: Session, data: str) -> Iterator[Found]:
    clean, scores = _scored(session, data)
    parts = {}
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            images = clean.adjusted(dataclasses.replace(clean.adjust, corruption=name, severity=severity))
            parts[name, severity] = outcome(_score_head(session, images, probed=False))
    for found in corrupted(parts, outcome(scores)):
        yield Found(found, clean)


def _imagenet_c(session: Session, data: str) -> Iterator[Found]:
    available = session.mesh.on_main(lambda: _imagenet_c_parts(session.config.data_root))
    parts = {}
    for name, severity in available:
        images = in_classes_of(session.model, session.open(f"{IMAGENET_C}/{name}/{severity}", "test"))
        parts[name, severity] = outcome(_score_head(session, images, probed=False))
    clean = None
    try:
        clean = outcome(_scored(session, "imagenet")[1])
    except MissingData as error:
        session.say(f"note: no relative mCE: {error}")
    for found in imagenet_c(parts, clean):
        yield Found(dataclasses.replace(found, data=IMAGENET_C), images)


def _imagenet_c_parts(data_root: str) -> list[tuple[str, int]]:
    """What is there. MissingData if it is too little for mCE: better before than after the others."""
    available = imagenet_c_parts(data_root)
    every = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    if missing := [f"{name}/{severity}" for name, severity in every if (name, severity) not in available]:
        origin = CATALOGUE[f"{IMAGENET_C}/{missing[0]}"].origin
        some = ", ".join(missing[:_MOST_SHOWN]) + (
            f" and {len(missing) - _MOST_SHOWN} more" if len(missing) > _MOST_SHOWN else ""
        )
        what = f"lacks {len(missing)} of the {len(every)} parts of mCE: {some}"
        raise origin.missing(Path(data_root) / IMAGENET_C, what)
    return available


def _shape_bias(session: Session, data: str) -> Iterator[Found]:
    images = session.open(data, "test")
    if session.model.num_classes != NUM_CLASSES:
        raise ValueError(
            f"shape bias takes a classifier of ImageNet's {NUM_CLASSES} classes, which are gathered in 16 "
            f"categories; {session.model.name} has {session.model.num_classes}"
        )
    members = (ids.tolist() for ids in category_members())
    categories = dict(zip(CATEGORIES, members, strict=True))
    people = Path(session.config.human) if session.config.human else None
    for found in shape_bias(session.pooled(images), session.model.logits, categories, people):
        yield Found(found, images)


def _fairness(session: Session, data: str) -> Iterator[Found]:
    train, images = session.open(data, "train"), session.open(data, "test")
    for layer, features in session.probe_features(train).items():
        probe, settings = fit(features, seed=session.config.seed)
        scores = score(session.probe_features(images)[layer], probe, "softmax")
        found = fairness(
            scores.predicted,
            images.labels[:, 0],
            images.groups["Male"],
            target_name=session.config.attribute,
            group_name="Male",
        )
        for one in found:
            yield Found(
                dataclasses.replace(one, settings={**settings, **one.settings, "layer": layer}), images
            )
    session.say(CAVEAT)


def _depth(session: Session, data: str) -> Iterator[Found]:
    for found in measure_depth(session, data):
        yield Found(*found)


def _segment(session: Session, data: str) -> Iterator[Found]:
    for found in measure_segment(session, data):
        yield Found(*found)


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
    return images, _score_head(session, images)


def _score_head(session: Session, images: ImageSet, *, probed: bool = True) -> Scores:
    # Softmax also for a model that was trained with sigmoids, as is the custom where models are compared.
    link: Link = "sigmoid" if images.right == "all" else "softmax"
    return score(session.pooled(images, probed=probed), session.model.logits, link)


_IMAGENET = ("imagenet-real", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
_RELATIVES = {"imagenet": _IMAGENET}  # on which a probe that learned from the set is tested too

PROTOCOLS = {
    "head": Protocol("the model's own classifier", _head),
    "linear": Protocol("linear probe by LBFGS, L2 chosen on held-out training images", _linear, learns=True),
    "linear-sgd": Protocol(
        "linear probe by SGD with random crops, rate chosen likewise", _linear_sgd, learns=True
    ),
    "fewshot": Protocol("ridge regression on a few images a class", _fewshot, learns=True),
    "knn": Protocol("vote of the k nearest training images", _knn, learns=True),
    "calibration": Protocol("calibration of the model's own classifier", _calibration),
    "selective": Protocol("risk and coverage of the model's own classifier", _selective),
    "corruption": Protocol("accuracy under 15 corruptions made on the fly", _corruption),
    "ood": Protocol("telling the test images from others (--ood)", _ood),
    IMAGENET_C: Protocol("mean corruption error against AlexNet", _imagenet_c),
    "shape-bias": Protocol("shape or texture, on cue-conflict images", _shape_bias),
    "fairness": Protocol("accuracy and positive rate by group", _fairness, learns=True),
    "depth": Protocol("errors of depth, at the size of the truth", _depth, maps="depth"),
    "segment": Protocol("classes of pixels, at the size of the truth", _segment, maps="segment"),
}
# How a set is measured if only its name is given; the others by the model's own classifier.
_USUAL = {
    "cifar10": "linear",
    "cifar100": "linear",
    "celeba": "fairness",
    "cue-conflict": "shape-bias",
    IMAGENET_C: IMAGENET_C,
    "nyu": "depth",
    "kitti": "depth",
    "ade20k": "segment",
    "voc": "segment",
}
_SETS = (*(name for name in CATALOGUE if "/" not in name), IMAGENET_C, *DENSE_SETS)
_OF_ONE_SET = {
    protocol: name
    for name, protocol in _USUAL.items()
    if protocol != "linear" and not PROTOCOLS[protocol].maps
}


def parse_tasks(config: EvaluateConfig) -> list[Task]:
    """The tasks that `--tasks` names. ValueError for an unknown one, for a protocol that cannot be asked of
    its set, and for one whose --data, --data_root or --ood is not given."""
    words = dict.fromkeys(word.strip() for word in config.tasks.split(",") if word.strip())
    return [_parse_task(name, config) for name in words]


def _parse_task(name: str, config: EvaluateConfig) -> Task:
    first, colon, data = name.partition(":")
    if not colon and first in _SETS:
        first, data = _USUAL.get(first, "head"), first
    elif not colon:
        data = _OF_ONE_SET.get(first, OWN)
    if first not in PROTOCOLS:
        known = (*PROTOCOLS, *_SETS)
        raise ValueError(
            f"--tasks: {name!r} is unknown{nearest(first, known)}; protocols are {', '.join(PROTOCOLS)}, "
            f"data sets {', '.join(_SETS)}, and knn:imagenet is both"
        )
    if data not in _SETS and (colon or data != OWN):
        raise ValueError(f"--tasks: {name!r} has no data set {data!r}{nearest(data, _SETS)}")
    _check_pair(name, first, data)
    if data == OWN and not config.data:
        raise ValueError(f"--tasks: {name} needs --data DIR, or a set: {name}:imagenet with --data_root DIR")
    if data != OWN and not config.data_root:
        raise ValueError(f"--tasks: {name} needs --data_root DIR, the folder of {data}")
    if first == "ood":
        _check_outside(name, config)
    return Task(name, PROTOCOLS[first], data)


def _check_pair(name: str, protocol: str, data: str) -> None:
    """ValueError if the protocol cannot be asked of the set."""
    only = _OF_ONE_SET.get(protocol, data)
    if data != only:
        raise ValueError(f"--tasks: {name!r}: {protocol} is measured on {only} only")
    if PROTOCOLS[protocol].maps and data != OWN and _USUAL.get(data) != protocol:
        those = ", ".join(one for one in DENSE_SETS if _USUAL[one] == protocol)
        raise ValueError(f"--tasks: {name!r}: {protocol} is measured on {those}, or on --data DIR")
    if (data == IMAGENET_C or data in DENSE_SETS) and protocol != _USUAL[data]:
        raise ValueError(f"--tasks: {name!r}: {data} has one protocol; write {data} alone")
    if data in CATALOGUE and PROTOCOLS[protocol].learns and "train" not in CATALOGUE[data].splits:
        sets = [one for one in _SETS if one in CATALOGUE and "train" in CATALOGUE[one].splits]
        more = f"; {protocol}:imagenet is scored on it too" if data in _IMAGENET else ""
        raise ValueError(
            f"--tasks: {name!r}: {protocol} learns from training images, and {data} has none; sets that have "
            f"some are {', '.join(sets)}{more}"
        )


def _check_outside(name: str, config: EvaluateConfig) -> None:
    if not config.ood:
        sets = ", ".join(one for one in _SETS if one in CATALOGUE)
        raise ValueError(
            f"--tasks: {name} needs --ood: shards, a folder of images, a set below --data_root ({sets}), or "
            f"{PHOTO_PATCHES}"
        )
    if config.ood in CATALOGUE and not config.data_root:
        raise ValueError(f"--ood {config.ood} needs --data_root DIR, its folder")


def listing(data_root: Path | None) -> list[str]:
    """Every protocol and data set, and, with a data root, whether its data are there."""
    lines = ["Protocols, on --data, or on a set as PROTOCOL:SET:"]
    lines += [f"  {name:12} {protocol.title}" for name, protocol in PROTOCOLS.items()]
    lines += [f"{'':15}--data of {plane}: {layout}" for plane, layout in OWN_LAYOUTS.items()]
    lines += ["", "Data sets below --data_root, which alone stand for their usual protocol:"]
    if data_root is not None:
        return [*lines, describe(find(data_root))]
    for name in _SETS:
        first = f"{IMAGENET_C}/{CORRUPTIONS[0]}/1" if name == IMAGENET_C else name
        origin = (DENSE_SETS[name] if name in DENSE_SETS else CATALOGUE[first]).origin
        layout = origin.layout.replace("\n", "\n" + " " * 18)
        lines += [f"  {name:16}{_USUAL.get(name, 'head')}: {origin.title}", f"{'':18}{layout}"]
        lines.append(f"{'':18}{origin.source} ({origin.terms}), {origin.size}")
    return lines
