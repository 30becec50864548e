"""Small data sets of depth, masks and videos, each in its true on-disk format.

Each maker returns what it wrote, by split and, where there is one, by the picture's path: numbers of the
planes [H, W] as the download has them.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30
Planes = dict[str, dict[str, np.ndarray]]


def noise(seed: int, *shape: int, top: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, shape)


def save_photo(path: Path, seed: int, width: int = WIDTH, height: int = HEIGHT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, height, width, 3).astype(np.uint8)).save(path)


def save_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def depth16(seed: int) -> np.ndarray:
    """uint16 [H, W], a third of it 0: sparse, as a laser's."""
    values = noise(seed, HEIGHT, WIDTH, top=1 << 16).astype(np.uint16)
    values[np.random.default_rng(seed + 1).random(values.shape) < 0.3] = 0
    return values


def make_nyu_labeled(root: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """MATLAB's v7.3 file with seven pictures, axes reversed, and the v5 one of the splits, which
    count from 1.
    Returns pictures [H, W, 3] and metres [H, W]."""
    import h5py
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    images = noise(0, 7, HEIGHT, WIDTH, 3).astype(np.uint8)
    depths = np.random.default_rng(1).uniform(0.7, 10, (7, HEIGHT, WIDTH)).astype(np.float32)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w", userblock_size=512) as file:
        file.create_dataset("images", data=images.transpose(0, 3, 2, 1), chunks=(1, 3, WIDTH, HEIGHT))
        file.create_dataset("depths", data=depths.transpose(0, 2, 1), chunks=(1, WIDTH, HEIGHT))
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, HDF5 schema 1.00 ."
    with open(root / "nyu_depth_v2_labeled.mat", "r+b") as raw:
        raw.write(header.ljust(124) + b"\x00\x02IM")
    train, test = [3, 5, 6, 7], [1, 2, 4]
    columns = {name: np.array(numbers, np.uint16)[:, None] for name, numbers in _ndxs(train, test).items()}
    savemat(root / "splits.mat", columns)
    return {
        name: [(images[number - 1], depths[number - 1]) for number in numbers]
        for name, numbers in (("train", train), ("test", test))
    }


def _ndxs(train: list[int], test: list[int]) -> dict[str, list[int]]:
    return {"trainNdxs": train, "testNdxs": test}


def make_nyu_folders(root: Path) -> Planes:
    """The folder form, in millimetres, with its two lists."""
    found: Planes = {"train": {}, "test": {}}
    for split, folder, scenes in (
        ("train", "sync", ("kitchen_0028b", "office_0001a")),
        ("test", "official_splits/test", ("kitchen", "bathroom")),
    ):
        lines = []
        for number, scene in enumerate(scenes * 2):
            picture, depth = (f"{scene}/{name}_{number:05}" for name in ("rgb", "sync_depth"))
            save_photo(root / folder / f"{picture}.jpg", number)
            found[split][f"{folder}/{picture}.jpg"] = values = depth16(number + 50)
            save_png(root / folder / f"{depth}.png", values)
            lines.append(f"/{picture}.jpg /{depth}.png 518.8579")
        (root / f"{split}_files_with_gt.txt").write_text("\n".join(lines[:3]) + "\n")
    return found


def make_kitti(root: Path, kind: str = "png") -> Planes:
    """Two drives of four frames; the first frame of each has no annotated depth, nor has the right camera of
    the second one. Annotated depth has a drive for training and one for validation."""
    found: Planes = {"train": {}, "val": {}}
    for split, drive in (("train", "2011_09_26_drive_0001_sync"), ("val", "2011_09_28_drive_0002_sync")):
        for camera in ("02", "03"):
            for number in range(4):
                name = f"{drive[:10]}/{drive}/image_{camera}/data/{number:010}.{kind}"
                save_photo(root / name, number + int(camera))
                if number == 0 or (split, camera) == ("val", "03"):
                    continue
                values = depth16(number + 10 * int(camera))
                depth = f"{split}/{drive}/proj_depth/groundtruth/image_{camera}/{number:010}.png"
                save_png(root / "data_depth_annotated" / depth, values)
                found[split][name] = values
    return found


def make_depthfolder(root: Path, kind: str = "npy", splits: tuple[str, ...] = ("train", "val")) -> Planes:
    found: Planes = {split: {} for split in splits}
    for split in splits:
        for number in range(3):
            save_photo(root / split / "rgb" / "a" / f"{number}.jpg", number)
            path = root / split / "depth" / "a" / f"{number}.{kind}"
            values = depth16(number)
            if kind == "npy":
                values = values / np.float32(1000)
                values[0, :5] = np.nan
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, values)
            else:
                save_png(path, values)
            found[split][f"{split}/rgb/a/{number}.jpg"] = values
    return found


