"""Influence against autograd, an explicit Hessian and a classifier fitted without the image."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor

from megavit.data.lanes import DataState, Lanes, Order
from megavit.data.write import ArrayImages, write_splits
from megavit.evaluate.config import EvaluateConfig
from megavit.evaluate.protocols.knn import highest
from megavit.evaluate.protocols.probe import LinearProbe
from megavit.evaluate.session import Session
from megavit.evaluate.sets.shards import shard_set
from megavit.explain import head as head_module
from megavit.explain.head import HeadInfluence, Scores
from megavit.explain.influence import label_errors, loss_of_set, pushed, score_gradient, similar
from megavit.explain.provenance import Readings, described
from megavit.explain.target import Target
from megavit.parallel.mesh import Mesh
from megavit.tasks.config import Loss
from tests.evaluate.fixtures import make_shards
from tests.evaluate.models import small_model
from tests.evaluate.protocols.memory import features, image_set
from tests.explain.training_images import Case, fit, found_labels, removal
from tests.exports import write_export
from tests.ranks import run_ranks

LOSSES: tuple[Loss, ...] = ("softmax", "sigmoid")
N, D, K = 90, 5, 4


def made(mesh: Mesh | None = None, bad: tuple[int, ...] = ()) -> tuple[Any, LinearProbe]:
    """Features with class means, and a classifier that is not at its optimum."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, K, N)
    values = rng.normal(size=(N, D)) + 2 * np.eye(K, D)[labels]
    probe = LinearProbe(torch.from_numpy(rng.normal(size=(K, D))), torch.from_numpy(rng.normal(size=K)))
    return features(image_set(labels.tolist(), K), values, mesh, bad), probe


def queries() -> tuple[Tensor, Target]:
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, D))).float()
    return x, Target(torch.tensor([0, 3, 1]))


def scores_of(probe: LinearProbe, x: Tensor, target: Target, loss: Any) -> Scores:
    logits = probe(x)
    return Scores.of(x, logits, score_gradient(logits, target, loss), loss)


