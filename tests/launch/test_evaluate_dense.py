"""`launch/evaluate.py` and `launch/predict.py` with models of depth and segmentation."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavit.evaluate.tasks import listing
from megavit.launch.predict import main as predict
from tests.data.dense_fixtures import (
    HEIGHT,
    WIDTH,
    make_ade20k,
    make_depthfolder,
    make_kitti,
    make_nyu_folders,
    make_nyu_labeled,
    make_segfolder,
    make_voc,
    save_png,
)
from tests.dense_exports import DEPTH, SEGMENT, write_dense_export
from tests.exports import write_export
from tests.launch.evaluations import Evaluation, evaluate, read_recorded, run_main, three_colours
from tests.ranks import run_ranks
from tests.tasks.dense_data import SIDE, scene, write_dense
from tests.tasks.test_dense import dense_run
from tests.train.runs import ds_config, log_of, train_here

DELTAS = {"delta1.1": 1.1, "delta1": 1.25, "delta2": 1.25**2, "delta3": 1.25**3}
EIGEN = (45 / 480, 471 / 480, 41 / 640, 601 / 640)
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
NAMES = ("road", "car", "sky")


@pytest.fixture(scope="module")
def depth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_export(tmp_path_factory.mktemp("models") / "depth")


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense_export(tmp_path_factory.mktemp("models") / "segment", SEGMENT, NAMES)


def maps_of(
    model: Path, pictures: Sequence[Path | np.ndarray], folder: Path, *words: str
) -> list[np.ndarray]:
    """What `launch/predict.py` writes for each picture."""
    found = []
    folder.mkdir()
    for number, picture in enumerate(pictures):
        path, out = folder / f"{number}.png", folder / f"{number}.npy"
        if isinstance(picture, Path):
            path = picture
        else:
            save_png(path, picture)
        assert predict([str(model), str(path), "--out", str(out), *words]) == 0
        found.append(np.load(out))
    return found


def depth_reference(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    max_m: float,
    crop: tuple[float, ...] = (),
    align: str = "",
) -> dict[str, float]:
    """The mean over pictures of each picture's errors, in numpy, of predicted and true metres [H, W]."""
    rows = []
    for predicted, truth in pairs:
        valid = (truth > 1e-3) & (truth < max_m)
        if crop:
            height, width = truth.shape
            inside = np.zeros_like(valid)
            top, bottom, left, right = crop
            inside[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
            valid &= inside
        p, t = predicted[valid].astype(np.float64), truth[valid].astype(np.float64)
        if align == "median":
            p = p * np.median(t) / np.median(p)
        elif align == "least_squares":
            p = np.polyval(np.polyfit(p, t, 1), p)
        p = np.clip(p, 1e-3, max_m)
        logs, ratio = np.log(p) - np.log(t), np.maximum(p / t, t / p)
        row = {"abs_rel": np.mean(np.abs(p - t) / t), "rmse": np.sqrt(np.mean((p - t) ** 2))}
        row |= {"rmse_log": np.sqrt(np.mean(logs**2)), "log10": np.mean(np.abs(np.log10(p / t)))}
        rows.append(row | {name: np.mean(ratio < limit) for name, limit in DELTAS.items()})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def check(
    found: Evaluation, task: str, data: str, expected: Mapping[str, float], count: tuple[int, ...]
) -> None:
    for name, value in expected.items():
        assert found.value(task, data, name) == pytest.approx(value, abs=1e-6), name
    rows = [one for one in found.recorded.results if one.task == task]
    assert {one.count for one in rows} == {count}
    assert all(one.stderr is not None and one.stderr >= 0 for one in rows)
    ups = {one.metric for one in rows if one.higher_is_better}
    assert ups == {name for name in expected if name.startswith("delta") or "iou" in name or "acc" in name}


def test_nyu_in_both_forms_and_kitti(depth: Path, tmp_path: Path) -> None:
    """Catches errors at the model's size in place of the truth's, over all pixels in place of each picture's,
    outside of the crop or the valid depths, a list of pictures that is not obeyed, and predict.py that does
    something else than what is measured."""
    root = tmp_path / "data"
    test = make_nyu_labeled(root / "nyu")["test"]
    found = evaluate(depth, tmp_path / "nyu", "--tasks", "nyu", "--data_root", root)
    assert found.code == 0, found.output
    maps = maps_of(depth, [picture for picture, _ in test], tmp_path / "maps")
    pairs = list(zip(maps, (metres for _, metres in test), strict=True))
    assert maps[0].dtype == np.float32 and maps[0].shape == (HEIGHT, WIDTH)
    check(found, "nyu", "nyu", depth_reference(pairs, 10, EIGEN), (3, 3, 0))
    settings = found.recorded.results[0].settings
    assert (settings["crop"], settings["max_m"]) == ("eigen", 10)

    words = ["--inference", "slide", "--stride", "9", "--mirror", "--short_side", "20"]
    more = [*words, "--crop", "none", "--align", "median", "--tasks", "nyu", "--data_root", root]
    found = evaluate(depth, tmp_path / "slid", *more)
    slid = maps_of(depth, [picture for picture, _ in test], tmp_path / "slid maps", *words)
    assert abs(slid[0] - maps[0]).max() > 0.1
    pairs = list(zip(slid, (metres for _, metres in test), strict=True))
    check(found, "nyu", "nyu", depth_reference(pairs, 10, align="median"), (3, 3, 0))
    assert "20 px, squares of 16 px every 9 px, mean with" in found.recorded.results[0].transform

    shutil.rmtree(root / "nyu")
    planes = make_nyu_folders(root / "nyu_depth_v2")["test"]
    pictures = [root / "nyu_depth_v2" / name for name in planes]
    kitti = make_kitti(root / "kitti")
    chosen = [name for name in kitti["train"] if "image_03" in name]
    listed = tmp_path / "eigen.txt"
    first = chosen[0].replace("0000000001", "0000000000")  # without annotated depth
    listed.write_text("\n".join([first, *chosen]))
    more = ["--tasks", "nyu,kitti", "--data_root", root, "--align", "least_squares", "--kitti_list", listed]
    found = evaluate(depth, tmp_path / "folders", *more)
    assert found.code == 0 and "left out 1 without annotated depth" in found.output, found.output
    for name, files, values, scale, limit, crop in (
        ("nyu", pictures, planes.values(), 1000, 10, EIGEN),
        (
            "kitti",
            [root / "kitti" / one for one in chosen],
            [kitti["train"][c] for c in chosen],
            256,
            80,
            GARG,
        ),
    ):
        maps = maps_of(depth, files, tmp_path / f"{name} maps")
        pairs = [(one, value / scale) for one, value in zip(maps, values, strict=True)]
        reference = depth_reference(pairs, limit, crop, "least_squares")
        check(found, name, name, reference, (len(maps), len(maps), 0))
    assert found.recorded.results[-1].settings["images"] == "eigen.txt"
    found = evaluate(depth, tmp_path / "val", "--tasks", "kitti", "--data_root", root)
    assert found.recorded.results[0].settings["images"] == "val of the annotated depth"
    assert found.recorded.results[0].count == (3, 3, 0)


def test_a_folder_of_pngs_says_its_scale(depth: Path, tmp_path: Path) -> None:
    """Catches depth in an unknown unit that is taken for metres, and a dense.json that is not looked at."""
    root = tmp_path / "own"
    planes = make_depthfolder(root, "png", ("train", "val"))["val"]
    words = ["--tasks", "depth", "--data", root]
    found = evaluate(depth, tmp_path / "out", *words)
    assert found.code == 1 and str(root / "dense.json") in found.recorded.failed[0].error
    (root / "dense.json").write_text(json.dumps({"depth": {"scale": 0.0005, "max_m": 20}}))
    found = evaluate(depth, tmp_path / "out", *words)
    maps = maps_of(depth, [root / name for name in planes], tmp_path / "maps")
    pairs = [(one, plane * 0.0005) for one, plane in zip(maps, planes.values(), strict=True)]
    check(found, "depth", "own", depth_reference(pairs, 20), (3, 3, 0))


def segmentation_reference(pairs: Sequence[tuple[np.ndarray, np.ndarray]], classes: int) -> dict[str, float]:
    matrix = np.zeros((classes, classes))
    for predicted, truth in pairs:
        known = truth != 255
        np.add.at(matrix, (truth[known], predicted[known]), 1)
    right, true = np.diag(matrix), matrix.sum(1)
    with np.errstate(invalid="ignore"):
        iou, recall = right / (true + matrix.sum(0) - right), right / true
    found = {"miou": np.nanmean(iou), "class_accuracy": np.nanmean(recall)}
    return {name: float(value) for name, value in found.items()} | {
        "pixel_accuracy": float(right.sum() / true.sum())
    }


def test_segmentation_data_sets(segment: Path, tmp_path: Path) -> None:
    """Catches masks that are shrunk to the model's size, ADE20K's numbers that are one off, VOC's borders
    that count, classes in another order that are taken by number, and a mean over pictures in place of one
    matrix."""
    root = tmp_path / "data"
    own = make_segfolder(root / "own")["train"]
    found = evaluate(segment, tmp_path / "own", "--tasks", "segment", "--data", root / "own")
    assert found.code == 0, found.output
    maps = maps_of(segment, [root / "own" / name for name in own], tmp_path / "maps")
    pairs = list(zip(maps, own.values(), strict=True))
    check(found, "segment", "own", segmentation_reference(pairs, 3), (4, 4, 0))
    (miou,) = (one for one in found.recorded.results if one.metric == "miou")
    assert set(miou.settings["class_iou"]) == set(NAMES)

    turned = write_dense_export(tmp_path / "turned", SEGMENT, ("sky", "road", "car"))
    found = evaluate(turned, tmp_path / "turned out", "--tasks", "segment", "--data", root / "own")
    numbers = np.array([2, 0, 1])
    pairs = [(numbers[one], truth) for one, truth in pairs]
    check(found, "segment", "own", segmentation_reference(pairs, 3), (4, 4, 0))

    ade, voc = make_ade20k(root)["val"], make_voc(root)["val"]
    cases = (
        (
            "ade20k",
            150,
            root / "ADEChallengeData2016",
            {n: (v.astype(int) - 1) % 256 for n, v in ade.items()},
        ),
        ("voc", 21, root / "VOCdevkit" / "VOC2012", voc),
    )
    for name, classes, folder, planes in cases:
        model = write_dense_export(tmp_path / name, dataclasses.replace(SEGMENT, classes=classes))
        found = evaluate(model, tmp_path / f"{name} out", "--tasks", name, "--data_root", root)
        assert found.code == 0, found.output
        maps = maps_of(model, [folder / path for path in planes], tmp_path / f"{name} maps")
        assert any(len(np.unique(one)) > 1 for one in maps)
        pairs = [(one, plane) for one, plane in zip(maps, planes.values(), strict=True)]
        check(found, name, name, segmentation_reference(pairs, classes), (3, 3, 0))


@pytest.mark.dist
@pytest.mark.slow
def test_trained_runs_are_evaluated_and_used(tmp_path: Path) -> None:
    """Catches an evaluation or a prediction that does not see what the run's own evaluation saw: pictures of
    the model's size, whole."""
    data = write_dense(tmp_path / "data", 60, 21)
    for name, task in (("depth", DEPTH), ("segment", SEGMENT)):
        run, folder = dense_run(data, tmp_path / name, task), tmp_path / name
        assert run_ranks(1, train_here, run, ds_config(3)) == [""]
        found = evaluate(folder, folder / "evaluation", "--tasks", name, "--data", data)
        assert found.code == 0, found.output
        rows = [row for row in log_of(folder) if row.get("eval") == "val"]
        for one in ("abs_rel", "rmse", "delta1") if name == "depth" else ("miou", "class_accuracy"):
            assert found.value(name, "data", one) == pytest.approx(rows[-1][f"eval/val/{one}"], rel=1e-4), one
        save_png(tmp_path / "scene.png", scene(np.random.default_rng(3))[0])
        words = [str(folder), str(tmp_path / "scene.png"), "--out", str(tmp_path / f"{name}.png")]
        assert predict(words) == 0
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (SIDE, SIDE) and image.mode == ("I;16" if name == "depth" else "P")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures with depth, of which one is cut off, one has no depth that counts, and one a plane of
    another size."""
    root = tmp_path_factory.mktemp("data") / "own"
    make_depthfolder(root, splits=("val",))
    for number in range(3, 7):
        for kind, extension in (("rgb", "jpg"), ("depth", "npy")):
            path = root / "val" / kind / "a" / f"0.{extension}"
            shutil.copy(path, path.with_stem(str(number)))
    cut = root / "val" / "rgb" / "a" / "3.jpg"
    cut.write_bytes(cut.read_bytes()[:500])
    np.save(root / "val" / "depth" / "a" / "4.npy", np.full((HEIGHT, WIDTH), 99.0, np.float32))
    np.save(root / "val" / "depth" / "a" / "5.npy", np.ones((HEIGHT, WIDTH + 1), np.float32))
    return root


def test_pictures_that_cannot_be_used(depth: Path, damaged: Path, tmp_path: Path) -> None:
    """Catches a picture that ends the task, or is left out in silence, and one without a pixel that counts
    which is called bad or counts as 0."""
    found = evaluate(depth, tmp_path / "out", "--tasks", "depth", "--data", damaged)
    assert found.code == 0, found.output
    assert {one.count for one in found.recorded.results} == {(7, 4, 2)}
    assert "left out: 2" in found.output
    assert "3.jpg" in found.output and "5.npy" in found.output and "41x30" in found.output
    trial = evaluate(depth, tmp_path / "trial", "--tasks", "depth", "--data", damaged, "--limit", "2")
    assert {one.count.given for one in trial.recorded.results} == {2}


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "tp_size"), [(2, 1), (2, 2)])
def test_all_layouts_measure_the_same(
    ranks: int, tp_size: int, depth: Path, segment: Path, damaged: Path, tmp_path: Path
) -> None:
    """Catches pictures that are counted twice or not at all where the ranks do not divide them, and bad ones
    that only their rank knows of."""
    masks = tmp_path / "masks"
    make_segfolder(masks)
    for model, task, data in ((depth, "depth", damaged), (segment, "segment", masks)):
        single = evaluate(model, tmp_path / f"{task} single", "--tasks", task, "--data", data)
        argv = [str(model), "--out", str(tmp_path / task), "--tasks", task, "--data", str(data)]
        argv += ["--tensor_parallel_size", str(tp_size), "--cache_dir", str(tmp_path / "cache")]
        codes, _, errors = zip(*run_ranks(ranks, run_main, argv), strict=True)
        assert codes == (0,) * ranks, errors
        recorded = read_recorded(tmp_path / task)
        for one, other in zip(recorded.results, single.recorded.results, strict=True):
            assert (one.metric, one.count) == (other.metric, other.count)
            assert (one.value, one.stderr) == pytest.approx((other.value, other.stderr), abs=1e-6)
            assert (one.dp_size, one.tp_size) == (ranks // tp_size, tp_size)


def test_models_and_data_that_do_not_fit(depth: Path, segment: Path, tmp_path: Path) -> None:
    """Catches a classifier that is asked for depth and ends in a traceback, one that is refused after hours
    only, missing data that are an error, and a depth model whose trunk has no features."""
    classifier = write_export(tmp_path / "classifier")
    cases = [
        (classifier, "head,nyu", "nyu measures exports of --task depth, and"),
        (segment, "nyu", "is one of --task segment"),
        (depth, "ade20k", "ade20k measures exports of --task segment"),
        (depth, "segment", "is one of --task depth"),
    ]
    data = write_dense(tmp_path / "data", 1, 2)
    for model, tasks, expected in cases:
        more = ["--data_root", tmp_path, "--data", data]
        found = evaluate(model, tmp_path / "out", "--tasks", tasks, *more)
        assert found.code == 1 and expected in found.errors and "Traceback" not in found.errors
        assert found.recorded.results == found.recorded.failed == ()
    for words, expected in (
        (["--tasks", "depth:imagenet"], "depth is measured on nyu, kitti, or on --data DIR"),
        (["--tasks", "knn:nyu"], "nyu has one protocol; write nyu alone"),
        (["--tasks", "nyu"], "nyu needs --data_root"),
        (["--tasks", "depth"], "depth needs --data"),
        (["--tasks", "nyu", "--inference", "all"], "inference"),
        (["--tasks", "nyu", "--stride", "-1"], "--stride"),
    ):
        more = ["--data_root", tmp_path] if ":" in words[1] else []
        found = evaluate(depth, tmp_path / "out", *words, *more)
        assert found.code == 2 and expected in found.errors, found.errors
    more = ["--tasks", "nyu", "--data_root", tmp_path, "--stride", "17"]
    assert "--stride 17 is above the side" in evaluate(depth, tmp_path / "out", *more).errors

    more = ["--tasks", "nyu,kitti,depth", "--data_root", tmp_path, "--data", tmp_path, "--strict"]
    found = evaluate(depth, tmp_path / "missing", *more)
    assert found.code == 3, found.output
    reasons = {one.task: one.reason for one in found.recorded.skipped}
    assert str(tmp_path / "nyu") in reasons["nyu"] and "splits.mat" in reasons["nyu"]
    assert str(tmp_path / "kitti") in reasons["kitti"] and "--kitti_list" in reasons["kitti"]
    assert "holds no test pictures with depth" in reasons["depth"] and "dense.json" in reasons["depth"]
    colours = three_colours(tmp_path / "colours", 20, 5)
    found = evaluate(depth, tmp_path / "features", "--tasks", "knn,head", "--data", colours)
    assert found.value("knn", "colours", "top1", k=10) >= 0
    assert "has no classifier" in found.recorded.failed[0].error
    lines = "\n".join(listing(None))
    assert "nyu             depth: NYU Depth v2" in lines and "voc             segment: Pascal VOC" in lines
    missing = "\n".join(listing(tmp_path))
    assert "nyu              missing" in missing and f"{tmp_path / 'VOCdevkit'} does not exist" in missing