def make_ade20k(root: Path) -> Planes:
    """SceneParse150: masks count from 1, 0 is for other things; sizes differ."""
    folder = root / "ADEChallengeData2016"
    found: Planes = {"train": {}, "val": {}}
    for split, part in (("train", "training"), ("val", "validation")):
        for number in range(1, 4):
            name = f"ADE_{split}_{number:08}"
            save_photo(folder / "images" / part / f"{name}.jpg", number, WIDTH + 2 * number, HEIGHT)
            values = noise(number, HEIGHT, WIDTH + 2 * number, top=151).astype(np.uint8)
            save_png(folder / "annotations" / part / f"{name}.png", values)
            found[split][f"images/{part}/{name}.jpg"] = values
    rows = [f"{i}\t{0.1 / i:.4f}\t{100 + i}\t{10 + i}\t{i % 2}\tthing {i}, object {i}" for i in range(1, 151)]
    (folder / "objectInfo150.txt").write_text(
        "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n"
    )
    return found


def make_voc(root: Path) -> Planes:
    """Palette PNGs whose borders are 255, and more pictures than have masks."""
    folder = root / "VOCdevkit" / "VOC2012"
    found: Planes = {"train": {}, "val": {}}
    lists = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033", "2007_000042", "2007_000061"]}
    for split, names in lists.items():
        for number, name in enumerate(names):
            save_photo(folder / "JPEGImages" / f"{name}.jpg", number)
            values = noise(number + 5, HEIGHT, WIDTH, top=22).astype(np.uint8)
            values[values == 21] = 255
            mask = Image.fromarray(values, "P")
            mask.putpalette(bytes(noise(1, 768).astype(np.uint8)))
            path = folder / "SegmentationClass" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask.save(path)
            found[split][f"JPEGImages/{name}.jpg"] = values
        listed = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{name}\n" for name in names))
    save_photo(folder / "JPEGImages" / "2008_000001.jpg", 9)
    return found


def make_segfolder(root: Path, names: str = "road\ncar\nsky\n") -> Planes:
    found: Planes = {"train": {}}
    for number in range(4):
        save_photo(root / "images" / f"{number}.png", number)
        values = noise(number, HEIGHT, WIDTH, top=3).astype(np.uint8)
        values[0] = 255
        save_png(root / "masks" / f"{number}.png", values)
        found["train"][f"images/{number}.png"] = values
    if names:
        (root / "classes.txt").write_text(names)
    return found


def encode_video(
    colors: list[int],
    width: int = 64,
    height: int = 48,
    *,
    gop: int = 6,
    codec: str = "mpeg4",
    turn: int = 0,
    rate: int = 25,
) -> bytes:
    """An mp4 of grey frames, one of each brightness, with a bright upper left quarter and B-frames."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size, stream.max_b_frames = gop, 2
        stream.bit_rate = 4_000_000
        if turn:
            stream.set_display_rotation(turn)
        for color in colors:
            pixels = np.full((height, width, 3), color, np.uint8)
            pixels[: height // 2, : width // 2] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def make_kinetics(root: Path) -> dict[str, dict[str, bytes]]:
    """Two classes; of the training videos one is cut off and one is an error page, as downloads have them."""
    found: dict[str, dict[str, bytes]] = {"train": {}, "val": {}}
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("abseiling", "zumba")):
            for number in range(count):
                path = f"{split}/{name}/{'aBc-_'[number]}{label}dEfGhIjK_{number:06}_{number + 10:06}.mp4"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                data = encode_video(list(range(20, 180, 20 + number)))
                (root / path).write_bytes(data)
                found[split][path] = data
    for path, data in (
        ("train/zumba/cutOff12345_000000_000010.mp4", encode_video([10] * 30)[:-600]),
        ("train/abseiling/error123456_000000_000010.mp4", b"<html>Video unavailable</html>"),
    ):
        (root / path).write_bytes(data)
    return found
