"""Tiny data sets in the forms in which the true ones are downloaded: two to four images a split.

`make_NAME(root)` writes what `root` would hold below the data root. Images are noise of 24 to 40 pixels.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from megavit.data.write import ArrayImages, write_splits

# Class ids by the sorted WordNet ids. The devkit's numbers of the first three are 1, 2 and 1000.
KIT_FOX, ENGLISH_SETTER, DUMBBELL, TENCH, GOLDFISH = 278, 212, 543, 0, 1
WNIDS = {
    KIT_FOX: "n02119789",
    ENGLISH_SETTER: "n02100735",
    DUMBBELL: "n03255030",
    TENCH: "n01440764",
    GOLDFISH: "n01443537",
}
DEVKIT_IDS = {1: KIT_FOX, 2: ENGLISH_SETTER, 1000: DUMBBELL}
VAL_DEVKIT_IDS = (1000, 1, 2, 1)  # of the validation images 1 to 4
VAL_LABELS = [DEVKIT_IDS[number] for number in VAL_DEVKIT_IDS]
REAL_LABELS = [[DUMBBELL, GOLDFISH], [], [ENGLISH_SETTER], [KIT_FOX]]
STINGRAY, GOLDFINCH = (6, "n01498041"), (11, "n01531178")  # of ImageNet-A
C_CORRUPTIONS = ("noise/gaussian_noise", "extra/spatter")
ATTRIBUTES = ("Attractive", "Male", "Smiling")
_SYNSET = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")


def encoded(number: int, kind: str = "JPEG", size: tuple[int, int] = (40, 32)) -> bytes:
    """A coloured image that `number` and nothing else determines."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def make_imagenet(root: Path, val: str = "flat") -> Path:
    """ILSVRC 2012 with `val` "flat" (and the devkit), "kaggle" or in "folders"; two classes of train."""
    base = root / "imagenet"
    data = base / "ILSVRC" / "Data" / "CLS-LOC" if val == "kaggle" else base
    for label in (KIT_FOX, TENCH):
        for i in range(2):
            put(data / "train" / WNIDS[label] / f"{WNIDS[label]}_{i}.JPEG", encoded(10 * label + i))
    for number, label in enumerate(VAL_LABELS, 1):
        folder = data / "val" / (WNIDS[label] if val == "folders" else ".")
        put(folder / f"ILSVRC2012_val_{number:08d}.JPEG", encoded(number))
    if val == "flat":
        make_devkit(base / "ILSVRC2012_devkit_t12" / "data")
    if val == "kaggle":
        # As on Kaggle: in no order, several boxes an image.
        rows = [
            f"ILSVRC2012_val_{n:08d},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8 "
            for n, label in reversed(list(enumerate(VAL_LABELS, 1)))
        ]
        put(base / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows, ""]))
    return base


def make_devkit(folder: Path) -> None:
    """meta.mat with three classes and one synset above them, and the labels of four images."""
    rows = [(number, WNIDS[label], "words", "gloss", 0, 0, 0) for number, label in DEVKIT_IDS.items()]
    rows.append((1001, "n00001740", "entity", "that which is", 2, [1, 2], 19))
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in _SYNSET])
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    folder.mkdir(parents=True)
    savemat(folder / "meta.mat", {"synsets": synsets})
    lines = "".join(f"{number}\n" for number in VAL_DEVKIT_IDS)
    put(folder / "ILSVRC2012_validation_ground_truth.txt", lines)


def make_imagenet_real(root: Path) -> Path:
    """real.json beside ImageNet's images, which must be made too."""
    return put(root / "imagenet" / "real.json", json.dumps(REAL_LABELS))


def make_imagenet_v2(root: Path) -> Path:
    """Four classes whose numbers have another order as strings."""
    base = root / "imagenetv2-matched-frequency-format-val"
    for number in (2, 10, 100, 999):
        put(base / str(number) / f"{number:040x}.jpeg", encoded(number))
    return base


def make_imagenet_a(root: Path) -> Path:
    base = root / "imagenet-a"
    put(base / "README.txt", "ImageNet-A")
    for number, wnid in (GOLDFINCH, STINGRAY):
        for i in range(2):
            put(base / wnid / f"0.00{i}_x_ {i}.jpg", encoded(number + i))
    return base


def make_imagenet_r(root: Path) -> Path:
    base = root / "imagenet-r"
    put(base / "README.txt", "ImageNet-R")
    for i in range(2):
        put(base / WNIDS[GOLDFISH] / f"art_{i}.jpg", encoded(i))
        put(base / STINGRAY[1] / f"toy_{i}.jpg", encoded(10 + i))
    return base


def make_imagenet_sketch(root: Path) -> Path:
    base = root / "imagenet-sketch" / "sketch"
    for label in (DUMBBELL, TENCH):
        put(base / WNIDS[label] / "sketch_0.JPEG", encoded(label))
    return base


def make_imagenet_c(root: Path, corruptions: tuple[str, ...] = C_CORRUPTIONS) -> Path:
    """Two images of each severity; a corruption may have the folder of its category or not."""
    base = root / "imagenet-c"
    for corruption in corruptions:
        for severity in range(1, 6):
            for number, label in enumerate(VAL_LABELS[:2], 1):
                name = f"ILSVRC2012_val_{number:08d}.JPEG"
                put(base / corruption / str(severity) / WNIDS[label] / name, encoded(number, size=(224, 224)))
    return base