def losses(parameters: Tensor, x: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Of each image, as torch has them, of parameters [K, D + 1]."""
    logits = F.pad(x.double(), (0, 1), value=1.0) @ parameters.T
    if loss == "softmax":
        return F.cross_entropy(logits, labels, reduction="none")
    targets = F.one_hot(labels, K).double()
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def log_odds(parameters: Tensor, x: Tensor, target: Target, loss: Loss) -> Tensor:
    logits = F.pad(x.double(), (0, 1), value=1.0) @ parameters.T
    if target.against is not None or loss == "sigmoid":
        return target.score(logits)
    p = logits.softmax(1).gather(1, target.classes[:, None])[:, 0]
    return (p / (1 - p)).log()


def by_row(found: Any) -> Tensor:
    assert len(set(found.rows.tolist())) == len(found.rows)
    return found.values[:, np.argsort(found.rows)]


@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_values_are_those_of_autograd_and_of_the_whole_hessian(
    loss: Loss, against: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a wrong sign, a bias that is left out, the gradient of another score, a Hessian without the
    coupling of softmax's classes, damping on the wrong scale, and images lost between chunks."""
    monkeypatch.setattr(head_module, "_CHUNK_NUMBERS", 40)
    train, probe = made()
    x, target = queries()
    if against:
        target = Target(target.classes, torch.tensor([1, 2, 3]))
    parameters = torch.cat([probe.weight, probe.bias[:, None]], 1)
    rows, values = zip(*train.mine(), strict=True)
    order = np.argsort(np.concatenate(rows))
    inputs, labels = torch.cat(values)[order], torch.from_numpy(train.labels[:, 0])

    of_images = torch.func.jacrev(partial(losses, x=inputs, labels=labels, loss=loss))(parameters).flatten(1)
    of_scores = torch.func.jacrev(partial(log_odds, x=x, target=target, loss=loss))(parameters).flatten(1)
    hessian = torch.func.hessian(lambda p: losses(p, inputs, labels, loss).mean())(parameters)
    hessian = hessian.reshape(K * (D + 1), -1)

    head = HeadInfluence(train, probe, loss)
    scores = scores_of(probe, x, target, loss)
    np.testing.assert_allclose(
        by_row(head.values(scores, "tracin")), -of_scores @ of_images.T, rtol=1e-5, atol=1e-6
    )
    found = head.values(scores, "influence", 0.05)
    assert found.settings["residual"] < 1e-7
    diagonal = hessian.diagonal().view(K, D + 1)
    for i, classes in enumerate(scores.classes):
        damped = hessian + 0.05 * diagonal[classes].mean() * torch.eye(len(hessian))
        expected = -torch.linalg.solve(damped, of_scores[i]) @ of_images.T / N
        np.testing.assert_allclose(by_row(found)[i], expected, rtol=1e-4, atol=1e-6)
    own = by_row(head.own())[0]
    np.testing.assert_allclose(own, of_images.square().sum(1), rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_influence_is_what_a_fit_without_the_image_loses(loss: Loss) -> None:
    """Catches values of the wrong size, as without 1 / n: each of some images is left out, and the
    classifier fitted again."""
    train, _ = made()
    x, target = queries()
    inputs, labels = train.take(train.usable).double().numpy(), train.labels[:, 0]
    c = 1.0
    whole = fit(inputs, labels, loss, c, K)
    head = HeadInfluence(train, whole, loss)
    scores = scores_of(whole, x, target, loss)
    p = whole(torch.from_numpy(inputs))
    p = p.softmax(1) if loss == "softmax" else p.sigmoid()
    squares = np.pad(np.square(inputs), ((0, 0), (0, 1)), constant_values=1.0)
    diagonal = ((p * (1 - p)).T.numpy() @ squares / N)[scores.classes.numpy()].mean((1, 2))
    # The fit's own regularisation is the damping.
    for i in range(len(x)):
        one = Scores(*(part[i : i + 1] for part in scores))
        values = by_row(head.values(one, "influence", 1 / (c * N) / diagonal[i]))[0]
        chosen = np.concatenate([values.argsort()[:4], values.argsort()[-4:]])
        falls = []
        for row in chosen:
            again = fit(np.delete(inputs, row, 0), np.delete(labels, row), loss, c, K)
            before, after = (
                log_odds(torch.cat([probe.weight, probe.bias[:, None]], 1), x, target, loss)[i]
                for probe in (whole, again)
            )
            falls.append(float(before - after))
        assert np.corrcoef(values[chosen], falls)[0, 1] > 0.97
        assert 0.5 < np.polyfit(values[chosen], falls, 1)[0] < 2


def test_few_of_many_classes_are_followed() -> None:
    """Catches a score cut off in silence, and with sigmoid classes that are followed for nothing."""
    x, target = queries()
    logits = torch.randn(3, K, generator=torch.Generator().manual_seed(0))
    for loss, used in (("softmax", 2), ("sigmoid", 1)):
        gradient = score_gradient(logits, target, loss)  # type: ignore[arg-type]
        scores = Scores.of(x, logits, gradient, loss, 2)  # type: ignore[arg-type]
        assert scores.classes.shape == (3, used)
        assert (scores.classes == target.classes[:, None]).any(1).all()
        assert (scores.kept == 1).all() == (loss == "sigmoid")
        assert (scores.kept > 0.5).all()


def test_images_that_cannot_be_used_push_nothing() -> None:
    """Catches the row of an unreadable image, or an unlabelled one taken as no class of a softmax."""
    train, probe = made(bad=(3, 50))
    train.set.labels[7] = -1
    x, target = queries()
    for loss, count in (("softmax", N - 3), ("sigmoid", N - 2)):
        head = HeadInfluence(train, probe, loss)  # type: ignore[arg-type]
        scores = scores_of(probe, x, target, loss)  # type: ignore[arg-type]
        found = head.values(scores)
        assert len(found.rows) == count and not {3, 50} & set(found.rows.tolist())
        assert (7 in found.rows) == (loss == "sigmoid")


def measured(mesh: Mesh) -> list[Any]:
    """Both lists of each measure, the loss of a set, and the influence of images on themselves."""
    train, probe = made(mesh, bad=(3,))
    x, target = queries()
    train.take = train.everywhere = None
    found: list[Any] = []
    for loss in LOSSES:
        head = HeadInfluence(train, probe, loss)
        scores = scores_of(probe, x, target, loss)
        some = [head.values(scores, measure) for measure in ("tracin", "influence")]
        for one in [*some, head.values(loss_of_set(head), "influence"), head.own()]:
            for sign in (1, -1):
                values, rows = highest(mesh, sign * one.values, one.rows, 6)
                found.append((values.tolist(), rows.tolist()))
    return found


def measured_on(tp_size: int) -> list[Any]:
    return measured(Mesh.from_environment(tp_size))


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 1), (3, 1), (4, 2)])
def test_same_images_on_any_ranks(ranks: int, tp_size: int) -> None:
    """Catches rows that are counted twice, as by the ranks of a TP group, or not at all, a rank without rows
    that waits or fails, and training features that are brought together."""
    expected = measured(Mesh.single())
    results = run_ranks(ranks, measured_on, tp_size)
    for found in results:
        assert found == results[0]
    for (values, rows), (their_values, their_rows) in zip(expected, results[0], strict=True):
        assert rows == their_rows
        np.testing.assert_allclose(values, their_values, rtol=1e-6)


