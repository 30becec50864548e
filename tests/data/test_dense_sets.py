"""Shards of depth, masks and videos: written by the command from fixtures in the data sets' true formats, and
read back as training does."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import shards
from megavit.data.class_names import class_names_beside
from megavit.data.config import DataConfig
from megavit.data.fields import Field, Labels, Picture, Plane
from megavit.data.loader import EvalLoader
from megavit.data.manifest import open_shards
from megavit.data.plane_facts import PlaneFacts, claim_planes, planes_beside
from megavit.data.reader import ShardReader
from megavit.data.write_masks import VOC_CLASSES
from tests.data.dense_fixtures import (
    HEIGHT,
    WIDTH,
    Planes,
    make_ade20k,
    make_depthfolder,
    make_kinetics,
    make_kitti,
    make_nyu_folders,
    make_nyu_labeled,
    make_segfolder,
    make_voc,
    noise,
    save_photo,
    save_png,
)
from tests.data.test_fields import encode, write

WHOLE = DataConfig(workers=0, augment="none", flip=False, eval_crop=1.0)
MASK = Plane("mask", ("mask.png",), size=HEIGHT, dtype="int32", fill=-1, invalid=255)
Call = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command with these words; what it said. Its exit status must be `code`."""

    def run(*words: object, code: int = 0) -> str:
        found = shards.main([*map(str, words), *(["--workers", "1"] if words[0] != "which" else [])])
        said = capsys.readouterr()
        assert found == code, said
        return said.out + (said.err if code else "")

    return run


def sources(out: Path, split: str) -> list[str]:
    """The picture that each sample was made from."""
    reader = ShardReader(open_shards(f"{out}/{split}.manifest.json"))
    places = [(s, i) for s, n in enumerate(reader.manifest.samples.tolist()) for i in range(n)]
    return [members(reader, *place)["source.txt"].decode() for place in places]


def members(reader: ShardReader, shard: int, index: int) -> dict[str, bytes]:
    found = reader.members(shard, index)
    return dict(zip(found, reader.read(shard, index, found.values()), strict=True))


def read_back(out: Path, split: str, field: Field) -> np.ndarray:
    """The field of all samples, in the middle square of the pictures, which is not resized."""
    manifest = open_shards(f"{out}/{split}.manifest.json")
    (batch,) = list(EvalLoader(manifest, [Picture(size=HEIGHT), field], WHOLE, batch=manifest.num_samples))
    assert not batch.bad and batch.weights.all()
    return batch.fields[field.name].numpy()


def middle(values: np.ndarray) -> np.ndarray:
    left = (values.shape[1] - HEIGHT) // 2
    return values[:, left : left + HEIGHT]


def depth_of(facts: PlaneFacts) -> Plane:
    """What a task declares of a depth with these facts."""
    return Plane(
        "depth",
        ("depth.png", "depth.npy"),
        size=HEIGHT,
        dtype="float64",
        fill=-1,
        invalid=facts.invalid,
        scale=facts.scale,
    )


def check_depth(out: Path, expected: Planes, root: Path, facts: PlaneFacts) -> None:
    """Compares every number, and that files are as they were."""
    assert planes_beside(f"{out}/x") == {"depth": facts}
    for split, planes in expected.items():
        names = sources(out, split)
        assert set(names) == planes.keys() and len(names) == len(planes)
        for name, found in zip(names, read_back(out, split, depth_of(facts)), strict=True):
            stored = middle(planes[name])
            known = np.isfinite(stored) & (stored != facts.invalid)
            assert 0.3 < known.mean() < 0.9
            assert np.array_equal(found, np.where(known, stored * facts.scale, -1))
        reader = ShardReader(open_shards(f"{out}/{split}.manifest.json"))
        first = members(reader, 0, 0)
        (picture,) = (data for kind, data in first.items() if kind in ("jpg", "png"))
        assert picture == (root / names[0]).read_bytes()


