"""How `--tasks` names protocols and data sets, and which of them go together."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from megavit.evaluate.config import EvaluateConfig
from megavit.evaluate.session import Session
from megavit.evaluate.sets.catalogue import CATALOGUE, DENSE_SETS
from megavit.evaluate.tasks import PROTOCOLS, Task, listing, parse_tasks
from tests.evaluate.fixtures import encoded, put
from tests.evaluate.models import small_model
from tests.exports import NAMES

SETS = (*(name for name in CATALOGUE if "/" not in name), "imagenet-c", *DENSE_SETS)
MAPS = {"nyu": "depth", "kitti": "depth", "ade20k": "segment", "voc": "segment"}


def parsed(tasks: str, **changes: Any) -> list[Task]:
    given = {"data": "own", "data_root": "data", "ood": "sklearn-photos", **changes}
    return parse_tasks(EvaluateConfig(tasks=tasks, **given))


def test_names_of_tasks() -> None:
    """Catches a set that is measured by another protocol than its usual one, a protocol on other data, and a
    task that is done twice."""
    found = parsed(
        "knn, imagenet-a,cifar10,celeba,fairness,shape-bias,imagenet-c,linear:imagenet,knn,voc,nyu,depth"
    )
    protocols = {id(protocol): name for name, protocol in PROTOCOLS.items()}
    assert [(task.name, protocols[id(task.protocol)], task.data) for task in found] == [
        ("knn", "knn", ""),
        ("imagenet-a", "head", "imagenet-a"),
        ("cifar10", "linear", "cifar10"),
        ("celeba", "fairness", "celeba"),
        ("fairness", "fairness", "celeba"),
        ("shape-bias", "shape-bias", "cue-conflict"),
        ("imagenet-c", "imagenet-c", "imagenet-c"),
        ("linear:imagenet", "linear", "imagenet"),
        ("voc", "segment", "voc"),
        ("nyu", "depth", "nyu"),
        ("depth", "depth", ""),
    ]


def test_every_pair_is_a_task_or_is_refused() -> None:
    """Catches a protocol that learns on a set without training images, or that ends in a traceback."""
    for protocol, data in itertools.product(PROTOCOLS, SETS):
        has_train = data in CATALOGUE and "train" in CATALOGUE[data].splits
        of_one_set = {"fairness": "celeba", "shape-bias": "cue-conflict", "imagenet-c": "imagenet-c"}
        good = of_one_set.get(protocol, data) == data and (data != "imagenet-c" or protocol == "imagenet-c")
        if PROTOCOLS[protocol].learns and not has_train:
            good = False
        if data in MAPS or PROTOCOLS[protocol].maps:
            good = MAPS.get(data) == protocol
        name = f"{protocol}:{data}"
        if good:
            assert [task.data for task in parsed(name)] == [data]
        else:
            with pytest.raises(ValueError, match=f"--tasks: '{name}'"):
                parsed(name)


def test_all_tasks_are_listed() -> None:
    """Catches a protocol or set that nobody can find."""
    lines = listing(None)
    for name in (*PROTOCOLS, *SETS):
        assert any(line.startswith(f"  {name} ") for line in lines), name


def test_bad_images_of_all_that_was_looked_at(tmp_path: Path) -> None:
    """Catches bad images of train that those of test, which has the same name, take the place of."""
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        for number in range(2):
            put(tmp_path / "own" / split / name / f"{number}.png", encoded(number, "PNG"))
    put(tmp_path / "own" / "train" / "dog" / "1.png", b"")
    put(tmp_path / "own" / "test" / "cat" / "0.png", b"")
    config = EvaluateConfig(tasks="knn", data=str(tmp_path / "own"), cache_dir=str(tmp_path / "cache"))
    session = Session(small_model(tmp_path / "model"), config, lambda text: None)
    for split in ("train", "test", "test"):
        session.pooled(session.open("", split))  # type: ignore[arg-type]
    found = dict(session.bad())
    assert set(found) == {"own train", "own test"}
    assert ["train/dog/1.png" in found["own train"][0], "test/cat/0.png" in found["own test"][0]] == [
        True,
        True,
    ]
    assert [len(reasons) for reasons in found.values()] == [1, 1]


def test_corrupted_images_have_no_features_that_nobody_asks_for(tmp_path: Path) -> None:
    """Catches 75 passes that keep every block of --layers all beside the one feature that is looked at."""
    for split, number in itertools.product(("train", "test"), range(4)):
        put(tmp_path / "own" / split / NAMES[number % 3] / f"{number}.png", encoded(number, "PNG"))
    config = EvaluateConfig(
        tasks="knn,corruption", data=str(tmp_path / "own"), cache_dir=str(tmp_path / "cache"), layers="all"
    )
    session = Session(small_model(tmp_path / "model"), config, lambda text: None)
    for task in parse_tasks(config):
        list(task.run(session))
    folders = [
        {path.name for path in key.iterdir() if path.is_dir()} for key in (tmp_path / "cache").iterdir()
    ]
    assert folders.count({"pooled"}) == 75 and folders.count({"pooled", "block.0"}) == 2