def session_of(tmp_path: Path, mesh: Mesh | None = None, count: int = 40) -> Session:
    data = tmp_path / "data"
    if not data.exists():
        make_shards(data, count)
    model = small_model(tmp_path / "export", mesh)
    config = EvaluateConfig(
        tasks="knn", data=str(data), cache_dir=str(tmp_path / "cache"), workers=0, quiet=True
    )
    return Session(model, config, print)


def readings_of(session: Session) -> Readings:
    """Of a run of three epochs over the session's training shards."""
    images: Any = session.open("", "train").images
    manifest = images.reader.manifest
    order = Order(
        Lanes(manifest.samples, 4, 5, 4), 8, ((2, 4),), DataState(0, 0, 0, 4, 4, 5, (), "", "", 0, 0)
    )
    return Readings(order, manifest.rows(), 1, 14)


def test_lists_name_images_that_exist(tmp_path: Path) -> None:
    """Catches a helpful image of negative value, a row that is not that of the key, names of other classes,
    and steps counted from 0."""
    session = session_of(tmp_path)
    readings = readings_of(session)
    test = session.pooled(session.open("", "test"))
    x = test.take(test.usable[:2])
    target = Target(session.model.logits(x).argmax(1))
    found = pushed(session, x, target, 5, readings)
    images = session.open("", "train")
    assert "classifier alone" in found.about and found.settings["measure"] == "tracin"
    for helpful, harmful in zip(found.helpful, found.harmful, strict=True):
        assert [one.value for one in helpful] == sorted((one.value for one in helpful), reverse=True)
        assert helpful[-1].value > 0 > harmful[-1].value >= harmful[0].value
        for one in [*helpful, *harmful]:
            assert one.key == images.images.key(one.row)
            assert one.label_name == images.class_names[one.label] == images.class_names[one.row % 3]
            assert one.key.startswith(Path(one.shard).name) and one.row == int(one.key.rsplit("_", 1)[1])
            assert one.steps
            for step in one.steps:
                slots = readings.order.slots(step - 1, 0, 8)
                shards = [Path(readings.shards[shard].name).name for shard in slots.shard.tolist()]
                assert (Path(one.shard).name, one.index) in zip(shards, slots.index.tolist(), strict=True)
    train = session.pooled(images)
    (nearest,) = similar(session, train.take(np.array([11])), 3, readings)
    assert nearest[0].row == 11 and nearest[0].value == pytest.approx(1.0)
    errors = label_errors(session, session.open("", "test"), 4, readings)
    assert len(errors.odd) == 4 and errors.odd[0].value >= errors.odd[-1].value > 0
    assert errors.harmful[0].value <= errors.harmful[-1].value < 0


def test_readings_of_a_run_folder(tmp_path: Path) -> None:
    """Catches steps after the export's, and an export of another program, whose last step nobody knows."""
    session = session_of(tmp_path)
    images: Any = session.open("", "train").images
    expected = readings_of(session)
    manifest, state = images.reader.manifest, DataState(0, 0, 0, 4, 4, 5, (), "", "", 10, 40).to_json()
    run = tmp_path / "run"
    write_export(run / "export")
    (run / "checkpoints").mkdir()
    saved = {"shards": f"{tmp_path}/data/train-*.tar", "global_batch": 8, "skips": [[2, 4]]}
    state |= {"manifest": manifest.digest, "checksums": manifest.checksum_digest}
    (run / "data.json").write_text(json.dumps(saved | {"state": state}))
    with pytest.raises(ValueError, match="export it again"):
        Readings.of_run(run)
    weights = run / "export" / "model.safetensors"
    save_file(load_file(weights), weights, {"step": "14"})
    found = Readings.of_run(run)
    assert (found.first, found.last) == (1, 14)
    rows = range(40)
    steps = found.steps(session.open("", "train"), rows)
    assert steps == expected.steps(session.open("", "train"), rows)
    assert max(step for some in steps for step in some or ()) == 14