def make_objectnet(root: Path) -> Path:
    """Two classes that ImageNet has, one of them twice, and one that it has not."""
    base = root / "objectnet-1.0"
    for number, folder in enumerate(("air_freshener", "bicycle", "weight_exercise")):
        for i in range(2):
            pixels = np.random.default_rng(10 * number + i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            pixels[[0, -1]] = pixels[:, [0, -1]] = (255, 0, 0)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            put(base / "images" / folder / f"{i:015x}.png", buffer.getvalue())
    labels = {"air_freshener": "Air freshener", "bicycle": "Bicycle", "weight_exercise": "Weight (exercise)"}
    names = {
        "Bicycle": "mountain bike, all-terrain bike, off-roader; bicycle-built-for-two, tandem bicycle",
        "Weight (exercise)": "dumbbell",
    }
    # The lines are in the devkit's order, not in that of the class ids.
    lines = ["dumbbell", "bicycle-built-for-two, tandem bicycle", "kit fox, Vulpes macrotis"]
    lines.append("mountain bike, all-terrain bike, off-roader")
    ids = {"543": 0, "444": 1, "278": 2, "671": 3}
    put(base / "mappings" / "folder_to_objectnet_label.json", json.dumps(labels))
    put(base / "mappings" / "objectnet_to_imagenet_1k.json", json.dumps(names))
    put(base / "mappings" / "pytorch_to_imagenet_2012_id.json", json.dumps(ids))
    put(base / "mappings" / "imagenet_to_label_2012_v2", "\n".join(lines) + "\n")
    return base


def make_cifar10(root: Path) -> Path:
    base = root / "cifar-10-batches-py"
    for part in range(1, 6):
        _cifar_batch(base / f"data_batch_{part}", b"labels", [part, (part + 5) % 10], part)
    _cifar_batch(base / "test_batch", b"labels", [3, 9, 0], 6)
    names = [f"class{number}".encode() for number in range(10)]
    put(base / "batches.meta", pickle.dumps({b"label_names": names, b"num_vis": 3072}, protocol=2))
    return base


def make_cifar100(root: Path) -> Path:
    base = root / "cifar-100-python"
    _cifar_batch(base / "train", b"fine_labels", [99, 0, 50, 7], 1)
    _cifar_batch(base / "test", b"fine_labels", [0, 98], 2)
    names = [f"class{number}".encode() for number in range(100)]
    put(base / "meta", pickle.dumps({b"fine_label_names": names, b"coarse_label_names": []}, protocol=2))
    return base


def _cifar_batch(path: Path, key: bytes, labels: list[int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    put(path, pickle.dumps({b"data": pixels, key: labels, b"batch_label": b"x"}, protocol=2))


def make_celeba(root: Path, counts: tuple[int, int, int] = (4, 2, 2)) -> Path:
    """So many images of train, validation and test, with three of the forty attributes.

    Every third image smiles, every second is of a man.
    """
    base = root / "celeba"
    parts = [part for part, count in enumerate(counts) for _ in range(count)]
    rows = []
    for number in range(1, len(parts) + 1):
        put(base / "img_align_celeba" / f"{number:06d}.jpg", encoded(number, size=(24, 30)))
        marks = [1, 1 if number % 2 == 0 else -1, 1 if number % 3 == 0 else -1]
        rows.append(f"{number:06d}.jpg " + " ".join(f"{mark:2d}" for mark in marks))
    head = [str(len(parts)), " ".join(ATTRIBUTES) + " "]
    put(base / "list_attr_celeba.txt", "\n".join([*head, *rows, ""]))
    lines = [f"{number:06d}.jpg {part}" for number, part in enumerate(parts, 1)]
    put(base / "list_eval_partition.txt", "\n".join([*lines, ""]))
    return base


def make_cue_conflict(root: Path) -> Path:
    base = root / "cue-conflict"
    for name in ("dog10-bird2", "bird1-dog3", "bird4-bird1"):
        put(base / name.split("1")[0].split("4")[0] / f"{name}.png", encoded(len(name), "PNG", (32, 32)))
    return base


def make_image_folder(root: Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Classes cat and dog, three images each in train and one in the others."""
    for split in splits:
        for label, name in enumerate(("cat", "dog")):
            for i in range(3 if split == "train" else 1):
                kind = ("JPEG", "PNG", "WEBP")[i]
                extension = ("JPG", "png", "webp")[i]
                put(root / split / name / f"{split}_{name}_{i}.{extension}", encoded(10 * label + i, kind))
    return root


def make_shards(root: Path, count: int = 7) -> Path:
    """train and test shards of 8x8 images with classes.txt, as launch/shards.py writes them."""
    splits = []
    for number, name in enumerate(("train", "test")):
        images = np.random.default_rng(number).integers(0, 256, (count, 8, 8), dtype=np.uint8)
        splits.append(ArrayImages(images, np.arange(count) % 3).split(name))
    write_splits(splits, root, 4, 1)
    put(root / "classes.txt", "zero\none\ntwo\n")
    return root


def make_everything(root: Path) -> Path:
    """A data root with every set of the catalogue."""
    makers = (
        *(make_imagenet, make_imagenet_real, make_imagenet_v2, make_imagenet_a, make_imagenet_r),
        *(make_imagenet_sketch, make_imagenet_c, make_objectnet, make_cifar10, make_cifar100, make_celeba),
        make_cue_conflict,
    )
    for make in makers:
        make(root)
    return root