def check_masks(out: Path, expected: Planes, names: list[str], shift: int = 0) -> None:
    """Compares every class; `shift` is that of the first one."""
    facts = PlaneFacts(invalid=255, classes=len(names))
    assert class_names_beside(f"{out}/x") == names
    assert planes_beside(f"{out}/x") == {"mask": facts}
    field = dataclasses.replace(MASK, classes=len(names), allow_empty=False)
    for split, planes in expected.items():
        found = sources(out, split)
        assert set(found) == planes.keys() and len(found) == len(planes)
        for name, mask in zip(found, read_back(out, split, field), strict=True):
            stored = middle(planes[name].astype(int))
            unknown = stored == (0 if shift else 255)
            assert np.array_equal(mask, np.where(unknown, -1, stored - shift)) and unknown.any()


def test_nyu_labeled(tmp_path: Path, call: Call) -> None:
    """Catches MATLAB's axes taken for NumPy's, splits counted from 0 or swapped, and metres that are
    rounded."""
    pytest.importorskip("h5py", reason="NYU's file needs h5py: pip install 'megavit[depth]'")
    expected = make_nyu_labeled(tmp_path / "in")
    out = tmp_path / "out"
    assert "train: 4 samples, test: 3 samples" in call("nyu", "--root", tmp_path / "in", "--out", out)
    (facts,) = planes_beside(f"{out}/x").values()
    assert facts == PlaneFacts(scale=1, invalid=0, max_m=10)
    for split, samples in expected.items():
        found = read_back(out, split, depth_of(facts))
        assert [len(samples), HEIGHT, HEIGHT] == list(found.shape)
        assert all(np.array_equal(f, middle(depth)) for f, (_, depth) in zip(found, samples, strict=True))
        images = read_back(out, split, Picture("again", size=HEIGHT))
        assert all(np.array_equal(f, middle(image)) for f, (image, _) in zip(images, samples, strict=True))
    said = call("stats", out / "train.manifest.json", "--decode")
    assert "planes          depth.npy: 4" in said and "4 files, 100.0% of the pixels known" in said
    assert "unusable        0" in said and "labels" not in said
    again = call("nyu", "--root", tmp_path / "in", "--out", out)
    assert "4 samples" in again