def test_images_of_other_data_have_no_steps(tmp_path: Path) -> None:
    """Catches the steps of a shard of the same name with other contents, and a limited set whose rows are
    taken for those of the whole."""
    session = session_of(tmp_path)
    readings = readings_of(session)
    whole = session.open("", "train")
    few = whole.first(7)
    rows = few.images.numbers.tolist()  # type: ignore[attr-defined]
    assert rows != list(range(7))
    values = [0.0] * 7
    for mine, theirs in zip(
        described(few, range(7), values, readings), described(whole, rows, values, readings), strict=True
    ):
        assert (mine.key, mine.shard, mine.index, mine.steps) == (
            theirs.key,
            theirs.shard,
            theirs.index,
            theirs.steps,
        )
    images = np.full((40, 8, 8), 7, np.uint8)
    write_splits([ArrayImages(images, np.arange(40) % 3).split("train")], tmp_path / "other", 4, 1)
    other = shard_set(f"{tmp_path}/other/train-*.tar", "other", "train", whole.class_names)
    assert other.images.key(1) == whole.images.key(1)
    assert [one.steps for one in described(other, [0, 1], [0.0, 0.0], readings)] == [None, None]
    assert described(image_set([1, 2]), [1], [0.5])[0].shard == ""


def test_a_training_set_of_other_classes_is_refused(tmp_path: Path) -> None:
    """Catches the errors of one label space subtracted from another's."""
    session = session_of(tmp_path)
    (tmp_path / "data" / "classes.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(ValueError, match=r"has 4 classes, the model 3.*--data"):
        pushed(session, torch.zeros(1, 16), Target(torch.tensor([0])), 1)


def pushed_on(tp_size: int, folder: Path) -> Any:
    session = session_of(folder, Mesh.from_environment(tp_size))
    test = session.pooled(session.open("", "test"))
    x = test.take(test.usable[:2])
    found = pushed(session, x, Target(torch.tensor([0, 1])), 4, measure="influence")
    return [[(one.row, one.value) for one in some] for some in [*found.helpful, *found.harmful]]


@pytest.mark.dist
def test_a_sharded_model_names_the_same_images(tmp_path: Path) -> None:
    """Catches ranks of a TP group that ask the sharded classifier about different rows."""
    (one,) = run_ranks(1, pushed_on, 1, tmp_path)
    for found in run_ranks(4, pushed_on, 2, tmp_path):
        for mine, theirs in zip(one, found, strict=True):
            assert [row for row, _ in mine] == [row for row, _ in theirs]
            np.testing.assert_allclose([v for _, v in mine], [v for _, v in theirs], rtol=1e-4)


def pixels(labels: np.ndarray | None = None) -> Case:
    """The digits' pixels as features, and a classifier that is fitted to them with these labels."""
    x, y = load_digits(return_X_y=True)
    y = y if labels is None else labels
    train = features(image_set(y[:1437].tolist()), x[:1437] / 16)
    test = features(image_set(y[1437:].tolist(), split="test"), x[1437:] / 16)
    return Case(train, test, fit(x[:1437] / 16, y[:1437], "softmax", 1.0), "softmax")


@pytest.mark.slow
def test_removing_what_pushed_a_score_lowers_it() -> None:
    """Catches lists that are no better than the images of the class, or than those that look alike."""
    lists = ["random", "random, same class", "nearest by feature", "tracin", "influence, damping 0.1"]
    falls = {name: some.mean() for name, some in removal(pixels(), count=8, only=lists).items()}
    assert falls["influence, damping 0.1"] > 2 * falls["random, same class"], falls
    assert falls["tracin"] > 2 * falls["random, same class"], falls
    assert abs(falls["random"]) < 0.3 * falls["random, same class"], falls


def test_wrong_labels_are_found() -> None:
    """Catches harmful images taken for helpful ones, and an influence on itself that is blind to labels: one
    in twenty is wrong."""
    y, rng = load_digits().target, np.random.default_rng(0)
    wrong = rng.choice(1437, 72, replace=False)
    labels = y.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, 72)) % 10
    found = found_labels(pixels(labels), wrong)
    assert found["influence on itself (tracin)"] > 0.8
    assert found["influence over validation, damping 0.1"] > 0.4
    assert found["tracin over validation"] > 0.2
    assert found["random"] < 0.15