def test_a_missing_package_is_named(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where an extra is not installed."""
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    out = ["--out", tmp_path / "out"]
    said = call("nyu", "--root", tmp_path, *out, code=1)
    assert re.search(r"error: .*labeled\.mat needs h5py.*pip install 'megavit\[depth\]'", said)
    monkeypatch.setattr("megavit.data.video.importlib.util.find_spec", lambda name: None)
    said = call("kinetics", "--root", tmp_path, *out, code=1)
    assert "error: videos need PyAV" in said and "pip install 'megavit[video]'" in said


def test_nyu_folders(tmp_path: Path, call: Call) -> None:
    """Catches pictures with the depth of another frame, millimetres taken for metres, and a list that is not
    obeyed."""
    root = tmp_path / "in"
    expected = make_nyu_folders(root)
    facts = PlaneFacts(scale=0.001, invalid=0, max_m=10)
    call("nyu", "--root", root, "--out", tmp_path / "all")
    check_depth(tmp_path / "all", expected, root, facts)
    lists = [f"--{split}_list={root}/{split}_files_with_gt.txt" for split in expected]
    said = call("nyu", "--root", root, "--out", tmp_path / "listed", *lists)
    assert "train: 3 samples, test: 3 samples" in said
    assert set(sources(tmp_path / "listed", "test")) < expected["test"].keys()


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_kitti(tmp_path: Path, call: Call, kind: str) -> None:
    """Catches the other camera's depth, or that of another frame, metres without their 1/256, and re-encoded
    files."""
    root = tmp_path / "in"
    expected = make_kitti(root, kind)
    call("kitti", "--root", root, "--out", tmp_path / "out", "--shard_size", 2)
    left = {
        split: {name: values for name, values in planes.items() if "image_02" in name}
        for split, planes in expected.items()
    }
    check_depth(tmp_path / "out", left, root, PlaneFacts(scale=1 / 256, invalid=0, max_m=80))
    reader = ShardReader(open_shards(f"{tmp_path}/out/val.manifest.json"))
    depth = members(reader, 0, 0)["depth.png"]
    assert depth in {path.read_bytes() for path in root.rglob("groundtruth/image_02/*.png")}


def test_kitti_by_eigens_lists(tmp_path: Path, call: Call) -> None:
    """Catches one of the notations in use, and test pictures without annotated depth that vanish, or stop
    it."""
    root = tmp_path / "in"
    expected = make_kitti(root)
    (root / "data_depth_annotated").rename(tmp_path / "depth")
    one, two = "2011_09_26/2011_09_26_drive_0001_sync", "2011_09_28/2011_09_28_drive_0002_sync"
    train = [
        f"{one}/image_02/data/0000000001.png {one[11:]}/proj_depth/groundtruth/image_02/0000000001.png 721.5",
        f"{one} 2 r",
        f"{two}/image_02/data/0000000003.jpg {two}/image_03/data/0000000003.jpg",
        "",
    ]
    test = [
        f"{two}/image_02/data/0000000000.png None 718.3",
        f"{two}/image_02/data/0000000002.png {two[11:]}/x.png 7",
    ]
    (tmp_path / "train.txt").write_text("\n".join(train))
    (tmp_path / "test.txt").write_text("\n".join(test))
    words = ["--root", root, "--depth_root", tmp_path / "depth", "--out", tmp_path / "out"]
    lists = ["--train_list", tmp_path / "train.txt", "--test_list", tmp_path / "test.txt"]
    said = call("kitti", *words, *lists)
    assert f"note: test: left out 1 without annotated depth ({two}/image_02/data/0000000000.png)" in said
    every = expected["train"] | expected["val"]
    chosen = {
        "train": [
            f"{one}/image_02/data/{1:010}.png",
            f"{one}/image_03/data/{2:010}.png",
            f"{two}/image_02/data/{3:010}.png",
        ],
        "test": [f"{two}/image_02/data/{2:010}.png"],
    }
    listed = {split: {name: every[name] for name in names} for split, names in chosen.items()}
    check_depth(tmp_path / "out", listed, root, PlaneFacts(scale=1 / 256, invalid=0, max_m=80))


@pytest.mark.parametrize(("kind", "scale"), [("npy", 1.0), ("png", 0.004)])
def test_depthfolder(tmp_path: Path, call: Call, kind: str, scale: float) -> None:
    """Catches depth without its unit, and NaN taken for depth."""
    expected = make_depthfolder(tmp_path / "in", kind)
    words = ["--root", tmp_path / "in", "--out", tmp_path / "out"]
    if kind == "png":
        assert "--scale must say how many metres" in call("depthfolder", *words, code=1)
        words += ["--scale", scale, "--max_m", 75]
    call("depthfolder", *words)
    facts = PlaneFacts(scale=scale, invalid=0, max_m=None if kind == "npy" else 75)
    check_depth(tmp_path / "out", expected, tmp_path / "in", facts)
    text = json.loads((tmp_path / "out" / "dense.json").read_text())
    assert text["depth"] == {"scale": scale, "invalid": 0} | ({} if kind == "npy" else {"max_m": 75})
    if kind == "png":
        said = call("depthfolder", *words[:-4], "--scale", 0.001, code=1)
        assert "dense.json says something else of other shards" in said


def test_ade20k(tmp_path: Path, call: Call) -> None:
    """Catches classes that are off by one, 'other' taken for a class, and masks of another picture."""
    expected = make_ade20k(tmp_path)
    out = tmp_path / "out"
    command = [sys.executable, str(Path(shards.__file__)), "ade20k", "--root", str(tmp_path)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0 and "train: 3 samples, val: 3 samples" in done.stdout, done
    check_masks(out, expected, [f"thing {i}, object {i}" for i in range(1, 151)], shift=1)


def test_voc(tmp_path: Path, call: Call) -> None:
    """Catches colours of the palette taken for classes, pictures without a mask, and swapped lists."""
    expected = make_voc(tmp_path)
    for number, root in enumerate((tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012")):
        call("voc", "--root", root, "--out", tmp_path / f"out{number}")
        check_masks(tmp_path / f"out{number}", expected, VOC_CLASSES)
    reader = ShardReader(open_shards(f"{tmp_path}/out0/train.manifest.json"))
    masks = {path.read_bytes() for path in tmp_path.rglob("SegmentationClass/*.png")}
    assert members(reader, 0, 0)["mask.png"] in masks


@pytest.mark.parametrize("names", ["road\ncar\nsky\n", "road\ncar\nsky\npole\n", ""])
def test_segfolder(tmp_path: Path, call: Call, names: str) -> None:
    """Catches a list of classes that is not obeyed, and 255 counted as one."""
    expected = make_segfolder(tmp_path / "in", names)
    call("segfolder", "--root", tmp_path / "in", "--out", tmp_path / "out")
    check_masks(tmp_path / "out", expected, names.split() or ["0", "1", "2"])


def test_kinetics(tmp_path: Path, call: Call) -> None:
    """Catches re-encoded videos, classes by another order, and broken videos that are written, or missing
    without a word."""
    pytest.importorskip("av", reason="videos need PyAV: pip install 'megavit[video]'")
    from megavit.data.video import Video

    expected = make_kinetics(tmp_path / "in")
    (tmp_path / "in" / "train" / "zumba" / "part.mp4.part").write_bytes(b"x")
    out = tmp_path / "out"
    said = call("kinetics", "--root", tmp_path / "in", "--out", out)
    assert "train: 6 samples, val: 4 samples" in said
    assert "note: train: 2 of 8 videos are broken and not written" in said
    assert "note: train: left out 1 .part (train/zumba/part.mp4.part)" in said
    listed = sorted((out / "broken.txt").read_text().splitlines())
    assert [line.partition(": ")[0] for line in listed] == [
        "train/abseiling/error123456_000000_000010.mp4",
        "train/zumba/cutOff12345_000000_000010.mp4",
    ]
    assert class_names_beside(f"{out}/x") == ["abseiling", "zumba"]
    for split, videos in expected.items():
        reader = ShardReader(open_shards(f"{out}/{split}.manifest.json"))
        found = [members(reader, 0, index) for index in range(len(videos))]
        assert {one["source.txt"].decode(): one["mp4"] for one in found} == videos
        assert all(int(one["cls"]) == int(b"zumba" in one["source.txt"]) for one in found)
        fields = [Labels(num_classes=2), Video(size=16, frames=4, stride=2)]
        (batch,) = list(EvalLoader(reader.manifest, fields, WHOLE, batch=len(videos)))
        assert not batch.bad and batch.fields["video"].shape == (len(videos), 4, 16, 16, 3)
    said = call("stats", out / "train.manifest.json", "--decode")
    assert "frames          min 8, median 8, max 8" in said and "width           min 64" in said
    assert "formats         mp4: 6" in said and "unusable        0" in said and "classes         2" in said
    assert "no problems" in call("verify", out / "train.manifest.json", "--decode")


def bad_ade(root: Path) -> None:
    make_ade20k(root)
    values = np.full((HEIGHT, WIDTH + 4), 200, np.uint8)
    save_png(root / "ADEChallengeData2016" / "annotations" / "training" / "ADE_train_00000002.png", values)


def no_depth(root: Path) -> None:
    make_depthfolder(root)
    (root / "val" / "depth" / "a" / "1.npy").unlink()


def other_size(root: Path) -> None:
    make_depthfolder(root)
    save_photo(root / "val" / "rgb" / "a" / "2.jpg", 0, WIDTH, HEIGHT + 1)


def negative(root: Path) -> None:
    make_depthfolder(root)
    np.save(root / "train" / "depth" / "a" / "0.npy", np.full((HEIGHT, WIDTH), -1.0, np.float32))


def mixed(root: Path) -> None:
    make_depthfolder(root, "npy", ("train",))
    make_depthfolder(root, "png", ("val",))


def colored(root: Path) -> None:
    make_segfolder(root)
    save_photo(root / "masks" / "3.png", 0)


def beyond(root: Path) -> None:
    make_segfolder(root, "road\ncar\n")


def truncated_mat(root: Path) -> None:
    pytest.importorskip("h5py", reason="NYU's file needs h5py: pip install 'megavit[depth]'")
    make_nyu_labeled(root)
    path = root / "nyu_depth_v2_labeled.mat"
    path.write_bytes(path.read_bytes()[:20_000])


def wrong_splits(root: Path) -> None:
    pytest.importorskip("h5py", reason="NYU's file needs h5py: pip install 'megavit[depth]'")
    from scipy.io import savemat

    make_nyu_labeled(root)
    savemat(root / "splits.mat", {"trainNdxs": np.array([[0], [1]]), "testNdxs": np.array([[2]])})


def no_splits(root: Path) -> None:
    wrong_splits(root)
    (root / "splits.mat").unlink()


def both_forms(root: Path) -> None:
    make_nyu_folders(root)
    (root / "nyu_depth_v2_labeled.mat").write_bytes(b"")


def no_raw(root: Path) -> None:
    make_kitti(root)
    (root / "2011_09_26").rename(root / "elsewhere")
    (root / "2011_09_28").rename(root / "elsewhere_too")


def no_mask(root: Path) -> None:
    make_voc(root)
    next(root.rglob("SegmentationClass/2007_000042.png")).unlink()


def half_a_jpeg(root: Path) -> None:
    make_depthfolder(root)
    (root / "train" / "rgb" / "a" / "0.jpg").write_bytes(b"GIF89a")


def half_a_plane(root: Path) -> None:
    make_depthfolder(root)
    path = root / "train" / "depth" / "a" / "2.npy"
    path.write_bytes(path.read_bytes()[:-7])


def all_broken(root: Path) -> None:
    pytest.importorskip("av", reason="videos need PyAV: pip install 'megavit[video]'")
    make_kinetics(root)
    for path in (root / "val").rglob("*.mp4"):
        path.write_bytes(b"")


def no_videos(root: Path) -> None:
    pytest.importorskip("av", reason="videos need PyAV: pip install 'megavit[video]'")
    for number in range(4):
        save_photo(root / "zumba" / f"{number}.jpg", number)


@pytest.mark.parametrize(
    ("command", "make", "words"),
    [
        ("depthfolder", lambda root: None, r"in has no folder rgb, nor have train, val, test in it"),
        (
            "depthfolder",
            no_depth,
            r"val/rgb/a/1\.jpg has no .*val/depth/a/1\.png or .*1\.npy \(1 of 3 .*; add it",
        ),
        (
            "depthfolder",
            other_size,
            r"depth/a/2\.npy .*it has 40x30 pixels, but .*rgb/a/2\.jpg 40x31; repair",
        ),
        ("depthfolder", negative, r"depth/a/0\.npy cannot be used: it holds -1\.0; --invalid says"),
        ("depthfolder", mixed, r"in has depth as npy and as png, whose units may differ"),
        ("depthfolder", half_a_jpeg, r"rgb/a/0\.jpg is no picture: .*; repair it, or remove"),
        ("depthfolder", half_a_plane, r"depth/a/2\.npy cannot be used: its npy has \d+ bytes"),
        ("segfolder", colored, r"masks/3\.png cannot be used: it has 3 channels"),
        (
            "segfolder",
            beyond,
            r"masks/\d\.png cannot .* the number 2, but the 2 classes of .*classes\.txt are 0",
        ),
        (
            "ade20k",
            bad_ade,
            r"ADE_train_00000002\.png .*number 200, but the 150 classes of .*objectInfo150\.txt",
        ),
        ("ade20k", make_voc, r"objectInfo150\.txt cannot be read: No such file.*must be the list of classes"),
        ("voc", no_mask, r"SegmentationClass/2007_000042\.png is missing, which line 2 of .*val\.txt names"),
        ("voc", make_segfolder, r"Segmentation/train\.txt cannot be read: No such file"),
        ("nyu", truncated_mat, r"labeled\.mat is not NYU's labeled file, or cut off: .*; download it again"),
        ("nyu", wrong_splits, r"splits\.mat does not number the 7 pictures from 1"),
        ("nyu", no_splits, r"splits\.mat is missing, which says what is for training"),
        ("nyu", both_forms, r"give each form a folder of its own as --root"),
        ("nyu", make_segfolder, r"in holds neither nyu_depth_v2_labeled\.mat nor sync/ nor official_splits/"),
        ("kitti", no_raw, r"no picture of raw data in .*in has depth in .*data_depth_annotated"),
        ("kinetics", all_broken, r"every video of val is broken, e\.g\. val/.*mp4: video: "),
        ("kinetics", no_videos, r"in holds no files \(mp4\) in class folders; there are 4 outside"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else value[:12],
)
def test_bad_inputs_are_one_line_that_names_the_file(
    tmp_path: Path, call: Call, command: str, make: Callable[[Path], object], words: str
) -> None:
    """Catches a traceback, shards with a hole, and a message that does not say which of a million files."""
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    said = call(command, "--root", tmp_path / "in", "--out", tmp_path / "out", code=1)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.rstrip().endswith(errors[0]) and re.search(words, errors[0]), said
    assert not list((tmp_path / "out").glob("*.manifest.json"))


def test_bad_lists_are_named_by_their_line(tmp_path: Path, call: Call) -> None:
    """Catches a list of another data set, and one of pictures that were not downloaded."""
    root, listed = tmp_path / "in", tmp_path / "list.txt"
    make_kitti(root)
    drive = "2011_09_26/2011_09_26_drive_0001_sync"
    for text, words in (
        (f"{drive} 1 l\n{drive} 9 l\n", "0000000009.png is missing, which line 2 of"),
        (f"{drive} 1 l\n\nkitchen/rgb_1.jpg\n", "line 3 is 'kitchen/rgb_1.jpg'"),
        (f"{drive} 0 l\n", "no picture of .* has annotated depth"),
        ("\n", "is empty"),
    ):
        listed.write_text(text)
        said = call("kitti", "--root", root, "--out", tmp_path / "out", "--test_list", listed, code=1)
        assert re.search(words, said)
    make_nyu_folders(root)
    listed.write_text("kitchen/rgb_00009.jpg kitchen/sync_depth_00009.png 5\n")
    said = call("nyu", "--root", root, "--out", tmp_path / "out", "--test_list", listed, code=1)
    assert "kitchen/rgb_00009.jpg is missing, which line 1 of" in said


def test_verify_and_stats_know_planes(tmp_path: Path, call: Call) -> None:
    """Catches planes that no check ever opens: one of another size, one that holds classes beyond the list,
    one that is cut off and one that knows nothing."""
    make_segfolder(tmp_path / "in")
    call("segfolder", "--root", tmp_path / "in", "--out", tmp_path / "out")
    manifest = tmp_path / "out" / "train.manifest.json"
    assert "no problems" in call("verify", manifest, "--decode")
    said = call("stats", manifest)
    assert "planes          mask.png: 4" in said and "unusable        0" in said and "absent" not in said
    said = call("stats", manifest, "--decode")
    assert "mask.png        4 files, 96.7% of the pixels known" in said
    assert "  classes       3 of 3 are there, ids 0 to 2; absent 0" in said

    picture = io.BytesIO()
    Image.fromarray(noise(0, HEIGHT, WIDTH, 3).astype(np.uint8)).save(picture, "JPEG")

    def png(value: int, height: int = HEIGHT) -> bytes:
        return encode(Image.fromarray(np.full((height, WIDTH), value, np.uint8)))

    planes = {
        "no mask.png": None,
        "has 40x31 pixels, but its picture 40x30": png(0, HEIGHT + 1),
        "holds class 7, which is outside 0..2": png(7),
        "cannot be decoded": png(1)[:-30],
        "has no pixel of which anything is known": png(255),
        "": png(1),
    }
    (tmp_path / "bad").mkdir()
    samples = [{"jpg": picture.getvalue()} | ({"mask.png": data} if data else {}) for data in planes.values()]
    tar = write(tmp_path / "bad", samples)
    call("index", tar, "--out", tmp_path / "bad", "--name", "x")
    claim_planes(tmp_path / "bad", {"mask": PlaneFacts(invalid=255, classes=3)})
    manifest = tmp_path / "bad" / "x.manifest.json"
    assert "no problems" in call("verify", manifest)
    said = call("verify", manifest, "--decode", code=1)
    lines = [line for line in said.splitlines() if "sample '" in line]
    assert "6 samples: 5 problems" in said
    assert all(words in line for words, line in zip(list(planes)[:5], lines, strict=True)), said
    said = call("stats", manifest, "--decode")
    assert "unusable        5" in said and "mask.png        1 files, 100.0%" in said
    assert "1 of 3 are there, ids 1 to 1; absent 2: 0, 2" in said

    # The same planes are bad samples for training, if the task says what they are.
    fields = [Picture(size=8), dataclasses.replace(MASK, size=8, classes=3, allow_empty=False)]
    (batch,) = list(EvalLoader(open_shards(str(manifest)), fields, WHOLE, batch=6))
    assert batch.weights.tolist() == [0, 0, 0, 0, 0, 1]
    reasons = [bad.reason for bad in batch.bad]
    assert all(words in reason for words, reason in zip(list(planes)[:5], reasons, strict=True)), reasons


def test_depth_statistics(tmp_path: Path, call: Call) -> None:
    """Catches statistics of the numbers of invalid pixels, and of numbers without their unit."""
    expected = make_kitti(tmp_path / "in")["val"]
    call("kitti", "--root", tmp_path / "in", "--out", tmp_path / "out", "--shard_size", 2)
    said = call("stats", tmp_path / "out" / "val.manifest.json", "--decode")
    every = np.concatenate([values.ravel() for values in expected.values()])
    known = every[every > 0]
    share = f"{len(known) / len(every):.1%}"
    low, high = f"{known.min() / 256:g}", f"{known.max() / 256:g}"
    assert f"depth.png       3 files, {share} of the pixels known, min {low}, max {high}" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "it holds a list"),
        ("{", "it is not JSON"),
        ('{"depth": {"unit": 1}}', "an object with some of scale, invalid"),
        ('{"depth": {"scale": "1"}}', "a string .* as 'scale'"),
        ('{"depth": {"scale": 0}}', "must be positive"),
        ('{"mask": {"classes": 1.5}}', "1.5 as 'classes'"),
    ],
)
def test_what_is_known_of_planes_is_read_with_care(tmp_path: Path, text: str, words: str) -> None:
    """Catches a file edited by hand that is half understood."""
    assert planes_beside(f"{tmp_path}/x-*.tar") == {} == planes_beside("")
    (tmp_path / "dense.json").write_text(text)
    with pytest.raises(ValueError, match=rf"dense\.json does not say what planes mean: .*{words}"):
        planes_beside(f"{tmp_path}/x-*.tar")
